"""Vocabularies: lists of words that latents are named with. A file with one word or phrase a line, or the one here."""

from pathlib import Path

from actcache import SettingsError

VOCABULARY = Path(__file__).with_name("vocabulary.txt")
"""General words: colors, textures, shapes, materials, parts, animals, plants, people, things, places, light, styles."""


def read_vocabulary(path: str | Path | None = None) -> tuple[str, ...]:
    """The words of a file, in its order; by default the general vocabulary.

    Raises:
        SettingsError: no such file, an empty line, a word twice (the lines are named), or none at all.
    """
    path = VOCABULARY if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--vocabulary {path} cannot be read ({error}). Expected a text file, a word a line."
        ) from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if not word:
            raise SettingsError(f"Line {number} of {path} is empty. A vocabulary has a word or phrase on every line.")
        if word in lines:
            raise SettingsError(f"{path} has {word!r} twice, in lines {lines[word]} and {number}. Leave one out.")
        lines[word] = number
    if not lines:
        raise SettingsError(f"{path} has no words. Expected one a line.")
    return tuple(lines)
