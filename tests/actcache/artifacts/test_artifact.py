"""What all artifacts guarantee: an identity without place or time, atomic writes, a seal over every file."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from actcache import CorruptError, IncompleteError, SchemaError, SettingsError, describe, verify
from actcache.artifacts import (
    Artifact,
    begin_artifact,
    open_artifact,
    read_manifest,
    seal_artifact,
    write_atomic,
    write_record,
)
from actcache.artifacts.litter import remove_litter, temporary_path


def begin(path: Path, *, k: int = 3, parent: str = "abc", overwrite: bool = False, kind: Any = "run") -> Artifact:
    return begin_artifact(
        path,
        kind,
        settings={"k": k, "nested": {"tokens": "all"}},
        parents={"store": (parent, path.parent / "there.acts")},
        provenance={"torch": "2"},
        prepare=lambda folder: (folder / "plan.txt").write_text("plan") and None,
        overwrite=overwrite,
    )


def test_identity_depends_on_settings_and_parents_not_on_place(tmp_path: Path) -> None:
    first = begin(tmp_path / "a")
    assert begin(tmp_path / "deep" / "b").id == first.id
    assert begin(tmp_path / "c", k=4).id != first.id
    assert begin(tmp_path / "d", parent="xyz").id != first.id
    assert begin(tmp_path / "e", kind="codes").id != first.id


def test_the_same_settings_find_the_same_artifact(tmp_path: Path) -> None:
    first = begin(tmp_path / "a")
    (tmp_path / "a" / "work.bin").write_bytes(b"half done")
    again = begin(tmp_path / "a")
    assert (again.id, again.complete) == (first.id, False)
    assert (tmp_path / "a" / "work.bin").read_bytes() == b"half done"
    seal_artifact(tmp_path / "a")
    assert begin(tmp_path / "a").complete


def test_other_settings_are_refused_side_by_side_and_nothing_changes(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    write_record(tmp_path / "a", 0, {"files": {}})
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir() if file.is_file()}
    with pytest.raises(SettingsError, match=r"k: 3 there, 9 asked for") as caught:
        begin(tmp_path / "a", k=9, parent="other")
    assert "store (parent): abc there, other asked for" in str(caught.value)
    assert "tokens" not in str(caught.value)
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir() if file.is_file()} == before


def test_overwrite_replaces_an_artifact_of_the_same_kind_only(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    (tmp_path / "a" / "old.bin").write_bytes(b"old")
    assert begin(tmp_path / "a", k=9, overwrite=True).settings["k"] == 9
    assert not (tmp_path / "a" / "old.bin").exists()
    with pytest.raises(SchemaError):
        begin(tmp_path / "a", kind="codes", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(FileNotFoundError):
        begin(tmp_path / "mine", overwrite=True)
    with pytest.raises(FileNotFoundError):
        begin(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "precious"
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingsError, match="is a file"):
        begin(tmp_path / "file")
    assert sorted(os.listdir(tmp_path)) == ["a", "file", "mine"]


def test_a_newer_schema_is_refused_and_changed_fields_are_noticed(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    file = tmp_path / "a" / "artifact.json"
    value = json.loads(file.read_text())
    file.write_text(json.dumps(value | {"schema": 2}))
    with pytest.raises(SchemaError, match="newer"):
        open_artifact(tmp_path / "a")
    file.write_text(json.dumps(value | {"settings": {"k": 4}}))
    with pytest.raises(CorruptError, match="was changed"):
        open_artifact(tmp_path / "a")


GARBAGE = ["", "{", "[]", "7", '{"kind": "run"}', '{"schema": 1, "parents": []}', '{"schema": Infinity}', "[" * 5000]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_an_error_of_ours(tmp_path: Path, text: str) -> None:
    begin(tmp_path / "a")
    (tmp_path / "a" / "artifact.json").write_text(text)
    with pytest.raises(CorruptError, match=r"artifact\.json"):
        open_artifact(tmp_path / "a")


def test_the_manifest_covers_every_file_but_peoples_notes(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "sub" / "data.bin").write_bytes(b"12345")
    (tmp_path / "a" / "notes").mkdir()
    (tmp_path / "a" / "notes" / "names.json").write_text("{}")
    (tmp_path / "a" / ".data.bin.77.tmp").write_bytes(b"litter")
    litter = tmp_path / "a" / temporary_path(Path("data.bin")).name.replace(str(os.getpid()), "4194305")
    litter.write_bytes(b"of a process that cannot be")
    foreign = tmp_path / "a" / ".data.bin.00000000-1.tmp"
    foreign.write_bytes(b"of another machine")
    seal_artifact(tmp_path / "a", quality=0.5)
    manifest = read_manifest(open_artifact(tmp_path / "a"))
    assert set(manifest["files"]) == {"artifact.json", "plan.txt", "sub/data.bin"}
    assert manifest["files"]["sub/data.bin"]["bytes"] == 5
    assert manifest["quality"] == 0.5
    before = (tmp_path / "a" / "manifest.json").read_bytes()
    seal_artifact(tmp_path / "a", quality=0.5)
    assert (tmp_path / "a" / "manifest.json").read_bytes() == before
    assert verify(tmp_path / "a").ok
    remove_litter(tmp_path / "a")
    assert not litter.exists()
    assert foreign.exists()


def test_a_moved_artifact_opens_and_still_knows_its_parents(tmp_path: Path) -> None:
    begin(tmp_path / "here" / "a")
    seal_artifact(tmp_path / "here" / "a")
    shutil.move(tmp_path / "here", tmp_path / "there")
    found = open_artifact(tmp_path / "there" / "a", "run", complete=True)
    assert found.parent_path("store") == tmp_path / "there" / "there.acts"


def test_an_unsealed_artifact_is_refused_when_completeness_is_asked_for(tmp_path: Path) -> None:
    begin(tmp_path / "a")
    with pytest.raises(IncompleteError, match="resumes"):
        open_artifact(tmp_path / "a", complete=True)
    assert describe(tmp_path / "a")["complete"] is False
    parents = {"store": {"id": "abc", "path": "../there.acts", "state": "not there"}}
    assert describe(tmp_path / "a")["parents"] == parents


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "x.json", b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(OSError, match="No space"):
                write_atomic(tmp_path / "x.json", b"new")
        assert (tmp_path / "x.json").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["x.json"]
    write_atomic(tmp_path / "x.json", b"new")
    assert (tmp_path / "x.json").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["x.json"]


def test_an_artifact_that_cannot_be_begun_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "plan.txt").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin_artifact(tmp_path / "a", "run", settings={}, parents={}, provenance={}, prepare=fail)
    assert os.listdir(tmp_path) == []
