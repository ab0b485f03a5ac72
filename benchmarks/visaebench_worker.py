"""Runs metrics of the real visaebench on files, in an environment of benchmarks/peers-env.sh, and prints one JSON line.

    python visaebench_worker.py FOLDER [--metric NAME ...] [--float16-codes]

FOLDER holds what the package is given: shard_000.pt, shard_001.pt, ... (float16 [n, P, D]), labels.npy, sae.npz
(encoder [F, D], b_enc, decoder [F, D], b_dec, mean [D], std, k), and as far as its metrics want them ood_000.pt, ...
and ood_labels.npy, embeddings.npy [N, E] and groups.json. The metrics have their own settings, and the SAE is the
package's own GenericSAE; with --float16-codes its codes are rounded as this project stores them. The line has the
value, the metadata and the seconds of each metric, and the peak memory.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

SHARD = 5000
METRICS = [
    "localization", "fvu", "downstream_preservation", "sparse_probing", "monosemanticity", "cross_domain", "absorption"
]  # fmt: skip


def write_files(folder: Path, sae: Any, x: Any, labels: np.ndarray, *, name: str = "shard") -> None:
    """Write what the package is given, from this project's SAE (topk, without norms of its own).

    Args:
        x: yields [n, P, D] of the next images, in the order of `labels`; each but the last has SHARD images.
        name: shard or ood.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(x):
        torch.save(torch.from_numpy(part), folder / f"{name}_{number:03d}.pt")
    np.save(folder / ("labels.npy" if name == "shard" else "ood_labels.npy"), labels)
    weights = {each: getattr(sae, each).detach().numpy() for each in ("encoder", "b_enc", "decoder", "b_dec", "mean")}
    np.savez(folder / "sae.npz", std=1 / float(sae.scale), k=sae.config.k, **weights)


class Embedded:
    """An evaluator whose "images" are numbers of rows of an array, because no model is at hand."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = torch.from_numpy(rows).float()

    def extract_activations(self, images: list[int], layer: int) -> torch.Tensor:
        return self.rows[torch.tensor(images)][:, None]


def read_sae(path: Path, *, float16_codes: bool = False) -> Any:
    """The package's own SAE."""
    from visaebench.hub.sae_wrapper import GenericSAE

    w = {name: torch.from_numpy(value) for name, value in np.load(path).items()}
    bias = w["b_enc"] - w["encoder"] @ w["b_dec"]  # this SAE subtracts b_dec from its input, that one does not
    weights = {
        "encoder.weight": w["encoder"],
        "encoder.bias": bias,
        "decoder.weight": w["decoder"],
        "decoder.bias": w["b_dec"],
    }
    sae = GenericSAE({"activation": "topk", "k": int(w["k"])}, weights)
    if float16_codes:
        encode = sae.encode
        sae.encode = lambda x: encode(x).half().float()
    return sae


def run_metrics(folder: Path, names: list[str], *, float16_codes: bool = False) -> dict[str, object]:
    from visaebench.metrics import METRIC_REGISTRY

    given = np.load(folder / "sae.npz")
    mean, std = torch.from_numpy(given["mean"]), float(given["std"])
    sae = read_sae(folder / "sae.npz", float16_codes=float16_codes)
    shards = sorted(folder.glob("shard_*.pt"))
    labels = np.load(folder / "labels.npy")
    n_patches = torch.load(shards[0], weights_only=True, mmap=True).shape[1]
    side = round(n_patches**0.5)
    results = {}
    begun = resource.getrusage(resource.RUSAGE_SELF)
    before = begun.ru_utime + begun.ru_stime  # of imports
    for name in names:
        more: dict[str, object] = {"labels": labels}
        if name in ("localization", "fvu"):
            more = {}
        if name == "monosemanticity":
            rows = np.load(folder / "embeddings.npy")
            more = {"images": list(range(len(rows))), "evaluator_backbone": Embedded(rows)}
        if name == "cross_domain":
            ood = {"activations": sorted(folder.glob("ood_*.pt")), "labels": np.load(folder / "ood_labels.npy")}
            more = {"ood_datasets": {"ood": ood}}
        if name == "absorption":
            more["sibling_groups"] = json.loads((folder / "groups.json").read_text())
        metric = METRIC_REGISTRY[name](grid_size=(side, side)) if name == "localization" else METRIC_REGISTRY[name]()
        started = time.perf_counter()
        found = metric.compute(sae, shards, device="cpu", mean=mean, std=std, seed=42, **more)
        seconds = time.perf_counter() - started
        results[found.metric_name] = {"value": found.value, "metadata": found.metadata, "seconds": seconds}
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "metrics": results, "peak_rss_gb": used.ru_maxrss * 1024 / 1e9, "cpu_s": used.ru_utime + used.ru_stime - before
    }  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--metric", choices=METRICS, nargs="+", default=METRICS)
    arguments.add_argument("--threads", type=int, default=2)
    arguments.add_argument("--float16-codes", action="store_true", help="round codes as this project stores them")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps(run_metrics(options.folder, options.metric, float16_codes=options.float16_codes)))


if __name__ == "__main__":
    main()
