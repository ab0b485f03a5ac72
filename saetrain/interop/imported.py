"""write_imported(): an SAE that `train` did not make becomes a sealed Run, with its quality on held-out images."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from actcache import HookPoint
from actcache.artifacts import OutputLock, begin_artifact, crc32c, seal_artifact, write_atomic
from actcache.store import StoreGroup, Tokens
from saetrain.config import TrainConfig
from saetrain.data import split_images
from saetrain.metrics import evaluate
from saetrain.model import SAE
from saetrain.run import SAE_FILE, Run, name_tower_of, run_settings


def write_imported(
    dst: str | Path,
    sae: SAE,
    store: StoreGroup,
    hook_point: HookPoint,
    *,
    format: str,
    tokens: Tokens,
    provenance: Mapping[str, object],
    seed: int = 0,
    overwrite: bool = False,
) -> Run:
    """Write an SAE as a run that was imported. The same SAE at the same place is left as it is.

    Args:
        format: what made the SAE, as the settings record it.
        tokens: the kind of tokens that it is for.
        provenance: further facts to show, beside the versions and the tower.
        seed: what its initial weights were drawn from, where there was a seed.

    Raises:
        SettingsError: something else is at `dst`.
    """
    from safetensors.torch import save

    weights = save(sae.state_dict())
    settings = run_settings(store, hook_point, sae.config, TrainConfig(tokens=tokens, seed=seed))
    settings["imported"] = {"format": format, "crc32c": crc32c(weights), "bytes": len(weights)}
    with OutputLock(dst) as lock:
        artifact = begin_artifact(
            dst, "run", settings=settings, parents=store.parents(),
            provenance={"torch": torch.__version__, "tower": asdict(name_tower_of(store)), **provenance},
            overwrite=overwrite, lock=lock,
        )  # fmt: skip
        if not artifact.complete:
            _, held_out = split_images([member.n_images for member in store.stores])
            quality = evaluate(sae, store, hook_point, held_out, tokens=tokens)
            quality["dead"] = quality["silent"]
            write_atomic(artifact.path / SAE_FILE, weights)
            seal_artifact(artifact.path, quality=quality)
        return Run.open(artifact.path)
