"""Measures training several SAEs on one stream, against training each of them alone: seconds, in alternation."""

import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from bench_read import make_store
from common import emit, parser

from saetrain import SAEConfig, TrainConfig, sweep, train


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--members", type=int, default=8)
    arguments.add_argument("--n-latents", type=int, default=4096)
    arguments.add_argument("--steps", type=int, default=60)
    arguments.add_argument("--batch-size", type=int, default=4096)
    arguments.add_argument("--images", type=int, default=2048)
    arguments.add_argument("--grid", type=int, default=14)
    arguments.add_argument("--d-model", type=int, default=768)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--folder", type=Path, default=Path())
    options = arguments.parse_args()
    config = TrainConfig(n_steps=options.steps, batch_size=options.batch_size)
    saes = [SAEConfig("topk", options.n_latents, 16 + 4 * i) for i in range(options.members)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        store = make_store(Path(folder) / "x.acts", options, options.images, 1, min(1024, options.images))
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
