"""The commit protocol, with plain arrays and no model: killed anywhere and repeated, it ends with the same bytes.

Run as a script (`test_writer.py FOLDER`) this file is the driver of the kill test: it forks one writer a step, and
each is killed by SIGKILL at its own step.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from actcache import ActivationStore, HookPoint, IncompleteError, PipelineError, missing_shards, remove_litter, verify
from actcache.images import IMAGES_SCHEMA, ImagePlan
from actcache.store import layout_of
from actcache.writer import ShardWriter, begin_store, seal_store

ROOT = Path(__file__).parents[2]
SYSTEM_CALLS = ("fsync", "replace", "link", "pwrite", "rename", "unlink", "mkdir")
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
    """[I, T, D] a hook point, the prompt tokens behind the patches."""
    rng = np.random.default_rng(5)
    n_tokens = 1 + fields["grid"][0] * fields["grid"][1] + fields["n_extra"]
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
    path: Path, fields: dict[str, Any], *, failed: dict[int, str] | None = None, n_shards: int | None = None
) -> None:
    """What extraction does with a store, the model left out: begin or find, write what is missing, seal."""
    failed = failed or {}
    values = make_values(fields)
    plan = make_plan(fields["n_images"])
    artifact = begin_store(path, plan=plan, images_path=path.parent / "images", settings=fields, provenance={})
    layout = layout_of(artifact.settings)
    if not artifact.complete:
        remove_litter(path)
        for shard in missing_shards(path, layout.n_shards)[:n_shards]:
            with ShardWriter(artifact, shard) as writer:
                for block in range(layout.n_blocks(shard)):
                    images = layout.block_range(shard, block)
                    for hook, x in values.items():
                        part = x[images.start : images.stop].copy()
                        part[[image - images.start for image in failed if image in images]] = 0
                        patches = part[:, 1 : layout.n_tokens].reshape(len(images), *layout.grid, -1)
                        writer.write(
                            HookPoint.parse(hook),
                            block,
                            patches.transpose(1, 0, 2, 3),
                            part[:, 0],
                            valid=np.array([image not in failed for image in images]),
                            extra=part[:, layout.n_tokens :] if layout.n_extra else None,
                        )
                writer.commit({image: reason for image, reason in failed.items() if image in layout.shard_range(shard)})
    seal_store(path)


def all_bytes(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


# ---------------------------------------------------------------------------------------------------------------------
# Killed


def count_calls(act: Callable[[int], object]) -> None:
    """From now on, `act(n)` is called before the n-th call that changes the disk."""
    n_calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal n_calls
            n_calls += 1
            act(n_calls)
            return function(*args, **kwargs)

        return call

    os.fsync = lambda fd: None  # a kill loses no page of the kernel's
    for name in SYSTEM_CALLS:
        setattr(os, name, counted(getattr(os, name)))


def kill_writers(folder: Path) -> None:
    """Leave FOLDER/<n>.acts as a writer leaves it that is killed at its n-th system call, for every n there is."""
    import numcodecs  # noqa: F401
    import zarr  # noqa: F401

    make_plan(1), make_values(make_settings())  # pyarrow and numpy import more on first use: once, not in every child
    step, finished = 0, False
    while not finished:
        step += 1
        child = os.fork()
        if child == 0:
            count_calls(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == step else None)  # noqa: B023
            write_store(folder / f"{step}.acts", make_settings())
            os._exit(0)
        _, status = os.waitpid(child, 0)
        finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        assert finished or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), status
    print(step)


def test_killed_at_any_step_and_repeated_it_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # four times faster
    write_store(tmp_path / "whole.acts", make_settings())
    expected = all_bytes(tmp_path / "whole.acts")
    driver = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(
        driver, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    n_steps = int(done.stdout)
    assert n_steps > 60
    n_missing = []
    for step in range(1, n_steps + 1):
        path = tmp_path / f"{step}.acts"
        try:  # what was killed is refused, or it is whole
            opened = ActivationStore.open(path)
            np.testing.assert_array_equal(opened.read(), make_values(make_settings())["blocks.3.hook_resid_post"])
        except (IncompleteError, FileNotFoundError):
            n_missing.append(len(missing_shards(path, 2)) if path.exists() else 3)
        write_store(path, make_settings())
        assert all_bytes(path) == expected, f"killed at step {step}"
    assert n_missing == sorted(n_missing, reverse=True)  # later is never less
    assert set(n_missing) == {3, 2, 1, 0}
    assert verify(path).ok


def test_what_was_committed_before_is_not_written_again(tmp_path: Path) -> None:
    write_store(tmp_path / "x.acts", make_settings(), n_shards=1)
    first = [file for file in (tmp_path / "x.acts").rglob("c/0/**/0") if file.is_file()]
    before = [file.stat().st_mtime_ns for file in first]
    write_store(tmp_path / "x.acts", make_settings())
    assert [file.stat().st_mtime_ns for file in first] == before
    assert len(first) == 2


def test_an_unfinished_store_is_refused_and_counts_what_is_missing(tmp_path: Path) -> None:
    write_store(tmp_path / "x.acts", make_settings(n_images=100), n_shards=1)
    with pytest.raises(IncompleteError, match="3 of 4 shards are missing"):
        ActivationStore.open(tmp_path / "x.acts")
    found = verify(tmp_path / "x.acts")
    assert (found.complete, found.problems) == (False, ())
    before = all_bytes(tmp_path / "x.acts")
    seal_store(tmp_path / "x.acts")  # whoever sees all records seals; here nobody does
    assert all_bytes(tmp_path / "x.acts") == before


def test_sealing_again_changes_nothing(tmp_path: Path) -> None:
    write_store(tmp_path / "x.acts", make_settings())
    before = all_bytes(tmp_path / "x.acts")
    seal_store(tmp_path / "x.acts")
    (tmp_path / "x.acts" / "manifest.json").unlink()  # killed just before it was named
    seal_store(tmp_path / "x.acts")
    assert all_bytes(tmp_path / "x.acts") == before


# ---------------------------------------------------------------------------------------------------------------------
# A disk that fails


@pytest.mark.parametrize("name", ["pwrite", "fsync", "link"])
def test_a_full_disk_commits_nothing_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path, fields = tmp_path / "x.acts", make_settings()
    write_store(path, fields, n_shards=0)
    empty = all_bytes(path)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        with pytest.raises(OSError, match="No space left"):
            write_store(path, fields)
    assert all_bytes(path) == empty
    write_store(path, fields)
    assert verify(path).ok


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "whole.acts", make_settings())
    pwrite, sizes = os.pwrite, []

    def short(fd: int, data: Any, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(fd, data[:100], offset)

    monkeypatch.setattr(os, "pwrite", short)
    write_store(tmp_path / "x.acts", make_settings())
    assert max(sizes) > 100
    assert all_bytes(tmp_path / "x.acts") == all_bytes(tmp_path / "whole.acts")


def test_an_error_while_beginning_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(PipelineError):
        write_store(tmp_path / "x.acts", make_settings(codec="gzip"))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Values


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    return make_settings(
        n_images=draw(st.integers(1, 70)),
        grid=[draw(st.integers(1, 3)), draw(st.integers(1, 3))],
        d_model=draw(st.integers(1, 5)),
        dtype=draw(st.sampled_from(["float16", "float32"])),
        codec=draw(st.sampled_from(["raw", "raw", "lz4", "zstd"])),
        shard_images=draw(st.sampled_from([16, 48])),
        n_extra=draw(st.sampled_from([0, 0, 2])),
        hook_points=["blocks.0.hook_resid_post", "blocks.3.hook_resid_post"],
    )


@settings(max_examples=15, deadline=None)
@given(shapes())
def test_any_shape_reads_back_here_and_through_plain_zarr(fields: dict[str, Any]) -> None:
    import zarr

    folder = Path(tempfile.mkdtemp())
    try:
        write_store(folder / "x.acts", fields)
        store = ActivationStore.open(folder / "x.acts")
        group: Any = zarr.open_group(folder / "x.acts" / "activations.zarr", mode="r")
        for hook, x in make_values(fields).items():
            np.testing.assert_array_equal(store.read(HookPoint.parse(hook), check=True), x[:, : store.n_tokens])
            np.testing.assert_array_equal(group[f"{hook}/cls"][:], x[:, 0])
            np.testing.assert_array_equal(group[f"{hook}/patches"][:], x[:, 1 : store.n_tokens])
            if fields["n_extra"]:
                np.testing.assert_array_equal(group[f"{hook}/extra"][:], x[:, store.n_tokens :])
        assert verify(folder / "x.acts").ok
    finally:
        shutil.rmtree(folder)


def test_statistics_and_failures_are_those_of_the_rows(tmp_path: Path) -> None:
    failed = {3: "truncated", 33: "not an image"}
    fields = make_settings()
    write_store(tmp_path / "x.acts", fields, failed=failed)
    store = ActivationStore.open(tmp_path / "x.acts")
    assert store.failed == failed
    assert np.flatnonzero(~store.valid).tolist() == [3, 33]
    assert not store.read(images=[3, 33]).any()
    good = np.delete(make_values(fields)["blocks.3.hook_resid_post"], [3, 33], axis=0).astype(np.float64)
    for tokens, rows in (("all", good), ("cls", good[:, :1]), ("patch", good[:, 1:])):
        flat, statistics = rows.reshape(-1, 4), store.statistics(None, tokens)  # type: ignore[arg-type]
        assert statistics.count == len(flat)
        np.testing.assert_allclose(statistics.sum, flat.sum(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.sum_squares, (flat**2).sum(0), rtol=1e-12)
        assert statistics.absmax == abs(flat).max()


if __name__ == "__main__":
    kill_writers(Path(sys.argv[1]))
