"""Run: one trained SAE on disk, with its checkpoints and its metrics.

artifact.json         the configurations, the hook point and d_model; the parent is the store
metrics.jsonl         one JSON object per logged step
checkpoints/          step-00001000.safetensors (weights, Adam, dead counters) and .json (checksum); the last two stay
learned.bin           hashes of the images that the SAE was trained on, if its stores have them
sae.safetensors       the finished SAE: encoder, decoder, b_enc, b_dec, mean, scale and the variant's own parameters
manifest.json         the seal, with the held-out quality
"""

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict, TypeGuard

from actcache import CorruptError, HookPoint, IncompleteError, ParentMismatchError, PipelineError, SettingsError
from actcache.artifacts import (
    MANIFEST_FILE,
    Artifact,
    append_line,
    check_whole,
    crc32c,
    make_folders,
    open_artifact,
    read_json,
    read_provenance,
    read_settings,
    read_summary,
    storage_errors,
    write_atomic,
    write_json,
)
from actcache.notebook import draw_facts
from actcache.schema import parse
from actcache.store import StoreGroup, recorded_name
from saetrain.config import ResolvedSAEConfig, TrainConfig
from saetrain.quality import Quality

if TYPE_CHECKING:
    from torch import Tensor

    from saetrain.model import SAE

logger = logging.getLogger(__name__)

SAE_FILE = "sae.safetensors"
METRICS_FILE = "metrics.jsonl"
LEARNED_FILE = "learned.bin"
CHECKPOINTS = "checkpoints"
NORMALIZED_FROM = "normalized_from"
"""The setting that names the rows from which the mean and the scale of the input come."""

N_KEPT = 2
CURVES: tuple[Literal["step", "loss", "fvu", "l0", "dead"], ...] = ("step", "loss", "fvu", "l0", "dead")
N_CURVE = 200


class MetricsLine(TypedDict):
    """One line of metrics.jsonl: the batch of one step."""

    step: int
    loss: float
    reconstruction: float
    sparsity: float
    revival: float
    fvu: float
    l0: float
    dead: float
    lr: float
    weight: NotRequired[float]  # of the penalty, where it is steered
    tokens_per_s: float
    seconds: dict[str, float]  # by part of a step, since the line before


@dataclass(frozen=True)
class _Imported:
    """The weights that another package trained."""

    format: str
    crc32c: int
    bytes: int


@dataclass(frozen=True)
class TowerNames:
    """The tower whose activations a run reads, as `--model` and `--pretrained` take it; None for what was a file.

    `preprocess` are the fields of `actcache.preprocess.Preprocess`.
    """

    model: str | None = None
    pretrained: str | None = None
    preprocess: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class _Provenance:
    """What is read of a run's provenance."""

    tower: TowerNames = TowerNames()


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run. An SAE that another package trained has the defaults in `train`, with None in them."""

    model_id: str
    hook_point: str
    sae: ResolvedSAEConfig
    train: TrainConfig
    d_model: int = field(metadata={"at_least": 1})
    imported: _Imported | None = None
    normalized_from: Literal["training images"] | None = None

    def __post_init__(self) -> None:
        HookPoint.parse(self.hook_point)
        if self.sae.top_k and not 1 <= self.sae.k <= self.sae.n_latents:
            raise SettingsError(f"sae.k must lie in 1..{self.sae.n_latents} (the number of latents), got {self.sae.k}")


@dataclass(frozen=True)
class _Summary:
    """What the manifest says of a run."""

    quality: Quality


class Run:
    """A finished run, open for reading.

    run = Run.open("runs/l10-k32"); run.sae().encode(x); run.quality["all"]["fvu"]
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.path, self.run_id = artifact, artifact.path, artifact.id
        settings = read_settings(artifact, RunSettings)
        self.model_id, self.d_model = settings.model_id, settings.d_model
        self.sae_config, self.train_config = settings.sae, settings.train
        self.hook_point = HookPoint.parse(settings.hook_point)
        if not artifact.complete:
            step = latest_step(artifact.path)
            raise IncompleteError(
                f"{artifact.path} is not complete: {step:,} of {self.train_config.n_steps:,} steps are checkpointed. "
                "Run the same `train` command again to finish it; it resumes."
            )

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """Open a finished run. Raises ArtifactNotFoundError, SchemaError, IncompleteError, CorruptError."""
        return cls(open_artifact(path, "run"))

    def __repr__(self) -> str:
        c = self.sae_config
        return f"Run({self.path.name}: {c.variant}, {c.n_latents:,} latents at {self.hook_point}, fvu {self.fvu:.3f})"

    def _repr_html_(self) -> str:
        config, kind = self.sae_config, self.train_config.token_kind
        imported = read_settings(self.artifact, RunSettings).imported
        facts = {
            "SAE": f"{config.variant}, {config.n_latents:,} latents over {self.d_model:,} channels",
            "reads": f"{self.hook_point}, {self.train_config.tokens} tokens",
            "trained": f"by {imported.format}" if imported else f"{self.train_config.n_steps:,} steps",
            "FVU on held-out images": self.fvu,
            "active latents a token": self.quality[kind]["l0"],
            "latents that never fired there": f"{self.quality['silent']:.1%}",
            "run id": self.run_id,
        }
        return draw_facts(f"Run {self.path.name}", facts)

    @cached_property
    def quality(self) -> "Quality":
        """The quality on held-out images after the last step. Raises CorruptError."""
        quality = read_summary(self.artifact, _Summary).quality
        if self.train_config.token_kind not in quality:
            raise CorruptError(
                f"{self.path / MANIFEST_FILE} has no quality of the kind of tokens that the run was trained on "
                f"({self.train_config.tokens}). {self.artifact.remedy}"
            )
        return quality

    @property
    def fvu(self) -> float:
        """The held-out fvu over the kind of tokens that the SAE was trained on."""
        return float(self.quality[self.train_config.token_kind]["fvu"])

    @property
    def tower(self) -> TowerNames:
        """The tower that the run was trained on, as far as it is recorded. Raises CorruptError."""
        return read_provenance(self.artifact, _Provenance).tower

    @cached_property
    def metrics(self) -> list[MetricsLine]:
        """The lines of metrics.jsonl; none for an SAE that was imported. Raises CorruptError."""
        if (self.path / METRICS_FILE).exists():
            check_whole(self.artifact, METRICS_FILE)
        return read_metrics(self.path)

    def curves(self) -> dict[str, list[float]]:
        """Columns of the metrics, thinned to at most 200 steps; empty for an SAE that was imported."""
        whole = [line for line in self.metrics if all(name in line for name in CURVES)]
        lines = whole[:: 1 + len(whole) // N_CURVE]
        return {name: [line[name] for line in lines] for name in CURVES} if lines else {}

    def sae(self) -> "SAE":
        """Read the finished SAE. Raises CorruptError unless its file is what was written and fits the settings."""
        from saetrain.model import SAE

        return SAE.load(self.weights(), self.sae_config, self.d_model)

    def weights(self) -> Path:
        """The file of the finished SAE, once it has been compared with its checksum. Raises CorruptError."""
        check_whole(self.artifact, SAE_FILE)
        return self.path / SAE_FILE

    def check_store(self, store: StoreGroup) -> None:
        """Raise ParentMismatchError unless the store holds this model's activations, and the hook point."""
        if store.model_id != self.model_id:
            raise ParentMismatchError(
                f"{self.path} was trained on model {self.model_id}, but {store.path} holds model {store.model_id}. "
                "Give a store of the same CLIP weights, architecture and preprocessing."
            )
        store.hook_point(self.hook_point)


def name_tower_of(store: StoreGroup) -> TowerNames:
    """The tower that stores were extracted with, by which the run finds it where the stores are gone."""
    first = store.stores[0].artifact
    model, pretrained = (recorded_name(first, name) for name in ("model", "pretrained"))
    return TowerNames(model, pretrained, dict(first.settings.get("preprocess") or {}))


def run_settings(
    store: StoreGroup, hook_point: HookPoint, sae: ResolvedSAEConfig, train: TrainConfig, *, whole_store: bool = True
) -> dict[str, object]:
    """The settings of a run.

    Args:
        whole_store: the mean and the scale of the input are those of all images of the stores, as they were before
            `normalized_from` existed; or they were imported.
    """
    return {
        **({} if whole_store else {NORMALIZED_FROM: "training images"}),
        "model_id": store.model_id,
        "hook_point": str(hook_point),
        "d_model": store.layout.d_model,
        "sae": asdict(sae),
        "train": asdict(train),
    }


def normalizes_by_whole_store(path: str | Path) -> bool:
    """Whether a run lies at `path` that an earlier version began, so that the same command has to go on like it."""
    try:
        return NORMALIZED_FROM not in open_artifact(path, "run").settings
    except PipelineError:
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and metrics


@dataclass(frozen=True)
class _CheckpointFields:
    """What lies beside the tensors of a checkpoint."""

    step: int = field(metadata={"at_least": 0})
    weight: float
    bytes: int
    crc32c: int


class Checkpoint(NamedTuple):
    """The state after `step` updates, from which a run resumes."""

    step: int
    weight: float  # of the penalty, which may be steered
    tensors: "dict[str, Tensor]"


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, then delete all but the last two.

    The tensors are written first, then a JSON file with their size and checksum. Only the JSON file makes it a
    checkpoint.
    """
    from safetensors.torch import save

    folder = path / CHECKPOINTS
    with storage_errors(path):
        make_folders(folder, within=path)
    data = save(checkpoint.tensors)
    file = folder / f"step-{checkpoint.step:08d}.safetensors"
    write_atomic(file, data)
    fields = {"step": checkpoint.step, "weight": checkpoint.weight, "bytes": len(data), "crc32c": crc32c(data)}
    write_json(file.with_suffix(".json"), fields)
    with storage_errors(path):
        for old in _checkpoints(path)[:-N_KEPT]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_checkpoint(path: Path) -> Checkpoint | None:
    """Load the latest intact checkpoint, or None if there is none. A damaged one is skipped with a warning."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    for file in reversed(_checkpoints(path)):
        tensors = file.with_suffix(".safetensors")
        try:
            fields = parse(_CheckpointFields, read_json(file), file, "It is skipped.")
            data = tensors.read_bytes()
            if len(data) != fields.bytes or crc32c(data) != fields.crc32c:
                raise CorruptError("its size or checksum is not the recorded one")
            return Checkpoint(fields.step, float(fields.weight), load(data))
        except (OSError, CorruptError, SafetensorError) as error:
            logger.warning("%s is damaged (%s). Resuming from the checkpoint before it.", tensors, error)
    return None


def latest_step(path: Path) -> int:
    files = _checkpoints(path)
    return int(files[-1].stem.removeprefix("step-")) if files else 0


def _checkpoints(path: Path) -> list[Path]:
    return sorted((path / CHECKPOINTS).glob("step-*.json"))


def read_metrics(path: Path) -> list[MetricsLine]:
    """Read metrics.jsonl up to the first line that is incomplete, because a writer was killed, or damaged.

    Raises CorruptError where there is something else than a file.
    """
    lines: list[MetricsLine] = []
    file = path / METRICS_FILE
    try:
        data = file.read_bytes() if file.exists() else b""
    except OSError as error:
        raise CorruptError(f"{file} cannot be read ({error.strerror}). Train again, with --overwrite.") from error
    for text in data.splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not _is_line(line):
            break
        lines.append(line)
    return lines


def _is_line(line: object) -> TypeGuard[MetricsLine]:
    """Whether a line has a step, and numbers in its curves; a loss may be NaN, which no schema of a file allows."""
    if not isinstance(line, dict) or type(line.get("step")) is not int or line["step"] < 0:
        return False
    numbers = [line[name] for name in CURVES if name in line]
    return all(type(number) in (int, float) and not abs(number) > sys.float_info.max for number in numbers)


def truncate_metrics(path: Path, step: int) -> None:
    """Keep one line per step, up to `step`: a resumed run writes the later lines again."""
    kept = {line["step"]: line for line in read_metrics(path) if line["step"] <= step}
    write_atomic(path / METRICS_FILE, "".join(json.dumps(kept[number]) + "\n" for number in sorted(kept)).encode())


def append_metrics(path: Path, line: MetricsLine) -> None:
    """Write a line of metrics.jsonl. Raises StorageError."""
    append_line(path / METRICS_FILE, json.dumps(line))
