"""A run whose SAE is the identity: latent j is channel j. Of the stores of any_prefix.py it knows every place."""

from pathlib import Path

import torch
from safetensors.torch import save

from actcache import open_stores
from actcache.artifacts import begin_artifact, seal_artifact, write_atomic
from saetrain import SAE, Run, SAEConfig, TrainConfig, evaluate
from saetrain.run import SAE_FILE, run_settings


def write_place_run(path: Path, store: Path, tokens: str = "all") -> Run:
    """A finished run on a store, recorded with `tokens` as they are given."""
    group = open_stores(store)
    config = SAEConfig(variant="relu", n_latents=group.layout.d_model, normalize="none").resolve(group.layout.d_model)
    sae = SAE(config, group.layout.d_model, seed=0)
    with torch.no_grad():
        for weights in (sae.encoder, sae.decoder):
            weights.copy_(torch.eye(group.layout.d_model))
        for bias in (sae.b_enc, sae.b_dec):
            bias.zero_()
    hook = group.hook_point(None)
    settings = run_settings(group, hook, config, TrainConfig(tokens=tokens).resolve(config, "float32"))
    begin_artifact(path, "run", settings=settings, parents=group.parents(), provenance={})
    write_atomic(path / SAE_FILE, save({name: value.contiguous() for name, value in sae.state_dict().items()}))
    quality = evaluate(sae, group, hook, range(group.n_images), tokens=tokens)  # type: ignore[arg-type]
    seal_artifact(path, quality={tokens: quality.get("all", quality.get("patch", quality.get("cls"))), **quality})
    return Run.open(path)
