"""RA-SAE-DINOv2-32k: a whole module of overcomplete in one .pth, DataParallel(BatchTopKSAE), and config.json beside it.

The encoder is linear with a LayerNorm over the latents: encoder.final_block.0.{weight [F, D], bias}, and .1.{weight,
bias} [F]. The dictionary is a RelaxedArchetypalDictionary: C [points, D], W [F, points], Relax [F, D], multiplier []:

    W_dec = exp(multiplier) (relu(W) C / (sum of the row of relu(W) + 1e-8) + Relax min(1, delta / ||row of Relax||))

There is no bias before the encoder or after the decoder. A code is active where it is at least running_threshold, which
config.json tells, because the module was saved without it. W alone is 4.1 GB there, so its rows are read in blocks.

Source: overcomplete 0.3, `sae/archetypal_dictionary.py`, `sae/modules.py`, `sae/batchtopk_sae.py`.
"""

import zipfile
from pathlib import Path

import torch
from torch import Tensor

from actcache import CorruptError, SettingsError
from saetrain.interop.fields import shorten
from saetrain.interop.files import read_config
from saetrain.interop.foreign import build_sae
from saetrain.interop.module_file import MAX_PICKLE, Shell, StoredTensor, load_module
from saetrain.model import SAE

CONFIG, SUFFIX = "config.json", ".pth"
DICTIONARY = "RelaxedArchetypalDictionary"
_NN = "torch.nn.modules"
CLASSES = (
    "torch.nn.parallel.data_parallel.DataParallel", "overcomplete.sae.batchtopk_sae.BatchTopKSAE",
    "overcomplete.sae.modules.MLPEncoder", f"overcomplete.sae.archetypal_dictionary.{DICTIONARY}",
    f"{_NN}.linear.Linear", f"{_NN}.normalization.LayerNorm", f"{_NN}.activation.ReLU", f"{_NN}.container.ModuleList",
    f"{_NN}.container.Sequential",
)  # fmt: skip
"""The classes that the file names. Any other makes it another kind of SAE."""
NORM_EPS = 1e-5


def find(path: Path) -> Path | None:
    """The file of such a checkpoint, given it or its folder; None if there is none.

    Raises:
        SettingsError: the folder has several.
    """
    files = [path] if path.is_file() else sorted(path.glob(f"*{SUFFIX}"))
    found = [file for file in files if _names_dictionary(file)]
    if len(found) > 1:
        raise SettingsError(f"{path} has several checkpoints: {', '.join(file.name for file in found)}. Give one.")
    return found[0] if found else None


def _names_dictionary(file: Path) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            (entry,) = [entry for entry in archive.infolist() if entry.filename.split("/")[1:] == ["data.pkl"]]
            return entry.file_size <= MAX_PICKLE and DICTIONARY.encode() in archive.read(entry)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return False


def read(path: Path) -> SAE:
    """Read the file. Raises CorruptError, and SettingsError for an encoder that is no LayerNorm over a linear layer."""
    sae = unwrap(load_module(path, CLASSES))
    weights, dictionary = _read_encoder(sae, path), _part(sae, "dictionary", path)
    n_latents, d_model = weights["encoder"].shape
    weights["decoder"] = _read_decoder(dictionary, (n_latents, d_model), path)
    weights["b_dec"] = torch.zeros(d_model)
    threshold = torch.tensor(read_threshold(path), dtype=torch.float32)
    # the next smaller number, because a value here has to be above its threshold
    weights["threshold"] = threshold.nextafter(torch.tensor(-torch.inf)).clamp_min(0)
    return build_sae("batchtopk", weights)


def unwrap(module: Shell) -> Shell:
    """The SAE inside DataParallel, which only spreads a batch over several GPUs."""
    inner = module.get("module")
    return inner if isinstance(inner, Shell) else module


def read_threshold(path: Path) -> float:
    """running_threshold from config.json. Nothing else in it is needed: the module names its parts and their sizes."""
    settings = path.with_name(CONFIG)
    value = read_config(settings).get("running_threshold") if settings.is_file() else None
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1e12:
        raise CorruptError(
            f"{settings} must have a number running_threshold, got {shorten(value)}. {path.name} does not hold the "
            "threshold that decides which latents are active; download config.json from where it was published."
        )
    return float(value)


def _read_encoder(sae: Shell, path: Path) -> dict[str, Tensor]:
    encoder = _part(sae, "encoder", path)
    block = _part(encoder, "final_block", path)
    linear, norm = _part(block, "0", path), _part(block, "1", path)
    activation, hidden = _part(encoder, "final_activation", path), _part(encoder, "mlp_blocks", path).get("_modules")
    parts = [type(part).__name__ for part in (linear, norm, activation)]
    if parts != ["Linear", "LayerNorm", "ReLU"] or hidden or norm.get("eps") != NORM_EPS:
        raise SettingsError(
            f"{path} has an encoder of {'hidden layers, ' if hidden else ''}{', '.join(parts)}, which is not "
            "supported. Give an SAE with one linear layer, LayerNorm (eps 1e-5) and ReLU."
        )
    weight = _tensor(linear, "weight", (None, None), path)
    vectors = {"b_enc": (linear, "bias"), "latent_gain": (norm, "weight"), "latent_shift": (norm, "bias")}
    taken = {ours: _tensor(part, name, weight.shape[:1], path).read() for ours, (part, name) in vectors.items()}
    return {"encoder": weight.read(), **taken}


def _read_decoder(dictionary: Shell, shape: tuple[int, int], path: Path) -> Tensor:
    """The rows of the dictionary in evaluation [F, D], in blocks."""
    if type(dictionary).__name__ != DICTIONARY:
        raise SettingsError(f"{path} has a {shorten(type(dictionary).__name__)}. Give an SAE with a {DICTIONARY}.")
    if not dictionary.get("training", True) and isinstance(dictionary.get("_fused_dictionary"), StoredTensor):
        return _tensor(dictionary, "_fused_dictionary", shape, path).read()  # kept when evaluation began
    points = _tensor(dictionary, "C", (None, shape[1]), path).read()
    mixture = _tensor(dictionary, "W", (shape[0], len(points)), path)
    relaxed = _tensor(dictionary, "Relax", shape, path).read()
    multiplier, delta = _tensor(dictionary, "multiplier", (), path).read(), dictionary.get("delta")
    if not isinstance(delta, int | float) or isinstance(delta, bool) or not 0 <= delta < 1e12:
        raise CorruptError(f"{path}: delta must be a number of at least 0, got {shorten(delta)}. Copy the file again.")
    rows: Tensor = relaxed * (delta / relaxed.norm(dim=1, keepdim=True).clamp_min(1e-30)).clamp(max=1)
    first, scale = 0, multiplier.exp()
    for block in mixture.rows():
        positive = block.relu_()
        rows[first : first + len(block)] += positive @ points / (positive.sum(1, keepdim=True) + 1e-8)
        first += len(block)
    return rows.mul_(scale)


def _part(module: Shell, name: str, path: Path) -> Shell:
    part = module.get(name)
    if not isinstance(part, Shell):
        raise CorruptError(
            f"{path} has no part {name}: it is no SAE of overcomplete. Give the file as it was published."
        )
    return part


def _tensor(module: Shell, name: str, shape: tuple[int | None, ...] | torch.Size, path: Path) -> StoredTensor:
    tensor = module.get(name)
    if not isinstance(tensor, StoredTensor) or not tensor.dtype.is_floating_point:
        raise CorruptError(f"{path}: {type(module).__name__} has no tensor {name}. Give the file as it was published.")
    fits = len(tensor.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not fits:
        raise CorruptError(
            f"{path}: {name} has shape {tensor.shape}, expected {tuple(shape)}. Give the file as it was published."
        )
    return tensor
