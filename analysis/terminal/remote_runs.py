"""A run on the Hugging Face hub as the argument of a verb that takes a run: it is downloaded before the verb begins."""

from pathlib import Path
from typing import Any

from actcache.artifacts import ARTIFACT_FILE
from actcache.errors import SettingsError
from actcache.hub import is_hub_address, parse_address
from analysis.terminal.progress import show_download


def fetch_runs(value: Any) -> Any:
    """The value of an argument, one or several, with a local folder in place of each address of the hub."""
    if isinstance(value, list):
        return [fetch_runs(each) for each in value]
    return fetch_run(value) if isinstance(value, str | Path) and is_hub_address(value) else value


def fetch_run(text: str | Path) -> Path:
    """The local folder of a run that an address names, downloaded unless it is in the cache.

    Raises:
        SettingsError: there is an SAE, but not as a run.
        HubError, StorageError, CorruptError: see `saetrain.interop.find_source`.
    """
    from saetrain.interop import find_source  # late: the readers of formats load torch

    address = parse_address(text)
    with show_download(str(address)) as on_progress:
        path = find_source(str(address), on_progress).path
    if not (path / ARTIFACT_FILE).is_file():
        raise SettingsError(
            f"{address} is an SAE, but not a run. Make a run of it first: patchsae convert {address} RUN --store STORE."
        )
    return path
