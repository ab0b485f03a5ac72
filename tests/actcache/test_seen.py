"""Which images have been seen: by content where both sides have hashes, else by name; against sets."""

import hashlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache import SettingsError
from actcache.options import JudgingConfig, identity_of
from actcache.seen import CONTENT_HASH, LearnedImages, Seen, SeenImages, hash_content, pack_hashes, unpack_hashes

LETTERS = "abcdefg"
IMAGES = st.lists(st.tuples(st.sampled_from(LETTERS), st.sampled_from(LETTERS), st.booleans()), max_size=12)
"""(content, name, whether it was hashed)."""


def table_of(images: list[tuple[str, str, bool]], column: bool) -> pa.Table:
    columns: dict[str, Any] = {"uri": pa.array([name for _, name, _ in images], pa.string())}
    if column:
        hashes = [hash_content(text.encode()) if hashed else None for text, _, hashed in images]
        columns[CONTENT_HASH] = pa.array(hashes, pa.string())
    return pa.table(columns)


@given(learned=IMAGES, asked=IMAGES, columns=st.tuples(st.booleans(), st.booleans()), data=st.data())
def test_content_decides_where_both_are_hashed_and_names_elsewhere(
    learned: Any, asked: Any, columns: tuple[bool, bool], data: Any
) -> None:
    rows = np.array(data.draw(st.lists(st.booleans(), min_size=len(learned), max_size=len(learned))), dtype=bool)
    among = np.array(data.draw(st.lists(st.booleans(), min_size=len(asked), max_size=len(asked))), dtype=bool)
    found = LearnedImages.of("x", table_of(learned, columns[0]), rows).find(table_of(asked, columns[1]), among)
    known = [
        (text, name, hashed and columns[0]) for (text, name, hashed), row in zip(learned, rows, strict=True) if row
    ]
    by_name = any(not hashed for *_, hashed in known) and bool(among.any())
    for i, (text, name, hashed) in enumerate(asked):
        hashed &= columns[1]
        by_name |= among[i] and not hashed
        same = [(t == text) if h and hashed else n == name for t, n, h in known]
        assert found.images[i] == (among[i] and any(same))
    assert found.known_by == ("uri" if by_name else "content")


@given(st.lists(st.one_of(st.just(b""), st.binary(min_size=1, max_size=40)), max_size=20))
def test_packed_hashes_come_back(contents: list[bytes]) -> None:
    hashes = [hash_content(data) if data else "" for data in contents]
    wanted = [hashlib.blake2b(data, digest_size=16).hexdigest() if data else None for data in contents]
    packed = pack_hashes(hashes)
    assert len(packed) == 16 * len(contents)
    assert unpack_hashes(packed).to_pylist() == wanted


def test_what_nobody_knows_is_said_to_be_unknown() -> None:
    asked = table_of([("a", "a", True), ("b", "b", False)], True)
    assert LearnedImages.unknown("run x").find(asked).known_by == "unknown"
    hashes_only = LearnedImages("run y", pa.array([hash_content(b"a")]), None, pa.array([], pa.string()))
    found = hashes_only.find(asked)
    assert found.images.tolist() == [True, False]
    assert found.known_by == "unknown"  # of b there is only a name
    assert hashes_only.find(asked.slice(0, 1)).known_by == "content"
    assert (found | Seen(np.zeros(2, bool), ("run z",))).by == ("run y", "run z")


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.booleans())
def test_images_are_left_out_used_or_refused(seen: list[bool], use: bool) -> None:
    mask, candidates = np.array(seen), np.arange(len(seen))
    config = JudgingConfig(on_seen="use" if use else "leave-out")
    if all(seen) and not use:
        with pytest.raises(SettingsError, match=r"^Nothing is left to judge: .*run x.*--on-seen use") as caught:
            Seen(mask, ("run x",)).judge(candidates, config, "y.acts")
        assert "\n" not in str(caught.value)
        return
    judged, counted = Seen(mask, ("run x",)).judge(candidates, config, "y.acts")
    assert judged.tolist() == [i for i, s in enumerate(seen) if use or not s]
    assert counted == SeenImages("run x", sum(seen), len(seen), use, "content")
    assert bool(counted.lines()) == any(seen)


def test_the_default_is_no_part_of_an_identity() -> None:
    assert identity_of(JudgingConfig()) == {}
    assert identity_of(JudgingConfig(on_seen="use")) == {"on_seen": "use"}
    with pytest.raises(SettingsError, match="--on-seen must be leave-out or use, got 'drop'"):
        JudgingConfig(on_seen="drop")
