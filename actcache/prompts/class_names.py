"""What a text encoder is given for a class: words made of a folder's name, or taken from a file of class names.

In: names of classes. Out: texts. No torch.
"""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from actcache.errors import SettingsError

_WORDNET_ID = re.compile(r"^[nvars]\d{8}[_ .-]+(?=.)")
_NUMBER = re.compile(r"^(\d+)[_ .-]+(?=[^\W\d_])")

log = logging.getLogger(__name__)


def class_words(name: str, among: Sequence[str] = ()) -> str:
    """The words of a class, given the name of its folder.

    Underscores become spaces. A WordNet id is dropped (`n02951585_can_opener` -> `can opener`), and so is a leading
    number (`001.Black_footed_Albatross` -> `Black footed Albatross`) if each class has one of its own or one begins
    with 0: among names without numbers, `18_wheeler` is a name.

    Args:
        among: the names of all classes.
    """
    text = _WORDNET_ID.sub("", name)
    if _are_numbered(tuple(among) or (name,)):
        text = _NUMBER.sub("", text)
    return text.replace("_", " ").strip() or name


@lru_cache(maxsize=8)
def _are_numbered(names: tuple[str, ...]) -> bool:
    rest = [_WORDNET_ID.sub("", name) for name in names]
    numbers = [match[1] for match in map(_NUMBER.match, rest) if match]
    return len(numbers) == len(rest) == len(set(numbers)) or any(number[0] == "0" for number in numbers)


def find_shared_texts(names: Sequence[str], texts: Sequence[str]) -> dict[str, list[str]]:
    """Texts that several classes have, with the names of these classes."""
    classes = defaultdict(list)
    for name, text in zip(names, texts, strict=True):
        classes[text].append(name)
    return {text: shared for text, shared in classes.items() if len(shared) > 1}


def describe_shared_texts(names: Sequence[str], texts: Sequence[str] | None = None) -> str:
    """One line about classes that cannot be told apart by their text; "" if there are none.

    Args:
        texts: of the classes; their words by default.
    """
    shared = find_shared_texts(names, [class_words(name, names) for name in names] if texts is None else texts)
    if not shared:
        return ""
    text, classes = next(iter(shared.items()))
    more = f", and {len(shared) - 1:,} other texts are shared too" if len(shared) > 1 else ""
    return (
        f"{' and '.join(classes[:3])} have the same text, {text!r}{more}: a classifier predicts only the first. "
        "Give texts of your own with --class-names."
    )


def warn_about_shared_texts(names: Sequence[str], texts: Sequence[str] | None = None) -> None:
    if text := describe_shared_texts(names, texts):
        log.warning("%s", text)


def read_class_names(path: str | Path, names: Sequence[str]) -> dict[str, str]:
    """The texts that a file gives to classes; classes that it does not name keep their own words.

    The file is a JSON object {class: text}, or has one class per line: its name, then a tab, comma, semicolon or blank,
    then its text. Lines about other classes are ignored.

    Raises:
        SettingsError: the file cannot be read, names none of the classes, gives no text, or gives two to one class.
    """
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
        pairs = _parse_object(content) if Path(path).suffix.lower() == ".json" else _parse_lines(content, names)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(
            f"{path} cannot be read as class names: {reason}. Expected a JSON object or lines of a class and its text."
        ) from error
    texts: dict[str, str] = {}
    for name, text in pairs:
        if name not in names:
            continue
        if not text:
            raise SettingsError(f"{path} has no text for the class {name!r}. Add it, or remove the line.")
        if texts.setdefault(name, text) != text:
            raise SettingsError(f"{path} gives {name!r} two texts, {texts[name]!r} and {text!r}. Expected one.")
    if not texts:
        raise SettingsError(
            f"{path} names none of the classes ({', '.join(names[:5])}). Expected lines such as `{names[0]},its text`."
            if names
            else f"{path} cannot be used, because no image has a class. Leave out --class-names."
        )
    return texts


def digest_class_names(path: str | Path | None) -> str | None:
    """What stands for a file of class names in an identity. Raises SettingsError when it cannot be read."""
    try:
        return None if path is None else sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}. Check --class-names.") from error


def _parse_object(content: str) -> list[tuple[str, str]]:
    values = json.loads(content)
    if not isinstance(values, dict) or not all(isinstance(text, str) for text in values.values()):
        raise ValueError("it is not a JSON object of texts")
    return [(name, text.strip()) for name, text in values.items()]


def _parse_lines(content: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """The class of a line is the longest known name that it begins with, since names and texts may contain commas."""
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    line = re.compile(rf'^"?({longest_first})"?(?:[\t,; ]\s*(.*))?$') if names else re.compile("$^")
    found = [line.match(text) for text in content.splitlines()]
    return [(match[1], (match[2] or "").strip().strip('"').strip()) for match in found if match]
