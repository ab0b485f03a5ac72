"""Where an SAE is published: a repository of the Hugging Face hub, or a local folder that is laid out like one.

Both say what they hold (`look`), take the files of a publication (`write`), and give back what they took (`read_back`).
A local folder gets the SAE's folder whole or not at all, and a new one with everything in it; the hub gets one commit.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from actcache import CorruptError, SettingsError
from actcache.artifacts import (
    OutputLock,
    artifact_path,
    build_folder,
    check_apart,
    file_sha256,
    is_remote,
    list_files,
    remove_remnants,
    write_atomic,
    write_new,
)
from actcache.hub import HubAddress, fetch_files, is_hub_address, list_repository, parse_address, upload_folder
from actcache.progress import Progress
from analysis.publication.repository import MANIFEST, MAX_BYTES, README, Entry, parse_manifest
from saetrain.interop import is_published


@dataclass(frozen=True)
class Standing:
    """What a repository holds.

    Attributes:
        readme: its README.md, if it has one. manifest: path -> entry of its manifest.jsonl.
        names: the paths of its files.
        hashes: sha256 by path: of a local folder what its files have, of the hub what its manifest says.
        commit: of the hub.
    """

    readme: str | None = None
    manifest: Mapping[str, Entry] = field(default_factory=dict)
    names: frozenset[str] = frozenset()
    hashes: Mapping[str, str] = field(default_factory=dict)
    commit: str | None = None


def find_place(dst: str | Path) -> "HubPlace | LocalPlace":
    """What a destination means. Raises SettingsError."""
    if is_hub_address(dst):
        address = parse_address(dst)
        if address.kind != "model" or address.is_pinned:
            what = "a commit, which cannot change" if address.is_pinned else "a repository of data sets"
            raise SettingsError(f"{dst} names {what}. Give hf://OWNER/REPO, or hf://OWNER/REPO/FOLDER.")
        return HubPlace(address)
    path = artifact_path(dst)
    if is_remote(path):
        raise SettingsError(f"{dst} is neither hf://OWNER/REPO nor a local folder. Give one of these.")
    return LocalPlace(path)


def _parse(readme: bytes | None, manifest: bytes | None, where: str) -> tuple[str | None, dict[str, Entry]]:
    for name, data in ((README, readme), (MANIFEST, manifest)):
        if data is not None and len(data) > MAX_BYTES:
            raise CorruptError(f"{where}/{name} has {len(data):,} bytes, which is no {name} of SAEs. Remove it.")
    try:
        text = None if readme is None else readme.decode()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{where}/{README} is not UTF-8. Correct it, or remove it.") from error
    return text, {} if manifest is None else parse_manifest(manifest, f"{where}/{MANIFEST}")


def _compare(wanted: Mapping[str, str], found: Mapping[str, str | None], where: str) -> None:
    """Raise CorruptError unless what was read back is what was published."""
    if wrong := [path for path, sha256 in wanted.items() if found.get(path) != sha256]:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CorruptError(
            f"{where} was written, but read back, {', '.join(wrong[:3])}{more} differ from what was published. Publish "
            "again with --overwrite, and do not tell anybody of it before that succeeds."
        )


# ---------------------------------------------------------------------------------------------------------------------
# A local folder


@dataclass(frozen=True)
class LocalPlace:
    path: Path
    folder = ""
    repo = None

    def __str__(self) -> str:
        return str(self.path)

    def address(self, folder: str, *, within: bool = False) -> str:
        """The path of an SAE's folder; `within` the repository it says nothing of this machine."""
        return f"./{folder}" if within else str(self.path / folder)

    @property
    def written(self) -> Path:
        """What an error of the disk is about."""
        return self.path

    @contextmanager
    def lock(self, folder: str, dry_run: bool) -> Iterator[None]:
        """Let one process at a time publish here, without what a dead one left. A dry run only looks."""
        if dry_run:
            yield
            return
        for written in (self.path, *(self.path / name for name in (folder, README, MANIFEST))):
            remove_remnants(written)
        with OutputLock(self.path) as lock:
            lock.acquire()
            yield

    def check(self, parents: Mapping[str, Path]) -> None:
        """Raise SettingsError if the folder lies inside a parent, or is something else than a repository of SAEs."""
        check_apart(self.path, parents)
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise SettingsError(f"{self.path} is a file. Give a new or empty folder, or one of published SAEs.")
        seen = [
            entry for entry in self.path.iterdir() if not entry.name.startswith(".")
        ]  # git's own files may lie there
        if not (self.path / MANIFEST).is_file() and not all(is_published(entry) for entry in seen):
            raise SettingsError(
                f"{self.path} holds other things, and no {MANIFEST} of published SAEs. Give a new or empty folder."
            )

    def look(self, folder: str) -> Standing:
        inside = self.path / folder
        if inside.exists() and not inside.is_dir():
            raise SettingsError(f"{inside} is a file, where the SAE's folder would be. Remove it.")
        names = [f"{folder}/{name}" for name in list_files(inside)] if inside.is_dir() else []
        names += [name for name in (README, MANIFEST) if (self.path / name).is_file()]
        hashes = {name: sha256 for name in names if (sha256 := self._hash(name)) is not None}
        readme, manifest = ((self.path / name).read_bytes() if name in names else None for name in (README, MANIFEST))
        text, entries = _parse(readme, manifest, str(self.path))
        return Standing(text, entries, frozenset(names), hashes)

    def write(
        self, root: Path, folder: str, changed: Sequence[str], standing: Standing, on_progress: Progress | None
    ) -> None:
        """Take the files below `root`, which has all of the SAE's folder. A repository that is new appears whole."""
        if not self.path.exists() or not any(self.path.iterdir()):
            with build_folder(self.path) as new:
                _copy(root, new)
            return
        with build_folder(self.path / folder, replace=True) as new:
            _copy(root / folder, new)
        for name in (MANIFEST, README):
            write_atomic(self.path / name, (root / name).read_bytes())

    def read_back(self, wanted: Mapping[str, str], commit: str | None) -> None:
        """Raise CorruptError unless the files are those that were published."""
        _compare(wanted, {name: self._hash(name) for name in wanted}, str(self.path))

    def _hash(self, name: str) -> str | None:
        """The sha256 of a file; None if it cannot be read."""
        try:
            return file_sha256(self.path / name)
        except OSError:
            return None


def _copy(source: Path, destination: Path) -> None:
    for name in sorted(list_files(source)):
        write_new(destination / name, (source / name).read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# The hub


@dataclass(frozen=True)
class HubPlace:
    """A repository of the hub, and the SAE's folder in it if the user named one."""

    where: HubAddress

    @property
    def folder(self) -> str:
        return self.where.folder

    @property
    def repo(self) -> str:
        return self.where.repo

    @property
    def root(self) -> HubAddress:
        return replace(self.where, folder="")

    def __str__(self) -> str:
        return str(self.root)

    def address(self, folder: str, *, within: bool = False) -> str:
        return str(replace(self.where, folder=folder))

    @property
    def written(self) -> Path:
        """What an error of the disk is about: where the files are made."""
        return Path(tempfile.gettempdir())

    @contextmanager
    def lock(self, folder: str, dry_run: bool) -> Iterator[None]:
        """The hub takes one commit after the other."""
        yield

    def check(self, parents: Mapping[str, Path]) -> None:
        """Nothing of this machine is in the way."""

    def look(self, folder: str) -> Standing:
        listing = list_repository(self.root)
        if listing is None:  # there is no such repository, or nothing in it
            return Standing()
        sizes = listing.sizes()
        wanted = [name for name in (README, MANIFEST) if sizes.get(name, MAX_BYTES + 1) <= MAX_BYTES]
        data, hashes = dict[str, bytes](), dict[str, str]()
        if wanted:
            fetched = fetch_files(listing, wanted)
            data = {name: (fetched.folder / name).read_bytes() for name in wanted}
            hashes = dict(fetched.files)
        readme, manifest = _parse(data.get(README), data.get(MANIFEST), str(self))
        hashes |= {path: entry.sha256 for path, entry in manifest.items() if path in sizes}
        return Standing(readme, manifest, frozenset(sizes), hashes, listing.commit)

    def write(
        self, root: Path, folder: str, changed: Sequence[str], standing: Standing, on_progress: Progress | None
    ) -> str:
        """Upload the changed files below `root` as one commit, and return it. The others are deleted there.

        Where somebody else has made a commit since `look`, whose rows the new README lacks, nothing is changed.
        """
        for file in sorted(root.rglob("*")):
            if file.is_file() and file.relative_to(root).as_posix() not in changed:
                file.unlink()
        message = f"Publish the SAE {folder}"
        return upload_folder(root, self.root, message=message, parent=standing.commit, on_progress=on_progress)

    def read_back(self, wanted: Mapping[str, str], commit: str | None) -> None:
        """Raise CorruptError unless the hub has, at a commit, the files that were published."""
        assert commit is not None
        _compare(wanted, fetch_files(replace(self.root, revision=commit), wanted).files, f"{self} at {commit}")
