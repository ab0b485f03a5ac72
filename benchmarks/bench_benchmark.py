"""Measures the seven metrics of visaebench: `benchmark --protocol visaebench` beside the real package, by turns.

    sh benchmarks/peers-env.sh DIR
    python benchmarks/bench_benchmark.py --peers-python DIR/bin/python --json

Both get the same activations, the same TopK SAE, labels, groups, embeddings and second data set, and their own settings
for each metric. Activations are synthetic: every image has blobs of directions that its class prefers, so latents fire
in connected patches and tell classes apart. Each run is a process of its own with the same number of threads. Ours
counts encoding both data sets. The package runs once between two runs of ours; `speedup` is its seconds over the median
of ours, `cpu_speedup` the same of processor time, which says more on a machine that others use. `memory` has the peaks
of ours at the sizes of --growth. The limit is the encoder's product alone, in bfloat16, for as many tokens.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import emit, parser, timed

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
LAYER, N_OWN, N_ANY, PREFERRED, OFFSET = 1, 48, 12, 96, 0.3
"""Blobs of an image by directions of its class and by any, directions of a class, and what is added to all numbers."""


def plant(n_latents: int, d_model: int) -> NDArray[np.float32]:
    """Unit directions [F, D]."""
    directions = np.random.default_rng(0).standard_normal((n_latents, d_model), dtype=np.float32)
    return np.asarray(directions / np.linalg.norm(directions, axis=1, keepdims=True))


def draw_image(label: int, number: int, directions: NDArray[np.float32], grid: int) -> NDArray[np.float32]:
    """[P, D]: blobs of the directions of its class and of any, and noise."""
    rng = np.random.default_rng([label, number])
    of_class = np.random.default_rng(label).permutation(max(1, len(directions) // 12))[:PREFERRED]
    chosen = np.concatenate([rng.choice(of_class, N_OWN), rng.integers(len(directions), size=N_ANY)])
    rows, columns = np.divmod(np.arange(grid * grid), grid)
    center, width = rng.uniform(0, grid, (2, len(chosen))), rng.uniform(1, 40, len(chosen))
    distance = (rows[:, None] - center[0]) ** 2 + (columns[:, None] - center[1]) ** 2
    blob = np.exp(-distance / width) * rng.uniform(1, 4, len(chosen))
    x = np.where(blob > 0.4, blob, 0).astype(np.float32) @ directions[chosen]
    x += rng.standard_normal(x.shape, dtype=np.float32) * np.float32(0.02) + np.float32(OFFSET)
    return np.asarray(x)


def write_activations(folder: Path, name: str, options: Any, n_images: int, first: int = 0) -> Path:
    """A store of images with labels, unless it is there."""
    from actcache.importing import write_store

    path, images = folder / f"{name}.acts", folder / f"{name}-images"
    directions = plant(options.n_latents, options.d_model)
    for i in range(n_images):
        file = images / f"class{i % options.classes:03d}" / f"{first + i:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(file.name)
    labels = np.sort(np.arange(n_images) % options.classes)
    with write_store(
        path, images=images, n_tokens=options.grid**2, d_model=options.d_model, layers=[LAYER], prefix="none",
        model_name="planted", source=f"{options.d_model} {options.n_latents}",
    ) as writer:  # fmt: skip
        for rows in writer:
            drawn = [draw_image(int(labels[row]), first + int(row), directions, options.grid) for row in rows]
            writer.write(np.stack(drawn))
    return path


def write_run(folder: Path, store: Path, options: Any) -> Path:
    """A TopK SAE whose dictionary is the planted directions."""
    import torch

    from actcache import HookPoint, open_stores
    from saetrain import SAE, SAEConfig
    from saetrain.interop import write_imported

    sae = SAE(SAEConfig("topk", options.n_latents, options.k).resolve(options.d_model), options.d_model)
    sae.requires_grad_(False)
    directions = torch.from_numpy(plant(options.n_latents, options.d_model))
    sae.decoder.copy_(directions)
    sae.encoder.copy_(directions)
    sae.mean.fill_(OFFSET)
    path = folder / "run"
    write_imported(path, sae, open_stores(store), HookPoint(LAYER), format="planted", tokens="patch", provenance={})
    return path


def write_groups(path: Path, n_classes: int) -> None:
    groups = {f"group{i}": [f"class{c:03d}" for c in range(i, min(i + 5, n_classes))] for i in range(0, n_classes, 5)}
    path.write_text(json.dumps(groups))


def work(folder: Path, size: str, threads: int) -> None:
    """In a process of its own: encode both data sets, take the seven metrics, and print times and the peak."""
    import sklearn.linear_model  # before the clock starts, as the package imports it
    import sklearn.model_selection  # noqa: F401
    import torch

    from actcache import open_stores
    from analysis.benchmark.measured import Measured
    from analysis.benchmark.subject import Subject
    from analysis.benchmark.visaebench.protocol import measure_visaebench, open_protocol
    from analysis.config import BenchmarkConfig
    from saetrain import CodeStore, Run, encode

    torch.set_num_threads(threads)
    imports = peak_gb()
    run, store = Run.open(folder / "run"), open_stores(folder / f"{size}.acts")
    with tempfile.TemporaryDirectory(dir=folder) as made:
        started, before = time.perf_counter(), cpu_s()
        codes = encode(run, store, Path(made) / "first.codes", device="cpu")
        encoded = time.perf_counter()
        config = BenchmarkConfig(
            protocol="visaebench", hierarchy=folder / "groups.json", transfer=str(folder / "ood.acts"),
            embeddings=str(folder / f"{size}.acts"),
        )  # fmt: skip

        def encode_second(subject: Subject, other: Any) -> CodeStore:
            return encode(subject.run, other, Path(made) / "second.codes", device="cpu")

        subject = Subject("run", None, None, run, codes)
        found = measure_visaebench(subject, open_protocol(store, run, config), encode_second, lambda done, total: None)
        seconds, used = time.perf_counter() - started, cpu_s() - before
        facts: dict[str, object] = {"entries": codes.n_entries, "tokens": len(store.images) * (codes.n_tokens - 1)}
    values = {each.name: each.value for each in found if isinstance(each, Measured)}
    details = {each.name: dict(each.details) for each in found if isinstance(each, Measured)}
    facts |= {"values": values, "details": details}
    times = {"seconds": seconds, "encode_s": encoded - started, "cpu_s": used}
    print(json.dumps({**times, "peak_gb": peak_gb(), "imports_gb": imports, **facts}))


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def start(command: list[str], threads: int) -> dict[str, Any]:
    """Run one process alone, and read its last line."""
    limited = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    done = subprocess.run(command, env={**os.environ, **limited, "HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE,
                          check=True, text=True)  # fmt: skip
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def export(folder: Path, given: Path, size: str) -> None:
    """What the package is given: the same images in the same order."""
    from actcache import open_stores
    from analysis.benchmark.visaebench.hierarchy import number_groups, read_hierarchy
    from analysis.benchmark.visaebench.images import ProtocolImages
    from saetrain import Run

    sys.path.insert(0, str(HERE))
    import visaebench_worker as worker

    sae = Run.open(folder / "run").sae()
    for name, path in (("shard", f"{size}.acts"), ("ood", "ood.acts")):
        images = ProtocolImages.of(open_stores(folder / path))
        cuts = range(0, len(images), worker.SHARD)
        parts = (
            images.store.read(LAYER, images=images.images[cut : cut + worker.SHARD], tokens="patch") for cut in cuts
        )
        assert images.labels is not None
        worker.write_files(given, sae, parts, images.labels, name=name)
        if name == "shard":
            blocks = np.array_split(images.images, -(-len(images) // 64))
            means = [images.store.read(LAYER, images=each, tokens="patch").astype("f4").mean(1) for each in blocks]
            np.save(given / "embeddings.npy", np.concatenate(means))
            groups = number_groups(read_hierarchy(folder / "groups.json"), images.names)
            named = {key: {"class_indices": value, "hierarchy_depth": depth} for key, (value, depth) in groups.items()}
            (given / "groups.json").write_text(json.dumps(named))


def measure_limit(options: Any, n_tokens: int) -> float:
    """Seconds of the encoder's product alone for so many tokens, in bfloat16."""
    import torch

    torch.set_num_threads(options.threads)
    rows, weight = (torch.randn(n, options.d_model).bfloat16() for n in (2048, options.n_latents))
    out = torch.empty(256, options.n_latents, dtype=torch.bfloat16)

    def product() -> None:
        for first in range(0, len(rows), 256):
            torch.mm(rows[first : first + 256], weight.T, out=out)

    product()
    return min(timed(product) for _ in range(3)) * n_tokens / len(rows)


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, list[float]]:
    """name -> [theirs, ours, relative difference]."""
    table = {}
    for name, value in ours["values"].items():
        their = theirs["metrics"][name.removeprefix("visaebench ")]["value"]
        table[name] = [their, value, abs(value - their) / max(abs(their), 1e-12)]
    return table


def main() -> None:
    arguments = parser(__doc__, n_images=2000, n_ood=500, grid=14, d_model=768, n_latents=12_288, k=32, classes=50,
                       growth=[500, 4000], threads=2)  # fmt: skip
    arguments.add_argument("--peers-python", type=Path, help="the Python of peers-env.sh; without it only ours runs")
    arguments.add_argument("--folder", type=Path, help="where to keep the stores; a temporary folder by default")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        sizes = sorted({options.n_images, *options.growth})
        for size in sizes:
            write_activations(folder, str(size), options, size)
        write_activations(folder, "ood", options, options.n_ood, first=1_000_000)
        write_run(folder, folder / f"{options.n_images}.acts", options)
        write_groups(folder / "groups.json", options.classes)

        def run_ours(size: int) -> dict[str, Any]:
            me = [sys.executable, str(Path(__file__).resolve()), "--as-worker"]
            return start([*me, str(folder), str(size), str(options.threads)], options.threads)

        limit = measure_limit(options, (options.n_images + options.n_ood) * options.grid**2)
        runs, theirs, result = [run_ours(options.n_images)], None, {}
        if options.peers_python:
            given = folder / "given"
            export(folder, given, str(options.n_images))
            command = [str(options.peers_python), str(HERE / "visaebench_worker.py"), str(given)]
            theirs = start([*command, "--threads", str(options.threads)], options.threads)
            runs.append(run_ours(options.n_images))
        seconds, used = (statistics.median(each[name] for each in runs) for name in ("seconds", "cpu_s"))
        if theirs:
            their_seconds = sum(each["seconds"] for each in theirs["metrics"].values())
            result = {
                "visaebench_s": their_seconds, "visaebench_cpu_s": theirs["cpu_s"],
                "visaebench_peak_gb": theirs["peak_rss_gb"], "speedup": their_seconds / seconds,
                "cpu_speedup": theirs["cpu_s"] / used, "parity": compare(runs[0], theirs),
                "visaebench_s_by_metric": {name: each["seconds"] for name, each in theirs["metrics"].items()},
            }  # fmt: skip
        memory = {str(size): run_ours(size)["peak_gb"] for size in sizes if size != options.n_images}
        memory[str(options.n_images)] = runs[-1]["peak_gb"]
        emit(
            options, seconds=seconds, encode_s=runs[-1]["encode_s"], cpu_s=used, peak_gb=runs[-1]["peak_gb"],
            imports_gb=runs[-1]["imports_gb"],
            tokens_per_s=runs[-1]["tokens"] / seconds, memory=memory, l0=runs[-1]["entries"] / runs[-1]["tokens"],
            limit_bfloat16_product_s=limit, share_of_limit=limit / seconds, values=runs[-1]["values"],
            details=runs[-1]["details"], **result,
        )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-worker"]:
        work(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        main()
