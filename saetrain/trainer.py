"""train(): the loop, told top to bottom. A store in, a finished Run out; no model is needed.

Promises: the same call resumes from the last checkpoint with the same batches; held-out images are never trained on;
a loss that is not finite stops the run and keeps the last checkpoint.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actcache import (
    HookPoint,
    NonFiniteError,
    SettingsError,
    StoreGroup,
    Stores,
    begin_artifact,
    choose_device,
    has_cpu_bfloat16,
    open_stores,
    remove_litter,
    seal_artifact,
    write_atomic,
)
from saetrain.config import SAEConfig, TrainConfig
from saetrain.loader import ActivationLoader
from saetrain.metrics import evaluate
from saetrain.objective import Loss, relu_loss, topk_loss
from saetrain.optimizer import apply_update, load_optimizer_tensors, make_optimizer, optimizer_tensors
from saetrain.order import split_images
from saetrain.run import (
    SAE_FILE,
    Run,
    append_metrics,
    load_checkpoint,
    run_settings,
    save_checkpoint,
    truncate_metrics,
)
from saetrain.sae import SAE


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
    overwrite: bool = False,
    on_progress: Callable[[int, int, dict[str, Any]], None] | None = None,
) -> Run:
    """Train one SAE on one hook point of a store.

    The same call twice is safe: complete, it returns the run; interrupted, it resumes; with other settings it raises
    and shows the differing fields.

    Args:
        store: one, or several of one model; each gives its last 5 % of images as held-out ones.
        layer: which hook point; may be left out when the store holds one.
        device, log_every, checkpoint_every: do not change the result.
        on_progress: called with (steps done, steps in all, latest metrics).

    Raises:
        IncompleteError (store), SettingsError, NonFiniteError.
    """
    stores = open_stores(store)
    hook_point = stores.hook_point(layer)
    sae_config = (sae or SAEConfig()).resolve(stores.layout.d_model)
    target = choose_device(device)
    config = (config or TrainConfig()).resolve(sae_config, _default_precision(target))
    loader = ActivationLoader(
        stores,
        hook_point,
        tokens=config.tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        pool_tokens=config.pool_tokens,
        n_streams=config.n_streams,
        pin_memory=target.type == "cuda",
    )
    _, held_out = split_images([member.n_images for member in stores.stores])
    held_out = held_out[stores.valid[held_out]]
    if not len(held_out):  # found out now, not after the last step
        raise SettingsError(f"No readable image of {stores.path} is held out; extract more images.")
    artifact = begin_artifact(
        run,
        "run",
        settings=run_settings(stores, hook_point, sae_config, config),
        parents=stores.parents(),
        provenance={"torch": torch.__version__, "device": target.type},
        prepare=lambda folder: None,
        overwrite=overwrite,
    )
    if artifact.complete:
        return Run.open(artifact.path)
    path = artifact.path
    remove_litter(path)

    model = _new_sae(stores, hook_point, sae_config, config).to(target)
    optimizer = make_optimizer(model)
    silent = torch.zeros(sae_config.size, dtype=torch.int64, device=target)  # tokens since each latent last fired
    step = 0
    if checkpoint := load_checkpoint(path):
        step, tensors = checkpoint
        silent = tensors.pop("silent").to(target)
        model.load_state_dict({name: value for name, value in tensors.items() if not name.startswith("adam.")})
        load_optimizer_tensors(model, optimizer, {name: value.to(target) for name, value in tensors.items()})
    truncate_metrics(path, step)

    bfloat16 = config.precision == "bfloat16"
    started, first_step, waited = time.perf_counter(), step, 0.0
    batches = loader.batches(step)
    try:
        while step < config.n_steps:
            before = time.perf_counter()
            x = model.normalize(next(batches).activations.to(target, non_blocking=True))
            waited += time.perf_counter() - before
            if sae_config.variant != "relu":
                loss = topk_loss(model, x, silent > config.dead_tokens, aux=config.aux, bfloat16=bfloat16)
            else:
                loss = relu_loss(model, x, bfloat16=bfloat16)
            if not torch.isfinite(loss.total):
                raise NonFiniteError(
                    f"The loss is {loss.total.item()} at step {step:,}. The last checkpoint is kept in {path}. "
                    "Train into another run with a lower --lr."
                )
            torch.autograd.backward(loss.total)
            apply_update(model, optimizer, learning_rate=config.learning_rate(step), clip_norm=config.clip_norm)
            silent = torch.where(loss.fired, 0, silent + config.batch_size)
            step += 1
            if step % log_every == 0 or step == config.n_steps:
                seconds = time.perf_counter() - started
                line = _metrics(step, x, loss, config, silent)
                line |= {
                    "tokens_per_s": (step - first_step) * config.batch_size / seconds,
                    "wait_share": waited / seconds,
                }
                append_metrics(path, line)
                if on_progress:
                    on_progress(step, config.n_steps, line)
            if step % checkpoint_every == 0 and step < config.n_steps:
                save_checkpoint(path, step, _state(model, optimizer, silent))
    finally:
        batches.close()

    model = model.to("cpu").requires_grad_(False)
    quality = evaluate(model, stores, hook_point, held_out, tokens=config.tokens)
    fvu = quality[config.tokens]["fvu"]
    if not math.isfinite(fvu):  # the last update's doing
        raise NonFiniteError(
            f"The held-out fvu is {fvu} after step {step:,}. The last checkpoint is kept in {path}. "
            "Train into another run with a lower --lr."
        )
    quality["dead"] = float((silent > config.dead_tokens).float().mean())
    _finish(path, model, quality)
    return Run.open(path)


def _new_sae(store: StoreGroup, hook_point: HookPoint, sae: SAEConfig, config: TrainConfig) -> SAE:
    """A fresh SAE. The mean and scale come from the store's own statistics: no pass over the data."""
    model = SAE(sae, store.layout.d_model, seed=config.seed)
    statistics = store.statistics(hook_point, config.tokens)  # type: ignore[arg-type]
    if sae.normalize == "center":
        model.set_normalization(statistics.mean, float(statistics.variance.sum()))
    else:
        with torch.no_grad():
            model.b_dec.copy_(torch.from_numpy(statistics.mean))
    return model


def _metrics(step: int, x: Tensor, loss: Loss, config: TrainConfig, silent: Tensor) -> dict[str, Any]:
    variance = float((x - x.mean(0)).square().sum())
    return {
        "step": step,
        "loss": float(loss.total.detach()),
        "reconstruction": float(loss.reconstruction),
        "sparsity": float(loss.sparsity),
        "fvu": float(loss.squared_error) / max(variance, 1e-12),
        "l0": float(loss.n_active) / len(x),
        "dead": float((silent > config.dead_tokens).float().mean()),
        "lr": config.learning_rate(step - 1),
    }


def _state(model: SAE, optimizer: torch.optim.Adam, silent: Tensor) -> dict[str, Tensor]:
    return {**model.state_dict(), **optimizer_tensors(model, optimizer), "silent": silent}


def _finish(path: Path, model: SAE, quality: dict[str, Any]) -> None:
    """Write the SAE, drop the checkpoints, seal."""
    import shutil

    from safetensors.torch import save

    write_atomic(path / SAE_FILE, save(model.state_dict()))
    shutil.rmtree(path / "checkpoints", ignore_errors=True)
    seal_artifact(path, quality=quality)


def _default_precision(device: torch.device) -> str:
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and has_cpu_bfloat16() else "float32"
