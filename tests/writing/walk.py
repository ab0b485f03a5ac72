"""Fail, or kill, every verb at positions of its calls, and say what went wrong.

python tests/writing/walk.py                             # a few positions of each verb and error
python tests/writing/walk.py --all --verb encode         # every position
python tests/writing/walk.py --verb train --error EIO --at 17   # one, with what was printed
"""

import argparse
import errno
import json
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from verbs import VERBS, Attempt, Forked, Trouble, build_shim, contents, copy_inputs, leftovers, put_copies, spread

from actcache import verify

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EROFS", "EACCES")
KILL = "SIGKILL"
HEEDED = ("open", "write", "truncate", "fsync", "close", "rename", "link", "mkdir")
"""Calls whose failure must not be passed over; a file that could not be deleted does no harm."""


class Walk:
    """What an undisturbed command writes, and what is wrong with disturbed ones."""

    def __init__(self, forked: Forked, folder: Path) -> None:
        self.forked, self.folder, self.n_attempts = forked, folder, 0
        self.expected: dict[str, tuple[dict[str, bytes | None], int]] = {}

    def fresh(self, name: str) -> Path:
        self.n_attempts += 1
        out = self.folder / f"{self.n_attempts:05d}"
        put_copies(VERBS[name], self.forked.inputs, out)
        return out

    def undisturbed(self, name: str) -> tuple[dict[str, bytes | None], int]:
        """The files that a command writes, and the number of its calls."""
        if name not in self.expected:
            out = self.fresh(name)
            done = self.forked.run(VERBS[name].command.format(o=out), out, Trouble(at=1 << 40))
            assert done.code == 0, done
            self.expected[name] = contents(VERBS[name], out), done.n_calls
            shutil.rmtree(out)
        return self.expected[name]

    def attempt(self, name: str, error: str, at: int) -> tuple[Attempt, list[str]]:
        """Disturb a command once, then give it again. Returns what is wrong."""
        verb, (expected, _) = VERBS[name], self.undisturbed(name)
        out = self.fresh(name)
        command = verb.command.format(o=out)
        if error == KILL:
            trouble = Trouble(at=at, signal=signal.SIGKILL)
        else:
            trouble = Trouble(at=at, error=getattr(errno, error), lasting=error in ("ENOSPC", "EDQUOT", "EROFS"))
        done = self.forked.run(command, out, trouble)
        wrong = [] if error == KILL else self.judge(name, out, done)
        if error != KILL and (left := [name for name in leftovers(out) if not self.is_harmless(done, name)]):
            wrong.append(f"{done.failed}: it left {left}")
        again = self.forked.run(command, out)
        if again.code:
            wrong.append(f"again: {again.code} {again.stderr[-300:]}")
        elif contents(verb, out) != expected:
            different = [n for n in {*expected, *contents(verb, out)} if expected.get(n) != contents(verb, out).get(n)]
            wrong.append(f"again: other bytes in {sorted(different)}")
        wrong += [f"again: {problem}" for made in self.artifacts(name, out) for problem in verify(made).problems]
        if left := leftovers(out):
            wrong.append(f"again: it left {left}")
        shutil.rmtree(out)
        return done, wrong

    @staticmethod
    def is_harmless(done: Attempt, left: str) -> bool:
        """What could not be deleted, because that was the call that failed, or marks an interrupted --overwrite."""
        return done.failed.startswith(("unlink", "close")) or left.endswith(".overwrite.tmp")

    @staticmethod
    def artifacts(name: str, out: Path) -> list[Path]:
        return [out / made for made in VERBS[name].out if (out / made / "artifact.json").exists()]

    def read(self, name: str, out: Path) -> dict[str, bytes | None]:
        return contents(VERBS[name], out)

    def judge(self, name: str, out: Path, done: Attempt) -> list[str]:
        """What is wrong with the answer to an error."""
        lines = done.stderr.strip().splitlines()
        call = done.failed.split(" ")[0]
        if done.code == 0:
            if call in HEEDED and not done.failed.endswith((".lock", ".lock (deleted)")):
                return [f"{done.failed}: exit 0"]
            return []
        if done.code != 1 or len(lines) != 1 or not lines[0].startswith("error: "):
            return [f"{done.failed}: exit {done.code}: {done.stderr[-300:]}"]
        if str(out) not in lines[0] or ".tmp" in lines[0]:
            return [f"{done.failed}: does not name the output: {lines[0]}"]
        return []

    def positions(self, name: str, wanted: int | None) -> Iterator[int]:
        return spread(self.undisturbed(name)[1], wanted)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verb", action="append")
    parser.add_argument("--error", action="append")
    parser.add_argument("--at", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--n", type=int, default=6)
    options = parser.parse_args()
    names = options.verb or list(VERBS)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
        shim = build_shim(Path(scratch))
        assert shim, "a C compiler is needed"
        forked = Forked(copy_inputs(Path(scratch)), shim, warm=",".join(names))
        (Path(scratch) / "out").mkdir()
        walk = Walk(forked, Path(scratch) / "out")
        n_wrong = n_attempts = 0
        for name in names:
            for error in options.error or (*ERRORS, KILL):
                for at in [options.at] if options.at else walk.positions(name, None if options.all else options.n):
                    done, wrong = walk.attempt(name, error, at)
                    n_attempts += 1
                    if options.at:
                        print(json.dumps(done.__dict__, indent=1))
                    if wrong:
                        n_wrong += 1
                        print(f"{name} {error} at {at} of {walk.undisturbed(name)[1]}: {'; '.join(wrong)}", flush=True)
            print(f"{name}: {n_attempts} attempts so far", flush=True)
        print(f"{n_wrong} of {n_attempts} attempts went wrong")
        forked.close()
    sys.exit(bool(n_wrong))


if __name__ == "__main__":
    main()
