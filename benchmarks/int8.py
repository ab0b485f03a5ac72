"""What int8 would cost and save: its error, and what an SAE loses that is trained on it. Measures; builds nothing.

In: a store to train on, a store of other images to judge on, stores whose errors alone are wanted. Out: errors of
three ways to store a value, speeds, and the held-out FVU of the same SAE trained on stored and on quantized values,
all judged on the stored values of `--test`, by seed.

The quantization, a hook point and array (cls, patches) at a time:

    z = (x - mean[channel]) / std[channel]        mean and std of the first `--calibration` images
    scale[token] = max over channels |z| / 127    kept as float16
    q = round(z / scale[token])                   int8, -127..127
    x' = q * scale[token] * std[channel] + mean[channel]

A token takes d_model + 2 bytes. `per token` is the same without mean and std, for comparison.
"""

import statistics
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import emit, parser, timed
from numpy.typing import NDArray

from actcache import ActivationStore, HookPoint
from actcache.sources import ImagePlan
from actcache.store.writer import ShardWriter, begin_store, seal_store
from saetrain import SAE, Run, SAEConfig, TrainConfig, evaluate, train

Floats = NDArray[np.floating[Any]]
Quantized = tuple[NDArray[np.int8], NDArray[np.float16]]
BLOCK = 256
"""Images in memory at once."""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--errors", type=Path, nargs="*", default=[], help="stores whose errors are measured")
    arguments.add_argument("--store", type=Path, help="store to train on")
    arguments.add_argument("--test", type=Path, help="store to judge on: other images, the same model")
    arguments.add_argument("--layer", type=int, default=4)
    arguments.add_argument("--calibration", type=int, default=256, help="images")
    arguments.add_argument("--seeds", type=int, default=3)
    arguments.add_argument("--n-latents", type=int, default=1536)
    arguments.add_argument("--k", type=int, default=32)
    arguments.add_argument("--n-steps", type=int, default=2000)
    arguments.add_argument("--batch-size", type=int, default=2048)
    arguments.add_argument("--lr", type=float, default=1e-3)
    arguments.add_argument("--dead-tokens", type=int, default=250_000)
    arguments.add_argument("--folder", type=Path, default=Path(), help="for the quantized store and the runs")
    options = arguments.parse_args()

    found: dict[str, Any] = {"errors": {}}
    for path in options.errors:
        store = ActivationStore.open(path)
        for hook in store.hook_points:
            found["errors"][f"{path.stem} {hook}"] = measure_errors(store, hook, options.calibration)
    if options.store:
        found |= measure_training(options)
    options.errors = [path.name for path in options.errors]
    emit(options, **found)


# ---------------------------------------------------------------------------------------------------------------------
# The quantization


class Standard:
    """Mean and standard deviation [T or 1, D] by channel, CLS (row 0) apart from the patches."""

    def __init__(self, x: Floats) -> None:  # [I, T, D]
        parts = [part.reshape(-1, x.shape[-1]).astype(np.float64) for part in (x[:, :1], x[:, 1:])]
        repeats = [1, x.shape[1] - 1]
        self.mean = np.repeat([part.mean(0) for part in parts], repeats, axis=0).astype(np.float32)
        self.std = np.repeat([part.std(0) for part in parts], repeats, axis=0).astype(np.float32)

    def quantize(self, x: Floats) -> Quantized:
        return quantize((x.astype(np.float32) - self.mean) / self.std)

    def restore(self, quantized: Quantized) -> NDArray[np.float32]:
        return dequantize(quantized) * self.std + self.mean


def quantize(z: NDArray[np.float32]) -> Quantized:
    """(int8 [I, T, D], scale [I, T, 1])."""
    scale = (np.abs(z).max(-1, keepdims=True) / 127).astype(np.float16)
    safe = np.maximum(scale.astype(np.float32), 1e-7)
    return np.clip(np.rint(z / safe), -127, 127).astype(np.int8), scale


def dequantize(quantized: Quantized) -> NDArray[np.float32]:
    values, scale = quantized
    return values.astype(np.float32) * scale.astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Errors


def measure_errors(store: ActivationStore, hook: HookPoint, n_calibration: int) -> dict[str, Any]:
    """{way: {"values", "total", "channel", "worst_channel"}}: RMS errors as shares.

    values: of the RMS of the values, as docs/decisions/0007 has it. The others are shares of the centered values' RMS.
    total: over all values at once. channel: root of the mean over channels of error / variance of that channel.
    """
    images = np.flatnonzero(store.valid)
    standard = Standard(store.read(hook, images=images[:n_calibration]))
    ways = {
        "int8, per channel and token": lambda x: standard.restore(standard.quantize(x)),
        "int8, per token": lambda x: dequantize(quantize(x.astype(np.float32))),
        "float16": lambda x: x.astype(np.float16),
    }
    errors = {way: np.zeros(store.layout.d_model) for way in ways}
    total, squares, count, absmax = np.zeros(store.layout.d_model), np.zeros(store.layout.d_model), 0, 0.0
    for first in range(0, len(images), BLOCK):
        x = store.read(hook, images=images[first : first + BLOCK])
        for way, convert in ways.items():
            errors[way] += np.square(convert(x).astype(np.float64) - x).sum((0, 1))
        wide = x.astype(np.float64)
        total, squares = total + wide.sum((0, 1)), squares + np.square(wide).sum((0, 1))
        count, absmax = count + wide.shape[0] * wide.shape[1], max(absmax, float(np.abs(x).max()))
    variance = squares - total**2 / count
    found: dict[str, Any] = {
        way: {
            "values": float(np.sqrt(error.sum() / squares.sum())),
            "total": float(np.sqrt(error.sum() / variance.sum())),
            "channel": float(np.sqrt((error / variance).mean())),
            "worst_channel": float(np.sqrt((error / variance).max())),
        }
        for way, error in errors.items()
        if way != "float16" or store.dtype.itemsize > 2  # of float16 values it is zero
    }
    spread = np.sqrt(variance / count)
    bytes_saved = 1 - (store.layout.d_model + 2) / (2 * store.layout.d_model)
    return found | {
        "saved_of_float16": bytes_saved,
        "absmax": absmax,
        "largest_std_over_median": float(spread.max() / np.median(spread)),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Training


def measure_training(options: Namespace) -> dict[str, Any]:
    stored, test = ActivationStore.open(options.store), ActivationStore.open(options.test)
    hook = stored.hook_point(options.layer)
    standard = Standard(stored.read(hook, images=np.flatnonzero(stored.valid)[: options.calibration]))
    sae = SAEConfig(variant="topk", n_latents=options.n_latents, k=options.k)
    fvu: dict[str, list[float]] = {"stored": [], "int8": []}
    by_kind: dict[str, list[dict[str, float]]] = {"stored": [], "int8": []}
    agreement: list[float] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        stores = {"stored": stored, "int8": write_quantized(stored, hook, standard, folder / "int8.acts")}
        for seed in range(options.seeds):
            for way, store in stores.items():
                config = TrainConfig(
                    n_steps=options.n_steps,
                    batch_size=options.batch_size,
                    lr=options.lr,
                    dead_tokens=options.dead_tokens,
                    seed=seed,
                )
                run: Run = train(store, folder / f"{way}-{seed}", layer=hook, sae=sae, config=config)
                quality = evaluate(run.sae(), test, hook, range(test.n_images))
                fvu[way].append(quality["all"]["fvu"])
                by_kind[way].append({kind: quality[kind]["fvu"] for kind in ("patch", "cls")})
                if way == "stored":
                    agreement.append(measure_agreement(run.sae(), test, hook, standard))
    gaps = [b - a for a, b in zip(fvu["stored"], fvu["int8"], strict=True)]
    spread = {f"std_{way}": statistics.stdev(values) for way, values in fvu.items() if len(values) > 1}
    return {
        "fvu": fvu,
        "fvu_by_kind": by_kind,
        "mean_gap": statistics.mean(gaps),
        **spread,
        "latents_unchanged": statistics.mean(agreement),
        **measure_speed(stored, hook, standard),
    }


def write_quantized(store: ActivationStore, hook: HookPoint, standard: Standard, path: Path) -> ActivationStore:
    """The same store, one hook point, its values sent through int8 and back."""
    layout, dtype = store.layout, store.dtype
    settings = {**store.artifact.settings, "hook_points": [str(hook)], "n_extra": 0, "quantized": "int8"}
    plan = ImagePlan(store.images, str(settings["rows_id"]), 0)
    artifact = begin_store(path, plan=plan, images_path=store.path, settings=settings, provenance={})
    for shard in range(layout.n_shards):
        with ShardWriter(artifact, shard) as writer:
            for block in range(layout.n_blocks(shard)):
                images = np.array(layout.block_range(shard, block))
                x = standard.restore(standard.quantize(store.read(hook, images=images))).astype(dtype)
                valid = store.valid[images]
                x[~valid] = 0
                patches = x[:, 1:].reshape(len(x), *layout.grid, layout.d_model).transpose(1, 0, 2, 3)
                writer.write(hook, block, patches, x[:, 0], valid=valid)
            inside = layout.shard_range(shard)
            writer.commit({image: why for image, why in store.failed.items() if image in inside})
    seal_store(path)
    return ActivationStore.open(path)


@torch.no_grad()
def measure_agreement(sae: SAE, store: ActivationStore, hook: HookPoint, standard: Standard) -> float:
    """Share of (token, latent) pairs of one SAE on stored values that are the same on quantized ones."""
    same = total = 0
    images = np.flatnonzero(store.valid)
    for first in range(0, len(images), BLOCK):
        x = store.read(hook, images=images[first : first + BLOCK])
        pairs = []
        for values in (x, standard.restore(standard.quantize(x)).astype(store.dtype)):
            rows, latents, _ = sae.encode(torch.from_numpy(values.reshape(-1, values.shape[-1])))
            pairs.append((rows.long() * sae.config.size + latents.long()).numpy())
        same += len(np.intersect1d(*pairs, assume_unique=True))
        total += len(pairs[0])
    return same / total


def measure_speed(store: ActivationStore, hook: HookPoint, standard: Standard) -> dict[str, float]:
    """GB/s of float32 values made by one core, from float16 and from int8: what a loader would do for each batch."""
    x = store.read(hook, images=np.flatnonzero(store.valid)[:BLOCK])
    values, scale = (torch.from_numpy(part) for part in standard.quantize(x))
    half, mean, std = torch.from_numpy(x), torch.from_numpy(standard.mean), torch.from_numpy(standard.std)
    out = torch.zeros(x.shape)

    def from_int8() -> None:
        out.copy_(values)
        out.mul_(scale.float()).mul_(std).add_(mean)

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = {
        "float16": min(timed(lambda: out.copy_(half)) for _ in range(9)),
        "int8": min(timed(from_int8) for _ in range(9)),
    }
    torch.set_num_threads(n_threads)
    return {f"{name}_to_float32_gb_s": out.nbytes / seconds / 1e9 for name, seconds in times.items()}


if __name__ == "__main__":
    main()
