"""Names of image files: not UTF-8, equal but for the case of a letter, and in other scripts."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

import cli
from actcache import ActivationStore, ImageFolder, ImageSourceError, PipelineError, extract
from actcache.sources import open_source
from actcache.text import visible
from analysis import AnalyzeConfig, analyze, query_image, write_report
from saetrain import CodeStore, encode

Model = dict[str, str]


def ask(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["--quiet", "--json", *map(str, words)])


def save(path: str | Path, color: tuple[int, int, int]) -> None:
    Image.fromarray(np.full((24, 24, 3), color, np.uint8)).save(path, format="PNG")


NOT_UTF8 = (b"\xe4.png", b"caf\xe9/1.png", b"a\xff\xfe.png", b"\xed\xa0\x80.png")
"""Latin-1, a folder, two bytes that are nothing, and a half of a surrogate pair."""


@pytest.fixture(params=NOT_UTF8, ids=repr)
def bad_name(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A folder of images, one of which has such a name; and that name."""
    folder, name = tmp_path / "images", os.fsdecode(request.param)
    try:
        (folder / name).parent.mkdir(parents=True)
        save(folder / name, (200, 0, 0))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    for i in range(3):
        save(folder / f"{i}.png", (0, 60 * i, 99))
    return folder, name


def test_a_name_that_is_not_utf8_is_one_line_before_any_work(
    bad_name: tuple[Path, str], tiny_model: Model, tmp_path: Path
) -> None:
    folder, name = bad_name
    with pytest.raises(ImageSourceError) as caught:
        ImageFolder(folder).plan()
    shown = str(caught.value)
    assert "\n" not in shown
    shown.encode()  # it can be printed
    model = ["--model", tiny_model["model"], "--pretrained", tiny_model["pretrained"]]
    for more in (["--on-error", "skip"], ["--dry-run"], []):
        done = ask("extract", folder, tmp_path / "x.acts", *model, "--layer", 1, *more)
        assert done.exit_code == 1, done.output
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
        assert not (tmp_path / "x.acts").exists()
    (folder / name).rename(folder / "renamed.png")  # as the message says
    assert ask("extract", folder, tmp_path / "x.acts", *model, "--layer", 1).exit_code == 0


def read_all(source: Path) -> str | None:
    """Read every image of a source. Returns the message if it is refused."""
    try:
        opened = open_source(source)
        for uri in opened.plan().table["uri"].to_pylist():
            assert opened.read(uri).startswith(b"\x89PNG")
    except PipelineError as error:
        return str(error)
    return None


def assert_right_or_one_line(refused: str | None) -> None:
    if refused is not None:
        assert "\n" not in refused
        visible(refused).encode()  # it can be printed


@pytest.mark.parametrize("kind", ["csv", "jsonl", "tar"])
def test_other_sources_of_such_files_are_right_or_one_line(
    bad_name: tuple[Path, str], tmp_path: Path, kind: str
) -> None:
    folder, name = bad_name
    source = tmp_path / f"table.{kind}"
    if kind == "csv":
        source.write_bytes(b"path,label\nimages/" + os.fsencode(name) + b",x\nimages/1.png,y\n")
    elif kind == "jsonl":
        source.write_bytes(json.dumps({"path": f"images/{name}"}).encode() + b"\n")
    else:
        import tarfile

        with tarfile.open(source, "w", errors="surrogateescape") as tar:
            tar.add(folder, arcname="images")
    assert_right_or_one_line(read_all(source))


def test_a_folder_of_archives_with_such_names(bad_name: tuple[Path, str], tmp_path: Path) -> None:
    import tarfile

    folder, name = bad_name
    archives = tmp_path / "archives"
    archives.mkdir()
    with tarfile.open(archives / f"{Path(name).stem}.tar", "w") as tar:
        tar.add(folder / "1.png", arcname="1.png")
    assert_right_or_one_line(read_all(archives))
    assert_right_or_one_line(read_all(next(archives.iterdir())))


@pytest.mark.parametrize("kind", ["folder", "csv", "jsonl", "parquet", "parquet of images", "tar", "folder of tables"])
def test_a_source_in_a_folder_whose_name_is_not_utf8(tmp_path: Path, kind: str) -> None:
    """The names of the images themselves are fine."""
    import tarfile

    place = tmp_path / os.fsdecode(b"B\xe4ume")
    try:
        place.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (place / "images" / "cat").mkdir(parents=True)
    for i in range(3):
        save(place / "images" / "cat" / f"{i}.png", (i, 50, 7))
    names = [f"images/cat/{i}.png" for i in range(3)]
    source = place / "images"
    if kind == "csv":
        (source := place / "t.csv").write_text("path,label\n" + "".join(f"{name},cat\n" for name in names))
    elif kind == "jsonl":
        (source := place / "t.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in names))
    elif kind == "tar":
        with tarfile.open(source := place / "t.tar", "w") as tar:
            tar.add(place / "images", arcname="images")
    elif kind != "folder":
        data = [(place / name).read_bytes() for name in names]
        source = place / ("t.parquet" if kind != "folder of tables" else "tables")
        file = source if kind != "folder of tables" else source / "train.parquet"
        file.parent.mkdir(exist_ok=True)
        with file.open("wb") as sink:
            pq.write_table(pa.table({"path": names} if kind == "parquet" else {"image": data}), sink)
    refused = read_all(source)
    assert_right_or_one_line(refused)
    if kind in ("folder", "tar"):  # tables are read by pyarrow, which opens only paths that are UTF-8
        assert refused is None
        assert open_source(source).plan().n_images == 3


def test_a_mask_with_such_a_name_belongs_to_no_image(bad_name: tuple[Path, str], tmp_path: Path) -> None:
    folder, name = bad_name
    masks = Path(shutil.copytree(folder, tmp_path / "masks"))
    (folder / name).unlink()
    plan = ImageFolder(folder, masks=masks).plan()
    assert plan.table["mask"].to_pylist() == plan.table["uri"].to_pylist()


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory, tiny_model: Model, tiny_run: Path) -> Path:
    """A folder with images whose names and classes differ in the case of letters only, their store, codes and table."""
    folder = tmp_path_factory.mktemp("twins")
    colors = {"Cat/a.png": (250, 0, 0), "Cat/A.png": (0, 250, 0), "cat/a.png": (0, 0, 250), "cat/A.PNG": (250, 250, 0),
              "straße/ß.png": (90, 20, 140), "STRASSE/ß.png": (20, 140, 90)}  # fmt: skip
    for name, color in colors.items():
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        save(folder / "images" / name, color)
    if len(list((folder / "images").rglob("*.*"))) < len(colors):
        shutil.rmtree(folder)
        pytest.skip("this file system does not tell such names apart")
    extract(folder / "images", folder / "x.acts", **tiny_model, layers=[2], precision="float32", device="cpu")
    codes = encode(tiny_run, folder / "x.acts", folder / "x.codes", device="cpu")
    analyze(codes, folder / "x.concepts", config=AnalyzeConfig(n_gallery=3, n_top=2), device="cpu")
    return folder


def test_names_that_differ_in_case_are_different_images(twins: Path) -> None:
    images = ActivationStore.open(twins / "x.acts").images
    assert sorted(images["uri"].to_pylist()) == sorted(
        str(file.relative_to(twins / "images")) for file in (twins / "images").rglob("*.*")
    )
    for uri, class_name in zip(images["uri"].to_pylist(), images["label_name"].to_pylist(), strict=True):
        assert class_name == uri.split("/")[0]
    hashes = dict(zip(images["uri"].to_pylist(), images["content_hash"].to_pylist(), strict=True))
    for uri, recorded in hashes.items():
        assert recorded == hashlib.blake2b((twins / "images" / uri).read_bytes(), digest_size=16).hexdigest()


def test_answers_pictures_and_pages_tell_them_apart(twins: Path) -> None:
    codes = CodeStore.open(twins / "x.codes")
    names = ActivationStore.open(twins / "x.acts").images["uri"].to_pylist()
    for row, uri in enumerate(names):
        by_name = ask("query", codes.path, "--image", uri)
        assert by_name.exit_code == 0, by_name.output
        assert json.loads(by_name.stdout) == json.loads(ask("query", codes.path, "--image", row).stdout)
    latent = query_image(codes, 0)["latent"][0].as_py()
    sheet = ask("query", codes.path, "--latent", latent, "--sheet", twins / "s.png")
    assert sheet.exit_code == 0, sheet.output
    page = write_report(twins / "x.concepts", twins / "r.html").read_text()
    assert any(f'title="{uri}' in page for uri in names)


def test_a_mask_belongs_to_the_image_of_its_case(twins: Path) -> None:
    masks = twins / "masks"
    for number, name in enumerate(("Cat/a.png", "Cat/A.png", "cat/a.png", "cat/A.png"), 1):
        (masks / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((24, 24), number, np.uint8)).save(masks / name)
    source = ImageFolder(twins / "images", masks=masks)
    source.plan()
    for number, uri in enumerate(("Cat/a.png", "Cat/A.png", "cat/a.png", "cat/A.PNG"), 1):
        mask = source.read_mask(uri)
        assert mask is not None
        assert (mask == number).all()
