"""Sources: every image is planned exactly once, in an order that depends on names alone, and can be read."""

import io
import json
import os
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actcache import HuggingFaceDataset, ImageFolder, ImageSourceError, ImageTable, ImageTars, extract
from actcache.artifacts import digest
from actcache.sources import ImageSource, decode_image, open_source
from actcache.sources.plan import plan_images
from actcache.sources.tar_index import walk_tar


def png(value: int = 0, size: tuple[int, int] = (5, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value % 256, 7, 9)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as file:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def write_mask(path: Path, values: Sequence[Sequence[int]], mode: str = "P") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(values, dtype=np.uint8))
    if mode == "P":
        image.putpalette(bytes(range(255, -1, -1)) * 3)
    image.save(path)


def rows_of(source: ImageSource, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["uri"]: row for row in source.plan(**options).table.to_pylist()}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four images in two folders, each in a different color."""
    for i, name in enumerate(("a/0.png", "a/1.png", "b/2.png", "b/3.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(png(i))
    return tmp_path / "photos"


# -- what lies there ---------------------------------------------------------------------------------------------------


def test_the_kind_is_told_by_what_lies_there(tmp_path: Path, photos: Path) -> None:
    assert isinstance(open_source(photos), ImageFolder)
    assert isinstance(open_source(str(photos)), ImageFolder)
    for name in ("x.csv", "x.tsv", "x.parquet", "x.CSV"):
        (tmp_path / name).write_bytes(b"")
        assert isinstance(open_source(tmp_path / name), ImageTable)
    tars = tmp_path / "tars"
    tars.mkdir()
    write_tar(tars / "0.tar", {"0.png": png()})
    assert isinstance(open_source(tars), ImageTars)
    assert isinstance(open_source(tars / "0.tar"), ImageTars)
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "dataset_dict.json").write_text("{}")
    assert isinstance(open_source(saved), HuggingFaceDataset)
    source = ImageFolder(photos)
    assert open_source(source) is source
    assert all(isinstance(kind, ImageSource) for kind in (source, ImageTable("x"), ImageTars("x"), open_source(saved)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"absent does not exist\. Expected a folder of images, a \.csv"),
        ("x.jpg", "not a source of images.* Give the folder that contains the image"),
        ("x.tar.gz", "not a source of images.* Unpack it first"),
        ("x.txt", r"x\.txt is not a source of images"),
    ],
)
def test_what_is_no_source_is_refused(tmp_path: Path, name: str, message: str) -> None:
    if name != "absent":
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ImageSourceError, match=message) as caught:
        open_source(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("image", ["x.png", "class/x.png"])
def test_tars_among_images_are_not_guessed_at(tmp_path: Path, image: str) -> None:
    write_tar(tmp_path / "0.tar", {"0.png": png()})
    (tmp_path / "class").mkdir()
    (tmp_path / image).write_bytes(png())
    with pytest.raises(ImageSourceError, match=r"holds both \.tar files and images"):
        open_source(tmp_path)


def test_masks_belong_to_a_path(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(ImageSourceError, match="--masks needs a path"):
        open_source(ImageFolder(photos), masks=tmp_path)
    (photos / "dataset_dict.json").write_text("{}")
    with pytest.raises(ImageSourceError, match="does not apply to Hugging Face"):
        open_source(photos, masks=tmp_path)


# -- the plan ----------------------------------------------------------------------------------------------------------


def listing_of(names: Sequence[str]) -> pa.Table:
    n = len(names)
    return pa.table({"uri": list(names), "label": [-1] * n, "label_name": [""] * n, "bytes": list(range(n))})


@given(st.sets(st.text(min_size=1, max_size=8), min_size=1, max_size=40), st.data())
def test_every_image_is_planned_once_and_what_is_excluded_is_the_rest(names: set[str], data: st.DataObject) -> None:
    listing = listing_of(sorted(names))
    seed = data.draw(st.integers(0, 5))
    held = data.draw(st.sets(st.sampled_from(sorted(names)), max_size=len(names) - 1))
    whole = plan_images(listing, seed=seed)
    rest = plan_images(listing, seed=seed, exclude=held)
    assert sorted(whole.table["uri"].to_pylist()) == sorted(names)
    assert sorted([*rest.table["uri"].to_pylist(), *held]) == sorted(names)
    assert (rest.rows_id == whole.rows_id) == (not held)
    for row in rest.table.to_pylist():  # positions in the whole listing, whatever is left out
        assert listing["uri"][row["source_index"]].as_py() == row["uri"]


def test_rows_id_is_a_digest_of_names_sizes_seed_and_limit(photos: Path) -> None:
    listing = [[name, len(png(i))] for i, name in enumerate(("a/0.png", "a/1.png", "b/2.png", "b/3.png"))]
    assert ImageFolder(photos).plan().rows_id == digest({"images": listing, "seed": 0, "limit": None})
    assert ImageFolder(photos).plan(exclude=["z.png"]).rows_id == ImageFolder(photos).plan().rows_id
    part = digest({"images": listing[1:], "seed": 2, "limit": 9, "exclude": digest(["a/0.png"])})
    assert ImageFolder(photos).plan(seed=2, limit=9, exclude={"a/0.png"}).rows_id == part
    with pytest.raises(ImageSourceError, match="All 4 images are already in other stores"):
        ImageFolder(photos).plan(exclude=[name for name, _ in listing])


@settings(max_examples=15, deadline=None)
@given(st.permutations([f"{i % 3}/{i:02d}.png" for i in range(12)]))
def test_the_order_of_the_input_does_not_count(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x" * (1 + int(name[2:4])))
        plan = ImageFolder(folder).plan(seed=1)
        pq.write_table(pa.table({"path": names}), folder / "x.parquet")
        table = ImageTable(folder / "x.parquet").plan(seed=1)
        write_tar(folder / "x.tar", [(name, b"x" * (1 + int(name[2:4]))) for name in names])
        tars = ImageTars(folder / "x.tar").plan(seed=1)
    assert table.rows_id == plan.rows_id
    assert plan.table["uri"].to_pylist() == table.table["uri"].to_pylist()
    assert tars.table["uri"].to_pylist() == [f"x.tar/{uri}" for uri in plan.table["uri"].to_pylist()]
    assert sorted(plan.table["uri"].to_pylist()) == sorted(names)


# -- a folder ----------------------------------------------------------------------------------------------------------


def test_a_folder_reads_its_files(photos: Path) -> None:
    source = ImageFolder(photos)
    assert source.read("b/2.png") == png(2)
    assert "mask" not in source.plan().table.column_names
    assert source.read_mask("b/2.png") is None
    with pytest.raises(ImageSourceError, match=r"^b/9\.png cannot be read: No such file"):
        source.read("b/9.png")


def test_missing_files_are_counted(photos: Path) -> None:
    for name in "xyz":
        (photos / f"{name}.png").symlink_to("nowhere")
    with pytest.raises(ImageSourceError, match=r"x\.png cannot be read: No such file.*, as for 2 others of 7"):
        ImageFolder(photos).plan()


def test_links_that_lead_to_each_other_end(photos: Path) -> None:
    (photos / "a" / "to_b").symlink_to("../b")
    (photos / "b" / "to_a").symlink_to("../a")
    assert ImageFolder(photos).plan().n_images == 8


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list any folder")
def test_a_folder_that_may_not_be_listed_is_named(photos: Path) -> None:
    (photos / "a").chmod(0)
    try:
        with pytest.raises(ImageSourceError, match="a cannot be listed: Permission denied"):
            ImageFolder(photos).plan()
    finally:
        (photos / "a").chmod(0o755)


def test_masks_lie_as_the_images_do(tmp_path: Path, photos: Path) -> None:
    write_mask(tmp_path / "masks" / "a" / "1.png", [[0, 3, 200]])
    source = open_source(photos, masks=tmp_path / "masks")
    assert {uri: row["mask"] for uri, row in rows_of(source).items()} == {
        "a/0.png": "", "a/1.png": "a/1.png", "b/2.png": "", "b/3.png": "",
    }  # fmt: skip
    mask = source.read_mask("a/1.png")
    assert mask is not None
    assert mask.dtype == np.uint8
    assert mask.tolist() == [[0, 3, 200]]
    assert source.read_mask("a/0.png") is None
    assert source.plan().rows_id == ImageFolder(photos).plan().rows_id
    with pytest.raises(ImageSourceError, match=r"holds no mask for these images\. Expected PNG files such as a/0\.png"):
        open_source(photos, masks=photos.parent / "masks" / "a").plan()
    with pytest.raises(ImageSourceError, match=r"nowhere is not a directory.*--masks"):
        open_source(photos, masks="nowhere").plan()


# -- a table -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
@pytest.mark.parametrize("column", ["path", "image", "file", "filename", "uri"])
def test_a_table_gives_paths_labels_and_columns(photos: Path, suffix: str, column: str) -> None:
    table = pa.table(
        {
            "score": [0.5, 1.5, 2.5],
            column: ["b/3.png", "a/0.png", "a/1.png"],
            "label": ["dog", "cat", ""],
            "year": [2001, 2002, 2003],
        }
    )
    path = photos / f"x.{suffix}"
    if suffix == "parquet":
        pq.write_table(table, path)
    else:
        delimiter = "\t" if suffix == "tsv" else ","
        pyarrow.csv.write_csv(table, path, pyarrow.csv.WriteOptions(delimiter=delimiter))
    source = open_source(path)
    plan = source.plan()
    assert plan.table.column_names == ["source_index", "uri", "label", "label_name", "bytes", "score", "year"]
    assert plan.table.schema.field("year").type == pa.int64()
    rows = rows_of(source)
    assert rows["b/3.png"] == {
        "source_index": 2, "uri": "b/3.png", "label": 1, "label_name": "dog", "bytes": len(png(3)), "score": 0.5,
        "year": 2001,
    }  # fmt: skip
    assert (rows["a/0.png"]["label"], rows["a/1.png"]["label"], rows["a/1.png"]["label_name"]) == (0, -1, "")
    assert source.read("b/3.png") == png(3)
    with pytest.raises(ImageSourceError, match=r"b/2\.png is not in x\."):
        source.read("b/2.png")


def write_parquet(folder: Path, **columns: Any) -> ImageTable:
    pq.write_table(pa.table(columns), folder / "x.parquet")
    return ImageTable(folder / "x.parquet")


def test_whole_numbers_are_labels_as_they_are(photos: Path) -> None:
    names = ["a/0.png", "a/1.png", "b/2.png"]
    rows = rows_of(write_parquet(photos, path=names, label=[7, None, 3]))
    assert [(rows[name]["label"], rows[name]["label_name"]) for name in names] == [(7, "7"), (-1, ""), (3, "3")]
    rows = rows_of(write_parquet(photos, path=names, label=[7, -1, 3], label_name=["g", "?", "d"]))
    assert [(rows[name]["label"], rows[name]["label_name"]) for name in names] == [(7, "g"), (-1, ""), (3, "d")]
    rows = rows_of(write_parquet(photos, path=names, label_name=["g", "", "d"]))
    assert [(rows[name]["label"], rows[name]["label_name"]) for name in names] == [(1, "g"), (-1, ""), (0, "d")]
    rows = rows_of(write_parquet(photos, path=names, label=pa.array(["g", None, "d"]).dictionary_encode()))
    assert [rows[name]["label"] for name in names] == [1, -1, 0]
    assert [row["label"] for row in rows_of(write_parquet(photos, path=names)).values()] == [-1] * 3


def test_numbers_may_be_names(photos: Path) -> None:
    (photos / "0001").write_bytes(png(1))
    (photos / "x.csv").write_text("path,label\n0001,4\n")
    assert open_source(photos / "x.csv").read("0001") == png(1)


def test_absolute_paths_do_not_show_the_users_folders(tmp_path: Path, photos: Path) -> None:
    inside = write_parquet(photos, path=[str(photos / "a" / "0.png"), "b/2.png"])
    assert set(rows_of(inside)) == {"a/0.png", "b/2.png"}
    assert inside.read("a/0.png") == png(0)
    (tmp_path / "tables").mkdir()
    outside = write_parquet(tmp_path / "tables", path=[str(photos / "a" / "0.png"), str(photos / "b" / "2.png")])
    assert set(rows_of(outside)) == {"a/0.png", "b/2.png"}
    assert outside.read("b/2.png") == png(2)
    assert outside.plan().rows_id == inside.plan().rows_id
    one = write_parquet(tmp_path / "tables", path=[str(photos / "a" / "0.png")])
    assert set(rows_of(one)) == {"0.png"}
    assert one.read("0.png") == png(0)
    relative = write_parquet(tmp_path / "tables", path=["../photos/a/0.png"])
    assert relative.read("../photos/a/0.png") == png(0)


def test_a_table_may_name_masks(tmp_path: Path, photos: Path) -> None:
    write_mask(photos / "m" / "x.png", [[1, 2]], mode="L")
    source = write_parquet(photos, path=["a/0.png", "a/1.png"], mask=["m/x.png", None])
    assert {uri: row["mask"] for uri, row in rows_of(source).items()} == {"a/0.png": "m/x.png", "a/1.png": ""}
    mask = source.read_mask("a/0.png")
    assert mask is not None
    assert mask.tolist() == [[1, 2]]
    assert source.read_mask("a/1.png") is None
    elsewhere = shutil.move(photos / "m", tmp_path / "m")
    with pytest.raises(ImageSourceError, match=r"m/x\.png cannot be read"):
        source.plan()
    moved = ImageTable(write_parquet(photos, path=["a/0.png", "a/1.png"], mask=["x.png", ""]).path, masks=elsewhere)
    assert rows_of(moved)["a/0.png"]["mask"] == "x.png"
    assert moved.read_mask("a/0.png") is not None
    write_mask(tmp_path / "beside" / "a" / "1.png", [[4]])
    beside = ImageTable(write_parquet(photos, path=["a/0.png", "a/1.png"]).path, masks=tmp_path / "beside")
    assert {uri: row["mask"] for uri, row in rows_of(beside).items()} == {"a/0.png": "", "a/1.png": "a/1.png"}
    assert beside.read_mask("a/0.png") is None
    assert beside.read_mask("a/1.png") is not None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"name": ["a/0.png"]}, "no column of image paths. Expected one of path, image, file, filename, uri; its"),
        ({"path": pa.array([], pa.string())}, "has no rows"),
        ({"path": ["a/0.png", "a/1.png", "a/0.png"]}, r"names a/0\.png twice"),
        ({"path": ["a/0.png", "a/7.png"]}, r"a/7\.png cannot be read: No such file"),
        ({"path": ["a/0.png", "a"]}, "a cannot be read: Is a directory"),
        ({"path": ["a/0.png", None]}, "no path in row 2"),
        ({"path": [1]}, "int64 in column 'path'"),
        ({"path": ["a/0.png"], "bytes": [1]}, "a column 'bytes', which is a reserved name"),
        ({"path": ["a/0.png"], "uri": ["x"]}, "a column 'uri', which is a reserved name"),
        ({"path": ["a/0.png"], "": [1]}, "a column without a name"),
        ({"path": ["a/0.png"], "label": [0.5]}, "a label that is not a class"),
        ({"path": ["a/0.png"], "label": [1 << 40]}, "a label that is not a class"),
        ({"path": ["a/0.png"], "label": [-4]}, "the label -4"),
        ({"path": ["a/0.png"], "label": [[1]]}, "a label that is not a class"),
        ({"path": ["a/0.png"], "label": ["x"], "label_name": ["x"]}, "also a column 'label_name'"),
        ({"path": ["a/0.png"], "label": [1], "label_name": [1]}, "int64 in 'label_name'"),
        (
            {"path": ["a/0.png", "a/1.png"], "label": [1, 1], "label_name": ["x", "y"]},
            r"label 1 two names: \['x', 'y'\]",
        ),
        ({"path": ["a/0.png"], "mask": ["gone.png"]}, r"gone\.png cannot be read"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused_in_one_line(photos: Path, columns: Any, message: str) -> None:
    with pytest.raises(ImageSourceError, match=message) as caught:
        write_parquet(photos, **columns).plan()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", r"x\.csv is not a table: it is empty"),
        ("x.csv", "path,label\na/0.png\n", r"x\.csv is not a table: .*Expected 2 columns"),
        ("x.csv", "path,path\na/0.png,b\n", "two columns 'path'"),
        ("x.parquet", "path\na/0.png\n", r"x\.parquet is not a table"),
        ("gone.csv", None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_is_no_table_is_refused(photos: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (photos / name).write_text(text)
    with pytest.raises(ImageSourceError, match=message) as caught:
        ImageTable(photos / name).plan()
    assert "\n" not in str(caught.value)


# -- tars --------------------------------------------------------------------------------------------------------------


def test_samples_of_tars_become_rows(tmp_path: Path) -> None:
    record = {"year": 1999, "ok": True, "box": [1, 2], "name": "x", "offset": 5}
    write_tar(
        tmp_path / "0.tar",
        {
            "b/1.jpg": png(1),
            "b/1.cls": b"3\n",
            "b/1.json": json.dumps(record).encode(),
            "b/1.txt": "a café".encode(),
            "b/1.mask.png": b"not taken",
            "a/0.PNG": png(0, (50, 40)),
            "a/.hidden.png": b"",
            "readme": b"",
        },
    )
    write_tar(tmp_path / "1.tar", {"b/1.webp": png(2), "b/1.cls": b"0", "b/1.json": b'{"year": null}'})
    (tmp_path / ".2.tar").write_bytes(b"")
    source = open_source(tmp_path)
    rows = rows_of(source)
    assert set(rows) == {"0.tar/b/1.jpg", "0.tar/a/0.PNG", "1.tar/b/1.webp"}
    assert rows["0.tar/b/1.jpg"] == {
        "source_index": 1, "uri": "0.tar/b/1.jpg", "label": 3, "label_name": "3", "bytes": len(png(1)), "year": 1999,
        "ok": True, "box": "[1, 2]", "name": "x", "offset": 5, "text": "a café",
    }  # fmt: skip
    assert rows["0.tar/a/0.PNG"]["label"] == -1
    assert rows["1.tar/b/1.webp"]["year"] is None
    assert source.read("0.tar/a/0.PNG") == png(0, (50, 40))
    assert source.read("1.tar/b/1.webp") == png(2)
    with pytest.raises(ImageSourceError, match=r"0\.tar/readme is not in"):
        source.read("0.tar/readme")
    one = open_source(tmp_path / "0.tar")
    assert set(rows_of(one)) == {"0.tar/b/1.jpg", "0.tar/a/0.PNG"}
    assert one.read("0.tar/b/1.jpg") == png(1)
    assert sorted(os.listdir(tmp_path)) == [".2.tar", "0.tar", "1.tar"]


def test_columns_of_several_kinds_become_text(tmp_path: Path) -> None:
    values = [1, "x", None, {"a": 1}, 1 << 70]
    members = {f"{i}.json": json.dumps({"v": value, "n": i / 2 if i else 0}).encode() for i, value in enumerate(values)}
    write_tar(tmp_path / "x.tar", members | {f"{i}.png": png(i) for i in range(5)})
    rows = rows_of(ImageTars(tmp_path / "x.tar"))
    assert [rows[f"x.tar/{i}.png"]["v"] for i in range(5)] == ["1", "x", None, '{"a": 1}', str(1 << 70)]
    assert [rows[f"x.tar/{i}.png"]["n"] for i in range(5)] == [0, 0.5, 1, 1.5, 2]


def test_json_may_hold_the_label(tmp_path: Path) -> None:
    members = {"0.png": png(), "0.json": b'{"label": "dog"}', "1.png": png(), "1.json": b'{"label": "cat"}'}
    rows = rows_of(ImageTars(write_tar(tmp_path / "x.tar", members)))
    assert (rows["x.tar/0.png"]["label"], rows["x.tar/0.png"]["label_name"]) == (1, "dog")


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_walk_finds_what_tarfile_finds(tmp_path: Path, layout: int) -> None:
    long = ("d" * 90 + "/") + "n" * 95 + ".png"
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=layout) as file:
        for name, data in (
            ("./a.png", b"1"),
            ("empty.png", b""),
            (long, b"x" * 513),
            ("é.txt", b"text"),
            ("z.bin", b"y" * 5000),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5 if layout == tarfile.PAX_FORMAT else 1
            file.addfile(info, io.BytesIO(data))
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.LNKTYPE, "hard.png"), (tarfile.DIRTYPE, "dir.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.png"
            file.addfile(info)
        info = tarfile.TarInfo("last" + "p" * 200 + ".png" if layout != tarfile.USTAR_FORMAT else "last.png")
        info.size = 3
        file.addfile(info, io.BytesIO(b"end"))
    with tarfile.open(path) as file:
        expected = [(m.name.removeprefix("./"), m.offset_data, m.size) for m in file.getmembers() if m.isreg()]
    found = list(walk_tar(path, wanted=(".txt",)))
    assert [member[:3] for member in found] == expected
    assert [member.data for member in found if member.data is not None] == [b"text"]


def test_sizes_of_many_gigabytes_are_understood(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    size = 9 << 30  # base 256 in the header; the file has a hole there
    info = tarfile.TarInfo("big.bin")
    info.size = size
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(size, os.SEEK_CUR)
        small = tarfile.TarInfo("a.png")
        small.size = 3
        file.write(small.tobuf(tarfile.GNU_FORMAT) + b"abc".ljust(512, b"\0") + bytes(1024))
    assert [member.name for member in walk_tar(path)] == ["big.bin", "a.png"]
    assert ImageTars(path).read("x.tar/a.png") == b"abc"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1), st.data())
def test_a_tar_cut_anywhere_is_refused(seed: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = write_tar(Path(scratch) / "x.tar", {"0.png": png(seed), "0.cls": b"1", "1.png": bytes(700)})
        whole = path.read_bytes()
        n_used = 512 * (2 + 2 + 3)
        path.write_bytes(whole[: data.draw(st.integers(0, n_used + 511))])
        with pytest.raises(ImageSourceError, match=r"x\.tar is truncated at byte .*Download or write it again"):
            ImageTars(path).plan()


def test_a_tar_that_is_damaged_or_something_else_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.png": png(), "1.png": png()})
    data = bytearray(path.read_bytes())
    data[1024] ^= 1
    path.write_bytes(data)
    with pytest.raises(ImageSourceError, match=r"x\.tar is damaged at byte 1,024"):
        ImageTars(path).plan()
    with tarfile.open(path, "w:gz") as file:
        file.add(Path(__file__), "0.png")
    path.write_bytes(path.read_bytes().ljust(1024, b"\0"))
    with pytest.raises(ImageSourceError, match="not an uncompressed tar"):
        ImageTars(path).plan()
    with pytest.raises(ImageSourceError, match="No such file"):
        ImageTars(tmp_path / "gone.tar").plan()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.png", b"1"), ("0.png", b"2")], r"x\.tar holds 0\.png twice"),
        ([("a/0.png", b"1"), ("a/0.jpg", b"2")], r"two images for sample a/0: a/0\.png and a/0\.jpg"),
        ([("0.cls", b"1"), ("1.txt", b"1")], r"x\.tar holds no images in 2 samples\. Expected members ending in \.jpg"),
        ([], r"x\.tar holds no images\. Expected"),
        ([("0.png", b"1"), ("0.cls", b"d\xffg")], r"Sample x\.tar/0 cannot be read: it is not UTF-8"),
        ([("0.png", b"1"), ("0.json", b"[1]")], r"Sample x\.tar/0 cannot be read: its \.json is not an object"),
        ([("0.png", b"1"), ("0.json", b"{")], r"Sample x\.tar/0 cannot be read"),
        ([("0.png", b"1"), ("0.txt", b"\xff")], r"Sample x\.tar/0 cannot be read"),
        (
            [("0.png", b"1"), ("0.json", b'{"label": 1}'), ("0.cls", b"2")],
            "both its .json and a separate file give 'label'",
        ),
        ([("0.png", b"1"), ("0.json", b'{"bytes": 1}')], "a column 'bytes', which is a reserved name"),
    ],
)
def test_samples_that_make_no_sense_are_refused(tmp_path: Path, members: Any, message: str) -> None:
    with pytest.raises(ImageSourceError, match=message) as caught:
        ImageTars(write_tar(tmp_path / "x.tar", members)).plan()
    assert "\n" not in str(caught.value)


def test_samples_without_an_image_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tar(tmp_path / "x.tar", {"0.png": png(), "1.cls": b"1", "2.txt": b"x"})
    write_tar(tmp_path / "y.tar", {"7.cls": b"1"})
    assert ImageTars(tmp_path).plan().n_images == 1
    assert "3 samples without an image are left out" in caplog.text


def test_threads_read_many_tars_with_few_files_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(8):
        write_tar(tmp_path / f"{i}.tar", {f"{k}.png": png(10 * i + k, (9 + k, 4)) for k in range(5)})
    source = ImageTars(tmp_path)
    monkeypatch.setattr(source._files, "_most", 3)
    n_threads = threading.active_count()
    uris = source.plan().table["uri"].to_pylist() * 5
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(source.read, uris))
    assert found == [png(10 * int(uri[0]) + int(uri[6]), (9 + int(uri[6]), 4)) for uri in uris]
    assert len(source._files._open) == 3
    assert threading.active_count() <= n_threads


def test_a_tar_that_shrinks_or_goes_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.png": bytes(5000)})
    source = ImageTars(path)
    source.plan()
    os.truncate(path, 1000)
    with pytest.raises(ImageSourceError, match=r"x\.tar/0\.png cannot be read: the tar was truncated"):
        source.read("x.tar/0.png")
    source = ImageTars(write_tar(tmp_path / "y.tar", {"0.png": b"1"}))
    source.plan()
    (tmp_path / "y.tar").unlink()
    with pytest.raises(ImageSourceError, match=r"y\.tar/0\.png cannot be read: No such file"):
        source.read("y.tar/0.png")


def test_masks_of_tars_lie_by_member_or_by_tar_and_member(tmp_path: Path) -> None:
    write_tar(tmp_path / "s0.tar", {"0.png": png(), "1.png": png()})
    write_tar(tmp_path / "s1.tar", {"0.png": png()})
    write_mask(tmp_path / "masks" / "0.png", [[1]])
    write_mask(tmp_path / "masks" / "s1" / "0.png", [[2]])
    source = open_source(tmp_path / "s0.tar", masks=tmp_path / "masks")
    assert {uri: row["mask"] for uri, row in rows_of(source).items()} == {"s0.tar/0.png": "0.png", "s0.tar/1.png": ""}
    source = ImageTars(tmp_path, masks=tmp_path / "masks")
    assert {uri: row["mask"] for uri, row in rows_of(source).items()} == {
        "s0.tar/0.png": "0.png", "s0.tar/1.png": "", "s1.tar/0.png": "s1/0.png",
    }  # fmt: skip
    masks = [source.read_mask(uri) for uri in ("s0.tar/0.png", "s1.tar/0.png", "s0.tar/1.png")]
    assert [None if mask is None else mask.tolist() for mask in masks] == [[[1]], [[2]], None]
    assert ImageTars(tmp_path).read_mask("s0.tar/0.png") is None


# -- Hugging Face datasets ---------------------------------------------------------------------------------------------


@pytest.fixture
def make_dataset() -> Callable[..., Any]:
    """A Dataset of `n` images with a class, a score and a list, from encoded bytes."""
    datasets = pytest.importorskip("datasets")

    def make(n: int, first: int = 0, **features: Any) -> Any:
        columns = {
            "image": [{"bytes": png(first + i, (4 + i % 3, 4)), "path": f"{i}.png"} for i in range(n)],
            "label": [-1 if i == 0 else i % 2 for i in range(n)],
            "score": [i / 2 for i in range(n)],
            "boxes": [[i, i] for i in range(n)],
            "kind": [i % 2 for i in range(n)],
        }
        schema = {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "score": datasets.Value("float32"),
            "boxes": [datasets.Value("int64")],
            "kind": datasets.ClassLabel(names=["photo", "drawing"]),
        }
        for name, (values, feature) in features.items():
            columns[name], schema[name] = values, feature
        return datasets.Dataset.from_dict(columns, features=datasets.Features(schema))

    return make


def test_a_saved_dataset_is_a_source(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    import datasets

    splits = datasets.DatasetDict({"train": make_dataset(5), "test": make_dataset(3, first=100)})
    splits.save_to_disk(tmp_path / "saved")
    before = sorted(str(file) for file in (tmp_path / "saved").rglob("*"))
    source = open_source(tmp_path / "saved")
    assert isinstance(source, HuggingFaceDataset)
    plan = source.plan()
    assert plan.table.column_names == [
        "source_index", "uri", "label", "label_name", "bytes", "split", "score", "kind",
    ]  # fmt: skip
    assert plan.table.schema.field("score").type == pa.float32()
    rows = rows_of(source)
    assert sorted(rows) == [f"{split}/{i:06d}" for split, n in (("test", 3), ("train", 5)) for i in range(n)]
    assert rows["train/000003"] == {
        "source_index": 6, "uri": "train/000003", "label": 1, "label_name": "dog", "bytes": len(png(3, (4, 4))),
        "split": "train", "score": 1.5, "kind": "drawing",
    }  # fmt: skip
    assert (rows["test/000000"]["label"], rows["test/000000"]["label_name"]) == (-1, "")
    assert source.read("test/000002") == png(102, (6, 4))
    assert decode_image(source.read("train/000001")).size == (5, 4)
    for uri in ("train/000005", "valid/000000", "train/x", "train"):
        with pytest.raises(ImageSourceError, match=f"{uri} is not in saved"):
            source.read(uri)
    assert sorted(str(file) for file in (tmp_path / "saved").rglob("*")) == before
    assert HuggingFaceDataset(shutil.copytree(tmp_path / "saved", tmp_path / "b")).plan().rows_id == plan.rows_id


def test_one_split_and_a_selection_are_read_in_their_own_order(
    tmp_path: Path, make_dataset: Callable[..., Any]
) -> None:
    make_dataset(6).select([4, 2, 0]).save_to_disk(tmp_path / "saved", num_shards=2)
    source = open_source(tmp_path / "saved")
    assert sorted(rows_of(source)) == ["all/000000", "all/000001", "all/000002"]
    assert [source.read(f"all/00000{i}") for i in range(3)] == [png(i, (4 + i % 3, 4)) for i in (4, 2, 0)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, ["all/000001"] * 50)) == [png(2, (6, 4))] * 50


def test_text_labels_are_numbered_over_all_splits(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    import datasets

    def make(labels: list[str]) -> Any:
        plain = make_dataset(2).remove_columns(["label", "kind"])
        return plain.add_column("label", labels)

    datasets.DatasetDict({"a": make(["dog", "eel"]), "b": make(["cat", "dog"])}).save_to_disk(tmp_path / "saved")
    rows = rows_of(open_source(tmp_path / "saved"))
    assert {uri: (row["label"], row["label_name"]) for uri, row in rows.items()} == {
        "a/000000": (1, "dog"), "a/000001": (2, "eel"), "b/000000": (0, "cat"), "b/000001": (1, "dog"),
    }  # fmt: skip


def test_without_a_label_there_is_none(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    make_dataset(2).rename_column("label", "breed").save_to_disk(tmp_path / "several")
    rows = rows_of(open_source(tmp_path / "several"))
    assert [(row["label"], row["breed"], row["kind"]) for _, row in sorted(rows.items())] == [
        (-1, "", "photo"), (-1, "dog", "drawing"),
    ]  # fmt: skip
    make_dataset(2).remove_columns("label").save_to_disk(tmp_path / "one")  # then `kind` is the one ClassLabel
    assert [row["label_name"] for _, row in sorted(rows_of(open_source(tmp_path / "one")).items())] == [
        "photo",
        "drawing",
    ]


def test_an_image_column_called_mask_holds_masks(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    import datasets

    write_mask(tmp_path / "m.png", [[5, 6]])
    masks = [{"bytes": (tmp_path / "m.png").read_bytes(), "path": None}, None, None]
    make_dataset(3, mask=(masks, datasets.Image())).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert [row["mask"] for _, row in sorted(rows_of(source).items())] == ["all/000000", "", ""]
    mask = source.read_mask("all/000000")
    assert mask is not None
    assert mask.tolist() == [[5, 6]]
    assert source.read_mask("all/000001") is None


def test_a_row_without_an_image_can_be_planned_but_not_read(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    dataset = make_dataset(3)
    dataset.map(lambda row, i: {"image": None} if i == 1 else {}, with_indices=True).save_to_disk(tmp_path / "saved")
    source = open_source(tmp_path / "saved")
    assert rows_of(source)["all/000001"]["bytes"] == -1
    with pytest.raises(ImageSourceError, match="all/000001 cannot be read: the row contains no image"):
        source.read("all/000001")


def test_datasets_that_cannot_be_used_are_refused(tmp_path: Path, make_dataset: Callable[..., Any]) -> None:
    import datasets

    dataset = make_dataset(2)
    right = [{"bytes": png(i), "path": None} for i in range(2)]
    two = make_dataset(2, right=(right, datasets.Image())).rename_column("image", "left")
    cases = {
        r"must have one image column.* It has none among label, score": dataset.remove_columns("image"),
        r"must have one image column.* It has several: left, right": two,
        "a column 'bytes', which is a reserved name": dataset.rename_column("score", "bytes"),
        "cannot be read as a dataset": dataset.select([]),  # there is no file to read columns from
    }
    for i, (message, case) in enumerate(cases.items()):
        case.save_to_disk(tmp_path / str(i))
        with pytest.raises(ImageSourceError, match=message) as caught:
            open_source(tmp_path / str(i)).plan()
        assert "\n" not in str(caught.value)
    broken = tmp_path / "broken"
    dataset.save_to_disk(broken)
    next(broken.glob("*.arrow")).write_bytes(b"x")
    with pytest.raises(ImageSourceError, match="broken cannot be read as a dataset"):
        open_source(broken).plan()


def test_without_the_library_the_command_that_installs_it_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImageSourceError, match=r"pip install 'patchsae\[datasets\]'"):
        HuggingFaceDataset(tmp_path).plan()


# -- and on to activations ---------------------------------------------------------------------------------------------


def test_a_store_is_the_same_from_any_source(tmp_path: Path, tiny_images: Path, tiny_model: dict[str, str]) -> None:
    names = sorted(str(file.relative_to(tiny_images)) for file in tiny_images.rglob("*.png"))[::-1]
    pq.write_table(pa.table({"path": [str(tiny_images / name) for name in names]}), tmp_path / "x.parquet")
    write_tar(tmp_path / "x.tar", [(name, (tiny_images / name).read_bytes()) for name in names])
    options: dict[str, Any] = {**tiny_model, "layers": [0], "precision": "float32"}
    folder, table, tar = (
        extract(source, tmp_path / f"{i}.acts", **options)
        for i, source in enumerate((tiny_images, tmp_path / "x.parquet", tmp_path / "x.tar"))
    )
    assert table.artifact.id == folder.artifact.id
    assert tar.images["uri"].to_pylist() == [f"x.tar/{uri}" for uri in folder.images["uri"].to_pylist()]
    for other in (table, tar):
        ours, theirs = (Path(store.path) / "activations.zarr" for store in (folder, other))
        shards = [file.relative_to(ours) for file in ours.rglob("*") if file.is_file() and file.name != "zarr.json"]
        assert shards
        assert all((ours / shard).read_bytes() == (theirs / shard).read_bytes() for shard in shards)
