"""How much memory a training needs, counted before any of it is allocated.

The counts are lower bounds. What is left out is small beside them: gradients of a batch, caches of libraries, and on a
CPU a float32 encoder in the order of the hardware, which is an eighth of the rest.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from actcache.artifacts import MANIFEST_FILE
from actcache.machine import available_bytes, check_memory
from actcache.models import choose_precision, free_memory
from actcache.store import StoreGroup
from saetrain.config import ResolvedSAEConfig, ResolvedTrainConfig, SAEConfig, TrainConfig
from saetrain.data import train_images

WEIGHT_BYTES = 16
"""Of a parameter in training: its float32 value, its gradient, and Adam's two moments."""


def training_bytes(sae: ResolvedSAEConfig, config: ResolvedTrainConfig, d_model: int) -> int:
    """Memory of one SAE on the device: encoder, decoder and biases, and the encoder again in bfloat16."""
    n_weights = 2 * sae.n_latents * d_model
    copy = n_weights if config.precision == "bfloat16" else 0  # of half of them, in 2 bytes each
    return WEIGHT_BYTES * (n_weights + sae.n_latents + d_model) + copy


def pool_bytes(stores: StoreGroup, config: ResolvedTrainConfig) -> int:
    """Memory of the rows that the loader shuffles, and of a batch; 0 where a filter chooses them."""
    layout = stores.layout
    n_images = 0 if config.where else sum(len(train_images(member.n_images)) for member in stores.stores)
    n_rows = min(n_images * stores.n_read_tokens(config.token_kind), config.pool_tokens)
    return (n_rows + config.batch_size) * layout.d_model * layout.itemsize


def check_memory_of(
    members: Sequence[tuple[str | Path, SAEConfig, TrainConfig]], stores: StoreGroup, device: torch.device
) -> None:
    """Raise SettingsError if the SAEs that are trained on one stream do not fit into the memory that is free.

    Args:
        members: the run, the SAE and the training of each. A run that is complete needs no memory.
    """
    d_model, streams = stores.layout.d_model, dict[object, list[int]]()
    for run, sae, config in members:
        if not (Path(run) / MANIFEST_FILE).exists():
            resolved = sae.resolve(d_model)
            settings = config.resolve(resolved, choose_precision("auto", device))
            needs = streams.setdefault(stream_of(settings), [pool_bytes(stores, settings)])
            needs.append(training_bytes(resolved, settings, d_model))
    for pool, *needs in streams.values():
        what = "Training this SAE" if len(needs) == 1 else f"Training these {len(needs)} SAEs side by side"
        if device.type == "cuda":
            check_memory(sum(needs), free_memory(device), what, "Lower --n-latents, or take a GPU with more memory.")
        check_memory(
            pool + (0 if device.type == "cuda" else sum(needs)), available_bytes(), what,
            "Lower --n-latents, --batch-size or --pool-tokens, or take a machine with more memory.",
        )  # fmt: skip


def stream_of(config: TrainConfig) -> tuple[object, ...]:
    """The settings that two runs must share to be fed by one stream."""
    return (config.tokens, config.batch_size, config.pool_tokens, config.n_streams, config.seed, config.where)
