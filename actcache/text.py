"""visible(): text of others as it may be shown; to_json(): facts as strict JSON.

Everything that prints names, or draws them for people, uses `visible`.

Class names, uris, paths, columns and what libraries say may hold anything: an escape sequence that clears the screen, a
newline that fakes a second line, a mark that turns the direction of writing, a character without width.
"""

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters that have no ink."""


def is_utf8(path: object) -> bool:
    """Whether a path is UTF-8. safetensors opens no other: a file elsewhere has to be read before it is parsed."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def visible(value: object) -> str:
    """`value` as text on one line, with an escape such as \\x1b or \\u202e for each character that cannot be seen.

    These are control characters (newlines and tabs too), marks of direction and other characters without width, halves
    of surrogate pairs, and letters without ink. Spaces of all kinds stay.
    """
    text = str(value)
    if text.isprintable() and _BLANK.isdisjoint(text):
        return text
    return "".join(map(_show, text))


def _show(character: str) -> str:
    seen = character.isprintable() or unicodedata.category(character) in ("Zs", "Co", "Cn")
    return character if seen and character not in _BLANK else character.encode("unicode_escape").decode()


def to_json(facts: object) -> str:
    """One line of strict JSON: a number that does not exist (NaN, infinity) is null."""
    return json.dumps(_plain(facts), allow_nan=False)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, str | bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        return _plain(value.tolist())
    if isinstance(value, Sequence | set | frozenset):
        return [_plain(entry) for entry in value]
    return str(value)  # a path, a date
