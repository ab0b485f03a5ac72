"""Measures what bfloat16 and sparse compute cost in quality: each variant trained twice on the same batches, per seed.

    python benchmarks/quality.py --store train.acts --held-out test.acts --json

One training is as users run it (compiled kernels, gradients of active latents only, bfloat16 products where the
processor has them), the other is the plain reference (float32, autograd on dense blocks). Both are measured by FVU, L0
and silent latents on images that neither has seen.
`difference` is the mean over seeds of the first FVU minus the second; `noise` is the standard deviation of the
reference over its seeds.
"""

import statistics
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import emit, parser

import torch

from actcache import ActivationStore
from actcache.models import choose_precision
from saetrain import SAEConfig, TrainConfig, evaluate, train

VARIANTS: dict[str, dict[str, object]] = {
    "topk": {"variant": "topk"},
    "batchtopk": {"variant": "batchtopk"},
    "matryoshka": {"variant": "batchtopk", "prefixes": (1 / 8, 1 / 4, 1 / 2, 1)},
    "relu": {"variant": "relu", "normalize": "center", "l1": 1e-4},
    "jumprelu": {"variant": "jumprelu"},
    "gated": {"variant": "gated"},
}


def measure(options: Any, fields: dict[str, Any], seed: int, *, reference: bool) -> dict[str, float]:
    """Train one SAE and measure its quality."""
    sae = SAEConfig(n_latents=options.n_latents, k=options.k, **fields)
    precision = "float32" if reference else choose_precision("auto", torch.device("cpu"))
    config = TrainConfig(
        n_steps=options.steps, batch_size=options.batch_size, lr=options.lr, seed=seed,
        dead_tokens=options.dead_tokens, precision=precision,
    )  # fmt: skip
    dense: AbstractContextManager[Any] = (
        patch.dict("saetrain.training.objective.DENSE_SHARE", float32=-1.0) if reference else nullcontext()
    )
    held_out = ActivationStore.open(options.held_out)
    with tempfile.TemporaryDirectory() as folder, dense:
        run = train(options.store, Path(folder) / "run", layer=options.layer, sae=sae, config=config)
        quality = evaluate(run.sae(), held_out, run.hook_point, range(held_out.n_images))
    return {"fvu": quality["all"]["fvu"], "l0": quality["all"]["l0"], "silent": quality["silent"]}


def main() -> None:
    arguments = parser(
        __doc__, n_latents=1536, k=16, steps=1000, batch_size=2048, lr=1e-3, dead_tokens=250_000, seeds=3
    )
    arguments.add_argument("--store", type=Path, required=True)
    arguments.add_argument("--held-out", type=Path, required=True, help="a store of other images")
    arguments.add_argument("--layer", type=int)
    arguments.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = arguments.parse_args()

    table = {}
    for variant in options.variants:
        results = {
            name: [measure(options, VARIANTS[variant], s, reference=name == "reference") for s in range(options.seeds)]
            for name in ("sparse", "reference")
        }
        fvu = {name: [line["fvu"] for line in lines] for name, lines in results.items()}
        pairs = zip(fvu["sparse"], fvu["reference"], strict=True)
        table[variant] = {
            "runs": results,
            "difference": statistics.mean(a - b for a, b in pairs),
            "noise": statistics.stdev(fvu["reference"]) if options.seeds > 1 else None,
        }
    emit(options, table=table)


if __name__ == "__main__":
    main()
