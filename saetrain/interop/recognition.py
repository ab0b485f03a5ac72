"""Which format a checkpoint has: by the names of its files, then by the names inside them.

No two packages write the same file name with the same names inside, and what is more special is asked first. A file is
opened once for its names, without reading its tensors.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from actcache import CorruptError, SettingsError
from saetrain.interop import (
    dictionary_learning,
    lasgroup,
    patchsae,
    prisma,
    publication,
    ra_sae,
    saelens,
    saev,
    sparsify,
)
from saetrain.interop.fields import names, shorten
from saetrain.interop.files import check_download, load_tensors
from saetrain.interop.pickles import is_pickle
from saetrain.interop.prisma import config_of
from saetrain.interop.refusals import refuse_kind

FOLDERS = {
    saelens.WEIGHTS: "saelens", dictionary_learning.WEIGHTS: "dictionary_learning", sparsify.WEIGHTS: "sparsify",
}  # fmt: skip
"""A file that only one package writes, beside its settings -> the format of the folder."""
SUFFIXES = (".pt", ".pth", ".pkl", ".pkl.gz", ".safetensors")
"""How the name of a checkpoint ends."""
BESIDE = names("sparsity.safetensors ctx.safetensors activations_store_state.safetensors trainer_state.pt")
"""Files of the training that lie beside a checkpoint."""
LAYOUTS: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("SwitchSAE", "model_state_dict", names("router enc dec")),
    ("QSAE", "", names("Q dictionary._weights")),
    ("clipscope", "model_state_dict", names("pre_b enc dec")),
    ("universal_sae", "model_state_dict", names("encoder.final_block.0.weight dictionary._weights")),
    ("msae", "model", names("encoder pre_bias latent_bias")),
    ("discover_then_name", "", names("tied_bias encoder._weight decoder._weight")),
    ("discover_then_name", "", names("tied_bias encoder.weight decoder.weight")),
    ("overcomplete", "", names("encoder.final_block.0.weight dictionary._weights")),
    ("MpSAE", "", names("dictionary._weights")),
    ("visaebench", "", names("encoder.weight encoder.bias decoder.weight")),
    ("prisma", "", names("W_enc W_dec b_dec")),
)
"""Format, or what refuse_kind refuses; the entry that holds the tensors ("" for the file itself); names that all are
among them. The first that fits counts. A {"cfg", "state_dict"} is told apart by its settings."""
TOWERS = ("text_model.", "vision_model.", "transformer.resblocks.", "visual.", "positional_embedding")
"""Names of the tensors of a CLIP begin so."""
KNOWN = (
    "SAELens, dictionary_learning, sparsify, saev, ViT-Prisma, PatchSAE, overcomplete, ViSAEBench, CLIP-Scope, "
    "Universal SAE, MSAE, lasgroup, RA-SAE or Discover-then-Name"
)
MAX_SHOWN = 4
MAX_HEADER = 1 << 24


def recognize(path: Path) -> tuple[str, Path]:
    """(format, the path that its reader takes) of a file or a folder.

    Raises:
        SettingsError: the format is not known or no SAE here can compute it; or there are several checkpoints.
        CorruptError: the file could not be read.
    """
    if (module := ra_sae.find(path)) is not None:  # a pickle of modules, which no other reader opens
        return "ra_sae", module
    if path.name == publication.WEIGHTS and publication.is_published(path.parent):
        return "published", path.parent
    return _recognize_file(path) if path.is_file() else _recognize_folder(path)


def _recognize_folder(path: Path) -> tuple[str, Path]:
    if publication.is_published(path):  # before the others, since SAELens's files lie there, too
        return "published", path
    for weights, name in FOLDERS.items():
        if (path / weights).is_file():
            return name, path
    for weights in (saev.WEIGHTS, prisma.WEIGHTS, patchsae.WEIGHTS):
        if (path / weights).is_file():
            return _recognize_file(path / weights)
    found = [file for file in sorted(path.glob("*")) if file.name.endswith(SUFFIXES) and file.is_file()]
    found = [file for file in found if file.name not in BESIDE]
    if len(found) > 1:
        shown = ", ".join(shorten(file.name) for file in found[:MAX_SHOWN])
        more = ", ..." if len(found) > MAX_SHOWN else ""
        raise SettingsError(f"{path} holds {len(found):,} checkpoints ({shown}{more}). Give one of them.")
    if found:
        return _recognize_file(found[0])
    raise SettingsError(
        f"{path} is not a known kind of checkpoint: it holds no file that ends in {', '.join(SUFFIXES)}. Give a file "
        f"or a folder of {KNOWN}."
    )


def _recognize_file(path: Path) -> tuple[str, Path]:
    if path.name in FOLDERS:
        return FOLDERS[path.name], path.parent
    check_download(path)
    with open(path, "rb") as file:
        start = file.read(1)
    if path.suffix == ".safetensors":
        inside = _read_names(path)
        if path.name == lasgroup.WEIGHTS and {"W_enc", "W_dec"} <= set(inside):
            return "lasgroup", path.parent
        return _match_layout({"": inside}, path), path
    if start == b"{":
        return "saev", path
    if is_pickle(path):
        return "saelens_pickle", path
    content = load_tensors(path, mapped=True)
    if isinstance(content.get("state_dict"), dict):
        return _recognize_settings(content, path), path
    nested = {name: value for name, value in content.items() if isinstance(value, dict)}
    return _match_layout({"": content, **nested}, path), path


def _recognize_settings(content: Mapping[str, object], path: Path) -> str:
    """PatchSAE, ViT-Prisma or SAELens, which descend from one code: by the settings that only one of them has."""
    settings = config_of(content)
    if "architecture" in settings or "layer_subtype" in settings:
        return "prisma"
    if "hook_point" in settings and not {"block_layer", "module_name"} & set(settings):
        return "saelens_pickle"
    return "prisma" if not settings and (path.parent / prisma.CONFIG).is_file() else "patchsae"


def _match_layout(parts: Mapping[str, Mapping[str, object]], path: Path) -> str:
    """The format whose names are all there, among the names of the file ("") and of its entries."""
    for name, entry, wanted in LAYOUTS:
        if wanted <= set(parts.get(entry, {})):
            refuse_kind(name, path)
            return name
    if any(str(name).startswith(TOWERS) for part in parts.values() for name in part):
        raise SettingsError(f"{path} is a CLIP or a part of one, not an SAE, whatever its name says. Give an SAE.")
    shown = [shorten(name) for part in parts.values() for name in part if not isinstance(part[name], dict)]
    more = f" and {len(shown) - MAX_SHOWN:,} more" if len(shown) > MAX_SHOWN else ""
    raise SettingsError(
        f"{path} holds {', '.join(shown[:MAX_SHOWN]) or 'nothing'}{more}, which is the layout of no package known here "
        f"({KNOWN}). If you know its formula, save it again in one of these."
    )


def _read_names(path: Path) -> dict[str, object]:
    """The names of its tensors, from its header: its length in 8 bytes, then JSON."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError("its header is larger than 16 MiB")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise CorruptError(f"{path} could not be read as safetensors ({error}). Copy the file again.") from error
    return dict.fromkeys(name for name in header if name != "__metadata__")
