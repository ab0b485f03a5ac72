"""Shards of saev: of each version of its layout, of the package itself where it is installed, and of nobody."""

import json
import os
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from actcache import ActivationStore, PipelineError, import_activations
from actcache.importing.saev import open_saev

X = np.random.default_rng(0).normal(size=(24, 2, 10, 8)).astype("f4")  # images, layers, tokens, channels

OLD: dict[str, Any] = {
    "vit_family": "clip", "vit_ckpt": "ViT-B-16/openai", "layers": [0, 2], "n_patches_per_img": 9, "cls_token": True,
    "d_vit": 8, "seed": 42, "n_imgs": 24, "n_patches_per_shard": 140, "data": "ImageFolderDataset(root='x')",
}  # fmt: skip
"""saev 0.1: activations.py, Metadata."""
FIRST = {**{k: v for k, v in OLD.items() if k not in ("seed", "n_patches_per_shard")}, "max_patches_per_shard": 140,
         "data": {"__class__": "Imagenet"}, "dtype": "float32", "protocol": "1.0.0"}  # fmt: skip
"""src/saev/data/protocol.md of 2025-06-17."""
SECOND = {
    "family": "clip", "ckpt": "ViT-B-16/openai", "layers": [0, 2], "content_tokens_per_example": 9, "cls_token": True,
    "d_model": 8, "n_examples": 24, "max_tokens_per_shard": 140, "data": "gASVCgAAAAAAAACMBG5vbmWULg==",
    "dataset": "/data/images", "pixel_agg": None, "dtype": "float32", "protocol": "2.1",
}  # fmt: skip
"""src/saev/data/shards.py, Metadata, protocol 2.1; `data` is a pickle in base64."""


def write_shards(folder: Path, metadata: dict[str, Any], *, listed: str = "", whole: bool = True) -> Path:
    """Files of 7 images; the last one holds 3, and is as long as the others if `whole`."""
    folder.mkdir(parents=True)
    (folder / "metadata.json").write_text(json.dumps(metadata))
    shards = []
    for number, first in enumerate(range(0, 24, 7)):
        part = X[first : first + 7]
        file = np.zeros((7, *X.shape[1:]), "<f4") if whole else np.zeros(part.shape, "<f4")
        file[: len(part)] = part
        (folder / f"acts{number:06}.bin").write_bytes(file.tobytes())
        shards.append({"name": f"acts{number:06}.bin", listed: len(part)})
    if listed:
        (folder / "shards.json").write_text(json.dumps(shards))
    return folder


def check_values(store: ActivationStore, expected: dict[int, Any]) -> None:
    rows = [int(uri) for uri in store.images["uri"].to_pylist()]
    assert [hook.layer for hook in store.hook_points] == sorted(expected)
    for layer, values in expected.items():
        np.testing.assert_array_equal(store.read_stream(layer), values[rows])


@pytest.mark.parametrize(
    ("metadata", "how"),
    [(OLD, {}), (FIRST, {"listed": "n_imgs", "whole": False}), (SECOND, {"listed": "n_examples"}), (SECOND, {})],
    ids=["0.1", "1.0", "2.1", "2.1 without a list"],
)
def test_every_version_is_read(metadata: dict[str, Any], how: dict[str, Any], tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", metadata, **how)
    store = import_activations(folder, tmp_path / "x.acts", dtype="float32")
    check_values(store, {0: X[:, 0], 2: X[:, 1]})
    assert (store.settings.prefix, store.layout.grid) == (("cls",), (3, 3))
    assert store.artifact.provenance["model"] == "clip/ViT-B-16/openai"
    one = import_activations(folder, tmp_path / "one.acts", layers=[2], model_name="my-clip", dtype="float32")
    check_values(one, {2: X[:, 1]})
    assert one.artifact.provenance["model"] == "my-clip"


def test_slots_are_filled_in_the_order_of_the_blocks(tmp_path: Path) -> None:
    """saev lists the layers as they were asked for, and fills them as its hooks fire."""
    folder = write_shards(tmp_path / "shards", {**OLD, "layers": [2, 0]})
    check_values(import_activations(folder, tmp_path / "x.acts", dtype="float32"), {0: X[:, 0], 2: X[:, 1]})
    folder = write_shards(tmp_path / "from the end", {**OLD, "layers": [-2, -1]})
    with pytest.raises(PipelineError, match=r"counts its 2 layer\(s\) from the end. Name each one with --layer"):
        import_activations(folder, tmp_path / "y.acts")
    store = import_activations(folder, tmp_path / "y.acts", layers=[11, 10], dtype="float32")
    check_values(store, {10: X[:, 0], 11: X[:, 1]})


def test_without_cls(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", {**SECOND, "content_tokens_per_example": 10, "cls_token": False})
    store = import_activations(folder, tmp_path / "x.acts", dtype="float32", grid="2x5")
    check_values(store, {0: X[:, 0], 2: X[:, 1]})
    assert store.settings.prefix == ()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no field": ({"d_model": None}, "d_model should be int"),
    "too large": ({"n_examples": 10**30}, "n_examples should be int"),
    "large": ({"n_examples": 1 << 40}, r"has 4 of the .* files of its metadata.json"),
    "wide": ({"d_model": 1 << 40}, "float32 values take"),
    "many layers": ({"layers": list(range(100))}, "has no room for one image in a shard"),
    "no layers": ({"layers": []}, "layers must be distinct, and at least one"),
    "layers of text": ({"layers": ["../../x"]}, r"layers\[0\] should be int"),
    "half": ({"dtype": "float16"}, "dtype is 'float16', expected float32"),
    "negative": ({"max_tokens_per_shard": -1}, "max_tokens_per_shard should be int of at least 1|at least 1"),
    "true for a number": ({"d_model": True}, "d_model should be int"),
    "small shards": ({"max_tokens_per_shard": 3}, "has no room for one image in a shard of 3 tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_metadata_are_one_line(case: str, tmp_path: Path) -> None:
    fields, message = BAD[case]
    folder = write_shards(tmp_path / "shards", {**SECOND, **fields})
    refuse(folder, tmp_path, message)


def refuse(folder: Path, tmp_path: Path, message: str) -> None:
    with pytest.raises(PipelineError, match=message) as raised:
        import_activations(folder, tmp_path / "x.acts")
    assert len(str(raised.value).splitlines()) == 1
    assert not (tmp_path / "x.acts").exists()


@pytest.mark.parametrize("name", ["../../secret.bin", "/etc/passwd", "acts000000.bin/../../x", "acts.bin", "", 7, None])
def test_nothing_outside_the_folder_is_read(name: object, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(100_000))
    folder = write_shards(tmp_path / "a" / "shards", SECOND, listed="n_examples")
    (folder / "shards.json").write_text(json.dumps([{"name": name, "n_examples": 24}]))
    refuse(folder, tmp_path, "shards.json (names|has a missing or malformed field)")


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", SECOND, listed="n_examples")
    for name, text, message in (
        ("shards.json", "[", "not readable JSON"), ("shards.json", "{}", "is not a list of shards"),
        ("shards.json", '[{"name": "acts000000.bin", "n_examples": 7}]', "lists 7 images, but metadata.json says 24"),
        ("metadata.json", "[]", "holds no JSON object"), ("metadata.json", "[" * 100_000, "not readable JSON"),
        ("metadata.json", '{"layers": ' + "9" * 5000 + "}", "not readable JSON"),
    ):  # fmt: skip
        before = (folder / name).read_text()
        (folder / name).write_text(text)
        refuse(folder, tmp_path, message)
        (folder / name).write_text(before)
    (folder / "acts000002.bin").write_bytes((folder / "acts000002.bin").read_bytes()[:-4])
    refuse(folder, tmp_path, "acts000002.bin has 4,476 bytes, but 7 x 2 x 10 x 8 float32 values take 4,480")
    (folder / "acts000002.bin").unlink()
    refuse(folder, tmp_path, "acts000002.bin does not exist")
    os.mkfifo(folder / "acts000002.bin")
    refuse(folder, tmp_path, "acts000002.bin is not a file")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=6,
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(SECOND)), value=JSON)
def test_any_value_of_any_field_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: object
) -> None:
    folder = tmp_path_factory.mktemp("any") / "shards"
    write_shards(folder, {**SECOND, name: value})
    with suppress(PipelineError):  # anything else is an error of ours
        open_saev(folder)


WRITE = """
import sys
import numpy as np
import torch
from saev import activations, config

class Adding(torch.nn.Module):
    # Three blocks that add 1, 10 and 100 to every value, so that an output names its block.
    def __init__(self, x):
        super().__init__()
        self.name, self.x = "adding", x
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(x.shape[-1], x.shape[-1]) for _ in range(3)])
        for number, block in enumerate(self.blocks):
            torch.nn.init.eye_(block.weight)
            torch.nn.init.constant_(block.bias, 10.0**number)
    def get_residuals(self):
        return list(self.blocks)
    def get_patches(self, n_patches):
        return slice(None)
    def forward(self, rows):
        y = self.x[rows]
        for block in self.blocks:
            y = block(y)

x = torch.from_numpy(np.load(sys.argv[1]))
n, n_tokens, d = x.shape
layers = [2, 0]
made = config.Activations(
    data=config.ImageFolderDataset(root=sys.argv[3]), dump_to=sys.argv[2], vit_family="clip", d_vit=d,
    vit_ckpt="ViT-B-16/openai", vit_layers=layers, n_patches_per_img=n_tokens - 1, cls_token=True,
    n_patches_per_shard=n_tokens * len(layers) * 7,
)
tower = activations.RecordedVisionTransformer(Adding(x), n_tokens - 1, True, layers)
writer = activations.ShardWriter(made)
with torch.inference_mode():
    for first in range(0, n, 5):
        rows = torch.arange(first, min(first + 5, n))
        tower.reset()
        tower.vit(rows)
        writer[first : first + len(rows)] = tower.activations
writer.flush()
"""


@pytest.mark.slow
def test_shards_that_saev_wrote_are_read(tmp_path: Path, make_images: Any) -> None:
    """saev 0.1, the published version: its recorder and its writer, around a tower that is known."""
    python = os.environ.get("PATCHSAE_PEERS_PYTHON", "")
    if (
        not python
        or subprocess.run([python, "-c", "from saev import activations"], capture_output=True, check=False).returncode
    ):
        pytest.skip("PATCHSAE_PEERS_PYTHON does not name a python with saev")
    x = np.random.default_rng(0).normal(size=(24, 10, 8)).astype("f4")
    np.save(tmp_path / "x.npy", x)
    images = make_images(tmp_path / "images", 24)
    command = [python, "-c", WRITE, tmp_path / "x.npy", tmp_path / "shards", images]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (folder,) = (tmp_path / "shards").iterdir()
    store = import_activations(folder, tmp_path / "x.acts", images=images, dtype="float32")
    assert store.images["label_name"].to_pylist() == [uri.split("/")[0] for uri in store.images["uri"].to_pylist()]
    rows = store.images["source_index"].to_numpy()
    np.testing.assert_allclose(store.read_stream(0), (x + 1)[rows], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(store.read_stream(2), (x + 111)[rows], rtol=1e-5, atol=1e-4)
