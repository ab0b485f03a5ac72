"""Vocabularies: the lists of words from which latents get their names. A file has one word or phrase per line."""

from pathlib import Path

from actcache import SettingsError

VOCABULARY = Path(__file__).with_name("vocabulary.txt")
"""General words: colors, textures, shapes, materials, parts, animals, plants, people, things, places, light, styles."""


def read_vocabulary(path: str | Path | None = None) -> tuple[str, ...]:
    """The words of a file, in its order; by default, those of the general vocabulary.

    Raises:
        SettingsError: the file cannot be read, has an empty line, names a word twice, or has no words.
    """
    path = VOCABULARY if path is None else Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"--vocabulary {path} cannot be read ({error}). Expected a text file with one word per line."
        ) from error
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        word = line.strip()
        if not word:
            raise SettingsError(
                f"Line {number} of {path} is empty. Every line must hold a word or phrase; remove the line."
            )
        if word in lines:
            raise SettingsError(f"{path} has {word!r} twice, in lines {lines[word]} and {number}. Remove one of them.")
        lines[word] = number
    if not lines:
        raise SettingsError(f"{path} has no words. Expected one word per line.")
    return tuple(lines)
