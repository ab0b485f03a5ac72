"""Trackers show the lines of metrics.jsonl in TensorBoard or Weights & Biases as well.

Event files are in tensorboard/<run> beside the run, offline runs of wandb in wandb/ beside it (or in WANDB_DIR). A
tracker follows metrics.jsonl: a resumed run shows the lines that it kept, and none of them twice. A library is loaded
only on request, and the run itself stores nothing about trackers.
"""

import glob
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from actcache import SettingsError
from saetrain.distributed import rank
from saetrain.quality import Quality
from saetrain.run import MetricsLine, Run, read_metrics
from saetrain.training.state import Training


@dataclass(frozen=True)
class Tracker:
    """One run in one tool. `close` takes the held-out quality of a finished run, or None for an unfinished one."""

    write: Callable[[MetricsLine], None]
    close: Callable[[Quality | None], None]


Opener = Callable[[Training], Tracker]


def choose_trackers(log_to: Sequence[str], wandb_project: str | None) -> list[Opener]:
    """Look up trackers by name, each once. Raises SettingsError if one is unknown or not installed."""
    openers: dict[str, Opener] = {"tensorboard": open_tensorboard, "wandb": partial(open_wandb, project=wandb_project)}
    for name in log_to:
        if name not in openers:
            raise SettingsError(f"--log-to must be {' or '.join(openers)}, got {name!r}.")
        if importlib.util.find_spec(name) is None:
            raise SettingsError(f"--log-to {name} needs the package {name}: pip install 'patchsae[{name}]'.")
    if wandb_project is not None and "wandb" not in log_to:
        raise SettingsError(
            "--wandb-project works only together with --log-to wandb. Add --log-to wandb, or leave it out."
        )
    return [openers[name] for name in dict.fromkeys(log_to)]


@contextmanager
def tracked(trainings: Sequence[Training], openers: Sequence[Opener]) -> Iterator[None]:
    """Track what these trainings log, in the first process only."""
    opened: list[tuple[Training, Tracker]] = []
    try:
        for training in trainings:
            for opener in openers:
                if rank() or training.complete:
                    continue
                tracker = opener(training)
                opened.append((training, tracker))
                for line in read_metrics(training.path):
                    tracker.write(line)
                training.trackers.append(tracker.write)
        yield
    finally:
        for training, tracker in opened:
            tracker.close(Run.open(training.path).quality if training.complete else None)


def open_tensorboard(training: Training) -> Tracker:
    """Start a new curve. Event files of an interrupted process are deleted, since all lines are written again."""
    from torch.utils.tensorboard import SummaryWriter

    folder = training.path.parent / "tensorboard" / training.path.name
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = SummaryWriter(str(folder))

    def write(line: MetricsLine) -> None:
        for name, value in flatten(line):
            writer.add_scalar(name, value, line["step"])
        writer.flush()

    def close(quality: Quality | None) -> None:
        for name, value in flatten(quality or {}, "held_out/"):
            writer.add_scalar(name, value, training.step)
        writer.close()

    return Tracker(write, close)


def open_wandb(training: Training, *, project: str | None = None) -> Tracker:
    """Start a wandb run of the same name. A resumed training continues it online, or starts over offline.

    Project, entity and mode default to WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE.

    Raises:
        SettingsError: wandb could not be started, for example without a key.
    """
    import wandb

    config = {
        **asdict(training.sae.config), **asdict(training.config), "hook_point": str(training.hook_point),
        "model_id": training.data.stores.model_id,
    }  # fmt: skip
    name = training.path.name
    try:
        run = wandb.init(
            project=project, name=name, id=f"{training.run_id}-{name}", config=config, resume="allow",
            reinit="create_new", dir=os.environ.get("WANDB_DIR", training.path.parent),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )  # fmt: skip
    except (wandb.Error, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise SettingsError(
            f"wandb could not be started: {reason} Log in with `wandb login`, or set WANDB_MODE=offline."
        ) from error
    folder = Path(run.dir).parent
    for old in folder.parent.glob(f"offline-run-*-{glob.escape(run.id)}"):
        if old != folder:  # all lines are written again
            shutil.rmtree(old)
    first = run.step

    def write(line: MetricsLine) -> None:
        if line["step"] >= first:  # the earlier lines are online already, and equal: training resumes bit for bit
            run.log({key: value for key, value in flatten(line) if key != "step"}, step=line["step"])

    def close(quality: Quality | None) -> None:
        for key, value in flatten(quality or {}, "held_out/"):
            run.summary[key] = value
        run.finish(exit_code=int(quality is None))

    return Tracker(write, close)


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Flatten nested numbers under names such as seconds/encode and held_out/all/fvu."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
