"""Pairs of processes that write one output at random offsets, with and without --overwrite.

    python tests/writing/pairs.py                                 # fifty pairs of every verb
    python tests/writing/pairs.py --verb encode --n 200 --seed 3

After each pair: one of the two has succeeded, the other one has too or says in one line who keeps it out; and the same
command then ends with the bytes of an undisturbed one, with nothing left lying.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from verbs import VERBS, Forked, build_shim, copy_inputs, leftovers
from walk import Walk

from actcache import verify

HOWS = (("", ""), ("", " --overwrite"), (" --overwrite", ""), (" --overwrite", " --overwrite"))


def try_pair(walk: Walk, name: str, rng: random.Random, duration_s: float) -> list[str]:
    """Run one pair. Returns what is wrong."""
    verb, (expected, _) = VERBS[name], walk.undisturbed(name)
    out = walk.fresh(name)
    command = verb.command.format(o=out)
    if rng.random() < 0.5:  # something is there already
        assert walk.forked.run(command, out).code == 0
    hows = rng.choice(HOWS) if verb.overwrites else ("", "")
    processes = []
    for how in hows:
        processes.append(walk.forked.start(command + how, out))
        time.sleep(rng.uniform(0, duration_s))
    ended = [walk.forked.wait(process) for process in processes]
    wrong = [] if any(done.code == 0 for done in ended) else [f"none succeeded: {[done.stderr for done in ended]}"]
    for done in ended:
        lines = done.stderr.strip().splitlines()
        if done.code and (done.code != 1 or len(lines) != 1 or "is being written by process" not in lines[0]):
            wrong.append(f"exit {done.code}: {done.stderr[-500:]}")
    again = walk.forked.run(command, out)
    if again.code:
        wrong.append(f"again: {again.code} {again.stderr[-300:]}")
    elif walk.read(name, out) != expected:
        wrong.append("again: other bytes")
    wrong += [f"again: {problem}" for made in walk.artifacts(name, out) for problem in verify(made).problems]
    if left := leftovers(out):
        wrong.append(f"it left {left}")
    shutil.rmtree(out)
    return [f"{hows}: {text}" for text in wrong]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verb", action="append")
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = options.verb or list(VERBS)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        forked = Forked(copy_inputs(Path(scratch)), build_shim(Path(scratch)), warm=",".join(names))
        (Path(scratch) / "out").mkdir()
        walk = Walk(forked, Path(scratch) / "out")
        n_wrong = 0
        for name in names:
            walk.undisturbed(name)
            started = time.monotonic()
            walk.forked.run(VERBS[name].command.format(o=walk.fresh(name)), Path(scratch))
            duration_s = time.monotonic() - started
            for number in range(options.n):
                wrong = try_pair(walk, name, random.Random(f"{options.seed} {name} {number}"), duration_s)
                n_wrong += bool(wrong)
                for text in wrong:
                    print(f"{name}, pair {number}, {text}", flush=True)
            print(f"{name}: {options.n} pairs", flush=True)
        print(f"{n_wrong} pairs went wrong")
        forked.close()
    sys.exit(bool(n_wrong))


if __name__ == "__main__":
    main()
