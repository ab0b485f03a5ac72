"""convert(): turns a Run into a checkpoint of another package, or such a checkpoint into a Run.

Every conversion makes a parity report. The foreign side of the report is computed from the files by the formulas of
their package (`formulas/`), which share nothing with our readers but the bytes. If the two sides differ by more than
float32 rounding, that is an error and nothing is kept.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache import ActivationStore, CorruptError, HookPoint, SettingsError, open_stores
from actcache.artifacts import (
    OutputLock,
    begin_artifact,
    build_folder,
    check_place,
    crc32c,
    remove_remnants,
    seal_artifact,
    write_atomic,
    write_new,
)
from saetrain.config import TrainConfig
from saetrain.data import split_images
from saetrain.interop import dictionary_learning, formulas, overcomplete, patchsae, prisma, saelens, saev, sparsify
from saetrain.interop.files import load_tensors
from saetrain.interop.formulas.forward import Forward
from saetrain.metrics import evaluate
from saetrain.model import SAE
from saetrain.run import SAE_FILE, Run, run_settings

WRITERS: dict[str, Callable[[SAE, HookPoint], dict[str, bytes]]] = {
    "saelens": saelens.write, "dictionary_learning": dictionary_learning.write, "sparsify": sparsify.write,
    "saev": saev.write, "prisma": prisma.write, "patchsae": patchsae.write,
}  # fmt: skip
READERS: dict[str, Callable[[Path], SAE]] = {
    "saelens": saelens.read, "dictionary_learning": dictionary_learning.read, "sparsify": sparsify.read,
    "saev": saev.read, "prisma": prisma.read, "patchsae": patchsae.read, "overcomplete": overcomplete.read,
}  # fmt: skip
FORMULAS: dict[str, Callable[[Path], Forward]] = {
    "saelens": formulas.saelens.load, "dictionary_learning": formulas.dictionary_learning.load,
    "sparsify": formulas.sparsify.load, "saev": formulas.saev.load, "prisma": formulas.prisma.load,
    "patchsae": formulas.patchsae.load, "overcomplete": formulas.overcomplete.load,
}  # fmt: skip
FOLDERS = {
    saelens.WEIGHTS: "saelens", dictionary_learning.WEIGHTS: "dictionary_learning", sparsify.WEIGHTS: "sparsify",
    saev.WEIGHTS: "saev", prisma.WEIGHTS: "prisma",
}  # fmt: skip
"""The file by which a folder is recognized -> its format."""
PARITY_FILE = "parity.json"
N_ROWS = 1024
TOLERANCE = 1e-3
"""Largest difference of a reconstruction relative to the norm of its row, and largest share of active entries that may
differ, because they are at a threshold."""


@dataclass(frozen=True)
class Parity:
    """How well two SAEs agree on rows of activations.

    Attributes:
        rows: `activations`, or `random` if no store was given.
        active_agreement: number of entries active in both, over the number active in either.
        max_code_difference: largest difference of an entry, relative to the largest value.
        max_reconstruction_difference: largest difference of a reconstruction, relative to the norm of its row.
        fvu_ours, fvu_foreign: centered fvu on these rows.
    """

    rows: str
    n_rows: int
    active_agreement: float
    max_code_difference: float
    max_reconstruction_difference: float
    fvu_ours: float
    fvu_foreign: float

    @property
    def holds(self) -> bool:
        return self.max_reconstruction_difference <= TOLERANCE and self.active_agreement >= 1 - TOLERANCE


@dataclass(frozen=True)
class Foreign:
    """A checkpoint: `sae` is our version of it, and `forward` computes what its own package would."""

    format: str
    sae: SAE
    forward: Forward


@dataclass(frozen=True)
class Conversion:
    """What was written, in which format, and how well the two sides agree."""

    path: Path
    format: str
    parity: Parity


def convert(
    src: str | Path, dst: str | Path, *, to: str | None = None, store: ActivationStore | str | Path | None = None,
    layer: int | HookPoint | None = None, overwrite: bool = False,
) -> Conversion:  # fmt: skip
    """Convert a Run into a folder of another package, or a checkpoint of another package into a Run.

    Args:
        to: saelens (default), dictionary_learning, sparsify, saev, prisma or patchsae; only for a Run.
        store: activations to compare on. A checkpoint needs them, because they say which model and hook point it is
            for.
        layer: the hook point, if the store has several.

    Raises:
        SettingsError: the format cannot hold this SAE, or an argument is missing.
        CorruptError: the checkpoint could not be read, or the two sides disagree.
    """
    src, dst = Path(src), Path(dst)
    if not src.exists():
        raise SettingsError(f"{src} does not exist. Give a run, or a checkpoint of another package.")
    if (src / "artifact.json").exists():
        return _export(Run.open(src), dst, to or "saelens", store, layer, overwrite)
    if to is not None:
        raise SettingsError(
            f"--to names the format that a run is converted to, but {src} is a checkpoint of another package, which "
            "becomes a run. Leave out --to."
        )
    return _import(read_foreign(src), src, dst, store, layer, overwrite)


def read_foreign(path: Path) -> Foreign:
    """Read a checkpoint of any known format. Raises SettingsError, CorruptError."""
    name, path = _recognize(path)
    return Foreign(name, READERS[name](path), FORMULAS[name](path))


def _recognize(path: Path) -> tuple[str, Path]:
    """(format, the path that its reader takes)."""
    if path.is_file():
        with open(path, "rb") as file:
            first = file.read(1)
        return ("saev" if first == b"{" else _recognize_file(path)), path
    for weights, name in FOLDERS.items():
        if (path / weights).is_file():
            with open(path / weights, "rb") as file:  # saev and overcomplete share a name
                return ("overcomplete" if name == "saev" and file.read(1) != b"{" else name), path
    if (path / patchsae.WEIGHTS).is_file():
        return _recognize_file(path / patchsae.WEIGHTS), path / patchsae.WEIGHTS
    raise SettingsError(
        f"{path} is not a known kind of checkpoint. Give a folder with {saelens.WEIGHTS} (SAELens), "
        f"{dictionary_learning.WEIGHTS} (dictionary_learning), {sparsify.WEIGHTS} (sparsify) or {saev.WEIGHTS} (saev, "
        "overcomplete), or a .pt file (PatchSAE, ViT-Prisma)."
    )


def _recognize_file(path: Path) -> str:
    """PatchSAE or ViT-Prisma: only the latter's settings name an architecture, or lie beside the file."""
    content = load_tensors(path)
    inside = "cfg" in content or "config" in content
    beside = not inside and (path.parent / prisma.CONFIG).is_file()
    return "prisma" if beside or "architecture" in prisma.config_of(content) else "patchsae"


def _export(
    run: Run, dst: Path, to: str, store: ActivationStore | str | Path | None, layer: int | HookPoint | None,
    overwrite: bool,
) -> Conversion:  # fmt: skip
    if to not in WRITERS:
        raise SettingsError(f"--to must be one of {', '.join(WRITERS)}, got {to!r}.")
    check_place(dst)
    remove_remnants(dst)
    if (existing := _find_export(dst, run, to, overwrite)) is not None:
        return existing
    sae = run.sae()
    hook_point = run.hook_point if layer is None else layer
    rows, name = _rows(sae, store, hook_point)
    with OutputLock(dst) as lock:
        lock.acquire()
        if (existing := _find_export(dst, run, to, overwrite)) is not None:  # written while we read the store
            return existing
        with build_folder(dst, replace=overwrite) as folder:
            for file, data in WRITERS[to](sae, run.hook_point).items():
                write_new(folder / file, data)
            parity = _checked(
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
    foreign: Foreign, src: Path, dst: Path, store: ActivationStore | str | Path | None, layer: int | HookPoint | None,
    overwrite: bool,
) -> Conversion:  # fmt: skip
    if store is None:
        raise SettingsError(
            "A checkpoint does not record which activations it reads. Name a store of them with --store."
        )
    from safetensors.torch import save

    group, sae = open_stores(store), foreign.sae
    hook_point = group.hook_point(layer)
    if group.layout.d_model != sae.d_model:
        raise SettingsError(
            f"{src} reads activations of width {sae.d_model}, but {group.path} holds width {group.layout.d_model}. "
            "Give a store of the model it was trained on."
        )
    rows, name = _rows(sae, store, hook_point)
    parity = _checked(sae, foreign.forward, rows, name)
    weights = save(sae.state_dict())
    tokens = group.layout.token_kind("all")
    settings = run_settings(group, hook_point, sae.config, TrainConfig(tokens=tokens))
    settings["imported"] = {"format": foreign.format, "crc32c": crc32c(weights), "bytes": len(weights)}
    with OutputLock(dst) as lock:
        artifact = begin_artifact(
            dst, "run", settings=settings, parents=group.parents(),
            provenance={"torch": torch.__version__, "source": src.name, "parity": asdict(parity)},
            overwrite=overwrite, lock=lock,
        )  # fmt: skip
        if not artifact.complete:
            _, held_out = split_images([member.n_images for member in group.stores])
            quality = evaluate(sae, group, hook_point, held_out, tokens=tokens)
            quality["dead"] = quality["silent"]
            write_atomic(artifact.path / SAE_FILE, weights)
            seal_artifact(artifact.path, quality=quality)
    return Conversion(dst, foreign.format, parity)


def _rows(sae: SAE, store: Any, hook_point: int | HookPoint | None) -> tuple[Tensor, str]:
    """Rows [N, D] in float32 to compare on, and what kind they are."""
    if store is None:
        generator = torch.Generator().manual_seed(0)
        return sae.denormalize(torch.randn(N_ROWS, sae.d_model, generator=generator)), "random"
    group = open_stores(store)
    images = group.valid.nonzero()[0][: 1 + N_ROWS // group.n_read_tokens("all")]
    values = group.read(group.hook_point(hook_point), images=images, check=group.checks_cheaply)
    if values.shape[-1] != sae.d_model:
        raise SettingsError(
            f"{group.path} holds activations of width {values.shape[-1]}, but the SAE reads width {sae.d_model}. "
            "Give a store of the model it was trained on."
        )
    return torch.from_numpy(values.reshape(-1, values.shape[-1])[:N_ROWS]).float(), "activations"


@torch.no_grad()
def _checked(sae: SAE, forward: Forward, x: Tensor, name: str) -> Parity:
    """Make the parity report. Raises CorruptError if the two sides disagree."""
    both, either, n_negative, code_difference, largest, reconstruction_difference = 0, 0, 0, 0.0, 1e-12, 0.0
    errors = torch.zeros(2, dtype=torch.float64)
    for part in torch.split(x, 256):
        rows, latents, values = sae.encode(part)
        ours = torch.zeros(len(part), sae.config.n_latents).index_put_((rows, latents), values)
        decoded = sae.decode(rows, latents, values, len(part))
        if sae.norms is not None:  # in the units of the other package
            ours = ours / sae.norms
        theirs, foreign = forward(part)
        both += int(((ours != 0) & (theirs != 0)).sum())
        either += int(((ours != 0) | (theirs != 0)).sum())
        n_negative += int((theirs < 0).sum())
        code_difference = max(code_difference, float((ours - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
        relative = (decoded - foreign).norm(dim=1) / part.norm(dim=1).clamp_min(1e-6)
        reconstruction_difference = max(reconstruction_difference, float(relative.max()))
        errors += torch.stack([(part - other).double().square().sum() for other in (decoded, foreign)])
    fvu = errors / (x.double() - x.double().mean(0)).square().sum().clamp_min(1e-12)
    parity = Parity(
        rows=name, n_rows=len(x), active_agreement=both / max(either, 1) if either else 1.0,
        max_code_difference=code_difference / largest, max_reconstruction_difference=reconstruction_difference,
        fvu_ours=float(fvu[0]), fvu_foreign=float(fvu[1]),
    )  # fmt: skip
    if not parity.holds:
        why = (
            f" {n_negative:,} codes of the other package are negative, which is impossible here." if n_negative else ""
        )
        raise CorruptError(
            f"The two SAEs disagree: their reconstructions differ by {parity.max_reconstruction_difference:.2g} of the "
            f"norm of a row (at most {TOLERANCE:g} is allowed), and {parity.active_agreement:.2%} of their active "
            f"entries are the same.{why} Nothing was written. Check that the checkpoint is complete."
        )
    return parity
