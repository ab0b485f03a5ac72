"""Measures one training step of an SAE against the encoder's matrix product alone, which any step must compute.

Steps (selection, decoding, gradients, AuxK where latents are dead, clipping, projection, Adam, renormalization and the
parts of the logged metrics) alternate with the product (in bfloat16 where the hardware supports it), on random rows
with the falling spectrum of activations. The learning rate is so small that the active latents do not change; --l0 sets
how many are active in relu, gated and jumprelu. `share_of_limit` is the median ratio over rounds. `seconds` divides one
step into its parts. `dead_share` makes a share of the latents dead. `peak_gb` is the peak memory above the state before
the SAE was created.
"""

import gc
import statistics
import time
from dataclasses import replace

from common import emit, finish_device, parser, timed

import torch
from peer_worker import peak_gb
from peers import random_rows

from actcache.models import choose_device, choose_precision
from saetrain import SAE, SAEConfig, TrainConfig
from saetrain.training.objective import add_gradients
from saetrain.training.optimizer import Adam, apply_update
from saetrain.training.state import Laps


def main() -> None:
    arguments = parser(__doc__, n_latents=12288, k=32, batch_size=4096, d_model=768, dead_share=0.0, rounds=10)
    arguments.add_argument(
        "--variant", default="topk", help="an SAE variant, or matryoshka: batchtopk with nested prefixes"
    )
    arguments.add_argument("--l0", type=int, default=150, help="active latents per token for relu, gated and jumprelu")
    arguments.add_argument("--precision", default=None)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--warmup", type=int, default=10, help="number of steps before timing starts")
    options = arguments.parse_args()

    nested = options.variant == "matryoshka"
    variant = "batchtopk" if nested else options.variant
    config = SAEConfig(
        variant, options.n_latents, options.k, prefixes=(1 / 8, 1 / 4, 1 / 2, 1) if nested else (), normalize="none",
        target_l0=None if variant in ("relu", "topk", "batchtopk") else float(options.l0),
    ).resolve(options.d_model)  # fmt: skip
    device = choose_device(options.device)
    precision = options.precision or choose_precision("auto", device)
    training = replace(TrainConfig(precision=precision).resolve(config, precision), ghost=False)
    rows = torch.from_numpy(random_rows(options.batch_size, options.d_model))
    rows *= (options.d_model / rows.square().sum(1).mean()).sqrt()

    rows, before = rows.to(device), used_gb(device)
    sae = SAE(config, options.d_model).to(device)
    optimizer = Adam(sae)
    with torch.no_grad():
        if variant in ("relu", "gated", "jumprelu"):
            z = rows[:256] @ sae.encoder.T + sae.b_enc
            floor = float(z.flatten().topk(options.l0 * 256).values[-1])
            if variant == "jumprelu":
                sae.threshold.fill_(floor)
            else:
                sae.b_enc.sub_(floor)
    dead = torch.arange(options.n_latents, device=device) < options.dead_share * options.n_latents
    laps, active = Laps(), 0.0

    def step() -> None:
        nonlocal active
        loss = add_gradients(sae, rows, dead, training, lap=laps)
        apply_update(sae, optimizer, learning_rate=1e-9, clip_norm=1 / options.d_model)
        laps("optimizer")
        active = float(loss.n_active / loss.n_rows)

    for _ in range(options.warmup):  # memory that a process touches for the first time is slow
        step()
    laps.take()
    weight, x = sae.encoder.detach().bfloat16().T, rows.bfloat16()
    if precision == "float32":
        weight, x = weight.float(), x.float()
    n_rows = 256 if device.type == "cpu" else 4096  # what fits the cache of a processor, and what fills a GPU
    out = torch.empty(n_rows, options.n_latents, dtype=x.dtype, device=device)

    def product() -> None:
        for first in range(0, len(x), n_rows):
            torch.mm(x[first : first + n_rows], weight, out=out[: len(x[first : first + n_rows])])

    product()
    gc.collect()
    pairs = []
    for _ in range(options.rounds):
        finish_device()
        laps.last = time.perf_counter()
        pairs.append((timed(step), timed(product)))
    ratio = statistics.median(limit / ours for ours, limit in pairs)
    emit(
        options,
        tokens_per_s=options.batch_size / statistics.median(ours for ours, _ in pairs),
        limit_gemm_tokens_per_s=options.batch_size / statistics.median(limit for _, limit in pairs),
        share_of_limit=ratio,
        l0=active,
        seconds={name: round(value / options.rounds, 4) for name, value in laps.take().items()},
        peak_gb=used_gb(device) - before,
    )


def used_gb(device: torch.device) -> float:
    """The most memory so far: of the process, or on a GPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else peak_gb()


if __name__ == "__main__":
    main()
