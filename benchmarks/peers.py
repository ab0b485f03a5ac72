"""Measures training steps of this project beside those of peer packages: in one run, on the same rows, in alternation.

    sh benchmarks/peers-env.sh DIR
    python benchmarks/peers.py --peers-python DIR/bin/python --variant topk --n-latents 12288 --k 32 --json
    python benchmarks/peers.py --peers-python DIR/bin/python --quality --data train.acts --held-out test.acts --json

Every entry (peer:precision) runs in a process of its own with the same number of threads, alone, one after the other,
for several rounds. `ratio` is the median over rounds of our tokens per second over the peer's. `share_of_limit` is
relative to the bfloat16 encoder GEMM [B, D] x [D, F] alone, measured in the same rounds. `others_cpus` is the number of
processors that other processes kept busy meanwhile; no figure here can be trusted without it. --quality trains every
entry on the same tokens and evaluates all of them with the numpy evaluator below, on rows that none has seen.
"""

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import emit, parser

import numpy as np
from numpy.typing import NDArray

HERE = Path(__file__).parent
SPEED = {
    "topk": "ours:bfloat16 ours:float32 saelens:float32 saelens:bfloat16 saelens-sparse:float32 "
    "dictionary_learning:float32 dictionary_learning:bfloat16 overcomplete:float32 overcomplete:bfloat16",
    "relu": "ours:bfloat16 ours:float32 dense:float32 dense:bfloat16 saelens:float32 saelens:bfloat16 "
    "dictionary_learning:float32 overcomplete:float32",
}
OTHERS = "ours:bfloat16 saelens:float32 saelens:bfloat16 dictionary_learning:float32"
QUALITY = "ours:bfloat16 ours:float32 saelens:float32 dictionary_learning:float32"


def our_peer(options: argparse.Namespace) -> Any:
    """This project's trainer behind the interface of peer_worker: the only place to change when the trainer changes."""
    import torch

    from saetrain import SAE, SAEConfig
    from saetrain.config import TrainConfig
    from saetrain.training.objective import add_gradients
    from saetrain.training.optimizer import Adam, apply_update

    worker = importlib.import_module("peer_worker")
    nested = options.variant == "matryoshka"
    config = SAEConfig(
        "batchtopk" if nested else options.variant, options.n_latents, options.k, l1=options.l1, normalize="none",
        prefixes=(1 / 8, 1 / 4, 1 / 2, 1) if nested else (),
    ).resolve(options.d_model)  # fmt: skip
    training = TrainConfig(precision=options.precision, aux=1 / 32, ghost=False).resolve(config, "float32")
    sae = SAE(config, options.d_model, seed=options.seed)
    optimizer = Adam(sae)
    silent = torch.zeros(options.n_latents, dtype=torch.int64)
    limit = (training.clip_norm or 0.0) / options.d_model

    def our_step(x: Any, step: int) -> Any:
        loss = add_gradients(sae, x, silent > options.dead_tokens, training)
        apply_update(sae, optimizer, learning_rate=options.lr * worker.rate(options, step), clip_norm=limit)
        silent.add_(len(x)).masked_fill_(loss.fired, 0)
        return loss

    def train(batches: Any) -> None:
        for step, x in enumerate(batches):
            if step == 0 and options.variant in ("relu", "gated", "jumprelu") and options.l0:
                with (
                    torch.no_grad()
                ):  # set the number of active latents per token, which the cost of a sparse step depends on
                    z = x[:256] @ sae.encoder.T
                    floor = float(np.quantile(z.numpy(), 1 - options.l0 / options.n_latents))
                    if options.variant == "jumprelu":
                        sae.threshold.fill_(floor)
                    else:
                        sae.b_enc.fill_(-floor)
                batches.begun[-1] = time.perf_counter()
            loss = our_step(x, step)
        print(json.dumps({"l0": float(loss.n_active) / len(x)}), file=sys.stderr)

    def weights() -> Any:
        threshold = float(sae.threshold) if options.variant == "batchtopk" else 0.0
        return worker.neutral(
            options, sae.encoder, sae.b_enc - sae.encoder @ sae.b_dec, sae.decoder, sae.b_dec, threshold
        )

    return train, weights


def encoder_gemm(options: argparse.Namespace) -> Any:
    """The limit: the encoder's matrix product alone, into memory that is already allocated."""
    import torch

    dtype = getattr(torch, options.precision)
    weight = torch.randn(options.n_latents, options.d_model).to(dtype).T
    out = torch.zeros(options.batch_size, options.n_latents, dtype=dtype)

    def train(batches: Any) -> None:
        for x in batches:
            rows = x.to(dtype)
            batches.begun[-1] = time.perf_counter()
            torch.mm(rows, weight, out=out)

    return train, dict


def run(entry: str, options: argparse.Namespace, data: Path, **more: Any) -> dict[str, Any]:
    """Run one process alone and return its JSON line, or {"failed": reason}. It is stopped before memory runs out."""
    peer, _, precision = entry.partition(":")
    if peer in ("ours", "gemm"):
        command = [sys.executable, str(Path(__file__).resolve()), "--as-worker"]
    else:
        command = [str(options.peers_python), str(HERE / "peer_worker.py")]
    settings = {
        "peer": peer, "precision": precision, "variant": options.variant, "n-latents": options.n_latents,
        "k": options.k, "l1": options.l1, "batch-size": options.batch_size, "threads": options.threads, "data": data,
        "steps": options.steps, "warmup": options.warmup, **more,
    }  # fmt: skip
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    limit_kb = (memory_kb("/proc/meminfo", "MemAvailable") or 1 << 60) - (3 << 19)  # 1.5 GB are left to others
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        before = busy_s()
        process = subprocess.Popen(command, stdout=out, stderr=errors, env={**os.environ, **threads})
        started, stopped = time.monotonic(), ""
        while process.poll() is None:
            time.sleep(0.2)
            if (memory_kb(f"/proc/{process.pid}/status", "VmRSS") or 0) > limit_kb:
                stopped = f"needs more than {limit_kb / 1e6:.1f} GB of memory"
            elif time.monotonic() - started > options.timeout_s:
                stopped = f"took longer than {options.timeout_s:.0f} s"
            if stopped:
                process.kill()
                process.wait()
        others = max(0.0, busy_s() - before) / (time.monotonic() - started)
        out.seek(0)
        errors.seek(0)
        lines, last = out.read().splitlines(), [line for line in errors.read().splitlines() if line.strip()]
    if process.returncode:
        why = [line for line in last if "Error" in line] or last or [f"exit {process.returncode}"]
        return {"failed": stopped or why[-1][:200]}
    result: dict[str, object] = json.loads(lines[-1]) | {"others_cpus": others}
    if peer == "ours":
        result |= json.loads(last[-1])
    return result


def busy_s() -> float:
    """CPU seconds that other processes of the machine have used so far. 0 without /proc."""
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        user, nice, system = map(int, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
    except OSError:
        return 0.0
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - ours.ru_utime - ours.ru_stime


def memory_kb(path: str, field: str) -> int | None:
    """A field in kB of a file in /proc, or None if there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), None)


def speed(options: argparse.Namespace, data: Path, entries: list[str]) -> dict[str, object]:
    """The median tokens per second of each entry, and our ratio to it in each round."""
    rounds: list[dict[str, dict[str, Any]]] = []
    failed: dict[str, str] = {}
    for number in range(options.rounds):
        results = {}
        for entry in ["gemm:bfloat16", *entries]:
            if entry in failed:
                continue
            result = run(entry, options, data, seed=number, l0=options.l0)
            note(f"round {number} {entry}: {result.get('failed') or round(result['tokens_per_s'])}")
            if "failed" in result:
                failed[entry] = result["failed"]
            else:
                results[entry] = result
        rounds.append(results)
    ours = entries[0]
    table = {}
    for entry in ["gemm:bfloat16", *entries]:
        complete = [results for results in rounds if entry in results]
        if entry in failed or not complete:
            table[entry] = {"failed": failed.get(entry, "")}
            continue
        rates = [results[entry]["tokens_per_s"] for results in complete]
        limits = [results[entry]["tokens_per_s"] / results["gemm:bfloat16"]["tokens_per_s"] for results in complete]
        paired = [results for results in complete if ours in results]
        ratios = [results[ours]["tokens_per_s"] / results[entry]["tokens_per_s"] for results in paired]
        table[entry] = {
            "tokens_per_s": statistics.median(rates),
            "share_of_limit": statistics.median(limits),
            "ratio": statistics.median(ratios) if ratios else None,
            "ratios": ratios,
            "peak_rss_gb": max(results[entry]["peak_rss_gb"] for results in complete),
            "others_cpus": [round(results[entry]["others_cpus"], 2) for results in complete],
        }
        if "l0" in complete[0][entry]:
            table[entry]["l0"] = statistics.median(results[entry]["l0"] for results in complete)
    versions = {name: v for results in rounds for r in results.values() for name, v in r["versions"].items()}
    return {"table": table, "limit_tokens_per_s": table["gemm:bfloat16"].get("tokens_per_s"), "versions": versions}


def quality(options: argparse.Namespace, data: Path, held_out: NDArray[np.float64], entries: list[str]) -> Any:
    """Held-out FVU and L0 of each entry at each learning rate and seed, on the same tokens, by the same evaluator."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for lr in options.lr:
            for seed in range(options.seeds):
                for entry in entries:
                    path = Path(folder) / "weights.npz"
                    result = run(
                        entry, options, data, seed=seed, save=path, lr=lr, l0=0,
                        **{"warmup-lr-steps": options.steps // 10, "decay-steps": options.steps // 5,
                           "dead-tokens": options.dead_tokens},
                    )  # fmt: skip
                    line = {"entry": entry, "lr": lr, "seed": seed}
                    if "failed" not in result:
                        with np.load(path) as weights:
                            line |= evaluate(dict(weights), held_out)
                        line |= {"tokens_per_s": result["tokens_per_s"], "versions": result["versions"]}
                        path.unlink()
                    else:
                        line |= {"failed": result["failed"]}
                    note(str({name: value for name, value in line.items() if name != "versions"}))
                    runs.append(line)
    table: dict[str, object] = {}
    for entry, lr in {(line["entry"], line["lr"]) for line in runs}:
        done = [line for line in runs if (line["entry"], line["lr"]) == (entry, lr) and "fvu" in line]
        if done:
            fvu = [line["fvu"] for line in done]
            table[f"{entry} lr {lr:g}"] = {
                "fvu": statistics.mean(fvu), "fvu_min": min(fvu), "fvu_max": max(fvu), "seeds": len(fvu),
                "l0": statistics.mean(line["l0"] for line in done),
                "dead": statistics.mean(line["dead"] for line in done),
                "tokens_per_s": statistics.median(line["tokens_per_s"] for line in done),
            }  # fmt: skip
    return {"table": dict(sorted(table.items())), "runs": runs}


def evaluate(weights: dict[str, NDArray[Any]], rows: NDArray[np.float64]) -> dict[str, float]:
    """Centered FVU, L0 and the share of latents that never fire, computed in float64."""
    encoder, b_enc, decoder, b_dec = (weights[n].astype(np.float64) for n in ("encoder", "b_enc", "decoder", "b_dec"))
    error, active, fired = 0.0, 0, np.zeros(len(encoder), bool)
    for first in range(0, len(rows), 2048):
        x = rows[first : first + 2048]
        z = x @ encoder.T + b_enc
        if "k" in weights:
            k = int(weights["k"])
            floor = np.partition(z, -k, axis=1)[:, -k, None]
            z = np.where(z >= floor, z, 0.0)
        z = np.where(z > max(0.0, float(weights.get("threshold", 0.0))), z, 0.0)
        error += float(np.square(x - z @ decoder - b_dec).sum())
        active += np.count_nonzero(z)
        fired |= (z > 0).any(0)
    variance = float(np.square(rows - rows.mean(0)).sum())
    return {"fvu": error / variance, "l0": active / len(rows), "dead": 1 - float(fired.mean())}


def rows_of(path: Path, layer: int | None) -> NDArray[np.float16]:
    """The rows [N, D] of a .npy file, or all tokens of a store, shuffled."""
    if path.suffix == ".npy":
        return np.asarray(np.load(path))
    from actcache import ActivationStore
    from saetrain import ActivationLoader

    store = ActivationStore.open(path)
    loader = ActivationLoader(store, layer, batch_size=1000, images=np.arange(store.n_images), pool_tokens=1 << 20)
    batches = loader.batches()
    rows = np.concatenate([next(batches).activations.numpy().copy() for _ in range(loader.steps_per_epoch)])
    batches.close()
    return rows


def random_rows(n_rows: int, d_model: int) -> NDArray[np.float32]:
    """Random rows with the falling spectrum of activations, which suffice to measure time."""
    rng = np.random.default_rng(0)
    spectrum = np.arange(1, d_model + 1, dtype=np.float32) ** -0.5
    rotation = np.linalg.qr(rng.normal(size=(d_model, d_model)))[0].astype(np.float32)
    return (rng.normal(size=(n_rows, d_model)).astype(np.float32) * spectrum) @ rotation


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def work_here() -> None:
    """Run as a worker in this environment."""
    worker = importlib.import_module("peer_worker")
    options = worker.make_parser().parse_args(sys.argv[2:])
    worker.work(options, our_peer if options.peer == "ours" else encoder_gemm)


def main() -> None:
    arguments = parser(
        __doc__, variant="topk", n_latents=12288, k=32, l1=8e-5, batch_size=4096, steps=5, rounds=3, threads=2,
        timeout_s=1800.0, seeds=3, dead_tokens=250_000,
    )  # fmt: skip
    arguments.add_argument(
        "--peers-python", type=Path, required=True, help="the Python of the environment made by peers-env.sh"
    )
    arguments.add_argument(
        "--entries", nargs="+", help="entries as peer:precision; the first is compared with the others"
    )
    arguments.add_argument(
        "--l0", type=int, default=150, help="active latents per token of our relu, gated and jumprelu"
    )
    arguments.add_argument("--d-model", type=int, default=768, help="width of random rows")
    arguments.add_argument("--warmup", type=int, default=1, help="number of steps before timing starts")
    arguments.add_argument("--data", type=Path, help="a .npy of rows, or a store; random rows by default")
    arguments.add_argument("--layer", type=int, help="layer of the store")
    arguments.add_argument("--quality", action="store_true")
    arguments.add_argument("--held-out", type=Path, help="a .npy or a store of other images, for --quality")
    arguments.add_argument("--lr", type=float, nargs="+", default=[1e-3], help="learning rates for --quality")
    options = arguments.parse_args()
    least = 10 if options.quality else options.warmup + 2  # a tenth of the steps warm up; a median needs two times
    if options.warmup < 0 or options.steps < least:
        arguments.error(f"--steps must be at least {least} (with --warmup {options.warmup}), got {options.steps}")

    default = QUALITY if options.quality else SPEED.get(options.variant, OTHERS)
    entries = options.entries or default.split()
    raw = rows_of(options.data, options.layer) if options.data else random_rows(8 * options.batch_size, options.d_model)
    mean = raw.mean(0, dtype=np.float64)
    scale = float((raw.shape[1] / np.square(raw - mean).sum(1).mean()) ** 0.5)  # E||x||^2 = D
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.npy"
        np.save(data, ((raw - mean) * scale).astype(np.float16))
        if options.quality:
            if options.held_out is None:
                arguments.error("--quality needs --held-out")
            held_out = (rows_of(options.held_out, options.layer) - mean) * scale
            emit(options, **quality(options, data, held_out, entries))
        else:
            emit(options, **speed(options, data, entries))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as-worker"]:
        work_here()
    else:
        main()
