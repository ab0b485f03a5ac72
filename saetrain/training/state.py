"""Training: the state of one SAE in training, and its run directory.

The state is the weights, Adam's moments, the counters of dead latents, the weight of the penalty and the step. A
checkpoint holds all of it, so that a killed run resumes bit for bit. One stream of batches can feed several trainings.
With several processes, each holds the same weights and sees its part of every batch, and the first process writes.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from actcache import HookPoint, NonFiniteError
from actcache.artifacts import OutputLock, begin_artifact, seal_artifact, storage_errors, write_atomic
from actcache.store import statistics_of_images
from saetrain.config import ResolvedSAEConfig, ResolvedTrainConfig
from saetrain.data import TrainingData
from saetrain.distributed import copy_first, rank, wait_for_all
from saetrain.lineage import write_learned
from saetrain.metrics import evaluate
from saetrain.model import SAE
from saetrain.run import (
    CHECKPOINTS,
    SAE_FILE,
    Checkpoint,
    MetricsLine,
    append_metrics,
    load_checkpoint,
    name_tower_of,
    normalizes_by_whole_store,
    run_settings,
    save_checkpoint,
    truncate_metrics,
)
from saetrain.training.dead_latents import init_from_rows, init_thresholds, lower_thresholds, resample
from saetrain.training.objective import Loss, add_gradients
from saetrain.training.optimizer import (
    Adam,
    apply_update,
    load_optimizer_tensors,
    optimizer_tensors,
    reset_latents,
)
from saetrain.training.schedule import learning_rate

STEER_RATE = 0.01
"""How fast the weight of the penalty reacts to an l0 that is e times too high: by 1 % per step."""


class Laps:
    """Seconds spent on each part of a step since the last `take`. If `exact`, each lap waits for the GPU."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.exact = False
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        if self.exact and torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken


class Training:
    """One SAE in training.

    Attributes:
        step: number of finished updates.
        complete: whether the run is finished.
        trackers: functions that are called with every line of metrics.jsonl.
    """

    def __init__(
        self,
        run: str | Path,
        data: TrainingData,
        hook_point: HookPoint,
        sae: ResolvedSAEConfig,
        config: ResolvedTrainConfig,
        device: torch.device,
        *,
        lock: OutputLock,
        overwrite: bool = False,
    ) -> None:
        """Begin a run, or continue the one that was begun with the same settings. The first process locks it."""
        self.data, self.hook_point, self.config, self.device = data, hook_point, config, device
        store, overwrite = data.stores, overwrite and rank() == 0
        if rank():  # the first process creates the run
            wait_for_all()
        whole_store = not overwrite and normalizes_by_whole_store(run)
        artifact = begin_artifact(
            run,
            "run",
            settings=run_settings(store, hook_point, sae, config, whole_store=whole_store),
            parents=store.parents(),
            provenance={
                "torch": torch.__version__,
                "device": device.type,
                "rows": [member.rows_id for member in store.stores],
                "tower": asdict(name_tower_of(store)),
            },
            overwrite=overwrite,
            lock=None if rank() else lock,
        )
        if not rank():
            wait_for_all()
        self.path, self.complete, self.step, self.weight = artifact.path, artifact.complete, 0, sae.l1
        self.run_id, self.trackers = artifact.id, list[Callable[[MetricsLine], None]]()
        if self.complete:
            self.step = config.n_steps
            return
        self.sae = _new_sae(data, hook_point, sae, config, whole_store=whole_store).to(device)
        self.optimizer = Adam(self.sae)
        # tokens since each latent last fired
        self.silent = torch.zeros(sae.n_latents, dtype=torch.int64, device=device)
        if checkpoint := load_checkpoint(self.path):
            self._restore(checkpoint)
        if rank() == 0:
            truncate_metrics(self.path, self.step)

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.step, self.weight = checkpoint.step, checkpoint.weight
        tensors = checkpoint.tensors
        self.silent = tensors.pop("silent").to(self.device)
        self.sae.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("adam.")})
        moved = {name: value.to(self.device) for name, value in tensors.items()}
        load_optimizer_tensors(self.sae, self.optimizer, moved)

    @property
    def done(self) -> bool:
        return self.step >= self.config.n_steps

    @property
    def dead(self) -> Tensor:
        """[F] bool: the latents that have not fired for more than dead_tokens tokens."""
        return self.silent > self.config.dead_tokens

    def start(self) -> None:
        """Set the weights that come from data, if the run is at step 0."""
        from_rows = self.config.init == "data"
        if self.step or self.complete or not (from_rows or self.sae.variant.has_thresholds):
            return
        config, n = self.config, max(self.sae.config.n_latents, 4096)
        rows = self.data.first_rows(self.hook_point, config.token_kind, n, seed=config.seed)
        x = self.sae.normalize(rows.to(self.device))
        if from_rows:
            init_from_rows(self.sae, x, seed=config.seed)
        if self.sae.variant.has_thresholds:
            init_thresholds(self.sae, x)

    def update(self, x: Tensor, laps: Laps) -> Loss:
        """Make one step on normalized rows x [B, D].

        Raises:
            NonFiniteError: the loss is not finite. The state before this batch is in a checkpoint.
        """
        config = self.config
        loss = add_gradients(self.sae, x, self.dead, config, weight=self.weight, lap=laps)
        if not torch.isfinite(loss.total):
            self.checkpoint()
            raise NonFiniteError(
                f"The loss is {loss.total.item()} at batch {self.step:,}, not a finite number. The state before this "
                f"batch is kept in {self.path}. Train a new run with a lower --lr."
            )
        rate = learning_rate(config, self.step)
        limit = config.clip_norm / self.sae.d_model  # E||x'||^2 = d_model is 1 in the loss
        apply_update(self.sae, self.optimizer, learning_rate=rate, clip_norm=limit)
        if config.aux:
            lower_thresholds(self.sae, self.dead)
        self.silent = torch.where(loss.fired, 0, self.silent + config.batch_size)
        if (target_l0 := self.sae.config.steering_target) is not None:
            self.weight = steer(self.weight, float(loss.n_active / loss.n_rows), target_l0)
        self.step += 1
        if config.resample_every and self.step % config.resample_every == 0 and not self.done:
            replaced = resample(self.sae, x, self.dead, seed=config.seed, step=self.step)
            copy_first(self.sae.parameters())  # each process has drawn from its own rows
            reset_latents(self.sae, self.optimizer, replaced)
            self.silent[replaced] = 0
        laps("optimizer")
        return loss

    def measure(self, loss: Loss, *, tokens_per_s: float, seconds: dict[str, float]) -> MetricsLine:
        """The metrics of the last step."""
        return {
            "step": self.step,
            "loss": float(loss.total),
            "reconstruction": float(loss.reconstruction),
            "sparsity": float(loss.sparsity),
            "revival": float(loss.revival),
            "fvu": float(loss.squared_error / loss.variance),
            "l0": float(loss.n_active / loss.n_rows),
            "dead": float(self.dead.float().mean()),
            "lr": learning_rate(self.config, self.step - 1),
            **({"weight": self.weight} if self.sae.config.steering_target is not None else {}),  # type: ignore[typeddict-item]
            "tokens_per_s": tokens_per_s,
            "seconds": seconds,
        }

    def log(self, loss: Loss, *, tokens_per_s: float, seconds: dict[str, float]) -> MetricsLine:
        """Write the metrics of the last step to metrics.jsonl, and return them."""
        line = self.measure(loss, tokens_per_s=tokens_per_s, seconds=seconds)
        if rank() == 0:
            append_metrics(self.path, line)
            for write in self.trackers:
                write(line)
        return line

    def checkpoint(self) -> None:
        if rank() == 0:
            tensors = {**self.sae.state_dict(), **optimizer_tensors(self.sae, self.optimizer), "silent": self.silent}
            save_checkpoint(self.path, Checkpoint(self.step, self.weight, tensors))

    def finish(self) -> None:
        """Measure the quality on held-out images, write the SAE, delete the checkpoints and seal the run."""
        if not self.complete and rank() == 0:
            self._finish()
        wait_for_all()
        self.complete = True

    def _finish(self) -> None:
        from safetensors.torch import save

        tokens = self.config.token_kind
        sae = self.sae.requires_grad_(False).to("cpu")  # where evaluate() computes
        quality = evaluate(sae, self.data.stores, self.hook_point, self.data.held_out, tokens=tokens)
        fvu = quality[tokens]["fvu"]
        if not math.isfinite(fvu):  # because of the last update
            raise NonFiniteError(
                f"The held-out fvu is {fvu} after step {self.step:,}, not a finite number. The last checkpoint is kept "
                f"in {self.path}. Train a new run with a lower --lr."
            )
        quality["dead"] = float(self.dead.float().mean())
        if self.data.n_seen:
            quality["left_out"] = self.data.n_seen
        write_atomic(self.path / SAE_FILE, save(sae.state_dict()))
        write_learned(self.path, self.data.stores, self.data.images)
        truncate_metrics(self.path, self.step)
        with storage_errors(self.path):
            if (self.path / CHECKPOINTS).is_dir():
                shutil.rmtree(self.path / CHECKPOINTS)
            else:
                (self.path / CHECKPOINTS).unlink(missing_ok=True)
        seal_artifact(self.path, quality=quality)


def steer(weight: float, l0: float, target_l0: float) -> float:
    """The weight of the penalty after a batch with this l0: an integral controller of its logarithm."""
    error = math.log(max(l0, 1e-3) / target_l0)
    return weight * math.exp(STEER_RATE * min(1.0, max(-1.0, error)))


def _new_sae(
    data: TrainingData, hook_point: HookPoint, sae: ResolvedSAEConfig, config: ResolvedTrainConfig, *, whole_store: bool
) -> SAE:
    """Make an untrained SAE. Mean and scale come from the statistics of the training images, mostly from records.

    Args:
        whole_store: from those of all images instead, as in runs that an earlier version began.
    """
    model = SAE(sae, data.stores.layout.d_model, seed=config.seed)
    if whole_store:
        statistics = data.stores.statistics(hook_point, config.token_kind)
    else:
        statistics = statistics_of_images(data.stores, hook_point, config.token_kind, data.images)
    if sae.normalize == "center":
        model.set_normalization(statistics.mean, float(statistics.variance.sum()))
    else:
        with torch.no_grad():
            model.b_dec.copy_(torch.from_numpy(statistics.mean))
    return model
