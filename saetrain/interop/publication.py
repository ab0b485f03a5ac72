"""Published SAEs: the folder that `publish` makes, and that anybody's `convert` and `look` read.

config.json             format "patchsae-sae", its version, and everything but the weights: the SAE's settings, the hook
                        point, the image tower and how it prepares images, the training images, the held-out quality
patchsae.safetensors    the tensors of the run's sae.safetensors, bit for bit, with the mean and the scale of the input

docs/reference/published.md lists the fields. What else lies in the folder (SAELens's files, the card, concepts) is not
needed to read the SAE.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from safetensors.torch import save

from actcache import CorruptError, HookPoint, SchemaError, SettingsError
from actcache.artifacts import encode_json, file_sha256
from actcache.preprocess import Preprocess
from actcache.schema import parse
from saetrain.config import ResolvedSAEConfig
from saetrain.interop.fields import shorten
from saetrain.interop.files import LARGEST, read_config, read_safetensors
from saetrain.model import SAE
from saetrain.quality import Quality

CONFIG_FILE, WEIGHTS = "config.json", "patchsae.safetensors"
FORMAT, VERSION = "patchsae-sae", 1
AGAIN = "Download the folder again."
FORMULAS = {
    "fvu": "sum ||x - x^||^2 / sum ||x - mean(x)||^2 over the tokens of the held-out images, sums in float64",
    "l0": "mean number of active latents of a token",
    "cosine": "mean over tokens of the cosine of x and x^",
    "dead": "share of latents that were silent for the last dead_tokens of the training (its settings say how many)",
    "silent": "share of latents that fired on no token of the held-out images",
    "dense": "share of latents that fired on more than 10 % of the tokens of the held-out images",
}
"""What the numbers of the quality are; `saetrain.metrics` computes them."""


@dataclass(frozen=True)
class PublishedTower:
    """The image tower whose activations an SAE reads, as far as it is known.

    Attributes:
        model_id: hash of the architecture, the base weights and the preprocessing, as a store records it.
        model: its name in open_clip, timm or on the hub; None where it was a file.
        pretrained: tag of the weights, or their repository; None where they were a file.
        model_file, weights_file: names of such files, without folders. weights_sha256: of that file.
        preprocess: how an image becomes pixels, the fields of `Preprocess`; None where it is not known.
        grid, patch_size: rows and columns of patches, and pixels of one; None where they are not known.
        prefix: kinds of the tokens before the patches.
        precision: in which the tower was computed.
        prompts: what describes the prompts of an adapted model; None for a plain one.
        only_name: what somebody called it whose activations were imported under that name; nothing else is known then.
    """

    model_id: str
    model: str | None = None
    pretrained: str | None = None
    model_file: str | None = None
    weights_file: str | None = None
    weights_sha256: str | None = None
    preprocess: Mapping[str, object] | None = None
    grid: tuple[int, int] | None = field(default=None, metadata={"at_least": 1})
    patch_size: tuple[int, int] | None = field(default=None, metadata={"at_least": 1})
    prefix: tuple[str, ...] | None = None
    precision: str | None = None
    prompts: Mapping[str, object] | None = None
    only_name: str | None = None

    def __post_init__(self) -> None:
        if self.preprocess is not None:
            Preprocess.from_json(self.preprocess)


@dataclass(frozen=True)
class PublishedTraining:
    """What an SAE was trained on.

    Attributes:
        tokens: all, patch or cls.
        rows: `rows_id` of each store: the hash of its images and their order.
        n_images: number of training images. images_sha256: of their sorted content hashes.
        is_part: whether a filter chose some of the stores' images.
        settings: the fields of TrainConfig.
        imported: the format of another package that the weights were read from; then the rest is not known.
        source: the repository of the hub, with its commit, that they were read from.
    """

    tokens: Literal["all", "patch", "cls"]
    rows: tuple[str, ...] = ()
    n_images: int | None = field(default=None, metadata={"at_least": 0})
    images_sha256: str | None = None
    is_part: bool = False
    settings: Mapping[str, object] = field(default_factory=dict)
    imported: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class _Weights:
    """The file of the weights, and what it must be."""

    file: Literal["patchsae.safetensors"]
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PublishedSAE:
    """What config.json says of an SAE, without its format and weights."""

    sae: ResolvedSAEConfig
    d_model: int = field(metadata={"at_least": 1})
    hook_point: str
    run_id: str
    tower: PublishedTower
    training: PublishedTraining
    quality: Quality
    license: str | None = None

    def __post_init__(self) -> None:
        HookPoint.parse(self.hook_point)
        if self.sae.top_k and not 1 <= self.sae.k <= self.sae.n_latents:
            raise SettingsError(f"sae.k must lie in 1..{self.sae.n_latents} (the number of latents), got {self.sae.k}")


@dataclass(frozen=True)
class _Config:
    weights: _Weights


def is_published(path: Path) -> bool:
    """Whether a folder is a published SAE, which may still be damaged. Reads one small file."""
    try:
        return read_config(path / CONFIG_FILE).get("format") == FORMAT
    except CorruptError:
        return False


def read_published(path: Path) -> PublishedSAE:
    """Read config.json. Raises SchemaError for a newer version, CorruptError for a malformed field."""
    published: PublishedSAE = parse(PublishedSAE, _read_config(path), path / CONFIG_FILE, AGAIN)
    return published


def read(path: Path) -> SAE:
    """Read a folder: the same tensors and settings as those of the run. Raises CorruptError, SchemaError."""
    config = _read_config(path)
    published: PublishedSAE = parse(PublishedSAE, config, path / CONFIG_FILE, AGAIN)
    weights: _Weights = parse(_Config, config, path / CONFIG_FILE, AGAIN).weights
    file = path / WEIGHTS
    try:
        n_bytes, sha256 = file.stat().st_size, file_sha256(file)
    except OSError as error:
        raise CorruptError(f"{file} cannot be read ({error.strerror}). {AGAIN}") from error
    if (n_bytes, sha256) != (weights.bytes, weights.sha256):
        raise CorruptError(f"{file} is not the file that {CONFIG_FILE} describes: its size or sha256 differs. {AGAIN}")
    try:
        sae = SAE.load(file, published.sae, published.d_model)
    except CorruptError as error:
        raise CorruptError(f"{str(error).removesuffix('Train it again.')}{AGAIN}") from error
    for name, value in sae.state_dict().items():
        if not (value.abs() <= LARGEST).all():  # NaN fails the comparison
            raise CorruptError(f"{file}: {name} holds numbers that are not finite, or beyond {LARGEST:g}. {AGAIN}")
    if not sae.scale > 0:
        raise CorruptError(f"{file}: the scale of the input must be above 0, got {float(sae.scale):.3g}. {AGAIN}")
    return sae


def _read_config(path: Path) -> Mapping[str, object]:
    """config.json of a version that this program knows, with no setting of the SAE that it does not know."""
    config = read_config(path / CONFIG_FILE)
    version, sae = config.get("version"), config.get("sae")
    if config.get("format") != FORMAT or type(version) is not int:
        raise CorruptError(f"{path / CONFIG_FILE} does not describe a published SAE of patchsae. {AGAIN}")
    unknown = sorted(set(sae) - {each.name for each in fields(ResolvedSAEConfig)}) if isinstance(sae, dict) else []
    if version > VERSION or unknown:
        what = f"version {shorten(version)}" if version > VERSION else f"the setting {shorten(unknown[0])}"
        raise SchemaError(f"{path} has {what}, which this version cannot read. Install a newer patchsae.")
    return config


def encode_published(published: PublishedSAE, weights: Path) -> dict[str, bytes]:
    """The bytes of config.json and patchsae.safetensors, by name.

    Args:
        weights: the finished SAE of a run. Its tensors are written as they are.
    """
    tensors = read_safetensors(weights)
    tower = {name: value for name, value in asdict(published.tower).items() if value is not None}
    about = {"format": FORMAT, "version": VERSION, "hook_point": published.hook_point, "tower": tower}
    data = save(tensors, {"patchsae": json.dumps(about)})  # one field, since the order of several is not fixed
    config: dict[str, object] = {
        "format": FORMAT, "version": VERSION,
        **{each.name: getattr(published, each.name) for each in fields(PublishedSAE)},
        "sae": asdict(published.sae), "tower": tower, "training": asdict(published.training),
        "formulas": {name: FORMULAS[name] for name in FORMULAS},
        "weights": {"file": WEIGHTS, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()},
    }  # fmt: skip
    return {CONFIG_FILE: encode_json(json.loads(json.dumps(config, allow_nan=False))), WEIGHTS: data}
