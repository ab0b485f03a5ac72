"""convert(): turns a Run into a checkpoint of another package, or such a checkpoint into a Run.

Every conversion makes a parity report. The foreign side of the report is computed from the files by the formulas of
their package (`formulas/`), which share nothing with our readers but the bytes. If the two sides differ by more than
float32 rounding, that is an error and nothing is kept.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from numpy.typing import ArrayLike

from actcache import ActivationStore, HookPoint, SettingsError, open_stores
from actcache.artifacts import (
    OutputLock,
    build_folder,
    check_place,
    remove_remnants,
    write_new,
)
from actcache.progress import Progress
from saetrain.interop.constants import estimate_constants, read_constants
from saetrain.interop.formats import Foreign, find_writer, read_foreign
from saetrain.interop.imported import write_imported
from saetrain.interop.matching import match_store, match_tokens
from saetrain.interop.parity import Parity, compare, read_rows
from saetrain.interop.sources import Source, find_source
from saetrain.interop.towers import name_tower
from saetrain.run import Run

PARITY_FILE = "parity.json"


@dataclass(frozen=True)
class Conversion:
    """What was written, in which format, and how well the two sides agree.

    Attributes:
        input: where the mean and the scale of the input come from, if they lie in no file of the checkpoint.
        notes: what else was not in its files, and of the model and the hook point what is guessed, or differs from what
            the checkpoint names; one sentence each.
    """

    path: Path
    format: str
    parity: Parity
    input: str | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Every fact that is shown."""
        return {
            "path": str(self.path),
            "format": self.format,
            "input": self.input,
            "parity": asdict(self.parity),
            "notes": self.notes,
        }


def convert(
    src: str | Path, dst: str | Path, *, to: str | None = None, store: ActivationStore | str | Path | None = None,
    layer: int | HookPoint | None = None, any_model: bool = False, input_mean: str | Path | ArrayLike | None = None,
    input_scale: str | Path | ArrayLike | None = None, overwrite: bool = False, on_progress: Progress | None = None,
) -> Conversion:  # fmt: skip
    """Convert a Run into a folder of another package, or a checkpoint of another package into a Run.

    Args:
        src: a path, or hf://OWNER/REPO[/folder][@revision] on the Hugging Face hub.
        to: saelens (default), dictionary_learning, sparsify, saev, prisma or patchsae; only for a Run.
        store: activations to compare on. A checkpoint needs them, because they say which model and hook point it is
            for.
        layer: the hook point; by default the one that the checkpoint names, or the only one of the store.
        any_model: accept a store of another model than the one that the checkpoint states.
        input_mean, input_scale: numbers, arrays [D] or .npy files of them: the checkpoint's package gives its SAE
            (x - input_mean) input_scale. Where its files lack these constants, they are otherwise estimated from the
            store, as the package takes them from its training rows.
        on_progress: called with bytes while files of the hub are downloaded.

    Raises:
        HubError: the hub cannot be reached, or has no such SAE; see `find_source`.
        SettingsError: the format cannot hold this SAE, or an argument is missing.
        CorruptError: the checkpoint could not be read, or the two sides disagree.
    """
    constants = read_constants(input_mean, input_scale)
    source = find_source(src, on_progress)
    src, dst = source.path, Path(dst)
    if not src.exists():
        raise SettingsError(f"{src} does not exist. Give a run, or a checkpoint of another package.")
    if (src / "artifact.json").exists():
        if constants is not None:
            raise SettingsError(f"{src} is a run, which has its own. Leave out --input-mean and --input-scale.")
        return _export(Run.open(src), dst, to or "saelens", store, layer, overwrite)
    if to is not None:
        raise SettingsError(
            f"--to names the format that a run is converted to, but {src} is a checkpoint of another package, which "
            "becomes a run. Leave out --to."
        )
    return _import(read_foreign(src, constants), source, dst, store, layer, any_model, overwrite)


def _export(
    run: Run, dst: Path, to: str, store: ActivationStore | str | Path | None, layer: int | HookPoint | None,
    overwrite: bool,
) -> Conversion:  # fmt: skip
    write = find_writer(to)
    check_place(dst)
    remove_remnants(dst)
    if (existing := _find_export(dst, run, to, overwrite)) is not None:
        return existing
    sae = run.sae()
    hook_point = run.hook_point if layer is None else layer
    rows, name = read_rows(sae, store, hook_point)
    with OutputLock(dst) as lock:
        lock.acquire()
        if (existing := _find_export(dst, run, to, overwrite)) is not None:  # written while we read the store
            return existing
        with build_folder(dst, replace=overwrite) as folder:
            for file, data in write(sae, run.hook_point).items():
                write_new(folder / file, data)
            parity = compare(
                sae, read_foreign(folder).forward, rows, name
            )  # compares what was written, by reading it again
            report = {"run_id": run.run_id, "format": to, "parity": asdict(parity)}
            write_new(folder / PARITY_FILE, json.dumps(report, indent=2).encode())
    return Conversion(dst, to, parity)


def _find_export(dst: Path, run: Run, to: str, overwrite: bool) -> Conversion | None:
    """The export of this run in this format, if `dst` is one and is to stay; None if there is something to write.

    Raises SettingsError for anything else at `dst`, unless it is an export and `overwrite` is given.
    """
    if not dst.exists():
        return None
    if not (dst / PARITY_FILE).is_file():  # it is not an export, so --overwrite must not delete it
        raise SettingsError(f"{dst} exists and is not an exported SAE. Give another destination.")
    if overwrite:
        return None
    try:
        report = json.loads((dst / PARITY_FILE).read_bytes())
        if (report["run_id"], report["format"]) == (run.run_id, to):
            return Conversion(dst, to, Parity(**report["parity"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise SettingsError(f"{dst} holds another SAE or another format. Give another destination, or --overwrite.")


def _import(
    foreign: Foreign, source: Source, dst: Path, store: ActivationStore | str | Path | None,
    layer: int | HookPoint | None, any_model: bool, overwrite: bool,
) -> Conversion:  # fmt: skip
    if store is None:
        raise SettingsError(
            "Parity and quality are measured on activations that the checkpoint reads. Name a store with --store."
        )
    group = open_stores(store)
    if group.layout.d_model != foreign.sae.d_model:
        raise SettingsError(
            f"{source.path} reads activations of width {foreign.sae.d_model}, but {group.path} holds width "
            f"{group.layout.d_model}. Give a store of the model it was trained on."
        )
    hint = name_tower(foreign.format, foreign.path, str(source.origin.get("repo", "")))
    hook_point, notes = match_store(hint, group, layer, any_model=any_model)
    if foreign.lacks_constants and foreign.statistics is not None:
        foreign = foreign.with_constants(estimate_constants(foreign.statistics, group, hook_point))
    sae, origin = foreign.sae, foreign.constants.origin if foreign.constants else None
    rows, name = read_rows(sae, store, hook_point)
    parity = compare(sae, foreign.forward, rows, name)
    tokens, more = match_tokens(hint, group)
    notes = (*notes, *more)
    write_imported(
        dst, sae, group, hook_point, format=foreign.format, tokens=tokens, overwrite=overwrite,
        provenance={
            "source": source.origin or source.path.name, "parity": asdict(parity),
            **({"input": origin} if origin else {}), **({"notes": list(foreign.notes)} if foreign.notes else {}),
        },
    )  # fmt: skip
    return Conversion(dst, foreign.format, parity, origin, (*foreign.notes, *notes))
