"""Images inside of Parquet files and saved datasets: the same images under the same names, however they are stored."""

import io
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actcache import HuggingFaceDataset, ImageFolder, ImageSourceError, ImageTable
from actcache.sources import ImageParquet, decode_image, open_source, parquet_images


def png(value: int = 0, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (5, 4), (value % 256, 7, 9) if mode == "RGB" else value).save(buffer, format="PNG")
    return buffer.getvalue()


def write(path: Path, n: int, first: int = 0, kind: Any = None, metadata: Any = None, **columns: Any) -> Path:
    """Rows with the images `first` to `first` + n - 1."""
    if kind is None or pa.types.is_struct(kind):
        images = pa.array([{"bytes": png(first + i), "path": f"{i}.png"} for i in range(n)], kind)
    else:
        images = pa.array([png(first + i) for i in range(n)]).cast(kind)
    table = pa.table({"image": images, "label": [i % 2 for i in range(n)]} | columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        table.replace_schema_metadata(metadata), path, row_group_size=3 if "view" not in str(table.schema) else 10
    )  # pyarrow cannot cut views
    return path


def rows_of(path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["uri"]: row for row in open_source(path, **options).plan().table.to_pylist()}


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(ImageSourceError) as caught:
        open_source(path, **options).plan()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 900
    return str(caught.value)


CLASSES = {b"huggingface": json.dumps({"info": {"features": {
    "image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}).encode()}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        None, pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
        pa.struct([("bytes", pa.binary())]),
        pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]), pa.binary(), pa.large_binary(),
        pa.binary_view(),
    ],
    ids=str,
)  # fmt: skip
def test_images_of_every_layout_are_read(tmp_path: Path, kind: Any) -> None:
    if kind is not None and pa.types.is_struct(kind) and kind.field("bytes").type == pa.binary_view():
        plain = pa.array([{"bytes": png(i), "path": "x"} for i in range(7)])
        fields = [plain.field("bytes").cast(pa.binary_view()), plain.field("path").cast(pa.string_view())]
        image = pa.StructArray.from_arrays(fields, ["bytes", "path"])
        path = write(tmp_path / "train-00000-of-00001.parquet", 7, metadata=CLASSES, image=image)
    else:
        path = write(tmp_path / "train-00000-of-00001.parquet", 7, kind=kind, metadata=CLASSES)
    source = open_source(path)
    assert isinstance(source, ImageParquet)
    rows = rows_of(path)
    assert sorted(rows) == [f"train/{i:06d}" for i in range(7)]
    assert [(row["label"], row["label_name"], row["bytes"], row["split"]) for _, row in sorted(rows.items())] == [
        (i % 2, ["cat", "dog"][i % 2], len(png(i)), "train") for i in range(7)
    ]  # fmt: skip
    uris = [f"train/{i:06d}" for i in (6, 0, 3, 2, 5)] * 5
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, uris)) == [png(int(uri[-1])) for uri in uris]
    assert decode_image(source.read("train/000002")).getpixel((0, 0)) == (2, 7, 9)
    for uri in ("train/000007", "test/000000", "train/x", "train", "train/-1", "train/٣"):
        with pytest.raises(ImageSourceError, match="is not in train-00000-of-00001"):
            source.read(uri)


def test_few_row_groups_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_images, "CACHE_BYTES", 3 * len(png()) + 50)
    source = ImageParquet(write(tmp_path / "x.parquet", 12))
    for i in (0, 11, 5, 1, 7, 0, 10):
        assert source.read(f"all/{i:06d}") == png(i)
        assert len(source._groups._kept) <= 1


SNAPSHOT = {
    "data/train-00000-of-00002.parquet": "train/0", "data/train-00001-of-00002.parquet": "train/1",
    "data/test-00000-of-00001-0123456789abcdef.parquet": "test/0",
}  # fmt: skip
CONVERTED = {"default/train/0000.parquet": "train/0", "default/train/0001.parquet": "train/1",
             "default/test/0000.parquet": "test/0"}  # fmt: skip
FLAT = {"train.parquet": "train/0", "validation.parquet": "validation/0", "test_1.parquet": "test/0"}


@pytest.mark.parametrize("files", [SNAPSHOT, CONVERTED, FLAT, {"a/train.parquet": "x", "b/train.parquet": "y"}])
def test_the_splits_of_a_folder_become_a_column(tmp_path: Path, files: dict[str, str]) -> None:
    snapshot = tmp_path / "snapshots" / "0123"
    for i, name in enumerate(files):  # as the hub's cache has them: links to files without a suffix
        blob = write(tmp_path / "blobs" / f"{i}.parquet", 4, first=10 * i).rename(tmp_path / "blobs" / str(i))
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    (snapshot / "README.md").write_text("data")
    rows = rows_of(snapshot)
    assert len(rows) == 4 * len(files)
    source = open_source(snapshot)
    images = sorted(source.read(uri) for uri in rows)
    assert images == sorted(png(10 * i + k) for i in range(len(files)) for k in range(4))
    assert {row["split"] for row in rows.values()} == {
        name.split("/")[0] for name in files.values()
    } or "x" in files.values()
    if files is SNAPSHOT:
        assert source.read("train/000005") == png(11)
        assert rows["train/000005"]["split"] == "train"


def test_a_folder_with_images_or_tars_stays_what_it_was(tmp_path: Path) -> None:
    write(tmp_path / "photos" / "meta.parquet", 2)
    (tmp_path / "photos" / "class").mkdir()
    (tmp_path / "photos" / "class" / "a.png").write_bytes(png())
    assert isinstance(open_source(tmp_path / "photos"), ImageFolder)
    (tmp_path / "empty").mkdir()
    assert isinstance(open_source(tmp_path / "empty"), ImageFolder)
    pq.write_table(pa.table({"path": ["photos/class/a.png"], "icon": [b"1"]}), tmp_path / "x.parquet")
    assert isinstance(open_source(tmp_path / "x.parquet"), ImageTable)
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"path": ["a.png"]}), tmp_path / "tables" / "x.parquet")
    message = refusal(tmp_path / "tables")
    assert "x.parquet holds no images, but the columns path. Give a table of paths as a file." in message


def test_files_that_are_there_count_before_previews_of_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(9))
    path = write(tmp_path / "x.parquet", 1, filename=["a.png"])
    assert open_source(path).read("a.png") == png(9)
    assert open_source(path, path_column="image").read("all/000000") == png(0)
    path = write(tmp_path / "y.parquet", 1, filename=["gone.png"])
    assert open_source(path).read("all/000000") == png(0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_dataset_is_read_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    import datasets

    folder = tmp_path_factory.mktemp("damaged") / "saved"
    own = {"label": ([0, 1], datasets.ClassLabel(names=["cat", "dog"])), "own": (["x", "é"], datasets.Value("string"))}
    dataset(2, **own).save_to_disk(folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    whole = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(whole)
    try:
        source = HuggingFaceDataset(folder)
        message = f"{source.plan().n_images} {source.read('all/000001')!r}"
    except ImageSourceError as error:
        message = str(error)
    assert "\n" not in message


def test_masks_and_rows_without_an_image(tmp_path: Path) -> None:
    masks = pa.array([{"bytes": png(5, "L"), "path": None}, None, {"bytes": None, "path": "x"}])
    path = write(tmp_path / "x.parquet", 3, mask=masks)
    source = open_source(path)
    assert [row["mask"] for _, row in sorted(rows_of(path).items())] == ["all/000000", "", ""]
    mask = source.read_mask("all/000000")
    assert mask is not None
    assert set(np.unique(mask)) == {5}
    assert source.read_mask("all/000001") is None
    images = pa.array([{"bytes": png(0), "path": None}, None, {"bytes": None, "path": "x"}])
    path = write(tmp_path / "y.parquet", 3, image=images)
    assert [row["bytes"] for _, row in sorted(rows_of(path).items())] == [len(png(0)), -1, -1]
    with pytest.raises(ImageSourceError, match="all/000002 cannot be read: the row contains no image"):
        open_source(path).read("all/000002")
    with pytest.raises(ImageSourceError, match="--masks does not apply"):
        open_source(path, masks=tmp_path)


def test_among_several_images_one_is_chosen(tmp_path: Path) -> None:
    left = pa.array([{"bytes": png(50 + i), "path": None} for i in range(2)])
    table = pq.read_table(write(tmp_path / "x.parquet", 2)).append_column("left", left)
    pq.write_table(table, tmp_path / "x.parquet")
    assert open_source(tmp_path / "x.parquet").read("all/000001") == png(1)
    chosen = open_source(tmp_path / "x.parquet", path_column="left")
    assert dict(chosen.plan().columns) == {"path": "left"}
    assert chosen.read("all/000001") == png(51)
    pq.write_table(table.rename_columns(["right", "label", "left"]), tmp_path / "y.parquet")
    assert "several columns of images: right, left. Choose one with --path-column" in refusal(tmp_path / "y.parquet")
    assert open_source(tmp_path / "y.parquet", path_column="right").read("all/000000") == png(0)


def test_class_numbers_without_a_name_are_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", 3, metadata=CLASSES, label=pa.array([0, 7, -1]))
    assert "has class 7 in column 'label', but names for 2 classes only" in refusal(path)
    path = write(tmp_path / "x.parquet", 3, metadata=CLASSES, label=pa.array([0, None, -1]))
    assert [row["label_name"] for _, row in sorted(rows_of(path).items())] == ["cat", "", ""]


@pytest.mark.parametrize("metadata", [b"", b"{", b"[1]", b'{"info": 1}', b'{"info": {"features": [1]}}', b"\xff",
                                      b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}',
                                      b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["\\ud800"]}}}}',  # noqa: E501
                                      b'{"info": {"features": {"label": 3, "image": {"_type": "Image"}}}}',
                                      b"[" * 5000], ids=map(str, range(9)))  # fmt: skip
def test_metadata_that_makes_no_sense_is_not_used(tmp_path: Path, metadata: bytes) -> None:
    path = write(tmp_path / "x.parquet", 2, metadata={b"huggingface": metadata})
    assert [row["label_name"] for _, row in sorted(rows_of(path).items())] == ["0", "1"]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_one_line(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = write(tmp_path_factory.mktemp("damaged") / "x.parquet", 4, metadata=CLASSES)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    try:
        source = ImageParquet(path)
        message = f"{source.plan().n_images} {source.read('all/000001')!r}"
    except ImageSourceError as error:
        message = str(error)
    assert "\n" not in message


# -- Hugging Face ------------------------------------------------------------------------------------------------------


def dataset(n: int, first: int = 0, **features: Any) -> Any:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(n)]}
    schema = {"image": datasets.Image()}
    for name, (values, feature) in features.items():
        columns[name], schema[name] = values, feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(schema))


def test_a_dataset_saved_to_disk_and_its_parquet_files_are_the_same_source(tmp_path: Path) -> None:
    import datasets

    names = datasets.ClassLabel(names=["cat", "dog"])
    own = {"label": ([0, 1, -1], names), "score": ([0.5, 1.5, 2.5], datasets.Value("float32")),
           "kind": ([1, 0, 1], datasets.ClassLabel(names=["photo", "drawing"]))}  # fmt: skip
    splits = datasets.DatasetDict({"train": dataset(3, **own), "test": dataset(3, first=9, **own)})
    splits.save_to_disk(tmp_path / "saved")
    for name, part in splits.items():
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        part.to_parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet")
    saved, hub = open_source(tmp_path / "saved").plan(), open_source(tmp_path / "hub").plan()
    assert isinstance(open_source(tmp_path / "hub"), ImageParquet)
    assert hub.rows_id == saved.rows_id
    assert hub.table.equals(saved.table)
    assert set(saved.table["kind"].to_pylist()) == {"photo", "drawing"}


def test_two_class_columns_are_both_labels_to_choose_from(tmp_path: Path) -> None:
    import datasets

    fine, coarse = datasets.ClassLabel(names=["oak", "elm", "cod"]), datasets.ClassLabel(names=["tree", "fish"])
    made = dataset(3, fine_label=([0, 1, 2], fine), coarse_label=([0, 0, 1], coarse))
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "x.parquet")
    for path in (tmp_path / "saved", tmp_path / "x.parquet"):
        plan = open_source(path).plan()
        assert sorted(plan.table["label_name"].to_pylist()) == ["cod", "elm", "oak"]
        assert "the labels are those of column 'fine_label'; coarse_label could be labels too" in "".join(plan.notes)
        chosen = open_source(path, label="coarse_label").plan()
        assert sorted(chosen.table["label_name"].to_pylist()) == ["fish", "tree", "tree"]
        assert sorted(chosen.table["label"].to_pylist()) == [0, 0, 1]
        assert not chosen.notes
        assert dict(chosen.columns) == {"label": "coarse_label"}
        assert "--label" in refusal(path, label="nothing")


def test_a_column_split_of_its_own_is_kept_beside_the_splits(tmp_path: Path) -> None:
    import datasets

    own = {"split": (["north", "south"], datasets.Value("string"))}
    splits = datasets.DatasetDict({"train": dataset(2, **own), "test": dataset(2, first=9, **own)})
    splits.save_to_disk(tmp_path / "saved")
    (tmp_path / "hub").mkdir()
    for name, part in splits.items():
        part.to_parquet(tmp_path / "hub" / f"{name}-00000-of-00001.parquet")
    for path in (tmp_path / "saved", tmp_path / "hub"):
        rows = rows_of(path)
        assert rows["train/000001"]["split"] == "south"
        assert rows["train/000001"]["dataset_split"] == "train"
        assert "'dataset_split'" in "".join(open_source(path).plan().notes)


def test_labels_of_a_dataset_that_are_no_classes_are_one_line(tmp_path: Path) -> None:
    import datasets

    dataset(2, label=([[0], [1, 0]], [datasets.Value("int64")])).save_to_disk(tmp_path / "saved")
    assert "a label that is not a class" in refusal(tmp_path / "saved")
    dataset(2, boxes=([[0], [1, 0]], [datasets.Value("int64")])).save_to_disk(tmp_path / "boxes")
    plan = open_source(tmp_path / "boxes").plan()
    assert set(plan.table["label"].to_pylist()) == {-1}
    assert "boxes" in "".join(plan.notes)


def test_class_numbers_of_a_damaged_dataset_are_one_line(tmp_path: Path) -> None:
    import datasets

    made = dataset(2, label=([0, 1], datasets.ClassLabel(names=["cat", "dog"])))
    made.save_to_disk(tmp_path / "saved")
    info = tmp_path / "saved" / "dataset_info.json"
    facts = json.loads(info.read_text())
    facts["features"]["label"]["names"] = ["cat"]
    info.write_text(json.dumps(facts))
    assert "saved" in refusal(tmp_path / "saved")


def test_a_dataset_moves(tmp_path: Path) -> None:
    import datasets

    dataset(2, label=([0, 1], datasets.Value("int64"))).save_to_disk(tmp_path / "saved")
    moved = shutil.move(tmp_path / "saved", tmp_path / "moved")
    assert HuggingFaceDataset(moved).read("all/000001") == png(1)


def test_a_file_may_hold_nothing_but_images(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", 3)
    pq.write_table(pq.read_table(path).select(["image"]), path)
    rows = rows_of(path)
    assert [(uri, row["label"], row["bytes"]) for uri, row in sorted(rows.items())] == [
        (f"all/{i:06d}", -1, len(png(i))) for i in range(3)
    ]  # fmt: skip
