"""Checks that a GPU computes what the CPU computes, and measures each stage against the limits of that card.

    benchmarks/gpu.sh > gpu.json                         # a few minutes; one JSON object to send to others
    benchmarks/gpu.sh --device cpu --small > cpu.json    # the same program without a GPU, tiny

`checks`: each stage runs on the CPU and on the device from the same inputs (the built-in demo), both in float32.
`difference` is what is compared, `limit` what is allowed, and `same_again` whether a second run on the device gives
the same bits. `limits`: what the card does in products and copies. `stages`: the other benchmarks on the device, each
beside its own limit. The exit code is 1 if a check failed.
"""

import gc
import io
import json
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import machine, parser, timed

import numpy as np
import torch
from bench_intervene import make_images

import actcache
from actcache import ActivationStore, HookPoint, extract, load_vision_tower
from actcache.demo import MODEL, PRETRAINED, write_demo
from actcache.prompts import PromptConfig, adapt
from analysis import MaskingConfig, ModelOptions, StudyConfig, evaluate_fidelity, mask_latents
from saetrain import CodeStore, Run, SAEConfig, TrainConfig, encode, train

HERE = Path(__file__).parent
LAYER = 3
VARIANTS = {
    "topk": SAEConfig("topk", 64, 4),
    "batchtopk": SAEConfig("batchtopk", 64, 4),
    "nested topk": SAEConfig("topk", 64, 4, prefixes=(1 / 4, 1 / 2, 1)),
    "relu": SAEConfig("relu", 64),
    "jumprelu": SAEConfig("jumprelu", 64, target_l0=4),
    "gated": SAEConfig("gated", 64, target_l0=4),
}


@dataclass(frozen=True)
class Check:
    """One comparison of the device with the CPU."""

    what: str
    difference: float
    limit: float
    same_again: bool | None = None  # None: not tried

    @property
    def ok(self) -> bool:
        return self.difference <= self.limit


def main() -> None:
    arguments = parser(__doc__, device="cuda", folder=Path())
    arguments.add_argument("--small", action="store_true", help="tiny sizes, to see whether this program works")
    options = arguments.parse_args()
    try:
        device = actcache.models.choose_device(options.device)
    except actcache.SettingsError as error:
        sys.exit(f"error: {error}")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checks = list(run_checks(Path(folder), device, small=options.small))
        limits = measure_limits(device, small=options.small)
        stages = dict(run_stages(Path(folder), device, small=options.small))
    failed = [check.what for check in checks if not check.ok]
    result = {
        "patchsae": version("patchsae"), "torch": torch.__version__, "machine": machine(), "device": describe(device),
        "settings": {"small": options.small},
        "ok": not failed, "failed": failed, "checks": [vars(check) | {"ok": check.ok} for check in checks],
        "limits": limits, "stages": stages,
    }  # fmt: skip
    print(json.dumps(result))
    sys.exit(bool(failed))


def describe(device: torch.device) -> dict[str, object]:
    if device.type != "cuda":
        return {"name": str(device)}
    facts = torch.cuda.get_device_properties(device)
    return {"name": facts.name, "bytes": facts.total_memory, "n": torch.cuda.device_count(), "cuda": torch.version.cuda}


@contextmanager
def told(what: str) -> Iterator[None]:
    print(f"{what} ...", end=" ", file=sys.stderr, flush=True)
    started = time.perf_counter()
    yield
    print(f"{time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Checks


def run_checks(folder: Path, device: torch.device, *, small: bool) -> Iterator[Check]:
    """Each stage, from artifacts that the CPU made."""
    n_images, n_steps = (40, 10) if small else (400, 200)
    variants = {name: VARIANTS[name] for name in ("topk", "relu")} if small else VARIANTS
    images = write_demo(folder / "scenes", n_images=n_images, seed=0).path / "images"
    store = extract_on(images, folder / "cpu.acts", "cpu")
    for precision, limit in (("float32", 1e-4), ("bfloat16", 0.06)):
        with told(f"a tower in {precision}"):
            yield check_tower(device, precision, limit, *((MODEL, PRETRAINED) if small else ("ViT-B-16", "random:0")))
    with told("extract"):
        ours, again = (extract_on(images, folder / f"device{i}.acts", str(device)) for i in range(2))
        yield Check("extract", distance(read(ours), read(store)), 1e-4, bool((read(ours) == read(again)).all()))
    config = TrainConfig(n_steps=n_steps, batch_size=512, lr=2e-3, dead_tokens=20_000, precision="float32")
    for name, sae in variants.items():
        with told(f"train, {name}"):
            runs = [
                train(store, folder / f"{name}-{i}", sae=sae, config=config, device=where)
                for i, where in enumerate(["cpu", str(device), str(device)])
            ]
            yield Check(f"train, {name}: FVU", abs(runs[1].fvu / runs[0].fvu - 1), 0.02, same_weights(*runs[1:]))
        with told(f"encode, {name}"):
            codes = [
                entries(encode(runs[0], store, folder / f"{name}-{i}.codes", device=where))
                for i, where in enumerate(["cpu", str(device), str(device)])
            ]
            same = np.array_equal(codes[1], codes[2])
            yield Check(f"encode, {name}: share of entries that differ", apart(codes[1], codes[0]), 1e-3, same)
    with told("a training that is interrupted goes on"):
        yield check_resumed(store, folder, config, device)
    run, study = Run.open(folder / "topk-0"), StudyConfig(on_seen="use")

    def splice(model: ModelOptions) -> list[float]:
        fidelity = evaluate_fidelity(run, store, study=study, model=model)
        return [row.accuracy for row in fidelity.runs[0].variants.values()]

    def mask(model: ModelOptions) -> list[float]:
        curve = mask_latents(run, store, None, MaskingConfig(k=(1, 4, 16)), study=study, model=model).curve
        return [row.accuracy for row in curve]

    for what, measure in (("evaluate", splice), ("intervene", mask)):
        with told(what):
            yield judge_both(f"{what}: accuracies", device, measure)
    with told("adapt"):
        accuracies = []
        for where in ("cpu", str(device)):
            config_ = PromptConfig("maple", shots=2, n_epochs=1, n_prompts=2)
            adapted = adapt(
                images, folder / f"{where.replace(':', '')}.prompts", model=MODEL, pretrained=PRETRAINED,
                config=config_, precision="float32", device=where,
            )  # fmt: skip
            accuracies.append(np.array([after for _, _, after in adapted.accuracy.parts() if after is not None]))
        yield Check("adapt: accuracies", float(np.abs(accuracies[1] - accuracies[0]).max()), 0.02)


def extract_on(images: Path, store: Path, device: str) -> ActivationStore:
    return extract(
        images, store, model=MODEL, pretrained=PRETRAINED, layers=[LAYER], precision="float32", dtype="float32",
        device=device,
    )  # fmt: skip


def read(store: ActivationStore) -> np.ndarray[Any, Any]:
    """[N, T, D] float32"""
    return np.asarray(store.read(LAYER, images=range(store.n_images)), np.float32)


def distance(ours: Any, reference: Any) -> float:
    """The largest difference, in units of the reference's root mean square."""
    ours, reference = (np.asarray(x, np.float64) for x in (ours, reference))
    return float(np.abs(ours - reference).max() / np.sqrt(np.square(reference).mean()))


def check_tower(device: torch.device, precision: str, limit: float, model: str, pretrained: str) -> Check:
    """The first and the last block, beside the CPU in float32."""
    outputs = []
    for where, how in (("cpu", "float32"), (str(device), precision)):
        tower = load_vision_tower(model, pretrained, precision=how, device=where)
        pixels = torch.randn(2, 3, *tower.preprocess.size, generator=torch.Generator().manual_seed(0))
        hooks = [HookPoint(layer) for layer in (0, tower.n_layers - 1)]
        made = tower.run(pixels, hooks)
        outputs.append([made[hook].float().cpu() for hook in hooks])
    return Check(f"tower, {precision}", max(map(distance, outputs[1], outputs[0])), limit)


def same_weights(first: Run, second: Run) -> bool:
    ours, theirs = first.sae().state_dict(), second.sae().state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def check_resumed(store: ActivationStore, folder: Path, config: TrainConfig, device: torch.device) -> Check:
    """Whether a training that stopped in the middle ends where an undisturbed one ends."""
    path, where = folder / "resumed", str(device)

    def stop(done: int, total: int, *rest: object) -> None:
        if done >= total // 2:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        train(store, path, sae=VARIANTS["topk"], config=config, device=where, log_every=5, on_progress=stop)
    run = train(store, path, sae=VARIANTS["topk"], config=config, device=where)
    whole = Run.open(folder / "topk-1")
    return Check("train, interrupted: FVU", abs(run.fvu / whole.fvu - 1), 0.02, same_weights(run, whole))


def entries(codes: CodeStore) -> np.ndarray[Any, Any]:
    """Active entries as one integer each, ascending."""
    parts = []
    for number in range(codes.n_shards):
        shard = codes.read_shard(number)
        rows = shard.first_row + np.repeat(np.arange(len(shard.indptr) - 1), np.diff(shard.indptr))
        parts.append(rows * codes.n_latents + shard.latent)
    return np.concatenate(parts)


def apart(ours: np.ndarray[Any, Any], reference: np.ndarray[Any, Any]) -> float:
    """The share of entries that only one of them has."""
    return float(len(np.setxor1d(ours, reference)) / max(1, len(np.union1d(ours, reference))))


def judge_both(what: str, device: torch.device, measure: Callable[[ModelOptions], list[float]]) -> Check:
    ours, reference = (np.array(measure(ModelOptions(device=where))) for where in (str(device), "cpu"))
    return Check(what, float(np.abs(ours - reference).max()), 0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Limits and stages


def measure_limits(device: torch.device, *, small: bool) -> dict[str, float]:
    """What the device does at best: square products in 1e12 operations a second, copies in GB/s."""
    n, n_bytes = (256, 1 << 20) if small else (8192, 1 << 30)
    found = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        torch.mm(a, b)
        seconds = min(timed(lambda a=a, b=b: torch.mm(a, b)) for _ in range(5))
        found[f"product_{name}_tflops"] = 2 * n**3 / seconds / 1e12
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found["copy_gb_s"] = 2 * n_bytes / min(timed(lambda: target.copy_(source)) for _ in range(5)) / 1e9
    host = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    found["from_host_gb_s"] = n_bytes / min(timed(lambda: target.copy_(host)) for _ in range(5)) / 1e9
    return found


def run_stages(folder: Path, device: torch.device, *, small: bool) -> Iterator[tuple[str, Any]]:
    """The other benchmarks."""
    on = ["--device", str(device)]
    model = [] if not small else ["--model", MODEL, "--pretrained", PRETRAINED]
    images = folder / "noise"
    make_images(images, 16 if small else 1024, 48 if small else 224)
    yield "extract", run_benchmark("bench_extract", *on, "--images", str(images), *model, "--folder", str(folder), *(
        ["--layer", "1", "--stop-layer", "0", "--pairs", "1"] if small else ["--batch-size", "128"]
    ))  # fmt: skip
    sizes = [64] if small else [12288, 49152]
    tiny = ["--d-model", "32", "--k", "4", "--rounds", "2"] if small else []
    for variant in ("topk", "relu") if small else ("topk", "batchtopk", "matryoshka", "relu", "jumprelu", "gated"):
        for n_latents in sizes:
            yield f"train, {variant}, {n_latents}", run_benchmark(
                "bench_train", *on, "--variant", variant, "--n-latents", str(n_latents), *tiny, "--l0",
                "9" if small else "150", "--batch-size", "256" if small else "16384",
            )  # fmt: skip
    for n_latents in sizes:
        yield (
            f"encode, topk, {n_latents}",
            run_benchmark(
                "bench_encode", *on, "--n-latents", str(n_latents), *tiny, "--rows", "256" if small else "32768"
            ),
        )
    little = ["--images", "64", "--grid", "2", "--batch-size", "32", "--pool-tokens", "200", "--steps", "2"]
    yield "train from a store", run_benchmark(
        "bench_feed", *on, "--folder", str(folder), "--rounds", "1",
        *(["--n-latents", "64", "--k", "4", "--d-model", "32", *little] if small else ["--batch-size", "16384"]),
    )  # fmt: skip
    yield "intervene", run_benchmark(
        "bench_intervene", *on, *model, "--folder", str(folder),
        *(["--layer", "1", "--n-latents", "64", "--k", "4", "--images", "12", "--pixels", "48", "--rounds", "1"]
          if small else ["--images", "256", "--batch-size", "128"]),
    )  # fmt: skip


def run_benchmark(name: str, *arguments: str) -> dict[str, object]:
    """What a benchmark prints, or the last line of its error, so that the others are measured all the same."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before, printed = sys.argv, io.StringIO()
    sys.argv = [name, *arguments, "--json"]
    try:
        with told(" ".join(sys.argv)), redirect_stdout(printed):
            runpy.run_path(str(HERE / f"{name}.py"), run_name="__main__")
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        sys.argv = before
    found: dict[str, object] = json.loads(printed.getvalue())
    return found


if __name__ == "__main__":
    main()
