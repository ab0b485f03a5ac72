"""cross_dictionaries(): two SAEs, each spliced into two models: does a second SAE, of the adapted model, differ?

In: a run on the base model's activations, a second run on the adapted model's, and both models' classifiers. Out: the
2 x 2 of {SAE} x {model} with held-out FVU, L0 and accuracy with the SAE spliced in; the share of the gain that needs no
new latents, for either SAE; and how many latents of the second SAE have no counterpart in the first.

Source: PatchSAE (arXiv 2412.05276), figure 11. Two SAEs of one model also differ if their seeds do: to measure by how
much, give a run on the base model's activations with another seed as second run.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional as F

from actcache import ParentMismatchError, SettingsError
from analysis.classifier import ZeroShot, sample_images
from analysis.comparison.verdict import Round, share_with_base_latents
from analysis.cosines import nearest_cosines, shuffle_channels
from analysis.interventions import Condition, classify_masked, count_in_stream, make_masks
from analysis.results import DictionaryCell, DictionaryShare, TwoDictionaries
from saetrain import SAE, Run, evaluate

COUNTERPART = 0.7
"""Decoder cosine from which on two latents count as counterparts."""


def check_second(first: Run, second: Run, k: int) -> None:
    """Raise ParentMismatchError or SettingsError unless the second reads what the first reads and has k latents."""
    if second.sae_config.n_latents <= k:
        raise SettingsError(
            f"{second.path} has {second.sae_config.n_latents:,} latents, but --k {k} keeps more. Lower --n-top."
        )
    if second.run_id == first.run_id:
        raise SettingsError(f"{second.path} is the run of the concept tables. Give another run as --second-run.")
    for what, expected, present in (
        ("model", first.model_id, second.model_id),
        ("hook point", str(first.hook_point), str(second.hook_point)),
        ("tokens", first.train_config.tokens, second.train_config.tokens),
    ):
        if expected != present:
            raise ParentMismatchError(
                f"{second.path} was trained on {what} {present}, {first.path} on {expected}. "
                "Train the second run on the adapted model's store, with the settings of the first."
            )


def cross_dictionaries(
    runs: tuple[Run, Run], classifiers: Mapping[str, ZeroShot], rounds: Sequence[Round], *, k: int, tau: float,
    seed: int, limit: int | None, batch_size: int, report: Callable[[int], None],
) -> TwoDictionaries:  # fmt: skip
    """`dictionaries` of a Comparison.

    Args:
        runs: the tables' run, and the second one.
        classifiers: of images that neither has learned from.
        rounds: as judged with the first run.
        k: latents per class at which the shares are taken.
    """
    images = sample_images(classifiers["base"].images, limit, seed)
    cells, shares, shares_in_words, firing = [], [], [], []
    for name, run in zip(("first", "second"), runs, strict=True):
        sae, tokens = run.sae(), classifiers["base"].store.layout.token_kind(run.train_config.tokens)
        outcomes = classify_masked(classifiers, sae, tokens, images, batch_size=batch_size, report=report)
        fired = np.zeros(sae.config.n_latents, dtype=np.bool_)
        for model, classifier in classifiers.items():
            quality = evaluate(run.sae(), classifier.store, run.hook_point, images.tolist(), tokens=tokens)[tokens]
            spliced = outcomes[Condition(model, "all", "all")].scores()
            original = outcomes[Condition(model, "all", "original")].scores()
            cells.append(
                DictionaryCell(
                    name, run.path.name, model, quality["fvu"], quality["l0"], spliced.accuracy, spliced.accuracy_low,
                    spliced.accuracy_high, spliced.loss, original.accuracy,
                )
            )  # fmt: skip
            fired |= count_in_stream(
                sae, tokens, classifier, images, classifier.labels, tau=tau, batch_size=batch_size
            )[1]
        firing.append(F.normalize(sae.decoder.detach().cpu()[torch.from_numpy(fired)]))
        if name == "second":
            rounds = _judge_again(sae, tokens, classifiers, rounds, k, tau, batch_size, report)
        gained = share_with_base_latents(rounds, k, seed)
        shares.append(DictionaryShare(name, gained.share, gained.low, gained.high))
        shares_in_words.append(gained.say())
    ours, others = firing[1].numpy(), firing[0].numpy()
    largest = nearest_cosines(ours, others, 1).cosine[:, 0].astype(np.float64)
    by_chance = nearest_cosines(ours, shuffle_channels(others), 1).cosine[:, 0].astype(np.float64)
    n_new = int((largest < COUNTERPART).sum())
    sentence = (
        f"{n_new:,} of the {len(largest):,} latents of {runs[1].path.name} that fire have no counterpart in "
        f"{runs[0].path.name} (decoder cosine below {COUNTERPART}). Share of the gain that the {k} latents a class "
        f"keep that the base model uses most: {shares_in_words[1]} with {runs[1].path.name}, "
        f"{shares_in_words[0]} with {runs[0].path.name}."
    )
    return TwoDictionaries(
        n_images=len(images), k=k, cells=tuple(cells), shares=tuple(shares),
        n_firing=tuple(len(rows) for rows in firing), n_without_counterpart=n_new, counterpart_cosine=COUNTERPART,
        mean_largest_cosine=float(largest.mean()), mean_largest_shuffled=float(by_chance.mean()),
        sentence=sentence,
    )  # fmt: skip


def _judge_again(
    sae: SAE, tokens: str, classifiers: Mapping[str, ZeroShot], rounds: Sequence[Round], k: int, tau: float,
    batch_size: int, report: Callable[[int], None],
) -> list[Round]:  # fmt: skip
    """The same rounds with another SAE, its own counts, and only masks of k latents per class."""
    judged = []
    for earlier in rounds:
        rng = np.random.Generator(np.random.Philox(earlier.seed))
        masks = [
            mask
            for model, classifier in classifiers.items()
            for mask in make_masks(
                count_in_stream(
                    sae, tokens, classifier, earlier.chosen, classifier.labels, tau=tau, batch_size=batch_size
                )[0],
                [k], 0, rng, chosen_by=model,
            )
            if mask.selection == "class"
        ]  # fmt: skip
        outcomes = classify_masked(
            classifiers, sae, tokens, earlier.judged, masks, batch_size=batch_size, report=report
        )
        judged.append(Round(earlier.seed, earlier.chosen, earlier.judged, outcomes))
    return judged
