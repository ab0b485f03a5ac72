"""cross_dictionaries(): two SAEs, each judged with two models: is a second SAE, trained on the adapted model, another?

In: a run of the base model's activations, a second one of the adapted model's, both models' classifiers. Out: the
2 x 2 of {SAE} x {model}: held-out FVU, L0 and accuracy with the SAE spliced in; the share of the gain that needs no
new latents with either; and how many latents of the second have no counterpart in the first.

Source: PatchSAE (arXiv 2412.05276), figure 11. Two SAEs of one model differ too, by their seed: to know how much, give
as second run one of the base model's with another seed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from actcache import ParentMismatchError, SettingsError
from analysis.classifier import ZeroShot
from analysis.comparison.crossover import Condition, Round, judge, make_masks
from analysis.comparison.verdict import say, share_with_base_latents
from analysis.interventions import count_in_stream
from analysis.lineage import unseen_images
from saetrain import SAE, Run, evaluate

COUNTERPART = 0.7
"""Decoder cosine from which two latents are each other's counterpart."""
BLOCK_LATENTS = 512


def check_second(first: Run, second: Run, k: int) -> None:
    """Raise ParentMismatchError or SettingsError unless the second reads what the first reads and has k latents."""
    if second.sae_config.size <= k:
        raise SettingsError(f"{second.path} has {second.sae_config.size:,} latents, --k {k} keeps more. Lower --n-top.")
    if second.run_id == first.run_id:
        raise SettingsError(f"{second.path} is the run of the concept tables. Give another one as --second-run.")
    for what, mine, its in (
        ("model", first.model_id, second.model_id),
        ("hook point", str(first.hook_point), str(second.hook_point)),
        ("tokens", first.train_config.tokens, second.train_config.tokens),
    ):
        if mine != its:
            raise ParentMismatchError(
                f"{second.path} was trained on {what} {its}, {first.path} on {mine}. "
                "Train the second run on the adapted model's store as the first one was."
            )


def cross_dictionaries(
    runs: tuple[Run, Run], scenes: Mapping[str, ZeroShot], rounds: Sequence[Round], *, k: int, tau: float, seed: int,
    limit: int | None, batch_size: int, report: Callable[[int], None],
) -> dict[str, Any]:  # fmt: skip
    """`dictionaries` of `compare`'s result.

    Args:
        runs: the tables' run, and the second one.
        rounds: as judged with the first run.
        k: latents a class at which the shares are taken.
    """
    images = _held_out(runs, scenes, limit, seed)
    cells, shares, firing = [], [], []
    for name, run in zip(("first", "second"), runs, strict=True):
        sae, tokens = run.sae(), run.train_config.token_kind
        outcomes = judge(sae, tokens, scenes, images, batch_size=batch_size, report=report)
        fired = np.zeros(sae.config.size, dtype=np.bool_)
        for model, scene in scenes.items():
            quality = evaluate(run.sae(), scene.store, run.hook_point, images.tolist(), tokens=tokens)[tokens]
            spliced = outcomes[Condition(model, "all", "all")].numbers()
            original = outcomes[Condition(model, "all", "original")].numbers()["accuracy"]
            kept = {n: spliced[n] for n in ("accuracy", "accuracy_low", "accuracy_high", "loss")}
            cells.append(
                {"sae": name, "run": run.path.name, "model": model, "fvu": quality["fvu"], "l0": quality["l0"]}
                | kept | {"original_accuracy": original}
            )  # fmt: skip
            fired |= count_in_stream(sae, tokens, scene, images, scene.labels, tau=tau, batch_size=batch_size)[1]
        firing.append(F.normalize(sae.decoder.detach().cpu()[torch.from_numpy(fired)]))
        mine = rounds if name == "first" else _judge_again(sae, tokens, scenes, rounds, k, tau, batch_size, report)
        shares.append(share_with_base_latents(mine, k, seed))
    largest = _largest_cosines(firing[1], firing[0])
    n_new = int((largest < COUNTERPART).sum())
    sentence = (
        f"{n_new:,} of the {len(largest):,} latents of {runs[1].path.name} that fire have no counterpart in "
        f"{runs[0].path.name} (decoder cosine below {COUNTERPART}). With {runs[1].path.name} the {k} latents a class "
        f"that the base model uses most keep {say(shares[1])} of the gain, with {runs[0].path.name} {say(shares[0])}."
    )
    return {
        "n_images": len(images), "k": k, "cells": cells,
        "shares": [{"sae": name, **found} for name, found in zip(("first", "second"), shares, strict=True)],
        "n_firing": [len(rows) for rows in firing],
        "n_without_counterpart": n_new, "counterpart_cosine": COUNTERPART, "mean_largest_cosine": float(largest.mean()),
        "sentence": sentence,
    }  # fmt: skip


def _held_out(runs: Sequence[Run], scenes: Mapping[str, ZeroShot], limit: int | None, seed: int) -> NDArray[np.int64]:
    """Labeled images that neither run was trained on, in either store: both stores hold the same images."""
    images = scenes["base"].images
    for run in runs:
        for scene in scenes.values():
            images = np.intersect1d(images, unseen_images(run, scene.store))
    if not len(images):
        raise SettingsError(
            "The two runs together were trained on every labeled image. Compare stores of other images."
        )
    if limit is not None and limit < len(images):
        images = np.sort(np.random.Generator(np.random.Philox(seed)).permutation(images)[:limit])
    return images


def _judge_again(
    sae: SAE, tokens: str, scenes: Mapping[str, ZeroShot], rounds: Sequence[Round], k: int, tau: float,
    batch_size: int, report: Callable[[int], None],
) -> list[Round]:  # fmt: skip
    """The same rounds with another SAE, its own counts and masks of k latents a class only."""
    found = []
    for one in rounds:
        counts = {
            model: count_in_stream(sae, tokens, scene, one.chosen, scene.labels, tau=tau, batch_size=batch_size)[0]
            for model, scene in scenes.items()
        }
        masks = [mask for mask in make_masks(counts, [k], 0, one.seed) if mask[1].selection == "class"]
        outcomes = judge(sae, tokens, scenes, one.judged, masks, batch_size=batch_size, report=report)
        found.append(Round(one.seed, one.chosen, one.judged, outcomes))
    return found


def _largest_cosines(rows: torch.Tensor, others: torch.Tensor) -> NDArray[np.float64]:
    """[N] of each unit row the largest cosine with a unit row of the others."""
    parts = [(block @ others.T).amax(1) for block in torch.split(rows, BLOCK_LATENTS)]
    return torch.cat(parts).double().numpy()
