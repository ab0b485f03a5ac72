"""publish(): an SAE with everything that others need to use it becomes a folder of a repository, on the hub or here.

All files are made first, under the system's temporary folder, and compared with what the repository has. Then the user
is asked; nothing leaves the machine before that. What was published is read back and compared by sha256 before success
is claimed.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from actcache import SettingsError
from actcache.artifacts import file_sha256, list_files, storage_errors, write_new
from actcache.progress import Progress
from analysis.publication.card import Address
from analysis.publication.files import write_files
from analysis.publication.place import HubPlace, LocalPlace, Standing, find_place
from analysis.publication.repository import MANIFEST, README, Entry, encode_manifest, merge, write_readme
from analysis.publication.subject import Subject, open_subject
from saetrain.interop import CONFIG_FILE


@dataclass(frozen=True)
class PublishedFile:
    """A file of a publication.

    Attributes:
        path: in the repository, with `/`.
        state: `new`, `changed`, or `unchanged` where the repository has it already.
    """

    path: str
    bytes: int
    sha256: str
    state: Literal["new", "changed", "unchanged"]


@dataclass(frozen=True)
class Publication:
    """What was published, or would be.

    Attributes:
        destination: the repository, as hf://OWNER/REPO or a local folder.
        folder: the SAE's folder in it.
        address: how that folder is reached: hf://OWNER/REPO/FOLDER, or its path.
        files: in the order of their paths. Files of the SAE's folder come before those of the repository.
        left_out: what is not published -> why.
        left_behind: files of an earlier publication of the folder that the hub keeps.
        written: whether anything was written or uploaded.
        commit: of the hub, at which everything was read back; None for a local folder, and before it was uploaded.
    """

    destination: str
    folder: str
    address: str
    files: tuple[PublishedFile, ...]
    left_out: Mapping[str, str]
    left_behind: tuple[str, ...] = ()
    written: bool = False
    commit: str | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the files that are new or changed."""
        return sum(file.bytes for file in self.files if file.state != "unchanged")


def publish(
    src: str | Path, dst: str | Path, *, license: str | None = None, gallery: bool = False,
    codes: str | Path | None = None, run: str | Path | None = None, store: str | Path | None = None,
    overwrite: bool = False, dry_run: bool = False, confirm: Callable[[Publication], bool] | None = None,
    on_progress: Progress | None = None,
) -> Publication:  # fmt: skip
    """Publish a run, or a concept table with the run behind it.

    A repository holds a folder for each SAE, and at its root README.md with a row for each and manifest.jsonl with the
    sha256 of each file. A second SAE is added to what is there. The same call twice changes nothing.

    Args:
        src: a run, or x.concepts.
        dst: hf://OWNER/REPO, hf://OWNER/REPO/FOLDER (by default the folder gets a name from the SAE), or a local folder
            that becomes such a repository.
        license: what the hub calls it, such as mit. Without one the card says that none was given.
        gallery: also publish the pictures that the concept table holds; they show the user's images.
        codes, run, store: where these lie now, if they have moved.
        overwrite: replace a folder of the same name that holds something else.
        dry_run: return what would be published, and write nothing.
        confirm: asked before anything is uploaded. Nothing is without it, or if it says no.
        on_progress: called with bytes that were uploaded.

    Raises:
        SettingsError: a bad argument; the destination is something else, or holds another SAE; it was not confirmed.
        HubError, StorageError: it cannot be written. CorruptError: what was read back is not what was published.
    """
    _check_license(license)
    place = find_place(dst)
    subject = open_subject(src, codes=codes, run=run, store=store)
    place.check(subject.parents)
    folder = place.folder or subject.folder
    with (
        place.lock(folder, dry_run),
        storage_errors(place.written),
        tempfile.TemporaryDirectory(prefix="patchsae-") as scratch,
    ):
        root, standing = Path(scratch), place.look(folder)
        _check_names(folder, standing, place)
        plan = _stage(root, subject, place, folder, standing, license, gallery)
        _check_folder(plan, standing, subject, overwrite)
        if dry_run:
            return plan
        is_hub = isinstance(place, HubPlace)  # whose files may differ from what its manifest says
        changed = [file.path for file in plan.files if file.state != "unchanged" or (overwrite and is_hub)]
        if changed and is_hub:
            if confirm is None:
                raise SettingsError(
                    f"publish() uploads to {plan.destination} only what `confirm` approves. Pass confirm=lambda plan: "
                    "True, or dry_run=True to see what would be uploaded."
                )
            if not confirm(plan):
                raise SettingsError(f"Nothing was uploaded to {plan.destination}, because it was not confirmed.")
        commit = place.write(root, folder, changed, standing, on_progress) if changed else standing.commit
        place.read_back({file.path: file.sha256 for file in plan.files}, commit)
    return replace(plan, written=bool(changed), commit=commit)


def _stage(
    root: Path, subject: Subject, place: HubPlace | LocalPlace, folder: str, standing: Standing, license: str | None,
    gallery: bool,
) -> Publication:  # fmt: skip
    """Make all files that this publication writes, under `root`, and compare them with what the repository has."""
    inside = root / folder
    inside.mkdir(parents=True)
    row, left_out = write_files(
        inside, subject, Address(place.address(folder, within=True), place.repo, folder), license=license,
        gallery=gallery,
    )  # fmt: skip
    entries = [
        Entry(f"{folder}/{name}", (inside / name).stat().st_size, file_sha256(inside / name),
              row if name == CONFIG_FILE else None)
        for name in sorted(list_files(inside))
    ]  # fmt: skip
    after = merge(standing.manifest, folder, entries)
    write_new(root / README, write_readme(standing.readme, standing.manifest, after, f"{place}/{README}").encode())
    write_new(root / MANIFEST, encode_manifest(after))
    files = []
    for path in [*(entry.path for entry in entries), README, MANIFEST]:
        sha256, before = file_sha256(root / path), standing.hashes.get(path)
        state: Literal["new", "changed", "unchanged"] = "unchanged" if sha256 == before else "changed"
        files.append(
            PublishedFile(path, (root / path).stat().st_size, sha256, state if path in standing.names else "new")
        )
    made = {file.path for file in files}
    behind = tuple(sorted(name for name in standing.names if name.startswith(f"{folder}/") and name not in made))
    return Publication(str(place), folder, place.address(folder), tuple(files), left_out, behind)


def _check_names(folder: str, standing: Standing, place: HubPlace | LocalPlace) -> None:
    """Raise SettingsError if the folder has the name of a file, or lies inside that of another SAE, or around it."""
    if folder in (README, MANIFEST):
        raise SettingsError(f"{folder} is the name of a file of the repository. Give the folder another name.")
    for entry in standing.manifest.values():
        other = entry.folder
        if entry.sae is not None and (other.startswith(f"{folder}/") or folder.startswith(f"{other}/")):
            raise SettingsError(
                f"{place.address(folder)} and the folder {other} of another SAE would lie one inside the other. Give "
                "the folder another name."
            )


def _check_folder(plan: Publication, standing: Standing, subject: Subject, overwrite: bool) -> None:
    """Raise SettingsError if the folder holds something else, unless it is to be replaced."""
    inside = [name for name in standing.names if name.startswith(f"{plan.folder}/")]
    differing = [file.path for file in plan.files if file.path in inside and file.state == "changed"]
    if overwrite or not differing:
        return
    known = standing.manifest.get(f"{plan.folder}/{CONFIG_FILE}")
    same = known is not None and known.sae is not None and known.sae.run_id == subject.run.run_id
    what = "an earlier publication of this SAE" if same else "another SAE, or something else"
    names = ", ".join(name.rpartition("/")[2] for name in [*differing, *plan.left_behind][:4])
    raise SettingsError(
        f"{plan.address} holds {what}, which differs in {names}. Pass --overwrite to replace it, or choose another "
        "destination."
    )


def _check_license(license: str | None) -> None:
    if license is not None and not (0 < len(license) <= 60 and license.isascii() and license.isprintable()):
        raise SettingsError(f"--license must be a name such as mit, apache-2.0 or cc-by-4.0, got {license[:60]!r}.")
