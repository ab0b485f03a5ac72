"""The table that a new one replaces: whether it is there, and what people wrote in it, which must not be lost."""

import json
from collections.abc import Mapping
from pathlib import Path

from actcache import PipelineError, SettingsError
from actcache.artifacts import Artifact, artifact_path, open_artifact
from analysis.concepts.table import NAMES_FILE, NOTES, OWN_FILE
from saetrain import CodeStore


def find_table(concepts: str | Path, codes: CodeStore) -> Artifact | None:
    """The table of the same codes that is there already, whatever its settings are."""
    try:
        there = open_artifact(concepts, "concepts")
    except PipelineError:
        return None
    same = there.parents.keys() == {"codes"} and there.parent("codes").id == codes.codes_id
    return there if same else None


def is_completed(there: Artifact, settings: Mapping[str, object]) -> bool:
    """Whether a table differs only in lacking parts that can be computed now.

    It was made without the images or the run; `analyze` advised to name them, and that must lead to the whole table.
    """
    old = dict(there.settings)
    gained = [part for part in ("pictures", "nearest") if not old.get(part) and settings[part]]
    same = {**old, **{part: settings[part] for part in gained}} == json.loads(json.dumps(settings))
    return bool(gained) and same


def read_notes(there: Artifact, settings: Mapping[str, object]) -> dict[str, bytes]:
    """What a new table keeps of the names of the latents: file name -> content.

    What people wrote is stored nowhere else. Computed names are left out if the new table chooses other top images.
    """
    files = [file for file in sorted((there.path / NOTES).glob("*")) if file.is_file()]
    if any(there.settings.get(name) != settings[name] for name in ("n_top", "score")):
        files = [file for file in files if file.name != NAMES_FILE]
    return {str(file.relative_to(there.path)): file.read_bytes() for file in files}


def check_notes(concepts: str | Path) -> None:
    """Raise SettingsError if names of people would be deleted: those of other codes, or of a table that is damaged."""
    own = artifact_path(concepts) / NOTES / OWN_FILE
    if own.is_file():
        raise SettingsError(
            f"{own} holds names that people gave to other latents, and they are stored nowhere else. Move the file "
            f"out of {concepts}, or delete it, before you replace the table with --overwrite."
        )
