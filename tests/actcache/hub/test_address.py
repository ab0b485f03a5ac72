"""hf://OWNER/REPO[/folder][@revision]."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache import SettingsError
from actcache.hub import HubAddress, is_hub_address, parse_address

NAMES = st.from_regex(r"[a-zA-Z0-9]([a-zA-Z0-9_]{0,5}[-.]?[a-zA-Z0-9_]){0,2}", fullmatch=True)
PARTS = st.text(
    st.characters(codec="utf-8", exclude_characters="/\\@", exclude_categories=["C"]), min_size=1, max_size=8
)
FOLDERS = st.lists(PARTS.filter(lambda part: part not in (".", "..")), max_size=3).map("/".join)
REVISIONS = st.sampled_from(["main", "v1.0", "feature/x", "refs/pr/4", "0123456789abcdef" * 2 + "01234567"])


@given(owner=NAMES, name=NAMES, folder=FOLDERS, revision=REVISIONS, kind=st.sampled_from(["model", "dataset"]))
def test_an_address_is_read_as_it_is_written(owner: str, name: str, folder: str, revision: str, kind: str) -> None:
    if owner in ("models", "datasets"):
        return
    address = HubAddress(f"{owner}/{name}", folder, revision, "dataset" if kind == "dataset" else "model")
    assert parse_address(str(address)) == address
    assert is_hub_address(str(address))
    assert address.is_pinned == (len(revision) == 40)


def test_other_ways_of_writing_the_same_are_read() -> None:
    expected = HubAddress("lab/sae", "layer_11/a", "v1")
    for text in (
        "hf://lab/sae/layer_11/a@v1",
        "hf://models/lab/sae/layer_11/a/@v1",
        Path("hf://lab/sae/layer_11/a@v1"),
    ):
        assert parse_address(text) == expected, text
    assert is_hub_address(Path("hf://lab/sae"))


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://lab", "hf://lab/", "hf:///sae", "hf://lab//sae", "hf://../sae", "hf://lab/..", "hf://lab/sae/../x",
     "hf://lab/sae/a//b", "hf://lab/sae/.", "hf://lab/sae@", "hf://lab/sae@../../x", "hf://lab/sae/a\\b",
     "hf://lab/sae/a\nb", "hf://lab/s ae", "hf://la:b/sae", "hf://lab/sae?x=1", "hf://-lab/sae", "hf://lab/sae--x",
     "hf://datasets/lab", "https://huggingface.co/lab/sae", "lab/sae", "hf://lab/sae/" + "x" * 256],
)  # fmt: skip
def test_a_malformed_address_is_one_line(text: str) -> None:
    with pytest.raises(SettingsError, match="Expected hf://OWNER/REPO") as caught:
        parse_address(text)
    assert "\n" not in str(caught.value).replace(text, "")


@pytest.mark.parametrize("path", ["runs/l10", "hf", "hf-hub:lab/sae", "./hf:", "s3://bucket/run"])
def test_other_paths_are_not_addresses(path: str) -> None:
    assert not is_hub_address(path)
