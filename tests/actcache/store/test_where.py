"""select_images: an expression over the columns of images.parquet is parsed and never executed."""

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache import SettingsError
from actcache.store import select_images

TABLE = pa.table(
    {
        "label": pa.array([1, 2, 3, None], pa.int32()),
        "name": ["a", "b", None, "c"],
        "flag": [True, False, True, True],
        "score": [0.5, -1.0, 2.0, 0.0],
    }
)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("label == 1 or name == 'b'", [0, 1]),
        ("label in (1, 3) and flag", [0, 2]),
        ("label not in [1, 2]", [2]),
        ("not flag", [1]),
        ("0 <= label < 3", [0, 1]),
        ("name is None", [2]),
        ("name is not None and not (label == 1)", [1]),
        ("-0.5 < score", [0, 2, 3]),
        ("score != 0.0 and label != 2", [0, 2]),
        ("label == 9", []),
    ],
)
def test_an_expression_chooses_rows(where: str, expected: list[int]) -> None:
    assert select_images(TABLE, where).nonzero()[0].tolist() == expected


@pytest.mark.parametrize(
    ("where", "text"),
    [
        ("split == 'train'", "names the unknown column 'split'. Columns: label, name, flag, score"),
        ("__import__('os').system('ls')", "cannot contain"),
        ("label.real == 1", "cannot contain"),
        ("label + 1 == 2", "cannot contain"),
        ("label == 'cat'", "does not fit the columns"),
        ("label", "gives int32, expected true or false"),
        ("1 == 1", "compares '1' with no column"),
        ("label in 3", "only with a list"),
        ("flag is True", "only with None"),
        ("label ==", "cannot be read"),
        ("", "cannot be read"),
        ("(" * 500 + "flag" + ")" * 500, "cannot be read"),
        ("flag == " + "9" * 50, "does not fit"),
    ],
)
def test_what_is_no_expression_is_refused_in_one_line(where: str, text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        select_images(TABLE, where)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.text(alphabet="labe nmfgscor=<>!()[],.'\"0123456789-+*/_", max_size=40))
def test_any_text_is_a_mask_or_an_error_of_ours(where: str) -> None:
    try:
        mask = select_images(TABLE, where)
    except SettingsError:
        return
    assert mask.shape == (4,)
    assert mask.dtype == bool
