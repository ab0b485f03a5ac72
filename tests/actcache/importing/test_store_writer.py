"""write_store(): a program of one's own writes a store, in the order that the store wants."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_store import all_bytes

from actcache import ActivationStore, IncompleteError, SettingsError, StoreWriter, verify, write_store

X = np.random.default_rng(0).normal(size=(50, 10, 6)).astype("f4")


def begin(path: Path, **other: Any) -> StoreWriter:
    options = {"n_images": 50, "n_tokens": 10, "d_model": 6, "layers": [3], "model_name": "m", "source": "x"}
    return write_store(path, **{**options, "shard_images": 16, **other})


def write_all(writer: StoreWriter, write: Callable[[StoreWriter, Any], Any]) -> None:
    with writer:
        for rows in writer:
            write(writer, rows)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with begin(tmp_path / "x.acts") as writer:
        asked = []
        for rows in writer:
            asked.append(rows)
            writer.write(torch.from_numpy(X[rows]).bfloat16())
    order = np.concatenate(asked)
    assert sorted(order) == list(range(50))
    assert order.tolist() != list(range(50))  # mixed, as training wants it
    expected = torch.from_numpy(X).bfloat16().half().numpy()[order]
    np.testing.assert_array_equal(writer.store.read_stream(check=True), expected)
    assert writer.store.images["source_index"].to_pylist() == order.tolist()
    assert verify(tmp_path / "x.acts").ok


def test_images_give_their_number_their_names_and_their_labels(tmp_path: Path, tiny_images: Path) -> None:
    with begin(tmp_path / "x.acts", images=tiny_images, n_images=None) as writer:
        for rows in writer:
            writer.write(np.full((len(rows), 10, 6), rows[:, None, None], dtype="f4"))
    store = writer.store
    names = sorted(str(path.relative_to(tiny_images)) for path in tiny_images.rglob("*.png"))
    assert store.images["uri"].to_pylist() == [names[int(row)] for row in store.read(tokens="cls")[:, 0, 0]]
    with pytest.raises(SettingsError, match=r"are of 50 images, but .*images has 75"):
        begin(tmp_path / "y.acts", images=tiny_images)


def test_a_program_that_stopped_goes_on(tmp_path: Path) -> None:
    for path, stop in ((tmp_path / "x.acts", 20), (tmp_path / "whole.acts", 100)):
        with begin(path) as writer:
            done = 0
            for rows in writer:
                if done > stop:
                    break
                writer.write(X[rows])
                done += len(rows)
    with pytest.raises(IncompleteError, match="running the program that wrote it again"):
        ActivationStore.open(tmp_path / "x.acts")
    with begin(tmp_path / "x.acts") as writer:
        assert 0 < writer.n_images < 50
        for rows in writer:
            writer.write(X[rows])
    with begin(tmp_path / "x.acts") as again:
        assert list(again) == []
    assert all_bytes(tmp_path / "x.acts") == all_bytes(tmp_path / "whole.acts")
    with (
        pytest.raises(SettingsError, match=r"imported\.source: x there, y asked for"),
        begin(tmp_path / "x.acts", source="y"),
    ):
        pass


def test_several_hook_points(tmp_path: Path) -> None:
    with begin(tmp_path / "x.acts", layers=[3, 1]) as writer:
        for rows in writer:
            with pytest.raises(SettingsError, match=r"Give an array for each of blocks\.1\.hook_resid_post, blocks\.3"):
                writer.write(X[rows])
            with pytest.raises(SettingsError, match=r"Expected activations of blocks\.1.*got 1, 2\."):
                writer.write({1: X[rows], 2: X[rows]})
            writer.write({3: X[rows], "blocks.1.hook_resid_post": -X[rows]})
    np.testing.assert_array_equal(writer.store.read(3), -writer.store.read(1))


def test_what_a_program_may_do_wrong(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="write\\(\\) is called in the loop"):
        begin(tmp_path / "x.acts").write(X)
    cases: dict[str, Any] = {
        r"float32 of shape \[16, 9, 6\]. Expected floating-point numbers of shape \[16, 10, 6\]": X[:16, 1:],
        "are int64 of shape": np.zeros((16, 10, 6), "i8"),
        r"are <U4 of shape \[\]": "text",
    }
    for message, values in cases.items():
        with pytest.raises(SettingsError, match=message):
            write_all(begin(tmp_path / "x.acts"), lambda writer, rows, values=values: writer.write(values))
    with pytest.raises(SettingsError, match="The 16 images of a block were not written"):
        write_all(begin(tmp_path / "x.acts"), lambda writer, rows: None)
    with pytest.raises(SettingsError, match="once in each round"):
        write_all(begin(tmp_path / "x.acts"), lambda writer, rows: [writer.write(X[rows]) for _ in range(2)])
    assert not [path for path in (tmp_path / "x.acts").rglob("*") if path.name.endswith(".tmp")]
    assert not (tmp_path / ".x.acts.lock").exists()
    wrong: dict[str, dict[str, Any]] = {
        "Which layer": {"layers": []}, "Give the images": {"n_images": None}, "--n-images must be": {"n_images": 0},
        "--d-model must be": {"d_model": 2.5},
    }  # fmt: skip
    for message, options in wrong.items():
        with pytest.raises(SettingsError, match=message):
            begin(tmp_path / "y.acts", **options)


def test_two_processes_write_their_own_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks = []
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(IncompleteError, match=r"Worker 0 of 2 is done\. 2 of 4 shards belong to other workers"):
        write_all(begin(tmp_path / "x.acts"), lambda writer, rows: (ranks.append(0), writer.write(X[rows])))
    monkeypatch.setenv("RANK", "1")
    write_all(begin(tmp_path / "x.acts"), lambda writer, rows: (ranks.append(1), writer.write(X[rows])))
    assert ranks == [0, 0, 1, 1]
    assert verify(tmp_path / "x.acts").ok
