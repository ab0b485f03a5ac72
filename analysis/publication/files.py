"""The files of a published SAE, written into an empty folder: weights, settings, SAELens's files, concepts, card.

The same subject gives the same bytes, so that what a repository has already is not sent again.
"""

from collections.abc import Mapping
from pathlib import Path

import pyarrow.compute as pc

from actcache import CorruptError, SettingsError
from actcache.artifacts import encode_json, open_checked, write_new
from analysis.concepts import ConceptTable
from analysis.naming import read_name_table, read_names, read_own_names
from analysis.publication.card import Address, write_card
from analysis.publication.picture import draw_picture
from analysis.publication.repository import Row
from analysis.publication.subject import Subject, describe_subject
from saetrain.interop import PublishedTower, compare, encode_published, find_writer, read_foreign, read_rows

CARD, PICTURE, NAMES = "README.md", "picture.png", "names.json"
TABLE, GALLERY = "concepts.parquet", "gallery"


def write_files(
    folder: Path, subject: Subject, address: Address, *, license: str | None = None, gallery: bool = False
) -> tuple[Row, dict[str, str]]:
    """Write all files into a folder.

    Args:
        license: under which the SAE is published; None if nobody said.
        gallery: also publish the pictures of the concept table, which show the user's images.

    Returns:
        what a repository's table says of the SAE, and what is left out -> why.

    Raises:
        SettingsError: a gallery is asked for where there is none. CorruptError: what was written reads differently.
    """
    if gallery:
        _check_gallery(subject.concepts)
    left_out = dict(subject.left_out)
    published = describe_subject(subject, license)
    for name, data in encode_published(published, subject.run.weights()).items():
        write_new(folder / name, data)
    if reason := _write_saelens(folder, subject):
        left_out["SAELens's files"] = reason
    names = {} if subject.concepts is None else collect_names(subject.concepts)
    if subject.concepts is not None:
        _write_concepts(folder, subject.concepts, names, gallery)
        if not gallery:
            left_out["pictures"] = "they show the images that were analyzed, and are published with --gallery only"
    shown = {latent: entry["name"] for latent, entry in names.items() if entry.get("name")}
    caption = draw_picture(folder / PICTURE, subject.run, subject.concepts, shown, gallery=gallery)
    tower, holds_saelens = published.tower, "SAELens's files" not in left_out
    base_model = _find_base_model(tower)
    card = write_card(
        published, address, caption=caption, picture=PICTURE, holds_saelens=holds_saelens, base_model=base_model,
        concepts=subject.concepts, names=names, gallery=gallery, left_out=left_out,
    )  # fmt: skip
    write_new(folder / CARD, card.encode())
    return Row.of(published, base_model, holds_saelens), left_out


def _find_base_model(tower: PublishedTower) -> str | None:
    """OWNER/REPO of the tower on the hub, if the libraries know one by its name."""
    if tower.model is None:
        return None
    from actcache.models import find_repository  # it loads open_clip and timm

    return find_repository(tower.model, tower.pretrained)


def _write_saelens(folder: Path, subject: Subject) -> str:
    """Write the files that SAELens loads, if it can hold the SAE and then computes the same. Returns the reason if not.

    Both are compared on random rows before they count.
    """
    sae = subject.run.sae()
    try:
        files = find_writer("saelens")(sae, subject.run.hook_point)
    except SettingsError as error:
        return str(error).split(". ")[0]
    inside = folder / "saelens.tmp"
    for name, data in files.items():
        write_new(inside / name, data)
    try:
        compare(sae, read_foreign(inside).forward, *read_rows(sae, None, None))
    except CorruptError:
        return "their weights, with the normalization folded in, would not compute the same"
    finally:
        for name in files:
            (inside / name).unlink()
        inside.rmdir()
    for name, data in files.items():
        write_new(folder / name, data)
    return ""


def collect_names(concepts: ConceptTable) -> dict[int, dict[str, str]]:
    """What is known of latents: `name`, `by` (person, images or lens) and `note`, each if there is one."""
    n_latents, own = concepts.table.num_rows, read_own_names(concepts)
    table, methods = read_name_table(concepts), dict[tuple[int, str], str]()
    if table is not None:
        columns = (table[column].to_pylist() for column in ("latent", "name", "method"))
        methods = {(latent, name): method for latent, name, method in zip(*columns, strict=True)}
    entries: dict[int, dict[str, str]] = {}
    for latent, name in read_names(concepts).items():
        by = "person" if own.get(latent, {}).get("name") else methods.get((latent, name), "")
        entries[latent] = {"name": name, "by": by}
    for latent, texts in own.items():
        if note := texts.get("note"):
            entries.setdefault(latent, {})["note"] = note
    return {latent: entries[latent] for latent in sorted(entries) if 0 <= latent < n_latents}


def _write_concepts(
    folder: Path, concepts: ConceptTable, names: Mapping[int, Mapping[str, str]], gallery: bool
) -> None:
    for name in (TABLE, *((f"{GALLERY}.parquet",) if gallery else ())):
        _copy(concepts, name, folder)
    if names:
        write_new(folder / NAMES, encode_json({str(latent): entry for latent, entry in names.items()}))
    if gallery:
        for image in sorted(pc.unique(concepts.gallery["image"]).to_pylist()):
            if (concepts.path / GALLERY / f"{image}.jpg").is_file():
                _copy(concepts, f"{GALLERY}/{image}.jpg", folder)


def _copy(concepts: ConceptTable, name: str, folder: Path) -> None:
    with open_checked(concepts.artifact, name) as file:
        write_new(folder / name, file.read())


def _check_gallery(concepts: ConceptTable | None) -> None:
    if concepts is None:
        raise SettingsError("--gallery belongs to concepts, but this is a run. Give x.concepts, or leave it out.")
    if not (concepts.path / GALLERY).is_dir():
        raise SettingsError(
            f"{concepts.path} has no pictures, because `analyze` did not find the images. Run `analyze` again with "
            "--images, or leave out --gallery."
        )
