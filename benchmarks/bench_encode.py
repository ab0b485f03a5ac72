"""Measures encoding against the encoder's matrix product alone, in bfloat16 and in float32.

`encode` runs on random rows in memory, with the falling spectrum of activations, in alternation with the product of
the same rows. `share_of_limit` is the rate relative to the bfloat16 product (the harder limit), `share_of_float32`
relative to the float32 product, and `speedup` relative to `SAE.encode`.
"""

import statistics

from common import emit, parser, timed

import torch
from peers import random_rows

from actcache.models import choose_device
from saetrain import SAE, SAEConfig
from saetrain.model.exact_encoder import make_encoder


def main() -> None:
    arguments = parser(__doc__, variant="topk", n_latents=12288, k=32, rows=8192, d_model=768, rounds=5)
    arguments.add_argument("--device", default="cpu")
    options = arguments.parse_args()
    device = choose_device(options.device)
    config = SAEConfig(options.variant, options.n_latents, options.k).resolve(options.d_model)
    sae = SAE(config, options.d_model).to(device).requires_grad_(False)
    rows = torch.from_numpy(random_rows(options.rows, options.d_model))
    rows *= (options.d_model / rows.square().sum(1).mean()).sqrt()
    stored, rows = rows.half(), rows.to(device)  # rows come from the store, and `encoder` brings them to the device
    encoder, n_rows = make_encoder(sae), 256 if device.type == "cpu" else 4096

    def product(dtype: torch.dtype) -> None:
        weight, x = sae.encoder.to(dtype).T, rows.to(dtype)
        out = torch.empty(n_rows, options.n_latents, dtype=dtype, device=device)
        for first in range(0, len(x), n_rows):
            torch.mm(x[first : first + n_rows], weight, out=out[: len(x[first : first + n_rows])])

    things = [
        lambda: encoder(stored), lambda: product(torch.bfloat16), lambda: product(torch.float32),
        lambda: sae.encode(stored.to(device)),
    ]  # fmt: skip
    for thing in things[:3]:
        thing()
    ours, coarse, exact, plain = zip(*([timed(thing) for thing in things] for _ in range(options.rounds)), strict=True)

    def ratio(first: tuple[float, ...], second: tuple[float, ...]) -> float:
        return statistics.median(b / a for a, b in zip(first, second, strict=True))

    emit(
        options,
        tokens_per_s=options.rows / statistics.median(ours),
        limit_bfloat16_tokens_per_s=options.rows / statistics.median(coarse),
        limit_float32_tokens_per_s=options.rows / statistics.median(exact),
        share_of_limit=ratio(ours, coarse),
        share_of_float32=ratio(ours, exact),
        speedup=ratio(ours, plain),
        l0=len(encoder(stored)[0]) / options.rows,
    )


if __name__ == "__main__":
    main()
