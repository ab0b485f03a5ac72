"""Stores of a few kilobytes, written from plain arrays by the real writer without a model; and system calls that fail.

Tests and the processes that they start share it: a store is written in 10 ms, so every fault at every step is tried.
"""

import builtins
import gc
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from actcache import HookPoint
from actcache.artifacts import missing_shards
from actcache.artifacts.litter import remove_litter
from actcache.sources.plan import IMAGES_SCHEMA, ImagePlan
from actcache.store.settings import StoreSettings
from actcache.store.writer import ShardWriter, begin_store, seal_store

Values = dict[str, NDArray[Any]]


def make_settings(n_images: int = 40, **other: Any) -> dict[str, Any]:
    return {
        "model_id": "0123456789abcdef",
        "rows_id": "fedcba9876543210",
        "hook_points": ["blocks.3.hook_resid_post"],
        "dtype": "float16",
        "precision": "float32",
        "codec": "raw",
        "n_images": n_images,
        "grid": [2, 3],
        "patch_size": [8, 8],
        "d_model": 4,
        "n_extra": 0,
        "chunk_images": 16,
        "shard_images": 32,
        "seed": 0,
        "limit": None,
        "preprocess": {},
        **other,
    }


def make_values(fields: dict[str, Any]) -> Values:
    """[I, T, D] for each hook point: special tokens, patches, prompt tokens."""
    rng = np.random.default_rng(5)
    n_tokens = len(fields.get("prefix", ["cls"])) + fields["grid"][0] * fields["grid"][1] + fields["n_extra"]
    return {
        hook: rng.normal(size=(fields["n_images"], n_tokens, fields["d_model"])).astype(fields["dtype"])
        for hook in fields["hook_points"]
    }


def make_plan(n_images: int) -> ImagePlan:
    columns = [range(n_images), [f"{i}.png" for i in range(n_images)], [-1] * n_images, [""] * n_images]
    table = pa.table(
        dict(zip(IMAGES_SCHEMA.names, [*columns, [1] * n_images], strict=True)),
        schema=IMAGES_SCHEMA,
    )
    return ImagePlan(table, "fedcba9876543210", 0)


def write_store(
    path: Path,
    fields: dict[str, Any],
    *,
    failed: dict[int, str] | None = None,
    n_shards: int | None = None,
    low_bits: int = 0,
    tidy: bool = True,
    values: Values | None = None,
    provenance: dict[str, Any] | None = None,
) -> None:
    """What extraction does with a store, without the model: begin or open it, write what is missing, seal it.

    Args:
        low_bits: added to the bytes of every value, as another processor or batch size does.
        tidy: remove what killed writers left; False trusts nothing to have been removed.
        values: [I, T, D] for each hook point instead of random ones.
        provenance: what the store records of its making.
    """
    failed = failed or {}
    values = make_values(fields) if values is None else values
    for x in values.values():
        x.view(f"u{x.itemsize}")[...] += low_bits
    plan = make_plan(fields["n_images"])
    settings = StoreSettings.from_json(fields)
    artifact = begin_store(
        path, plan=plan, images_path=path.parent / "images", settings=settings, provenance=provenance or {}
    )
    layout = settings.layout
    if not artifact.complete:
        if tidy:
            remove_litter(path)
        for shard in missing_shards(path, layout.n_shards)[:n_shards]:
            with ShardWriter(artifact, shard) as writer:
                for block in range(layout.n_blocks(shard)):
                    images = layout.block_range(shard, block)
                    for hook, x in values.items():
                        part = x[images.start : images.stop].copy()
                        part[[image - images.start for image in failed if image in images]] = 0
                        n_cls, first = int("cls" in layout.prefix), len(layout.prefix)
                        stop = first + layout.n_patches
                        patches = part[:, first:stop].reshape(len(images), *layout.grid, -1)
                        writer.write(
                            HookPoint.parse(hook),
                            block,
                            patches.transpose(1, 0, 2, 3),
                            part[:, 0] if n_cls else None,
                            valid=np.array([image not in failed for image in images]),
                            registers=part[:, n_cls:first] if first > n_cls else None,
                            extra=part[:, stop:] if layout.n_extra else None,
                        )
                writer.commit({image: reason for image, reason in failed.items() if image in layout.shard_range(shard)})
    seal_store(path)


def all_bytes(store: Path) -> dict[str, bytes]:
    """What a store holds wherever it lies; places.json holds the paths of one machine."""
    files = {str(file.relative_to(store)): file for file in store.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name != "places.json"}


# ---------------------------------------------------------------------------------------------------------------------
# Calls that change the disk

SYSTEM_CALLS = ("pwrite", "write", "fsync", "link", "replace", "rename", "unlink", "mkdir", "rmdir")


@contextmanager
def watched_calls(act: Callable[[int, str], object]) -> Iterator[None]:
    """Within the block, `act(n, name)` is called before the n-th call that changes the disk. fsync does nothing.

    Counted are the calls of SYSTEM_CALLS, opening a file to write, writing to it, and pyarrow's writing of a table.
    """
    n_calls = 0

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            act(n_calls, name)
            return function(*args, **kwargs)

        return call

    class Written(io.FileIO):
        write = counted("write", io.FileIO.write)

    plain_open, plain_os_open = builtins.open, os.open
    counted_os_open, counted_file = counted("open", os.open), counted("open", Written)

    def os_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        return int((counted_os_open if flags & os.O_CREAT else plain_os_open)(path, flags, *args, **kwargs))

    def open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "b" in mode and set(mode) & set("wxa"):
            return io.BufferedWriter(counted_file(file, mode.replace("b", "")))
        return plain_open(file, mode, *args, **kwargs)

    patched: list[tuple[Any, str, Any]] = [(os, "open", os_open), (builtins, "open", open), (io, "open", open)]
    patched += [(os, name, counted(name, getattr(os, name))) for name in SYSTEM_CALLS if name != "fsync"]
    patched += [(os, "fsync", counted("fsync", lambda fd: None)), (pq, "write_table", counted("open", pq.write_table))]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patched]
    for owner, name, new in patched:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for owner, name, old in before:
            setattr(owner, name, old)


# ---------------------------------------------------------------------------------------------------------------------
# Writers in processes of their own


class Writers:
    """Forks writers that receive a signal at a chosen step, from a process that has imported everything."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self._forker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def run(self, path: Path, fields: dict[str, Any], *, at: int, how: str = "SIGKILL", low_bits: int = 0) -> bool:
        """write_store() that gets a signal just before its `at`-th call. Returns whether it finished instead."""
        fields = {"path": str(path), "fields": fields, "at": at, "how": how, "low_bits": low_bits}
        return bool(self._ask(fields))

    def go_on(self) -> None:
        """Continue the writer that was stopped by SIGSTOP; it must finish without an error."""
        assert self._ask({}) is True

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._forker.stdin
        assert self._forker.stdout
        print(json.dumps(question), file=self._forker.stdin, flush=True)
        return json.loads(self._forker.stdout.readline())

    def close(self) -> None:
        self._forker.communicate()


def fork_writers() -> None:
    """The forking process: one request per line on stdin, one answer per line on stdout."""
    with tempfile.TemporaryDirectory() as scratch:
        write_store(Path(scratch) / "x.acts", make_settings())  # imports on first use: once, not in every child
    gc.freeze()  # a child's collector would copy every page
    child = 0
    for line in sys.stdin:
        question = json.loads(line)
        if question:
            child = os.fork()
            if child == 0:
                _be_writer(**question)
        else:
            os.kill(child, signal.SIGCONT)
        _, status = os.waitpid(child, os.WUNTRACED)
        ended = os.WIFEXITED(status)
        assert not ended or os.WEXITSTATUS(status) == 0, status
        print(json.dumps(ended), flush=True)


def _be_writer(path: str, fields: dict[str, Any], at: int, how: str, low_bits: int) -> None:
    def act(n: int, name: str) -> None:
        if n == at:
            os.kill(os.getpid(), signal.Signals[how])

    status = 1
    try:
        with watched_calls(act):
            write_store(Path(path), fields, low_bits=low_bits)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    fork_writers()
