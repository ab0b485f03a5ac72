"""Hand random and damaged input to the code for as long as wanted, and report whatever is not an answer or one line.

    python tests/fuzz/run.py --seconds 600                    # every target, in turn
    python tests/fuzz/run.py --target tables --seed 123456    # repeat one attempt, with its traceback

A target is a module `fuzz_NAME.py` in this folder that defines two functions:

    prepare(folder) -> state            makes what the inputs are made from, once a process
    attempt(rng, folder, state) -> None makes one input from `rng` alone, in the empty `folder`, and uses it

An attempt is right when it returns, or when it raises a PipelineError whose message is one line. Any other exception,
an `AssertionError` of the target's own, a crash of the process, more than `--limit` seconds and more than `--memory`
GB are faults.
"""

import argparse
import importlib
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent


def find_targets() -> list[str]:
    return sorted(file.stem.removeprefix("fuzz_") for file in HERE.glob("fuzz_*.py"))


def attempt(target: str, seed: int, state: object, folder: Path) -> tuple[str, str] | None:
    """Run one attempt. Returns None when it is right, otherwise (where it went wrong, traceback)."""
    from actcache import PipelineError

    module = importlib.import_module(f"fuzz_{target}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        module.attempt(random.Random(seed), folder, state)
    except PipelineError as error:
        if "\n" in str(error).strip():
            return f"{type(error).__name__} of several lines", str(error)
        return None
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} at {frame.filename}:{frame.lineno}", traceback.format_exc()
    return None


def work(target: str, first_seed: int, memory_gb: float, pipe: Connection) -> None:
    """In a process of its own: attempt one seed after the other, saying before each which one."""
    sys.path[:0] = [str(HERE), str(REPOSITORY), str(HERE.parent / "actcache"), str(HERE.parent / "analysis")]
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{target}-") as scratch:
        prepared = Path(scratch) / "prepared"
        prepared.mkdir()
        state = importlib.import_module(f"fuzz_{target}").prepare(prepared)
        seed = first_seed
        while True:
            pipe.send(("begin", seed, None))
            fault = attempt(target, seed, state, Path(scratch) / "attempt")
            peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            if fault is None and peak_gb > memory_gb:
                fault = (f"memory: {peak_gb:.1f} GB", "")
            pipe.send(("end", seed, fault))
            if fault is not None and fault[0].startswith("memory"):
                return  # the peak of a process never falls
            seed += 1


def run_target(
    target: str, seconds: float, first_seed: int, limit_s: float, memory_gb: float
) -> dict[str, tuple[int, str]]:
    """Attempt for `seconds`. Returns place -> (seed, traceback) of each distinct fault."""
    faults: dict[str, tuple[int, str]] = {}
    context = multiprocessing.get_context("forkserver")  # each process has memory of its own, and torch is loaded once
    context.set_forkserver_preload(["open_clip"])
    seed, n_attempts = first_seed, 0
    deadline = None
    while deadline is None or time.monotonic() < deadline:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(target, seed, memory_gb, theirs), daemon=True)
        process.start()
        theirs.close()
        running = None
        try:
            while deadline is None or time.monotonic() < deadline:
                if not ours.poll(limit_s if running is not None else 10 * limit_s):  # the first one imports torch
                    faults.setdefault(f"no end within {limit_s:.0f} s", (running or seed, ""))
                    break
                event, seed, fault = ours.recv()
                deadline = deadline or time.monotonic() + seconds  # imports and preparation do not count
                running = seed if event == "begin" else None
                if event == "end":
                    n_attempts += 1
                    if fault is not None:
                        faults.setdefault(fault[0], (seed, fault[1]))
        except EOFError:  # the process ended, by itself or by a signal
            process.join()
            if running is not None or n_attempts == 0:
                faults.setdefault(f"the process ended with {process.exitcode}", (running or seed, ""))
            if n_attempts == 0:
                break
        process.kill()
        process.join()
        seed += 1
    print(f"{target}: {n_attempts} attempts from seed {first_seed}, {len(faults)} distinct faults", flush=True)
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/fuzz/run.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", action="append", choices=find_targets(), help="one target (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="time in all, shared by the targets")
    parser.add_argument("--seed", type=int, help="repeat this single attempt")
    parser.add_argument("--first-seed", type=int, default=None, help="seed of the first attempt (default: the clock)")
    parser.add_argument("--limit", type=float, default=60, help="seconds an attempt may take")
    parser.add_argument("--memory", type=float, default=3.0, help="GB a process may use")
    options = parser.parse_args()
    targets = options.target or find_targets()
    if options.seed is not None:
        sys.path[:0] = [str(HERE), str(REPOSITORY), str(HERE.parent / "actcache"), str(HERE.parent / "analysis")]
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "prepared").mkdir()
            state = importlib.import_module(f"fuzz_{targets[0]}").prepare(Path(scratch) / "prepared")
            fault = attempt(targets[0], options.seed, state, Path(scratch) / "attempt")
        print("right" if fault is None else "\n".join(fault))
        return fault is not None
    first_seed = options.first_seed if options.first_seed is not None else time.time_ns() % 10**9
    n_faults = 0
    for target in targets:
        faults = run_target(target, options.seconds / len(targets), first_seed, options.limit, options.memory)
        for place, (seed, trace) in faults.items():
            print(f"\n{place}\nrepeat: python tests/fuzz/run.py --target {target} --seed {seed}\n{trace}", flush=True)
        n_faults += len(faults)
    return n_faults > 0


if __name__ == "__main__":
    sys.exit(main())
