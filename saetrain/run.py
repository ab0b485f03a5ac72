"""Run: one trained SAE on disk, with its checkpoints and its metrics.

artifact.json         the configurations, the hook point and d_model; the parent is the store
metrics.jsonl         one JSON object per logged step
checkpoints/          step-00001000.safetensors (weights, Adam, dead counters) and .json (checksum); the last two stay
sae.safetensors       the finished SAE: encoder, decoder, b_enc, b_dec, mean, scale and the variant's own parameters
manifest.json         the seal, with the held-out quality
"""

import json
import logging
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, TypedDict

from actcache import CorruptError, HookPoint, IncompleteError, ParentMismatchError
from actcache.artifacts import (
    Artifact,
    append_line,
    crc32c,
    make_folders,
    open_artifact,
    read_json,
    read_manifest,
    storage_errors,
    write_atomic,
    write_json,
)
from actcache.store import StoreGroup
from saetrain.config import ResolvedSAEConfig, TrainConfig

if TYPE_CHECKING:
    from torch import Tensor

    from saetrain.metrics import Quality
    from saetrain.model import SAE

logger = logging.getLogger(__name__)

SAE_FILE = "sae.safetensors"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
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


class Run:
    """A finished run, open for reading.

    run = Run.open("runs/l10-k32"); run.sae().encode(x); run.quality["all"]["fvu"]
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.path, self.run_id = artifact, artifact.path, artifact.id
        self.model_id = str(artifact.settings["model_id"])
        self.sae_config = ResolvedSAEConfig(**artifact.settings["sae"])
        # an SAE that another package trained has the defaults here, with None in them
        self.train_config = TrainConfig(**artifact.settings["train"])
        self.hook_point = HookPoint.parse(artifact.settings["hook_point"])
        self.d_model = int(artifact.settings["d_model"])
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

    @cached_property
    def quality(self) -> "Quality":
        """The quality on held-out images after the last step."""
        quality: Quality = read_manifest(self.artifact)["quality"]
        return quality

    @property
    def fvu(self) -> float:
        """The held-out fvu over the kind of tokens that the SAE was trained on."""
        return float(self.quality[self.train_config.token_kind]["fvu"])

    @cached_property
    def metrics(self) -> list[MetricsLine]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.path)

    def curves(self) -> dict[str, list[float]]:
        """Columns of the metrics, thinned to at most 200 steps; empty for an SAE that was imported."""
        lines = self.metrics[:: 1 + len(self.metrics) // N_CURVE]
        return {name: [line[name] for line in lines] for name in CURVES} if lines else {}

    def sae(self) -> "SAE":
        from saetrain.model import SAE

        return SAE.load(self.path / SAE_FILE, self.sae_config)

    def check_store(self, store: StoreGroup) -> None:
        """Raise ParentMismatchError unless the store holds this model's activations, and the hook point."""
        if store.model_id != self.model_id:
            raise ParentMismatchError(
                f"{self.path} was trained on model {self.model_id}, but {store.path} holds model {store.model_id}. "
                "Give a store of the same CLIP weights, architecture and preprocessing."
            )
        store.hook_point(self.hook_point)


def run_settings(
    store: StoreGroup, hook_point: HookPoint, sae: ResolvedSAEConfig, train: TrainConfig
) -> dict[str, object]:
    return {
        "model_id": store.model_id,
        "hook_point": str(hook_point),
        "d_model": store.layout.d_model,
        "sae": asdict(sae),
        "train": asdict(train),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and metrics


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
    from safetensors.torch import load

    for file in reversed(_checkpoints(path)):
        tensors = file.with_suffix(".safetensors")
        try:
            fields = read_json(file)
            data = tensors.read_bytes()
            if len(data) != fields["bytes"] or crc32c(data) != fields["crc32c"]:
                raise CorruptError("its size or checksum is not the recorded one")
            return Checkpoint(int(fields["step"]), float(fields["weight"]), load(data))
        except (OSError, CorruptError, KeyError, TypeError, ValueError) as error:
            logger.warning("%s is damaged (%s). Resuming from the checkpoint before it.", tensors, error)
    return None


def latest_step(path: Path) -> int:
    files = _checkpoints(path)
    return int(files[-1].stem.removeprefix("step-")) if files else 0


def _checkpoints(path: Path) -> list[Path]:
    return sorted((path / CHECKPOINTS).glob("step-*.json"))


def read_metrics(path: Path) -> list[MetricsLine]:
    """Read metrics.jsonl, without an incomplete last line that a killed writer left. Raises CorruptError."""
    lines = []
    file = path / METRICS_FILE
    try:
        text = file.read_text() if file.exists() else ""
    except OSError as error:
        raise CorruptError(
            f"{file} cannot be read ({error.strerror or error}). Remove it and run the same command again."
        ) from error
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def truncate_metrics(path: Path, step: int) -> None:
    """Keep one line per step, up to `step`: a resumed run writes the later lines again."""
    kept = {line["step"]: line for line in read_metrics(path) if line["step"] <= step}
    write_atomic(path / METRICS_FILE, "".join(json.dumps(kept[number]) + "\n" for number in sorted(kept)).encode())


def append_metrics(path: Path, line: MetricsLine) -> None:
    """Write a line of metrics.jsonl. Raises StorageError."""
    append_line(path / METRICS_FILE, json.dumps(line))
