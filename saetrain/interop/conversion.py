"""convert(): turns a Run into a checkpoint of another package, or such a checkpoint into a Run.

Every conversion makes a parity report. The foreign side of the report is computed from the foreign tensors by the
formulas of their package. If the two sides differ by more than float32 rounding, that is an error and nothing is kept.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache import ActivationStore, CorruptError, HookPoint, SettingsError, open_stores
from actcache.artifacts import begin_artifact, crc32c, seal_artifact, write_atomic
from saetrain.config import TrainConfig
from saetrain.data import split_images
from saetrain.interop import dictionary_learning, patchsae, prisma, saelens, saev, sparsify
from saetrain.interop.foreign import Foreign, Forward
from saetrain.metrics import evaluate
from saetrain.model import SAE
from saetrain.run import SAE_FILE, Run, run_settings

WRITERS: dict[str, Callable[[SAE, HookPoint], dict[str, bytes]]] = {
    "saelens": saelens.write, "dictionary_learning": dictionary_learning.write, "sparsify": sparsify.write,
    "saev": saev.write, "prisma": prisma.write, "patchsae": patchsae.write,
}  # fmt: skip
READERS: dict[str, Callable[[Path], Foreign]] = {
    saelens.WEIGHTS: saelens.read, dictionary_learning.WEIGHTS: dictionary_learning.read,
    sparsify.WEIGHTS: sparsify.read, saev.WEIGHTS: saev.read, prisma.WEIGHTS: prisma.read,
}  # fmt: skip
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
    if path.is_file():
        with open(path, "rb") as file:
            return saev.read(path) if file.read(1) == b"{" else patchsae.read(path)
    for weights, read in READERS.items():
        if (path / weights).is_file():
            return read(path)
    if (path / patchsae.WEIGHTS).is_file():
        return patchsae.read(path / patchsae.WEIGHTS)
    raise SettingsError(
        f"{path} is not a known kind of checkpoint. Give a folder with {saelens.WEIGHTS} (SAELens), "
        f"{dictionary_learning.WEIGHTS} (dictionary_learning), {sparsify.WEIGHTS} (sparsify) or {saev.WEIGHTS} (saev), "
        "or a .pt file (PatchSAE, ViT-Prisma)."
    )


def _export(
    run: Run, dst: Path, to: str, store: ActivationStore | str | Path | None, layer: int | HookPoint | None,
    overwrite: bool,
) -> Conversion:  # fmt: skip
    if to not in WRITERS:
        raise SettingsError(f"--to must be one of {', '.join(WRITERS)}, got {to!r}.")
    if dst.exists():
        existing = _find_export(dst, run, to)
        if existing is not None and not overwrite:
            return existing
        if not (dst / PARITY_FILE).is_file():  # it is not an export, so --overwrite must not delete it
            raise SettingsError(f"{dst} exists and is not an exported SAE. Give another destination.")
        if not overwrite:
            raise SettingsError(f"{dst} holds another SAE or another format. Give another destination, or --overwrite.")
    sae = run.sae()
    hook_point = run.hook_point if layer is None else layer
    rows, name = _rows(sae, store, hook_point)
    folder = dst.with_name(f".{dst.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        for file, data in WRITERS[to](sae, run.hook_point).items():
            write_atomic(folder / file, data)
        parity = _checked(
            sae, read_foreign(folder).forward, rows, name
        )  # compares what was written, by reading it again
        report = {"run_id": run.run_id, "format": to, "parity": asdict(parity)}
        write_atomic(folder / PARITY_FILE, json.dumps(report, indent=2).encode())
        if dst.exists():
            shutil.rmtree(dst)
        folder.rename(dst)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Conversion(dst, to, parity)


def _find_export(dst: Path, run: Run, to: str) -> Conversion | None:
    """The export of this run in this format, if `dst` is one."""
    try:
        report = json.loads((dst / PARITY_FILE).read_bytes())
        if (report["run_id"], report["format"]) == (run.run_id, to):
            return Conversion(dst, to, Parity(**report["parity"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


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
    settings = run_settings(group, hook_point, sae.config, TrainConfig())
    settings["imported"] = {"format": foreign.format, "crc32c": crc32c(weights), "bytes": len(weights)}
    artifact = begin_artifact(
        dst, "run", settings=settings, parents=group.parents(),
        provenance={"torch": torch.__version__, "source": src.name, "parity": asdict(parity)},
        overwrite=overwrite,
    )  # fmt: skip
    if not artifact.complete:
        _, held_out = split_images([member.n_images for member in group.stores])
        quality = evaluate(sae, group, hook_point, held_out)
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
    images = group.valid.nonzero()[0][: 1 + N_ROWS // group.layout.n_tokens]
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
