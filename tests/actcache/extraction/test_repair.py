"""repair(): only what is damaged is computed again, and the result equals the original store byte for byte."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

import cli
from actcache import ActivationStore, SettingsError, extract, repair, verify

HOOK = "activations.zarr/blocks.1.hook_resid_post"
SHARD = f"{HOOK}/patches/c/1/0/0"
Model = dict[str, str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, make_images: Callable[..., Path], tiny_model: Model) -> Path:
    """A folder with images, weights and a store of three shards made from them. Read-only."""
    folder = tmp_path_factory.mktemp("pristine")
    make_images(folder / "images", 40)
    shutil.copy(tiny_model["model"], folder / "tiny.json")
    shutil.copy(tiny_model["pretrained"], folder / "tiny.safetensors")
    extract(folder / "images", folder / "x.acts", **model_of(folder), layers=[1], shard_images=16)
    return folder


@pytest.fixture
def folder(tmp_path: Path, pristine: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def model_of(folder: Path) -> Model:
    return {"model": str(folder / "tiny.json"), "pretrained": str(folder / "tiny.safetensors")}


def all_bytes(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("*") if file.is_file()}


def identities(store: Path) -> dict[str, tuple[int, int]]:
    """The inode and modification time of every shard and record."""
    files = [file for file in store.rglob("*") if file.is_file() and ("c" in file.parts or "commits" in file.parts)]
    return {str(f.relative_to(store)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in files}


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x41
    file.write_bytes(data)


def link(file: Path) -> None:
    outside = file.parents[len(file.parts) - 1 - file.parts.index("copy")] / f"elsewhere-{file.name}"
    shutil.move(file, outside)
    file.symlink_to(outside)


def fold(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize(
    ("damage", "name", "shards"),
    [
        (flip, SHARD, {1}),
        (Path.unlink, SHARD, {1}),
        (link, SHARD, {1}),
        (fold, SHARD, {1}),
        (flip, f"{HOOK}/cls/c/2/0", {2}),
        (flip, "commits/000000.json", {0}),
        (Path.unlink, "commits/000000.json", {0}),
        (flip, "images.parquet", set()),
        (Path.unlink, "images.parquet", set()),
        (link, "images.parquet", set()),
        (flip, f"{HOOK}/patches/zarr.json", set()),
        (Path.unlink, "activations.zarr/zarr.json", set()),
        (lambda file: file.write_bytes(file.read_bytes() + b" "), f"{HOOK}/zarr.json", set()),
        (flip, "manifest.json", set()),
        (Path.unlink, "manifest.json", set()),
    ],
)
def test_what_is_damaged_is_made_anew_and_nothing_else(
    folder: Path, damage: Callable[[Path], object], name: str, shards: set[int]
) -> None:
    store = folder / "x.acts"
    expected, before = all_bytes(store), identities(store)
    damage(store / name)
    damaged = identities(store)
    assert not verify(store).ok
    assert repair(store).ok
    assert all_bytes(store) == expected
    after = identities(store)
    assert after.keys() == before.keys()
    for file, identity in after.items():
        mine = int(file.split("/c/")[1].split("/")[0]) if "/c/" in file else int(Path(file).stem)
        assert (identity == damaged.get(file)) == (mine not in shards), file
    ActivationStore.open(store).read(check=True)


def test_much_damage_at_once_is_repaired(folder: Path) -> None:
    store = folder / "x.acts"
    expected = all_bytes(store)
    flip(store / SHARD)
    shutil.rmtree(store / HOOK / "cls" / "c")
    shutil.rmtree(store / "commits")
    for name in ("images.parquet", "manifest.json"):
        flip(store / name)
    assert repair(store).ok
    assert all_bytes(store) == expected


def test_a_whole_store_is_left_alone(folder: Path) -> None:
    shutil.rmtree(folder / "images")  # not even asked for
    before = identities(folder / "x.acts")
    assert repair(folder / "x.acts").ok
    assert identities(folder / "x.acts") == before


@pytest.mark.parametrize(
    ("moved", "flag"), [("images", "--images"), ("tiny.json", "--model"), ("tiny.safetensors", "--pretrained")]
)
def test_what_moved_is_asked_for(folder: Path, moved: str, flag: str) -> None:
    store = folder / "x.acts"
    (store / "places.json").unlink()  # the store was copied here from where all of it still is
    expected = all_bytes(store)
    flip(store / SHARD)
    damaged = all_bytes(store)
    shutil.move(folder / moved, folder / f"moved-{moved}")
    with pytest.raises(SettingsError, match=rf"{moved} no longer exists.*{flag}") as caught:
        repair(store)
    assert "\n" not in str(caught.value)
    assert all_bytes(store) == damaged
    assert repair(store, **{flag.removeprefix("--"): str(folder / f"moved-{moved}")}).ok  # type: ignore[arg-type]
    after = all_bytes(store)
    assert {name for name in expected if after[name] != expected[name]} <= {"artifact.json", "manifest.json"}


def test_other_images_are_refused_and_nothing_is_removed(folder: Path, make_images: Callable[..., Path]) -> None:
    store = folder / "x.acts"
    flip(store / SHARD)
    before = all_bytes(store)
    others = [make_images(folder / "others", 40, size=25), make_images(folder / "fewer", 39)]
    for other in others:
        with pytest.raises(SettingsError, match=r"does not hold exactly the images of .*x\.acts.* with --images"):
            repair(store, images=other)
    Image.new("RGB", (24, 24)).save(folder / "images" / "class0" / "new.png")
    with pytest.raises(SettingsError, match="images"):
        repair(store)
    assert all_bytes(store) == before


def test_another_model_is_refused_and_nothing_is_removed(folder: Path) -> None:
    store = folder / "x.acts"
    flip(store / SHARD)
    before = all_bytes(store)
    with pytest.raises(SettingsError, match=r"is not the model of .* with --model and --pretrained"):
        repair(store, pretrained="random:7")
    assert all_bytes(store) == before


def test_an_image_that_became_unreadable_is_not_quietly_left_out(folder: Path) -> None:
    store = folder / "x.acts"
    uri = ActivationStore.open(store).images["uri"][20].as_py()
    size = (folder / "images" / uri).stat().st_size
    (folder / "images" / uri).write_bytes(b"?" * size)  # the listing, names and sizes, is as it was
    flip(store / SHARD)
    with pytest.raises(Exception, match=Path(uri).name):
        repair(store)
    assert not verify(store).complete


def test_files_of_others_are_not_removed(folder: Path) -> None:
    store = folder / "x.acts"
    (store / "activations.zarr" / "mine.txt").write_text("?")
    with pytest.raises(SettingsError, match=r"did not write \(activations\.zarr/mine\.txt\)\. Move"):
        repair(store)
    (store / "activations.zarr" / "mine.txt").unlink()
    assert verify(store).ok


def test_the_command_line_names_the_command_that_repairs_and_runs_it(folder: Path) -> None:
    store = folder / "x.acts"
    expected = all_bytes(store)
    flip(store / SHARD)

    found = CliRunner().invoke(cli.app, ["verify", str(store)])
    assert found.exit_code == 1
    assert SHARD in found.stdout
    assert f"patchsae verify {store} --repair" in found.stdout.replace("\n", "")
    repaired = CliRunner().invoke(cli.app, ["--json", "verify", str(store), "--repair"])
    assert repaired.exit_code == 0, repaired.output
    assert json.loads(repaired.stdout)["ok"] is True
    assert all_bytes(store) == expected
