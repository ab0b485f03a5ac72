"""Measures shuffled batches from a warm store against a random row gather in memory, and how well they are mixed.

Every epoch is read from the store through windows of a pool that holds a part of it. The measure of mixing is the mean
number of tokens of the same image that a token meets in its batch, including itself, beside that of a full shuffle of
all rows.
"""

import itertools
import time
from pathlib import Path

from common import emit, parser

import numpy as np
import torch
from bench_read import temporary_store

from saetrain import ActivationLoader


def same_image_tokens(images: np.ndarray) -> float:
    """The mean over the tokens of a batch of the number of tokens in it that come from the same image."""
    counts = np.unique(images, return_counts=True)[1].astype(np.float64)
    return float((counts**2).sum() / counts.sum())


def main() -> None:
    arguments = parser(
        __doc__, images=16384, grid=14, d_model=768, batch_size=4096, pool_tokens=1 << 19, n_streams=8, tokens="all",
        threads=2, seconds=5.0, rounds=3, folder=Path(),
    )  # fmt: skip
    options = arguments.parse_args()
    with temporary_store(options) as store:
        loader = ActivationLoader(
            store, tokens=options.tokens, batch_size=options.batch_size, pool_tokens=options.pool_tokens,
            n_streams=options.n_streams, n_threads=options.threads,
        )  # fmt: skip
        pool = torch.zeros(min(options.pool_tokens, loader.n_rows), options.d_model // 2, dtype=torch.int32)
        out = torch.empty(options.batch_size, options.d_model // 2, dtype=torch.int32)
        rates, limits = [], []
        stream = loader.batches()
        mixing = [same_image_tokens(next(stream).image.numpy()) for _ in range(20)]
        for _ in range(options.rounds):  # by turns
            started, n = time.perf_counter(), 0
            while time.perf_counter() - started < options.seconds:
                n += len(next(stream).image)
            rates.append(n / (time.perf_counter() - started))
            rows = torch.from_numpy(np.random.default_rng(0).integers(0, len(pool), (50, options.batch_size)))
            started, n = time.perf_counter(), 0
            for part in itertools.cycle(rows):
                torch.index_select(pool, 0, part, out=out)
                n += len(part)
                if time.perf_counter() - started > options.seconds / 2:
                    break
            limits.append(n / (time.perf_counter() - started))
        stream.close()
        shuffled = np.random.default_rng(1).integers(0, options.images, (20, options.batch_size))
    rate, limit = float(np.median(rates)), float(np.median(limits))
    emit(
        options,
        tokens_per_s=rate,
        gb_per_s=rate * options.d_model * 2 / 1e9,
        limit_gather_tokens_per_s=limit,
        share_of_limit=rate / limit,
        same_image_tokens=float(np.mean(mixing)),
        same_image_tokens_full_shuffle=float(np.mean([same_image_tokens(batch) for batch in shuffled])),
    )


if __name__ == "__main__":
    main()
