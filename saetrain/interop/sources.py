"""Where an SAE is read from: a path, or a repository of the Hugging Face hub, of which only the SAE is downloaded.

What to download is decided by the names of the files alone; the formats are told apart by their content afterwards.
A repository often holds more than weights: states of optimizers, logs, code. None of it is fetched.
"""

import itertools
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from actcache import HubError
from actcache.artifacts import ARTIFACT_FILE, MANIFEST_FILE
from actcache.hub import HubListing, copy_files, fetch_files, is_hub_address, list_files, parse_address
from actcache.progress import Progress
from saetrain.run import LEARNED_FILE, METRICS_FILE, SAE_FILE

RUN = (ARTIFACT_FILE, MANIFEST_FILE, SAE_FILE, METRICS_FILE, LEARNED_FILE)
"""The files of a run of ours, of which the first three are always there."""
WEIGHTS = ("patchsae.safetensors", "sae_weights.safetensors", "ae.pt", "sae.safetensors", "sae.pt", "weights.pt")
"""The file of the weights in a folder that holds one SAE; the first that is there is read. The first of all is that of
a published SAE of ours, which lies in a folder with those of another package."""
LOOSE = ("n_images_*.pt", "out.pt", "*.pth", "*.pkl.gz")
"""Files of weights of which a folder may hold several, each an SAE of its own."""
LOOSE_IN = ("*_resid", "*.pt")
"""A folder of which each such file is an SAE (CLIP-Scope)."""
BESIDE = (
    "cfg.json", "config.json", "config.yaml", "config.yml", "sparsity.safetensors", "activation_scaler.json",
    "activation_whitening.safetensors",
)  # fmt: skip
"""What is fetched with the weights, where it lies beside them."""
N_LISTED = 20


@dataclass(frozen=True)
class Source:
    """An SAE on this machine.

    Attributes:
        path: a run, or a folder or file of another package.
        origin: where it was downloaded from: `repo`, `commit`, and in `files` the sha256 of each file by its name in
            the repository. Empty for a path of the user.
    """

    path: Path
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Candidate:
    """One SAE of a listing: what names it in an address, its folder there, its files, and the one that it is named by.

    Attributes:
        file: the file to read; None for a folder.
    """

    name: str
    folder: str
    files: tuple[str, ...]
    file: str | None = None


def find_source(source: str | Path, on_progress: Progress | None = None) -> Source:
    """Find an SAE: a path as it is, or hf://OWNER/REPO[/folder][@revision], of which the files are fetched.

    Args:
        on_progress: called with bytes of what is downloaded, first with 0.

    Raises:
        SettingsError: the address is malformed.
        HubError: it cannot be reached, holds no known SAE, or several: the message lists them.
        StorageError, CorruptError: see `fetch_files`.
    """
    if not is_hub_address(source):
        return Source(Path(source))
    address = parse_address(source)
    listing = list_files(address)
    candidates = _find_candidates(listing)
    if not candidates:
        first = ", ".join(file.name for file in listing.files[:5])
        raise HubError(
            f"{address} holds no SAE that is recognized by the names of its files ({first}, ...). Expected "
            f"{', '.join((*WEIGHTS, *LOOSE))} or a run; if another file is one, name it: {address}/FILE."
        )
    if len(candidates) > 1:
        names = ", ".join(each.name for each in candidates[:N_LISTED])
        more = f" and {len(candidates) - N_LISTED} more" if len(candidates) > N_LISTED else ""
        example = replace(address, folder=_join(address.folder, candidates[0].name))
        raise HubError(f"{address} holds {len(candidates)} SAEs. Name one of them, as in {example}: {names}{more}.")
    return _fetch(listing, candidates[0], on_progress)


def _fetch(listing: HubListing, found: _Candidate, on_progress: Progress | None) -> Source:
    address = listing.address
    folder = _join(address.folder, found.folder)
    inside = f"{found.folder}/" if found.folder else ""
    part = replace(listing, address=replace(address, folder=folder), files=tuple(
        replace(file, name=file.name.removeprefix(inside)) for file in listing.files if file.name.startswith(inside)
    ))  # fmt: skip
    files = fetch_files(part, found.files, on_progress=on_progress)
    path = copy_files(files) if ARTIFACT_FILE in found.files else files.folder
    origin = {
        "repo": address.page, "commit": address.revision,
        "files": {_join(folder, name): sha256 for name, sha256 in files.files.items()},
    }  # fmt: skip
    return Source(path / found.file if found.file else path, origin)


def _find_candidates(listing: HubListing) -> list[_Candidate]:
    """The SAEs of a listing: the file that was named, what lies in the folder itself, or else what lies below it."""
    folders: dict[str, list[str]] = defaultdict(list)
    for file in listing.files:
        folder, _, name = file.name.rpartition("/")
        folders[folder].append(name)
    if listing.named is not None:
        alone = None if listing.named in WEIGHTS else listing.named  # readers take a folder where it has a convention
        return [_Candidate(listing.named, "", _with_settings(listing.named, folders[""]), alone)]
    where = listing.address.folder
    found = {folder: _find_in(folder, names, _join(where, folder)) for folder, names in folders.items()}
    if len(here := found.get("", [])) == 1:
        return here
    return sorted(itertools.chain.from_iterable(found.values()), key=lambda each: _natural(each.name))


def _find_in(folder: str, names: list[str], where: str) -> list[_Candidate]:
    """The SAEs whose files lie in one folder of a listing, which is `where` in the repository."""
    if {*RUN[:3]} <= {*names}:
        return [_Candidate(folder, folder, tuple(name for name in RUN if name in names))]
    for weights in WEIGHTS:
        if weights in names:
            return [_Candidate(folder, folder, _with_settings(weights, names))]
    pattern, inside = LOOSE_IN
    patterns = (*LOOSE, inside) if fnmatchcase(where.rpartition("/")[2], pattern) else LOOSE
    loose = [name for name in names if any(fnmatchcase(name, each) for each in patterns)]
    return [_Candidate(_join(folder, name), folder, _with_settings(name, names), name) for name in loose]


def _with_settings(weights: str, names: list[str]) -> tuple[str, ...]:
    return (weights, *(name for name in BESIDE if name in names and name != weights))


def _join(*parts: str) -> str:
    return "/".join(filter(None, parts))


def _natural(name: str) -> list[tuple[int, str]]:
    """A key by which layer_6 comes before layer_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
