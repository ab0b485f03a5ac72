"""Files of the Hugging Face hub, with bounded waits.

The hub's own client asks again for a minute when there is no network, for each of the names that a file might have.
Here the server is asked once, and only for what is not in the cache.
"""

import contextlib
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError

from actcache.errors import ModelError

TIMEOUT_S = 10.0
"""Longest wait for an answer of the server, before a download begins and between two parts of it."""


def fetch_file(repo: str, names: Sequence[str]) -> Path:
    """The first of these files that the repository has, from the cache or the hub.

    Raises:
        ModelError: the hub cannot be reached, or the repository does not exist or has none of the files.
    """
    for name in names:
        try:
            cached = huggingface_hub.try_to_load_from_cache(repo, name)
        except ValueError as error:  # not OWNER/NAME
            raise ModelError(f"hf-hub:{repo} is not the name of a repository: {_first_line(error)}.") from error
        if isinstance(cached, str):
            return Path(cached)
    for name in names:
        try:
            with limit_waits():
                huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, name), timeout=TIMEOUT_S)
                return Path(huggingface_hub.hf_hub_download(repo, name, etag_timeout=TIMEOUT_S))
        except EntryNotFoundError:
            continue
        except Exception as error:  # network libraries raise many kinds of errors
            raise ModelError(
                f"{name} of hf-hub:{repo} is not in the cache of the Hugging Face hub and could not be downloaded: "
                f"{_first_line(error)}. Download the repository where there is a network, and name its folder."
            ) from error
    raise ModelError(f"hf-hub:{repo} has no {' or '.join(names)}. Give the repository of a model, or a folder.")


@contextlib.contextmanager
def limit_waits() -> Iterator[None]:
    """Let no socket that is opened inside wait without end."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200].rstrip(".")
