"""A shard is committed only if every one of its chunks was written, whichever write fails, and once the disk is well
again the same command makes the store of an undisturbed one."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache import ActivationStore, StorageError, extract, verify
from actcache.artifacts import digest, file_digest
from actcache.artifacts.files import crc32c, encode_json
from actcache.store import writer

OPTIONS: dict[str, Any] = {"layers": [0, 1], "shard_images": 32, "precision": "float32", "device": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path]) -> Path:
    return make_images(tmp_path_factory.mktemp("images") / "images", 70)


def count_writes(patch: pytest.MonkeyPatch, fail_at: int = 0) -> list[int]:
    """Count the writes of chunks and indices; one of them fails."""
    real, made = writer._pwrite_all, []

    def write(fd: int, data: Any, offset: int) -> None:
        made.append(len(data))
        if len(made) == fail_at:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd, data, offset)

    patch.setattr(writer, "_pwrite_all", write)
    return made


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_no_shard_is_committed_that_lacks_a_chunk(
    tmp_path: Path, images: Path, tiny_model: dict[str, str], codec: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        made = count_writes(patch)
        whole = extract(images, tmp_path / "whole.acts", **tiny_model, **OPTIONS, codec=codec)
    expected = whole.read(1).tobytes()
    for at in range(1, len(made) + 1):
        store = tmp_path / f"{at}.acts"
        with pytest.MonkeyPatch.context() as patch:
            count_writes(patch, at)
            with pytest.raises(StorageError, match="cannot be written"):
                extract(images, store, **tiny_model, **OPTIONS, codec=codec)
        resumed = extract(images, store, **tiny_model, **OPTIONS, codec=codec)
        assert verify(store).ok
        assert resumed.read(1, check=True).tobytes() == expected


def test_verify_finds_a_shard_that_was_committed_without_a_chunk(
    tmp_path: Path, images: Path, tiny_model: dict[str, str]
) -> None:
    """An earlier version may have done so: the file has its size, but one piece fewer."""
    store = extract(images, tmp_path / "x.acts", **tiny_model, **OPTIONS)
    record = store.path / "commits" / "000001.json"
    fields = json.loads(record.read_bytes())
    name = next(name for name in fields["files"] if "/patches/" in name)
    pieces = fields["files"][name]["pieces"]
    pieces[0:2] = [[pieces[0][0] + pieces[1][0], 0]]
    data = bytearray((store.path / name).read_bytes())
    pieces[0][1] = crc32c(bytes(data[: pieces[0][0]]))
    del fields["digest"]
    record.write_bytes(encode_json({**fields, "digest": digest(fields)}))
    manifest = json.loads((store.path / "manifest.json").read_bytes())
    manifest["files"]["commits/000001.json"] = file_digest(record)
    del manifest["digest"]
    (store.path / "manifest.json").write_bytes(encode_json({**manifest, "digest": digest(manifest)}))
    assert [problem.what for problem in verify(store.path).problems] == ["lists files that lack chunks"]
    assert ActivationStore.open(store.path).n_images == 70
