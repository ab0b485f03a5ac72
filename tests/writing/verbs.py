"""Every verb that writes, on the golden pipeline's inputs; and processes that run them with something in their way.

`Forked` keeps one process that has imported everything and run every verb once. It forks a child for each attempt, so
that an attempt takes a fraction of a second. In the child, a call of the operating system may fail or kill it
(failing_calls.c, where a C compiler exists), a limit may hold, or another user may run.
"""

import ctypes
import errno
import faulthandler
import gc
import io
import json
import mmap
import os
import resource
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GOLDEN = HERE.parent / "golden" / "pipeline"

MODEL = "--model model/tiny.json --pretrained model/tiny.safetensors"
EXACT = "--precision float32 --device cpu"
SMALL = "--n-latents 64 --k 4 --batch-size 128 --lr 0.003 --precision float32 --device cpu"


@dataclass(frozen=True)
class Verb:
    """A command. {o} stands for a folder of its own, `out` for what it writes in it."""

    command: str
    out: tuple[str, ...]
    copied: str = ""  # a golden artifact that is put into {o}, because the command writes into it
    overwrites: bool = True
    changing: tuple[str, ...] = ()  # files whose bytes depend on the time, or are rounded in another way in another run


ROUNDED = ("0", "manifest.json", "000000.json", "000001.json", "000002.json")
"""Activations and their checksums: how a matrix product rounds depends on where its arrays lie in memory."""

VERBS = {
    "extract": Verb(
        f"extract images {{o}}/x.acts {MODEL} --layer 1 --shard-images 16 {EXACT}", ("x.acts",), changing=ROUNDED
    ),
    "extract-zstd": Verb(
        f"extract images {{o}}/x.acts {MODEL} --layer 1 --shard-images 32 --codec zstd {EXACT}", ("x.acts",),
        changing=ROUNDED,
    ),
    "adapt": Verb(
        f"adapt images {{o}}/x.prompts {MODEL} --method coop --shots 2 --n-epochs 2 --n-prompts 2 "
        f"--checkpoint-every 2 {EXACT}",
        ("x.prompts",), changing=("prompts.safetensors", "manifest.json"),
    ),
    "train": Verb(
        f"train a.acts {{o}}/run --n-steps 20 --log-every 5 --checkpoint-every 8 {SMALL}",
        ("run",), changing=("metrics.jsonl", "manifest.json"),
    ),
    "sweep": Verb(
        f"train a.acts {{o}}/runs --n-steps 8 --log-every 4 --seed 0 --seed 1 {SMALL}",
        ("runs/seed0", "runs/seed1"), changing=("metrics.jsonl", "manifest.json"),
    ),
    "encode": Verb("encode run a.acts {o}/x.codes --device cpu", ("x.codes",)),
    "analyze": Verb("analyze a.codes {o}/x.concepts --n-gallery 4 --device cpu", ("x.concepts",)),
    "name": Verb("name {o}/a.concepts --vocabulary words.txt --method lens --codes a.codes --run run --store a.acts "
                 "--device cpu", ("a.concepts/notes/names.parquet",), copied="a.concepts", overwrites=False),
    "name-set": Verb("name {o}/a.concepts --set 3=dots", ("a.concepts/notes/own.json",), copied="a.concepts",
                     overwrites=False),
    "query-csv": Verb("query a.codes --latent 19 --out {o}/x.csv", ("x.csv",), overwrites=False),
    "query-parquet": Verb("query a.codes --latent 19 --out {o}/deep/x.parquet", ("deep/x.parquet",), overwrites=False),
    "query-sheet": Verb("query a.codes --latent 19 --sheet {o}/x.png", ("x.png",), overwrites=False),
    "look-sheet": Verb("look images/class0/00.png --sae run --device cpu --out {o}/x.png", ("x.png",),
                    overwrites=False),
    "look-page": Verb("look images/class0/00.png --sae run --device cpu --out {o}/x.html", ("x.html",),
                    overwrites=False),
    "report": Verb("report a.concepts {o}/x.html", ("x.html",), overwrites=False, changing=("x.html",)),
    "evaluate": Verb("evaluate run a.acts {o}/x.json --device cpu", ("x.json",)),
    "benchmark": Verb("benchmark run a.acts {o}/x.json --limit 12 --on-seen use --device cpu", ("x.json",)),
    "intervene": Verb("intervene run b.acts {o}/x.json --set 19=5 --device cpu", ("x.json",)),
    "attribute": Verb("attribute run b.acts {o}/x.json --n 1 --limit 12 --device cpu", ("x.json",)),
    "steer": Verb("steer run b.acts {o}/x.json --latent 19 --strength 20 --limit 12 --vocabulary words.txt "
                  "--device cpu", ("x.json",)),
    "rules": Verb("rules a.codes {o}/x.json --n-patches 1 --on-seen use", ("x.json",)),
    "probe": Verb("probe a.codes {o}/x.json --label label_name --k 1 --n-random 1", ("x.json",)),
    "inspect": Verb("inspect run --store a.acts --n-tokens 20 --out {o}/x.json", ("x.json",)),
    "localize": Verb("localize a.codes --out {o}/x.json", ("x.json",)),
    "compare": Verb("compare a.concepts adapted.concepts {o}/x.json --k 1 --n-seeds 1 --on-seen use --device cpu",
                    ("x.json", "x.html"), changing=("x.html",)),
    "convert": Verb("convert run {o}/x --to saelens --store a.acts", ("x",)),
    "import-acts": Verb(
        "import a.concepts/nearest_cosine.npy {o}/x.acts --layer 1 --model-name any --shard-images 32", ("x.acts",)
    ),
    "publish": Verb("publish a.concepts {o}/x --gallery", ("x",)),
    "site": Verb("publish {o}/a.concepts --site {o}/x --codes a.codes --run run --store a.acts --images images",
                 ("x",), copied="a.concepts", changing=("map.parquet", "atlas.bin")),
    "demo": Verb("demo {o}/scenes", ("scenes",), overwrites=False),
    "import": Verb("convert foreign {o}/run --store a.acts", ("run",)),
}  # fmt: skip
"""`quickstart` calls the functions of extract, train, encode, analyze and report; `demo` stands for its images."""


@dataclass(frozen=True)
class Trouble:
    """What stands in the way of an attempt.

    Attributes:
        at: the number of the call that fails, 0 for none.
        error: the number of its error. signal: sent before the call instead. lasting: all later calls fail too.
        limits: name of a resource (RLIMIT_...) -> its limit.
        user: the user who runs the command instead of us.
        obeys: permissions hold, which root may otherwise pass over; the interpreter's own files stay readable.
        lacks: what the system does not have, a key of `LACKING`.
    """

    at: int = 0
    error: int = 0
    signal: int = 0
    lasting: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)
    user: int | None = None
    obeys: bool = False
    lacks: str = ""


@dataclass(frozen=True)
class Attempt:
    code: int
    stdout: str
    stderr: str
    n_calls: int
    failed: str  # the call that failed
    seconds: float


def build_shim(folder: Path) -> Path | None:
    """Compile failing_calls.c. None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    shim = folder / "failing_calls.so"
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "failing_calls.c", "-ldl"], check=False
    )
    return shim if done.returncode == 0 else None


def copy_inputs(folder: Path) -> Path:
    """The golden pipeline, and a checkpoint of another package."""
    inputs = Path(shutil.copytree(GOLDEN, folder / "inputs"))
    command = [sys.executable, str(ROOT / "cli.py"), "--quiet", "convert", "run", "foreign", "--store", "a.acts"]
    subprocess.run(command, cwd=inputs, check=True, capture_output=True)
    return inputs


class Forked:
    """forked = Forked(inputs, shim); forked.run("extract images x.acts ...", root, Trouble(at=3, error=errno.EIO))"""

    def __init__(self, inputs: Path, shim: Path | None = None, *, warm: str = "") -> None:
        """`warm`: names of verbs, separated by commas, to run once before anything else; all by default."""
        self.inputs = inputs
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""),
            "OMP_NUM_THREADS": "1", "COLUMNS": "1000", "NO_COLOR": "1",
        }  # fmt: skip
        if shim is not None:
            environment["LD_PRELOAD"] = str(shim)
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(inputs), warm], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment, cwd=inputs,
        )  # fmt: skip
        self.process = self._process.pid
        self._ask({})

    def start(self, command: str, root: Path, trouble: Trouble = Trouble()) -> int:
        """Start an attempt and return its number, which `wait` takes."""
        question = {"command": command, "root": str(root), "trouble": asdict(trouble)}
        return int(self._ask({"start": question})["process"])

    def wait(self, process: int, timeout_s: float = 60) -> Attempt:
        """The end of an attempt. One that takes longer is killed, and its code is 124."""
        return Attempt(**self._ask({"wait": process, "timeout_s": timeout_s}))

    def run(self, command: str, root: Path, trouble: Trouble = Trouble(), timeout_s: float = 60) -> Attempt:
        return self.wait(self.start(command, root, trouble), timeout_s)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(question), file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        self._process.communicate()


# ---------------------------------------------------------------------------------------------------------------------
# In the forking process


def serve(inputs: Path, warm: str) -> None:
    """One request per line on stdin, one answer per line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import cli

    scratch = inputs.parent / f"warm-{os.getpid()}"
    for name in warm.split(",") if warm else VERBS:
        put_copies(VERBS[name], inputs, scratch / name)
        with redirect_stdout(io.StringIO()):
            code = _call(cli, VERBS[name].command.format(o=scratch / name).split())
        assert code == 0, (name, code)
    shutil.rmtree(scratch)
    gc.collect()
    gc.freeze()  # a child's collector would copy every page
    for line in sys.stdin:
        question = json.loads(line)
        if not question:
            answer: dict[str, Any] = {}
        elif "start" in question:
            answer = {"process": _fork(cli, inputs, **question["start"])}
        else:
            answer = _wait(inputs, question["wait"], question["timeout_s"])
        print(json.dumps(answer), file=answers, flush=True)


def put_copies(verb: Verb, inputs: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    if verb.copied:
        shutil.copytree(inputs / verb.copied, folder / verb.copied)


def _call(cli: Any, words: list[str]) -> int:
    if words[0] == "demo":
        from actcache import PipelineError
        from actcache.demo import write_demo

        try:
            write_demo(words[1], n_images=4)
        except PipelineError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    try:
        cli.app(["--quiet", *words], prog_name="patchsae")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def _report(inputs: Path, process: int) -> Path:
    return inputs.parent / f"attempt-{process}"


def _fork(cli: Any, inputs: Path, command: str, root: str, trouble: dict[str, Any]) -> int:
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        report = _report(inputs, os.getpid())
        report.mkdir()
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(report / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        facts = os.open(report / "facts", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        faulthandler.register(signal.SIGUSR1, file=2)
        from dask import threaded

        threaded.default_pool = None  # its threads stayed in the forking process
        for name, limit in trouble["limits"].items():
            hard = resource.getrlimit(getattr(resource, name))[1]
            resource.setrlimit(getattr(resource, name), (limit, hard))
        if trouble["user"] is not None:
            os.setgroups([])
            os.setgid(trouble["user"])
            os.setuid(trouble["user"])
        if trouble["obeys"]:
            _obey_permissions()
        if trouble["lacks"]:
            LACKING[trouble["lacks"]]()
        with _armed(root, trouble) as count:
            code = _call(cli, shlex.split(command))
        sys.stdout.flush()
        sys.stderr.flush()
        os.write(facts, json.dumps(count()).encode())
    except BaseException:
        code = 70
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code)


def _obey_permissions() -> None:
    """Give up root's privilege to pass over permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH), for good."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # version 3: two words for each set
    if libc.capget(header, sets) == 0:
        for word in range(3):  # effective, permitted, inheritable
            sets[word] &= ~0b110
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "the privileges of root cannot be given up")


def _lack_links(error: int) -> Callable[[], None]:
    def refuse(*paths: object, **options: object) -> None:
        raise OSError(error, os.strerror(error))

    return lambda: setattr(os, "link", refuse)


def _lack_flushed_folders() -> None:
    flush = os.fsync

    def flush_files(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        flush(fd)

    os.fsync = flush_files  # type: ignore[assignment]


def _lack_locks() -> None:
    from actcache.artifacts import processes

    processes.fcntl = None  # type: ignore[assignment]


def _lack_calls_of_linux() -> None:
    for name in ("fork", "preadv", "pwritev", "posix_fadvise", "posix_fallocate", "O_DIRECT", "sched_getaffinity"):
        delattr(os, name)
    del mmap.MADV_HUGEPAGE


def _lack_proc() -> None:
    """Hide /proc from this process behind an empty disk, which only root can do."""
    from actcache.artifacts import processes

    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private_and_below = 0x20000, 0x44000
    if (
        libc.unshare(new_mounts) != 0
        or libc.mount(b"none", b"/", None, private_and_below, None) != 0
        or libc.mount(b"none", b"/proc", b"tmpfs", 0, None) != 0
    ):
        raise OSError(ctypes.get_errno(), "/proc cannot be hidden")
    for remembered in (processes.machine, processes._booted_at):
        remembered.cache_clear()


LACKING: dict[str, Callable[[], None]] = {
    "hard links, as on FAT": _lack_links(errno.EPERM),
    "hard links, as on some network disks": _lack_links(errno.ENOTSUP),
    "flushing of folders": _lack_flushed_folders,
    "locks": _lack_locks,
    "what only Linux has": _lack_calls_of_linux,
    "/proc": _lack_proc,
}
"""What a system may lack, and how a process loses it."""


@contextmanager
def _armed(root: str, trouble: Mapping[str, Any]) -> Iterator[Callable[[], tuple[int, str]]]:
    """Let a call fail, and yield a function that says how many there were and which one failed."""
    if "failing_calls" in os.environ.get("LD_PRELOAD", ""):
        shim = ctypes.CDLL(None)
        shim.failed_call.restype = ctypes.c_char_p
        shim.fail_at.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int, ctypes.c_int, ctypes.c_int]
        shim.fail_at(root.encode(), *(int(trouble[name]) for name in ("at", "error", "signal", "lasting")))
        yield lambda: (shim.n_calls(), shim.failed_call().decode())
        return
    if not trouble["at"]:
        yield lambda: (0, "")
        return
    from small_store import watched_calls  # without a C compiler: calls that Python makes

    made = [0, ""]

    def act(n: int, name: str) -> None:
        made[0] = n
        if n == trouble["at"]:
            made[1] = name
            if trouble["signal"]:
                os.kill(os.getpid(), trouble["signal"])
        if n == trouble["at"] or (n > trouble["at"] and trouble["lasting"] and name not in ("unlink", "rmdir")):
            raise OSError(trouble["error"], os.strerror(trouble["error"]))

    with watched_calls(act):
        yield lambda: (int(made[0]), str(made[1]))


def _wait(inputs: Path, process: int, timeout_s: float) -> dict[str, Any]:
    started = time.monotonic()
    status = None
    while time.monotonic() < started + timeout_s:
        ended, code = os.waitpid(process, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.005)
    if status is None:
        os.kill(process, signal.SIGUSR1)  # it prints where it stands
        time.sleep(0.5)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        status = 124
    report = _report(inputs, process)
    facts = (report / "facts").read_text() if (report / "facts").exists() else ""
    n_calls, failed = json.loads(facts) if facts else (0, "")
    texts = [(report / name).read_text() if (report / name).exists() else "" for name in ("stdout", "stderr")]
    shutil.rmtree(report, ignore_errors=True)
    return {
        "code": status, "stdout": texts[0], "stderr": texts[1], "n_calls": n_calls, "failed": failed,
        "seconds": time.monotonic() - started,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What lies there


def contents(verb: Verb, folder: Path) -> dict[str, bytes | None]:
    """Every file of the outputs; None for those whose bytes depend on the time."""
    found: dict[str, bytes | None] = {}
    for out in verb.out:
        files = sorted((folder / out).rglob("*")) if (folder / out).is_dir() else [folder / out]
        for file in files:
            if file.is_file():
                found[str(file.relative_to(folder))] = None if file.name in verb.changing else file.read_bytes()
    return found


def leftovers(folder: Path) -> list[str]:
    """Temporary files, and locks."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*")
        if path.name.endswith((".tmp", ".lock")) or path.name.startswith(".")
    )  # fmt: skip


def spread(n: int, wanted: int | None) -> Iterator[int]:
    """`wanted` positions in 1..n, evenly; all of them if None."""
    if wanted is None or n <= wanted:
        yield from range(1, n + 1)
    else:
        yield from sorted({1 + round(i * (n - 1) / (wanted - 1)) for i in range(wanted)})


if __name__ == "__main__":
    sys.path.append(str(HERE.parent / "actcache"))  # small_store
    serve(Path(sys.argv[1]), sys.argv[2])
