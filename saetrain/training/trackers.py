"""Trackers: what a run writes to metrics.jsonl, shown by TensorBoard or Weights & Biases as well.

Event files lie in tensorboard/<run> beside the run, offline runs of wandb in wandb/ beside it (or in WANDB_DIR). A
tracker follows metrics.jsonl: a run that resumes shows the lines it kept, and none twice. Neither library is loaded
before it is asked for; the run itself holds nothing of them.
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
from saetrain.metrics import Quality
from saetrain.run import MetricsLine, Run, read_metrics
from saetrain.training.state import Training


@dataclass(frozen=True)
class Tracker:
    """One run in one place. `close` is told the held-out quality of a finished run, None for an unfinished one."""

    write: Callable[[MetricsLine], None]
    close: Callable[[Quality | None], None]


Opener = Callable[[Training], Tracker]


def choose_trackers(log_to: Sequence[str], wandb_project: str | None) -> list[Opener]:
    """By name, once each. Raises SettingsError for one that is not known, or not installed."""
    openers: dict[str, Opener] = {
        "tensorboard": open_tensorboard,
        "wandb": partial(open_wandb, project=wandb_project),
    }
    for name in log_to:
        if name not in openers:
            raise SettingsError(f"--log-to must be {' or '.join(openers)}, got {name!r}.")
        if importlib.util.find_spec(name) is None:
            raise SettingsError(f"--log-to {name} needs the package {name}: pip install 'patchsae[{name}]'.")
    if wandb_project is not None and "wandb" not in log_to:
        raise SettingsError("--wandb-project belongs to --log-to wandb.")
    return [openers[name] for name in dict.fromkeys(log_to)]


@contextmanager
def tracked(trainings: Sequence[Training], openers: Sequence[Opener]) -> Iterator[None]:
    """While this lasts, what these trainings log is tracked too. The first process does it for all."""
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
    """A curve anew, from the lines that are given: nothing that an interrupted process wrote remains."""
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
    """A run of the same name, which a resumed training continues: online from its last step, offline anew.

    Project, entity and mode come from WANDB_PROJECT, WANDB_ENTITY and WANDB_MODE where they are not given.

    Raises:
        SettingsError: it cannot be started, e.g. without a key.
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
            f"wandb does not start: {reason} Log in with `wandb login`, or set WANDB_MODE=offline."
        ) from error
    here = Path(run.dir).parent
    for old in here.parent.glob(f"offline-run-*-{glob.escape(run.id)}"):
        if old != here:  # all of it is written again
            shutil.rmtree(old)
    first = run.step

    def write(line: MetricsLine) -> None:
        if line["step"] >= first:  # what a resumed run has online already is the same: training resumes bit for bit
            run.log({key: value for key, value in flatten(line) if key != "step"}, step=line["step"])

    def close(quality: Quality | None) -> None:
        for key, value in flatten(quality or {}, "held_out/"):
            run.summary[key] = value
        run.finish(exit_code=int(quality is None))

    return Tracker(write, close)


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of nested dicts: seconds/encode, held_out/all/fvu."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value
