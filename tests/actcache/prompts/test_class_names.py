"""Texts of classes: made of the names of folders, or taken from a file."""

import json
import logging
from pathlib import Path

import pytest

from actcache import SettingsError
from actcache.prompts import class_words, describe_shared_texts, read_class_names, warn_about_shared_texts


@pytest.mark.parametrize(("name", "words"), [
    ("n02951585_can_opener", "can opener"), ("n02012849-crane", "crane"), ("n02012849 crane", "crane"),
    ("001.Black_footed_Albatross", "Black footed Albatross"), ("12_dog", "dog"), ("0003-cat", "cat"),
    ("7. lamp", "lamp"), ("003.Émeu", "Émeu"), ("tabby_cat", "tabby cat"), ("cat", "cat"),
    ("747-400", "747-400"), ("3d_printer", "3d printer"), ("A300B4", "A300B4"), ("42", "42"), ("001", "001"),
    ("n02012849", "n02012849"), ("n02012849_", "n02012849"), ("1.5", "1.5"), ("_", "_"),
])  # fmt: skip
def test_ids_and_leading_numbers_are_no_words(name: str, words: str) -> None:
    assert class_words(name) == words


@pytest.mark.parametrize(("names", "words"), [
    (["1_cat", "2_dog", "10_bird"], ["cat", "dog", "bird"]),
    (["18_wheeler", "car", "bus"], ["18 wheeler", "car", "bus"]),
    (["2_seater", "2_door", "4_door"], ["2 seater", "2 door", "4 door"]),
    (["001.cat", "101.dog", "background"], ["cat", "dog", "background"]),
    (["707-320", "737-200", "A300B4"], ["707-320", "737-200", "A300B4"]),
])  # fmt: skip
def test_numbers_are_dropped_where_they_number_the_classes(names: list[str], words: list[str]) -> None:
    assert [class_words(name, names) for name in names] == words


@pytest.mark.parametrize("names", [
    ["n02012849_crane", "n03126707_crane"], ["001.crane", "002.crane", "003.dog"], ["big_cat", "big cat", "dog"],
])  # fmt: skip
def test_classes_that_share_a_text_are_named(names: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_about_shared_texts(names)
    (said,) = [record.getMessage() for record in caplog.records]
    assert all(name in said for name in names[:2])
    assert "--class-names" in said
    assert describe_shared_texts(["cat", "dog"]) == ""


NAMES = ["n02012849_crane", "n03126707_crane", "tabby, cat", "0", "00"]
FILES = {
    "a.csv": 'class,text\nn02012849_crane,crane (bird)\n"tabby, cat","cat, striped"\n0,airplane\nother,x\n',
    "a.tsv": "n02012849_crane\tcrane (bird)\ntabby, cat\tcat, striped\n0\tairplane\nn03126707\tx\n",
    "a.txt": "\ufeffn02012849_crane crane (bird)\r\n\r\ntabby, cat cat, striped\r\n0 airplane\r\n",
    "a.json": json.dumps({"n02012849_crane": "crane (bird)", "tabby, cat": "cat, striped", "0": "airplane", "o": "x"}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_gives_texts_to_classes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    expected = {"n02012849_crane": "crane (bird)", "tabby, cat": "cat, striped", "0": "airplane"}
    assert read_class_names(tmp_path / name, NAMES) == expected


@pytest.mark.parametrize(("name", "content", "reason"), [
    ("a.csv", b"dog,x\n", "names none of the classes"), ("a.csv", b"", "names none of the classes"),
    ("a.csv", b"0,\n", "no text for the class '0'"), ("a.csv", b"0,a\n0,b\n", "two texts"),
    ("a.csv", b"\xff\xfe0", "cannot be read"), ("a.json", b"[1]", "not a JSON object"),
    ("a.json", b'{"0": 1}', "not a JSON object"), ("a.json", b"{", "cannot be read"),
    ("a.json", b"[" * 100_000, "cannot be read"),
])  # fmt: skip
def test_a_file_that_names_no_class_is_refused_in_one_line(
    tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SettingsError, match=reason) as caught:
        read_class_names(tmp_path / name, NAMES)
    assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError, match="cannot be read"):
        read_class_names(tmp_path / "gone.csv", NAMES)
