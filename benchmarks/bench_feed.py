"""Measures what reading costs a trainer: training fed from a store, against the same steps on one batch in memory.

The two alternate, with the same number of steps each: batches of a fresh stream through a pool that holds a part of the
store (where waiting for batches, and centering and scaling them in float32, count), then updates on the last batch.
`wait_share` is the share of time that the trainer itself records as waiting.
"""

import statistics
import time
from pathlib import Path

from common import emit, finish_device, parser

from bench_read import temporary_store

from actcache import open_stores
from actcache.artifacts import OutputLock
from actcache.models import choose_device, choose_precision
from saetrain import ActivationLoader, SAEConfig, TrainConfig
from saetrain.data import TrainingData
from saetrain.training.state import Laps, Training


def main() -> None:
    arguments = parser(
        __doc__, variant="topk", n_latents=12288, k=32, images=4096, grid=14, d_model=768, batch_size=4096,
        pool_tokens=1 << 19, rounds=2, folder=Path(),
    )  # fmt: skip
    arguments.add_argument("--steps", type=int, default=60, help="number of steps in each turn")
    arguments.add_argument("--device", default="cpu")
    options = arguments.parse_args()
    device = choose_device(options.device)
    precision = choose_precision("auto", device)
    with temporary_store(options) as made:
        store = open_stores(made)
        loader = ActivationLoader(
            store, batch_size=options.batch_size, pool_tokens=options.pool_tokens, pin_memory=device.type == "cuda"
        )
        sae = SAEConfig(options.variant, options.n_latents, options.k).resolve(options.d_model)
        config = TrainConfig(n_steps=10**6, batch_size=options.batch_size).resolve(sae, precision)
        data = TrainingData.split(store)
        run = made.path.with_name("run")
        with OutputLock(run) as lock:
            training = Training(run, data, store.hook_point(0), sae, config, device, lock=lock)
        laps, fed, alone, waits = Laps(), [], [], []
        for turn in range(options.rounds + 1):  # the first touches memory
            stream = loader.batches(turn * options.steps)
            x = training.sae.normalize(next(stream).activations.to(device))
            laps.take()
            finish_device()
            laps.last = started = time.perf_counter()
            for _ in range(options.steps):
                batch = next(stream)
                laps("wait")
                x = training.sae.normalize(batch.activations.to(device, non_blocking=True))
                training.update(x, laps)
            finish_device()
            middle = time.perf_counter()
            waits.append(laps.take()["wait"] / (middle - started))
            stream.close()
            resumed = time.perf_counter()
            for _ in range(options.steps):
                training.update(x, laps)
            finish_device()
            fed.append(middle - started)
            alone.append(time.perf_counter() - resumed)
    n = options.steps * options.batch_size
    emit(
        options,
        tokens_per_s=n / statistics.median(fed[1:]),
        limit_step_tokens_per_s=n / statistics.median(alone[1:]),
        share_of_limit=statistics.median(limit / ours for ours, limit in zip(fed[1:], alone[1:], strict=True)),
        wait_share=statistics.median(waits[1:]),
    )


if __name__ == "__main__":
    main()
