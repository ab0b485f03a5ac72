"""Tars and JSON that somebody else has written: every sample is read, or one line names what cannot be read."""

import io
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from actcache import ImageSourceError, ImageTars
from actcache.sources.tar_index import walk_tar


def png(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), (value % 256, 7, 9)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as file:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def rows_of(path: Path, **options: Any) -> dict[str, dict[str, Any]]:
    return {row["uri"]: row for row in ImageTars(path, **options).plan().table.to_pylist()}


def refusal(path: Path) -> str:
    with pytest.raises(ImageSourceError) as caught:
        ImageTars(path).plan()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


def message_of(path: Path) -> str:
    """What is said of a tar that is refused; nothing for one that is listed."""
    try:
        ImageTars(path).plan()
    except ImageSourceError as error:
        return str(error)
    return ""


# -- labels ------------------------------------------------------------------------------------------------------------


def labels_of(folder: Path, *samples: Mapping[str, bytes]) -> list[tuple[int, str]]:
    members = {f"{i}{suffix}": data for i, sample in enumerate(samples) for suffix, data in sample.items()}
    path = write_tar(folder / "x.tar", members | {f"{i}.png": png(i) for i in range(len(samples))})
    rows = rows_of(path)
    return [(rows[f"x.tar/{i}.png"]["label"], rows[f"x.tar/{i}.png"]["label_name"]) for i in range(len(samples))]


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([{".cls": b"dog\n"}, {".cls": b" cat "}, {}], [(1, "dog"), (0, "cat"), (-1, "")]),
        ([{".cls": b"3"}, {".cls": b"0\n"}], [(3, "3"), (0, "0")]),
        ([{".cls": b"001"}, {".cls": b"010"}], [(0, "001"), (1, "010")]),
        ([{".cls": b"1"}, {".cls": b"dog"}], [(0, "1"), (1, "dog")]),
        ([{".cls": "kälte".encode()}], [(0, "kälte")]),
        ([{".cls": b"5", ".json": b'{"label": 5}'}, {".cls": b"6"}], [(5, "5"), (6, "6")]),
        ([{".cls": b"dog", ".json": b'{"label": "dog"}'}], [(0, "dog")]),
        ([{".cls": b"5", ".json": b'{"label": "5"}'}], [(5, "5")]),
        ([{".cls": b"5", ".json": b'{"label": "dog"}'}, {".cls": b"7", ".json": b'{"label": "cat"}'}],
         [(5, "dog"), (7, "cat")]),
        ([{".json": b'{"class": "dog"}'}, {".json": b'{"class": "cat"}'}], [(1, "dog"), (0, "cat")]),
        ([{".json": b'{"class_name": "dog", "class_id": 7}'}], [(0, "dog")]),
        ([{".json": b'{"label": NaN}'}, {".json": b'{"label": 2.0}'}], [(-1, ""), (2, "2")]),
        ([{".json": b'{"label": true}'}, {".json": b'{"label": false}'}], [(1, "true"), (0, "false")]),
    ],
)  # fmt: skip
def test_a_class_may_be_a_number_or_a_text_and_be_given_twice(
    tmp_path: Path, samples: list[dict[str, bytes]], expected: list[tuple[int, str]]
) -> None:
    assert labels_of(tmp_path, *samples) == expected


def test_a_key_of_any_name_can_be_the_label(tmp_path: Path) -> None:
    record = b'{"breed": "husky", "label": "dog", "n": 1}'
    path = write_tar(tmp_path / "x.tar", {"0.png": png(), "0.json": record})
    (row,) = rows_of(path, label="breed").values()
    assert (row["label"], row["label_name"], row["breed"]) == (0, "husky", "husky")
    with pytest.raises(ImageSourceError, match=r"no column 'nothing' for --label\. Its columns are breed, label, n"):
        ImageTars(path, label="nothing").plan()


@pytest.mark.parametrize(
    ("cls", "record"), [(b"5", b'{"label": 6}'), (b"dog", b'{"label": "cat"}'), (b"dog", b'{"label": 1}')]
)
def test_two_different_labels_of_a_sample_are_refused(tmp_path: Path, cls: bytes, record: bytes) -> None:
    message = refusal(write_tar(tmp_path / "x.tar", {"a/0.png": png(), "a/0.cls": cls, "a/0.json": record}))
    assert "x.tar/a/0" in message
    assert "both its .json and a separate file give 'label'" in message


@pytest.mark.parametrize("suffix", ["ppm", "bmp", "tif", "JFIF", "gif", "avif", "pgm"])
def test_images_of_every_format_that_folders_have_are_samples(tmp_path: Path, suffix: str) -> None:
    path = write_tar(tmp_path / "x.tar", {f"0.{suffix}": png(), "0.cls": b"1"})
    assert list(rows_of(path)) == [f"x.tar/0.{suffix}"]


# -- JSON --------------------------------------------------------------------------------------------------------------

HOSTILE_JSON = {
    "deep": b"[" * 1_000 + b"]" * 1_000,
    "deep value": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    "lone surrogate": b'{"a": "\\ud800"}',
    "lone surrogate in a key": b'{"\\udfff": 1}',
    "raw surrogate": b'{"a": "\xed\xa0\x80"}',
    "long number": b'{"a": ' + b"9" * 5_000 + b"}",
    "not UTF-8": b'{"a": "\xff"}',
    "no object": b'"text"',
    "cut": b'{"a": 1',
    "lines": b'{"a":\n\n\n}',
    "empty": b"",
    "zero": b"\0",
}


@pytest.mark.parametrize("what", HOSTILE_JSON)
def test_json_that_no_table_can_hold_is_refused_with_its_sample(tmp_path: Path, what: str) -> None:
    members = {"a/good.png": png(), "a/bad.png": png(1), "a/bad.json": HOSTILE_JSON[what]}
    assert "x.tar/a/bad" in refusal(write_tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize("cls", [b"9" * 5_000, b"\xff", b"", b"a\0b", b"a\nb", b"-7", b"9" * 12, b"x" * 3_000])
def test_a_class_that_makes_no_sense_is_one_line_or_a_name(tmp_path: Path, cls: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", {"0.png": png(), "0.cls": cls})
    message = message_of(path)
    assert "\n" not in message
    assert len(message) < 600


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=10), st.text(min_size=1, max_size=4))  # fmt: skip
def test_any_json_value_becomes_a_column(value: Any, key: str) -> None:
    if key in ("uri", "label", "label_name", "bytes", "mask", "source_index", "text"):
        return
    with tempfile.TemporaryDirectory() as scratch:
        record = json.dumps({key: value}).encode()
        row = rows_of(write_tar(Path(scratch) / "x.tar", {"0.png": png(), "0.json": record}))["x.tar/0.png"]
    if value is None or isinstance(value, bool | str):
        assert row[key] == value
    elif isinstance(value, dict | list):
        assert row[key] == json.dumps(value)
    else:
        assert str(row[key]) == str(value)


def test_keys_of_their_own_stay_bounded_and_are_counted(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(600):
        own = {f"own {i} {k}": k for k in range(60)}
        members |= {f"{i}.png": b"1", f"{i}.json": json.dumps({"year": i, **own, "late": i}).encode()}
    plan = ImageTars(write_tar(tmp_path / "x.tar", members)).plan()
    assert {"year", "late"} <= set(plan.table.column_names)
    assert plan.table.num_columns <= 270
    assert sorted(plan.table["late"].to_pylist()) == list(range(600))
    (note,) = [note for note in plan.notes if "keys" in note]
    assert "36,002 different keys" in note
    assert "own " in note
    assert "\n" not in note


def test_fifteen_hundred_samples_of_their_own_keys_take_little_memory(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(1_500):
        members |= {f"{i}.png": b"1", f"{i}.json": json.dumps({f"own {i} {k}": k for k in range(250)}).encode()}
    path = write_tar(tmp_path / "x.tar", members)
    code = (
        "import resource, sys; from actcache import ImageTars, ImageFolder; import pyarrow.compute\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); n = ImageTars(sys.argv[1]).plan().n_images; print(n, peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    n_images, kilobytes = map(int, done.stdout.split())
    assert n_images == 1_500
    assert kilobytes < 200_000  # 5 GB when every key was a column


# -- tars --------------------------------------------------------------------------------------------------------------


def header(name: str, size: int, kind: bytes = b"0") -> bytearray:
    info = tarfile.TarInfo(name)
    info.size, info.type = max(size, 0), kind
    return bytearray(info.tobuf(tarfile.USTAR_FORMAT))


def with_size(block: bytearray, digits: bytes) -> bytes:
    block[124:136] = digits.ljust(12, b"\0")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax(fields: Mapping[str, str]) -> bytes:
    """A pax record before the next member, whatever its values mean."""
    body = b""
    for key, value in fields.items():
        record = f" {key}={value}\n".encode()
        length = len(record) + 1
        while length != len(str(length)) + len(record):
            length = len(str(length)) + len(record)
        body += str(length).encode() + record
    return bytes(header("pax", len(body), b"x")) + padded(body)


MEMBER = bytes(header("0.png", 4)) + padded(b"abcd")
END = bytes(1024)


@pytest.mark.parametrize("size", ["-512", "-1024", "-1536", "-2048", "-1", "-99999999999", "x", "", "1e3", "0x10", " 4",
                                  "4_0", "٣", "9" * 5_000, "1.5", "+4", "4\n"], ids=repr)  # fmt: skip
def test_a_pax_size_that_is_no_size_is_damage(tmp_path: Path, size: str) -> None:
    (tmp_path / "x.tar").write_bytes(MEMBER + pax({"size": size}) + bytes(header("1.png", 4)) + padded(b"abcd") + END)
    message = refusal(tmp_path / "x.tar")
    assert "x.tar" in message
    assert "damaged" in message or "truncated" in message


@pytest.mark.parametrize("digits", [b"-1000", b"-1", b" -10", b"1_0", b"+7", b"8", b"zz", b"\xff" * 12,
                                    b"\xff" + b"\0" * 11, b"\x80" + b"\xff" * 11, b"0x1"])  # fmt: skip
@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"g", b"5", b"S", b"V"])
def test_a_header_size_that_is_no_size_ends(tmp_path: Path, digits: bytes, kind: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(MEMBER + with_size(header("1.png", 4, kind), digits) + padded(b"abcd") + END)
    message = message_of(tmp_path / "x.tar")
    assert "\n" not in message
    assert message or kind == b"5"  # a folder has no content, whatever its size


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_named_like_images_are_named_in_a_note(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        for name in ("a/0.png", "a/1.png", "a/2.png"):
            info = tarfile.TarInfo(name)
            if name != "a/0.png":
                info.type, info.linkname = kind, "0.png"
            else:
                info.size = len(png())
            file.addfile(info, io.BytesIO(png()) if info.size else None)
    plan = ImageTars(tmp_path / "x.tar").plan()
    assert plan.table["uri"].to_pylist() == ["x.tar/a/0.png"]
    (note,) = plan.notes
    assert "a/1.png" in note
    assert "2" in note


def sparse_gnu(name: str) -> bytes:
    """An old GNU sparse member: two pieces of 512 bytes and a hole, with the map in its header."""
    block = header(name, 1024, b"S")
    block[257:265] = b"ustar  \0"
    block[345:500] = bytes(155)
    block[386:410] = b"%011o\0%011o\0" % (0, 512)
    block[410:434] = b"%011o\0%011o\0" % (2048, 512)
    block[483:495] = b"%011o\0" % 2560
    return with_size(block, b"%011o" % 1024) + b"a" * 512 + b"b" * 512


@pytest.mark.parametrize("kind", ["old", "pax 0", "pax 1"])
def test_sparse_members_are_named_instead_of_read_wrongly(tmp_path: Path, kind: str) -> None:
    if kind == "old":
        member = sparse_gnu("a/hole.png")
    elif kind == "pax 0":
        sparse = {"GNU.sparse.size": "2560", "GNU.sparse.numblocks": "1", "GNU.sparse.map": "0,4"}
        member = pax(sparse) + bytes(header("a/hole.png", 4)) + padded(b"abcd")
    else:
        sparse = {
            "GNU.sparse.major": "1",
            "GNU.sparse.minor": "0",
            "GNU.sparse.name": "a/hole.png",
            "GNU.sparse.realsize": "9",
        }
        member = (
            pax(sparse)
            + bytes(header("GNUSparseFile.0/hole.png", 516))
            + padded(b"1\n0\n4\n".ljust(512, b"\0") + b"abcd")
        )
    (tmp_path / "x.tar").write_bytes(member + MEMBER + END)
    message = refusal(tmp_path / "x.tar")
    assert "hole.png" in message
    assert "sparse" in message
    (tmp_path / "y.tar").write_bytes(member.replace(b"hole.png", b"hole.bin") + MEMBER + END)
    blocks = bytearray((tmp_path / "y.tar").read_bytes())
    if kind == "old":
        blocks[:512] = with_size(blocks[:512], b"%011o" % 1024)
    else:  # the checksum of the second header
        at = len(pax(sparse))
        blocks[at : at + 512] = with_size(blocks[at : at + 512], bytes(blocks[at + 124 : at + 135]))
    (tmp_path / "y.tar").write_bytes(blocks)
    assert list(rows_of(tmp_path / "y.tar")) == ["y.tar/0.png"]


@pytest.mark.parametrize("name", ["../0.png", "a/../../0.png", "..png/../0.png"])
def test_names_that_lead_out_of_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    message = refusal(write_tar(tmp_path / "x.tar", {name: png()}))
    assert name in message
    assert "x.tar" in message


def test_masks_of_absolute_names_stay_in_their_folder(tmp_path: Path) -> None:
    Image.new("L", (5, 4), 3).save(tmp_path / "secret.png")
    path = tmp_path / "x.tar"
    path.write_bytes(bytes(header(f"{tmp_path}/secret.png", 4)) + padded(b"abcd") + END)
    (tmp_path / "masks").mkdir()
    source = ImageTars(path, masks=tmp_path / "masks")
    assert source.read_mask(f"x.tar/{tmp_path}/secret.png") is None


@pytest.mark.parametrize("content", ["a/0.png\0/b.png", "\udcff", "é\n.png", "x" * 200_000 + ".png"])
def test_any_name_in_a_pax_record_is_a_name_or_one_line(tmp_path: Path, content: str) -> None:
    body = content.encode("utf-8", "surrogateescape")
    for length in range(len(body), len(body) + 20):
        record = str(length).encode() + b" path=" + body + b"\n"
        if len(record) == length:
            break
    (tmp_path / "x.tar").write_bytes(bytes(header("p", len(record), b"x")) + padded(record) + MEMBER + END)
    assert "\n" not in message_of(tmp_path / "x.tar")


# -- against tarfile ---------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=120).filter(
    lambda name: not name.startswith("/") and not name.endswith("/") and ".." not in name and not name.startswith("./")
)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
                         tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])  # fmt: skip
EXTRA = st.dictionaries(
    st.sampled_from(["comment", "mtime", "vendor.x"]), st.sampled_from(["1", "é", "a=b"]), max_size=2
)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(NAMES, KINDS, st.binary(max_size=1200)), max_size=6), FORMATS, EXTRA)
def test_every_valid_archive_holds_what_tarfile_says(
    members: list[tuple[str, bytes, bytes]], layout: int, extra: dict[str, str]
) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as file:
        for name, kind, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "target"
            info.pax_headers = extra if "mtime" not in extra or extra["mtime"] == "1" else {}
            if kind in tarfile.REGULAR_TYPES:
                info.size = len(data)
            try:
                file.addfile(info, io.BytesIO(data))
            except ValueError:  # too long a name for ustar
                continue
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.tar"
        path.write_bytes(buffer.getvalue())
        with tarfile.open(path) as file:
            expected = [(m.name, m.offset_data, m.size) for m in file.getmembers() if m.isreg()]
        assert [(m.name, m.offset, m.size) for m in walk_tar(path)] == expected


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_archive_is_a_listing_or_one_line(data: st.DataObject) -> None:
    whole = bytearray(pax({"size": "4", "path": "é/1.png"}) + MEMBER + sparse_gnu("s.png") + MEMBER + END)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.sampled_from([0, 255, 0x80, ord("-"), ord("0"), ord("7"), ord("x"), 10]))
        block = at // 512 * 512
        if data.draw(st.booleans()) and block + 512 <= len(whole):  # with a checksum that fits
            whole[block + 148 : block + 156] = b" " * 8
            whole[block + 148 : block + 156] = b"%06o\0 " % sum(whole[block : block + 512])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.tar"
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        assert "\n" not in message_of(path)
