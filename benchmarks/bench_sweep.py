"""Measures training several SAEs on one stream, against training each of them alone: seconds, in alternation."""

import shutil
import time
from pathlib import Path
from statistics import median

from common import emit, parser

from bench_read import temporary_store

from saetrain import SAEConfig, TrainConfig, sweep, train


def main() -> None:
    arguments = parser(
        __doc__, members=8, n_latents=4096, steps=60, batch_size=4096, images=2048, grid=14, d_model=768, rounds=3,
        folder=Path(),
    )  # fmt: skip
    options = arguments.parse_args()
    config = TrainConfig(n_steps=options.steps, batch_size=options.batch_size)
    saes = [SAEConfig("topk", options.n_latents, 16 + 4 * i) for i in range(options.members)]
    with temporary_store(options) as store:
        folder = store.path.parent
        together, alone = [], []
        for _ in range(options.rounds):
            started = time.perf_counter()
            sweep(store, f"{folder}/runs", [(None, sae, config) for sae in saes])
            together.append(time.perf_counter() - started)
            shutil.rmtree(f"{folder}/runs")
            started = time.perf_counter()
            for i, sae in enumerate(saes):
                train(store, f"{folder}/{i}", sae=sae, config=config)
            alone.append(time.perf_counter() - started)
            for i in range(options.members):
                shutil.rmtree(f"{folder}/{i}")
    emit(
        options,
        sweep_s=median(together),
        singles_s=median(alone),
        share=median(a / b for a, b in zip(together, alone, strict=True)),
        sweep_tokens_per_s=options.members * options.steps * options.batch_size / median(together),
    )


if __name__ == "__main__":
    main()
