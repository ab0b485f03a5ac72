"""train() and sweep(): the training loop. Stores in, finished Runs out; no model is needed.

The same call resumes from the last checkpoint with the same batches, bit for bit. Held-out images are never trained on.
SIGINT and SIGTERM write a checkpoint first. A loss that is not finite stops the run and keeps the state before it.
SAEs of one stream (the same tokens, images, batch size, pool and seed) share one pass over the data, whatever their
layer, variant or width. Each has its own run directory, and becomes the same run that train() alone would make.
"""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache import HookPoint, NonFiniteError, SettingsError, open_stores
from actcache.artifacts import OutputLock
from actcache.models import choose_device, choose_precision
from actcache.options import check_number
from actcache.store import StoreGroup, Stores
from saetrain.config import ResolvedTrainConfig, SAEConfig, TrainConfig
from saetrain.data import ActivationLoader, TrainingData
from saetrain.distributed import any_of_all, join_processes, rank, world_size
from saetrain.run import MetricsLine, Run
from saetrain.training.memory import check_memory_of, stream_of
from saetrain.training.state import Laps, Training
from saetrain.training.trackers import Opener, choose_trackers, tracked

logger = logging.getLogger(__name__)

TrainingProgress = Callable[[int, int, MetricsLine], None]
"""Called with (steps done, steps in all, metrics of that step), with every logged step and otherwise each second."""

OFTEN = 200
"""Times that a token is read above which a training warns of it."""
REPORT_S = 1.0
"""Seconds between reports of progress where no step is logged. A report waits for the device."""


def train(
    store: Stores | StoreGroup,
    run: str | Path,
    *,
    layer: int | HookPoint | None = None,
    sae: SAEConfig | None = None,
    config: TrainConfig | None = None,
    device: str = "auto",
    log_every: int = 50,
    checkpoint_every: int = 1000,
    log_to: Sequence[str] = (),
    wandb_project: str | None = None,
    overwrite: bool = False,
    on_progress: TrainingProgress | None = None,
) -> Run:
    """Train one SAE on one hook point of a store.

    Repeating the call is safe: if the run is complete, it is returned; if it was interrupted, it resumes; if the
    settings differ, an error shows the differing fields. Under torchrun the processes share each batch.

    Args:
        store: one store, or several of one model. Each store holds out its last 5 % of images.
        layer: the hook point; may be omitted if the store has only one.
        device, log_every, checkpoint_every: do not change the result.
        log_to: where to show metrics in addition to metrics.jsonl: tensorboard, wandb, or both.
        on_progress: called with (steps done, steps in total, latest metrics).

    Raises:
        IncompleteError: the store is not complete.
        SettingsError: the settings are impossible, or differ from those of the run.
        NonFiniteError: the loss is not finite.
    """
    log_every, checkpoint_every = check_intervals(log_every, checkpoint_every)
    stores, target = open_stores(store), join_processes(choose_device(device))
    openers = choose_trackers(log_to, wandb_project)
    check_memory_of([(run, sae or SAEConfig(), config or TrainConfig())], stores, target)
    with OutputLock(run) as lock:
        training = _begin(run, stores, layer, sae, config, target, overwrite, lock)
        _warn_of_repetition([training])
        _raise(_train([training], log_every, checkpoint_every, openers, on_progress), 1)
        return Run.open(training.path)


def sweep(
    store: Stores | StoreGroup,
    runs: str | Path,
    members: Sequence[tuple[int | HookPoint | None, SAEConfig, TrainConfig]],
    *,
    device: str = "auto",
    log_every: int = 50,
    checkpoint_every: int = 1000,
    log_to: Sequence[str] = (),
    wandb_project: str | None = None,
    overwrite: bool = False,
    on_progress: TrainingProgress | None = None,
) -> list[Run]:
    """Train several SAEs. Those that can share a stream of batches share one pass over the data.

    Args:
        runs: a folder for the runs, each named after the settings in which it differs from the others.
        members: (layer, SAE, training) of each run.
        on_progress: called with steps counted over all members.

    Raises:
        SettingsError: two members are the same.
        NonFiniteError: some members diverged. The others are finished first.
        Other errors as in train().
    """
    log_every, checkpoint_every = check_intervals(log_every, checkpoint_every)
    stores, target = open_stores(store), join_processes(choose_device(device))
    openers = choose_trackers(log_to, wandb_project)
    names = name_runs(members)
    check_memory_of(
        [(Path(runs) / name, sae, config) for name, (_, sae, config) in zip(names, members, strict=True)],
        stores,
        target,
    )
    with ExitStack() as held:
        trainings = []
        for name, (layer, sae, config) in zip(names, members, strict=True):
            lock = held.enter_context(OutputLock(Path(runs) / name))
            trainings.append(_begin(Path(runs) / name, stores, layer, sae, config, target, overwrite, lock))
        streams: dict[tuple[Any, ...], list[Training]] = {}
        for training in trainings:
            streams.setdefault(stream_of(training.config), []).append(training)
        before, total = 0, sum(training.config.n_steps for training in trainings)

        def report(done: int, _: int, line: MetricsLine) -> None:
            if on_progress:
                on_progress(before + done, total, line)

        _warn_of_repetition(trainings)
        failed: list[NonFiniteError] = []
        for group in streams.values():
            failed += _train(group, log_every, checkpoint_every, openers, report)
            before += sum(training.config.n_steps for training in group)
        _raise(failed, len(trainings))
        return [Run.open(training.path) for training in trainings]


def check_intervals(log_every: int, checkpoint_every: int) -> tuple[int, int]:
    """The steps between lines of metrics and between checkpoints. Raises SettingsError below 1."""
    return (
        check_number("log_every", log_every, int, at_least=1),
        check_number("checkpoint_every", checkpoint_every, int, at_least=1),
    )


def name_runs(members: Sequence[tuple[int | HookPoint | None, SAEConfig, TrainConfig]]) -> list[str]:
    """Name each member after the fields that differ between them, such as "layer5-k32"."""
    fields = [{"layer": layer, **vars(sae), **vars(config)} for layer, sae, config in members]
    varied = [name for name in fields[0] if len({str(field[name]) for field in fields}) > 1]
    names = ["-".join(f"{name}{field[name]}" for name in varied) or "run" for field in fields]
    if len(set(names)) < len(names):
        raise SettingsError(
            f"Two SAEs of the sweep have the same settings: {', '.join(sorted(names))}. Remove the repeated value."
        )
    return [name.replace("/", "_").replace(" ", "") for name in names]


def _begin(
    run: str | Path,
    stores: StoreGroup,
    layer: int | HookPoint | None,
    sae: SAEConfig | None,
    config: TrainConfig | None,
    device: torch.device,
    overwrite: bool,
    lock: OutputLock,
) -> Training:
    resolved = (sae or SAEConfig()).resolve(stores.layout.d_model)
    settings = (config or TrainConfig()).resolve(resolved, choose_precision("auto", device))
    settings = replace(settings, tokens=stores.layout.token_kind(settings.token_kind))  # what all are without CLS
    data, hook_point = TrainingData.split(stores, settings.where), stores.hook_point(layer)
    _make_loader(data, [hook_point], settings, device)  # refuses what cannot be trained before anything is written
    return Training(run, data, hook_point, resolved, settings, device, lock=lock, overwrite=overwrite)


def _warn_of_repetition(trainings: Sequence[Training]) -> None:
    """Warn of trainings that read a small store very often: it takes long, and may learn the images by heart.

    They are warned of once, by the one that reads it most often, and not again when they go on.
    """
    if rank() or any(training.step for training in trainings):
        return
    n_times, training = max(((_times_read(training), training) for training in trainings), key=lambda pair: pair[0])
    if n_times > OFTEN:
        config, n_tokens = training.config, _count_tokens(training)
        logger.warning(
            "%s steps read each of the %s training tokens %s times. The SAE may learn these images by heart; "
            "--n-steps %s reads them %s times.", f"{config.n_steps:,}", f"{n_tokens:,}", f"{n_times:,.0f}",
            max(1, OFTEN * n_tokens // config.batch_size), OFTEN,
        )  # fmt: skip


def _times_read(training: Training) -> float:
    return training.config.n_steps * training.config.batch_size / _count_tokens(training)


def _count_tokens(training: Training) -> int:
    return len(training.data.images) * training.data.stores.n_read_tokens(training.config.token_kind)


def _make_loader(
    data: TrainingData, hook_points: Sequence[HookPoint], config: ResolvedTrainConfig, device: torch.device
) -> ActivationLoader:
    return ActivationLoader(
        data.stores,
        list(hook_points),
        tokens=config.token_kind,
        images=data.images,
        batch_size=config.batch_size,
        seed=config.seed,
        pool_tokens=config.pool_tokens,
        n_streams=config.n_streams,
        rank=rank(),
        world_size=world_size(),
        pin_memory=device.type == "cuda",
        check=data.stores.checks_cheaply,
    )


def _train(
    trainings: list[Training], log_every: int, checkpoint_every: int, openers: Sequence[Opener],
    on_progress: TrainingProgress | None,
) -> list[NonFiniteError]:  # fmt: skip
    """Train the members of one stream, starting from the least advanced; the others join when it has caught up.

    Returns:
        The errors of the members that diverged. The others go on.
    """
    hook_points = list(dict.fromkeys(training.hook_point for training in trainings if not training.complete))
    if not hook_points:
        return []
    device, config = trainings[0].device, trainings[0].config
    loader = _make_loader(trainings[0].data, hook_points, config, device)
    n_total = sum(training.config.n_steps for training in trainings)
    failed: dict[Path, NonFiniteError] = {}
    active = [training for training in trainings if not training.done]
    step = first_step = min((training.step for training in active), default=0)
    with tracked(trainings, openers), _signals() as stopped, closing(loader.batches(step)) as batches:
        for training in trainings:
            training.start()
            if training.done and not training.complete:  # it was stopped after its last step
                _finish(training, failed)
        started, laps = time.perf_counter(), Laps()
        reported = started
        while active:
            laps.exact = device.type == "cuda" and (step + 1) % log_every == 0
            batch = next(batches)
            rows = dict(zip(hook_points, (batch.activations, *batch.others), strict=True))
            laps("wait")
            shared: dict[tuple[HookPoint, str | None], Tensor] = {}
            turn = [training for training in active if training.step == step]
            lines, losses, logged = [], [], list[MetricsLine]()
            for training in turn:
                key = training.hook_point, training.sae.config.normalize
                if key not in shared:
                    shared[key] = training.sae.normalize(rows[training.hook_point].to(device, non_blocking=True))
                    laps("normalize")
                try:
                    loss = training.update(shared[key], laps)
                except NonFiniteError as error:
                    failed[training.path] = error
                    continue
                losses.append((training, loss))
                if training.step % log_every == 0 or training.done:
                    lines.append((training, loss))
            step += 1
            if lines:
                speed = (step - first_step) * config.batch_size / (time.perf_counter() - started)
                seconds = {name: round(value, 4) for name, value in laps.take().items()}
                logged = [training.log(loss, tokens_per_s=speed, seconds=seconds) for training, loss in lines]
            elif on_progress and losses and time.perf_counter() - reported > REPORT_S:
                speed = (step - first_step) * config.batch_size / (time.perf_counter() - started)
                logged = [training.measure(loss, tokens_per_s=speed, seconds={}) for training, loss in losses[-1:]]
            if on_progress and logged:
                on_progress(sum(training.step for training in trainings), n_total, logged[-1])
                reported = time.perf_counter()
            stop = any_of_all(stopped(), device)
            for training in turn:
                if training.path not in failed and (stop or (step % checkpoint_every == 0 and not training.done)):
                    training.checkpoint()
            if stop:
                raise KeyboardInterrupt
            for training in turn:
                if training.done:
                    _finish(training, failed)
            active = [training for training in active if not training.done and training.path not in failed]
    return list(failed.values())


def _finish(training: Training, failed: dict[Path, NonFiniteError]) -> None:
    try:
        training.finish()
    except NonFiniteError as error:
        failed[training.path] = error


def _raise(errors: list[NonFiniteError], n_members: int) -> None:
    """Raise one error for all members that could not be finished."""
    if len(errors) == 1 and n_members == 1:
        raise errors[0]
    if errors:
        raise NonFiniteError(f"{len(errors)} of {n_members} SAEs diverged; the others are finished. {errors[0]}")


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether SIGINT or SIGTERM has arrived. A second signal takes effect at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
