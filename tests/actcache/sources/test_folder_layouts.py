"""Which files of a folder are images, what is left out of it, and which folders are classes."""

import io
from pathlib import Path

import pytest
from PIL import Image

from actcache import ImageSourceError, SettingsError
from actcache.sources import ImageFolder, open_source
from actcache.sources.formats import SUFFIXES


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    return buffer.getvalue()


PNG = png()


def fill(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(PNG)
    return folder


def labels(folder: Path, **options: int) -> dict[str, str]:
    table = ImageFolder(folder, **options).plan().table
    return dict(zip(table["uri"].to_pylist(), table["label_name"].to_pylist(), strict=True))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("upper", [False, True])
def test_every_suffix_of_a_format_is_listed_in_folders_tables_and_tars(
    tmp_path: Path, suffix: str, upper: bool
) -> None:
    import tarfile

    suffix = suffix.upper() if upper else suffix
    folder = fill(tmp_path / "photos", f"cat/1{suffix}")
    assert labels(folder) == {f"cat/1{suffix}": "cat"}
    assert open_source(folder).read(f"cat/1{suffix}") == PNG
    (tmp_path / "t.csv").write_text(f"path\nphotos/cat/1{suffix}\n")
    assert open_source(tmp_path / "t.csv").plan().n_images == 1
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.add(folder / "cat" / f"1{suffix}", f"1{suffix}")
    assert open_source(tmp_path / "t.tar").plan().n_images == 1


SYSTEM = ["@eaDir", "$RECYCLE.BIN", "lost+found", "System Volume Information", ".git", "__MACOSX",
          ".ipynb_checkpoints", "#recycle", ".Trash-1000", "@EADIR", ".thumbnails", "#snapshot"]  # fmt: skip


@pytest.mark.parametrize("name", SYSTEM)
@pytest.mark.parametrize("below", ["", "cat/", "train/dog/"])
def test_folders_of_the_operating_system_are_neither_images_nor_classes(tmp_path: Path, name: str, below: str) -> None:
    folder = fill(tmp_path, "cat/1.png", "dog/2.png", f"{below}{name}/cat/1.png", f"{below}{name}/x.jpg")
    plan = ImageFolder(folder).plan()
    assert sorted(plan.table["uri"].to_pylist()) == ["cat/1.png", "dog/2.png"]
    assert plan.classes == ["cat", "dog"]
    assert sum(plan.left_out.values()) == 1


def test_what_is_left_out_is_counted_by_kind(tmp_path: Path) -> None:
    names = ("cat/1.png", "cat/notes.txt", "a.txt", "b.HEIC", "._1.png", ".hidden/2.png", "Thumbs.db", "@eaDir/1.jpg",
             "LICENSE", "x.svg")  # fmt: skip
    plan = ImageFolder(fill(tmp_path, *names)).plan()
    assert plan.left_out == {
        ".heic files": 1, ".svg files": 1, ".txt files": 2, "files without a suffix": 1, "hidden": 2,
        "of the operating system": 2,
    }  # fmt: skip
    assert ImageFolder(fill(tmp_path / "clean", "1.png")).plan().left_out == {}
    with pytest.raises(ImageSourceError, match=r"no images \(left out: 2 \.heic files\)"):
        ImageFolder(fill(tmp_path / "phone", "1.heic", "2.heic")).plan()


SPLITS = [("train", "val"), ("train", "test"), ("Training", "Validation", "Testing"), ("TRAIN", "dev"), ("test",)]


@pytest.mark.parametrize("splits", SPLITS)
def test_split_folders_become_a_column_and_classes_are_read_below_them(tmp_path: Path, splits: tuple[str, ...]) -> None:
    folder = fill(tmp_path, *(f"{split}/{name}/{i}.png" for split in splits for name in ("cat", "dog") for i in (1, 2)))
    plan = ImageFolder(folder).plan()
    assert plan.classes == ["cat", "dog"]
    rows = plan.table.to_pylist()
    assert {row["label_name"]: row["label"] for row in rows} == {"cat": 0, "dog": 1}
    assert all(row["uri"].split("/")[:2] == [row["split"], row["label_name"]] for row in rows)
    assert ImageFolder(folder, class_level=1).plan().classes == sorted(splits)
    assert "split" not in ImageFolder(folder, class_level=1).plan().table.column_names
    assert ImageFolder(folder, class_level=1).plan().rows_id == plan.rows_id


@pytest.mark.parametrize("names", [
    ("train/1.png", "test/2.png"),  # parts, but no classes in them
    ("train/1.png", "bus/2.png"),
    ("train/old/1.png", "bus/new/2.png"),
    ("train/cat/1.png", "2.png"),
    ("cat/tabby/1.png", "dog/2.png"),
    ("1.png", "2.png"),
])  # fmt: skip
def test_other_layouts_keep_the_first_folder_as_their_class(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = fill(tmp_path, *names)
    assert labels(folder) == {name: name.split("/")[0] if "/" in name else "" for name in names}
    assert "split" not in ImageFolder(folder).plan().table.column_names


@pytest.mark.parametrize(("level", "expected"), [
    (1, ["animals", "things"]), (2, ["cat", "cup", "dog"]), (3, ["", "persian"]), (-1, ["cup", "dog", "persian"]),
    (-2, ["animals", "cat", "things"]), (0, [""]), (None, ["animals", "things"]),
])  # fmt: skip
def test_the_level_of_the_class_is_chosen(tmp_path: Path, level: int | None, expected: list[str]) -> None:
    names = ["animals/cat/persian/1.png", "animals/dog/2.png", "things/cup/3.png"]
    given = {} if level is None else {"class_level": level}
    assert sorted(set(labels(fill(tmp_path, *names), **given).values())) == expected


@pytest.mark.parametrize("level", [4, 99, -4])
def test_a_level_that_no_image_has_is_refused(tmp_path: Path, level: int) -> None:
    with pytest.raises(ImageSourceError, match=f"--class-level {level}, such as a/b/1.png"):
        ImageFolder(fill(tmp_path, "a/b/1.png"), class_level=level).plan()


def test_a_level_is_for_folders_only(tmp_path: Path) -> None:
    (fill(tmp_path, "1.png") / "t.csv").write_text("path\n1.png\n")
    with pytest.raises(SettingsError, match="--class-level 2 is for folders of images"):
        open_source(tmp_path / "t.csv", class_level=2)
    assert open_source(tmp_path / "t.csv").plan().n_images == 1
