"""Writing a person's name for a latent and a note on it, from several pages at once: nobody overwrites what they have
not seen.

A page says which version of all names it has seen. If the latent's own texts have changed since, nothing is written,
and the page gets what is there now.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from actcache import SettingsError
from analysis.explore.atlas import describe_names, own_version
from analysis.explore.records import Names
from analysis.explore.sources import Sources
from analysis.naming import change_own, read_own_names

MAX_LETTERS = 2000
N_VERSIONS = 1000


class Notes:
    """The names and notes of a table. Several threads may read and write."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._seen: OrderedDict[str, dict[int, dict[str, str]]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self) -> Names:
        """What names.json says. Its version is remembered, so that a page may refer to it."""
        with self._lock:
            self._remember()
            return describe_names(self._sources)

    def write(self, latent: int, fields: Mapping[str, Any]) -> tuple[bool, Names]:
        """Write the name and the note of a latent, each if it is there; "" removes it.

        Args:
            fields: name, note, and the version of the names that the page has seen.

        Returns:
            Whether it was written, and what names.json says now.

        Raises:
            SettingsError: a latent out of range; a text of several lines, or too long. StorageError: see `set_name`.
        """
        self._sources.check_latent(latent)
        texts: dict[str, str] = {}
        for key in ("name", "note"):
            text = fields.get(key)
            if text is None:
                continue
            if not isinstance(text, str) or len(text) > MAX_LETTERS:
                raise SettingsError(f"A {key} is a text of at most {MAX_LETTERS:,} letters.")
            if not text.isprintable() and not _is_utf8(text):
                raise SettingsError(f"This {key} holds half of a letter. Write it again.")
            texts[key] = text
        with self._lock:
            now = self._remember()
            seen = self._seen.get(str(fields.get("version")))
            mine = now if seen is None else seen  # an unknown version is from before the server started
            before = mine.get(latent, {})
            if seen is None and before and before != {key: text for key, text in texts.items() if text}:
                return False, describe_names(self._sources)
            written = change_own(self._sources.concepts, latent, **texts, before=before)
            self._remember()
            return written, describe_names(self._sources)

    def _remember(self) -> dict[int, dict[str, str]]:
        """What people wrote, kept under its version."""
        own = read_own_names(self._sources.concepts)
        self._seen[own_version(own)] = own
        while len(self._seen) > N_VERSIONS:
            self._seen.popitem(last=False)
        return own


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
