"""Measure 4, patch concepts: how well single latents tell where in the images a concept is.

    patch mAP            for each concept, the latent whose 1-D logistic probe on patches has the lowest loss; average
                         precision of the probe's answer over all patches; mean over the concepts
    patch probe R        1 - loss of these probes / loss of the concepts' rates among the judged patches
    patch purity@16      share of a chosen latent's 16 strongest patches that carry what most of them carry (a concept,
                         or none); where it fires on fewer, the missing ones count as others; mean over the concepts
    patch coverage@0.3   share of the concepts whose average precision is at least 0.3
    pixel mAP, pointing  AP over pixels and pointing game of the chosen latents, as in `localize`

Latents are chosen and probes fitted on the choosing images, and judged on the judged ones. Equal values are one step of
AP, which is the sum over steps of precision times the gain in recall. On a resample, a concept that none of its images
has keeps its number, so that all means are over the same concepts. The details of `patch mAP` hold the AP of chance,
which is the mean rate of the concepts, and the AP of the chosen latents on the labels of other images (`shuffled`),
which is above chance where concepts have a place of their own in the frame.
Source: saev's trait_discovery (arXiv 2511.17735).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from actcache.progress import Progress
from analysis.benchmark.concept_latents import choose_latents, number_images
from analysis.benchmark.logistic import Best, entropy, softplus
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.patch_labels import COVERED, LabeledPatches, PatchLabels
from analysis.benchmark.ranked_patches import average_precision, draw_weights, purity
from analysis.benchmark.resamples import divide
from analysis.benchmark.subject import Judged, Subject
from analysis.reduce import find_pairs
from saetrain import CodeStore, LatentCodes

Array = NDArray[np.float64]

NAME = "patch mAP"
N_TOP = 16
N_RANKED = 1024
"""Strongest patches of a latent among which a resample finds its 16."""
COVERS = 0.3
LARGEST = float(np.log(1e7 - 1))
"""The largest logit of a probe, whose answers are at least 1e-7 likely, as in the source."""
N_SHUFFLED = 4
N_LISTED = 256


class Fires(NamedTuple):
    """Where a latent fires on the patches of labeled images, patch by patch."""

    image: NDArray[np.int64]  # [n] number of the image among the labeled ones
    patch: NDArray[np.int64]  # [n] number of the patch, as in PatchLabels
    value: Array  # [n]
    peak: NDArray[np.int64]  # [M] raster position of the strongest patch of each image; -1 where it is silent


class Judgment(NamedTuple):
    """What is known of a concept and its latent: on the judged images themselves, and on each resample, [n + 1]."""

    ap: Array
    pixel_ap: Array
    pointing: Array
    purity: Array
    loss: Array
    loss_of_rate: Array
    shuffled: float


def measure_patch_concepts(
    subject: Subject, judged: Judged, labels: LabeledPatches | Skipped, on_progress: Progress | None = None
) -> list[Measured | Skipped]:
    """The six numbers of a subject.

    Args:
        labels: from `read_patch_labels`, the same for all subjects.
        on_progress: called with (latents and concepts done, in all).
    """
    if isinstance(labels, Skipped):
        return [labels]
    codes = subject.codes
    n_steps = codes.n_latents + len(labels.concepts)

    def report(done: int) -> None:
        if on_progress:
            on_progress(done, n_steps)

    best = choose_latents(codes, labels.choosing, labels.concepts, report)
    weights = draw_weights(judged.resamples, labels.places)
    rng = np.random.Generator(np.random.Philox(judged.seed))
    others = [rng.permutation(len(labels.places)) for _ in range(N_SHUFFLED)]
    judgments = []
    for i, concept in enumerate(labels.concepts.tolist()):
        fires = read_fires(codes, int(best.latent[i]), labels.judged)
        probe = float(best.fit.b[i]), float(best.fit.w[i])
        judgments.append(judge_concept(fires, labels.judged, concept, probe, weights, others))
        report(codes.n_latents + i + 1)
    return describe(judgments, labels, best)


def read_fires(codes: CodeStore, latent: int, labels: PatchLabels) -> Fires:
    """Where a latent fires on the labeled patches."""
    slot = number_images(codes, labels)
    rows, values = codes.read_latent(latent)
    image, token = np.divmod(rows, codes.n_tokens)
    keep = (slot[image] >= 0) & (token > 0)
    image, token, values = slot[image[keep]], token[keep], values[keep]
    row = (image * codes.n_tokens + token).astype(np.uint64)
    pairs = find_pairs(LatentCodes(np.array([0, len(image)]), row, values), codes.n_tokens)
    peak = np.full(len(labels.images), -1, dtype=np.int64)
    peak[pairs.image] = pairs.peak_patch - 1
    return Fires(image, image * labels.n_patches + token - 1, values.astype(np.float64), peak)


def judge_concept(
    fires: Fires, labels: PatchLabels, concept: int, probe: tuple[float, float], weights: NDArray[np.int16],
    others: Sequence[NDArray[np.int64]],
) -> Judgment:  # fmt: skip
    """What the judged images say of a concept and its latent.

    Args:
        probe: b and w. weights: [n + 1, M] from `draw_weights`.
        others: permutations of the images, whose labels are taken in place of each image's own.
    """
    b, w = probe
    share, center = labels.spread(concept)
    n_images, n_patches = share.shape
    carries, present = share >= COVERED, share.any(1)
    n_carry = carries.sum(1).astype(np.float64)
    heard = slice(None) if w else slice(0)  # a probe of weight 0 tells no patch from another

    def find_ap(drawn: NDArray[np.int16], hits: NDArray[np.bool_], mass: Array) -> Array:
        image, score = fires.image[heard], np.sign(w) * fires.value[heard]
        found = hits.ravel()[fires.patch[heard]].astype(np.float64)
        return average_precision(drawn, image, score, found, mass, n_patches)

    shuffled = [find_ap(weights[:1], carries[order], n_carry[order])[0] for order in others]
    pixels = share.ravel()[fires.patch].astype(np.float64)
    hit = (fires.peak >= 0) & center[np.arange(n_images), fires.peak] & present
    strongest = np.argsort(-fires.value, kind="stable")[:N_RANKED]
    logit = np.clip(b + w * fires.value, -LARGEST, LARGEST)
    carried = carries.ravel()[fires.patch]
    of_zero = np.clip(b, -LARGEST, LARGEST)
    loss: Array = np.bincount(fires.image, softplus(logit) - logit * carried, n_images).astype(np.float64)
    loss += (n_patches - np.bincount(fires.image, minlength=n_images)) * softplus(of_zero)
    loss -= (n_carry - np.bincount(fires.image, carried, n_images)) * of_zero
    n_drawn, n_positives = weights.sum(1, dtype=np.float64) * n_patches, weights @ n_carry
    n_present = (weights @ present).astype(np.float64)
    return Judgment(
        ap=find_ap(weights, carries, n_carry),
        pixel_ap=average_precision(
            weights, fires.image, fires.value, pixels, share.sum(1, dtype=np.float64), n_patches
        ),
        pointing=divide((weights @ hit).astype(np.float64), n_present, n_present > 0),
        purity=purity(weights, fires.image[strongest], _spell_out(labels, fires.patch[strongest]), N_TOP),
        loss=np.asarray(weights @ loss),
        loss_of_rate=n_drawn * entropy(n_positives / np.maximum(n_drawn, 1)),
        shuffled=float(np.mean(shuffled)),
    )


def _spell_out(labels: PatchLabels, patch: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[k, C + 1]: which concepts some patches carry; the last column says that it is none."""
    first, last = labels.indptr[patch], labels.indptr[patch + 1]
    dense = np.zeros((len(patch), len(labels.names) + 1), dtype=bool)
    for i, (start, stop) in enumerate(zip(first.tolist(), last.tolist(), strict=True)):  # N_RANKED at most
        dense[i, labels.carried[start:stop]] = True
    dense[:, -1] = first == last
    return dense


def describe(judgments: Sequence[Judgment], labels: LabeledPatches, best: Best) -> list[Measured | Skipped]:
    """The numbers of a subject from what is known of each concept."""
    ap, pixel_ap, pointing, pure, loss, of_rate = (
        np.stack(column) for column in list(zip(*judgments, strict=True))[:6]
    )
    half = labels.judged
    rates = half.n_positives[labels.concepts] / (len(half.images) * half.n_patches)
    names = [half.names[concept] for concept in labels.concepts.tolist()]
    listed = {
        name: {"latent": int(best.latent[i]), "weight": float(best.fit.w[i]), "ap": float(ap[i, 0]),
               "chance": float(rates[i]), "purity": float(pure[i, 0])}
        for i, name in enumerate(names[:N_LISTED])
    }  # fmt: skip
    facts: dict[str, object] = {
        "chance": float(rates.mean()), "shuffled": float(np.mean([each.shuffled for each in judgments])),
        "n_concepts": len(names), "n_left_out": len(labels.left_out), "left_out": list(labels.left_out[:N_LISTED]),
        "n_images": len(half.images), "n_choosing": len(labels.choosing.images), "concepts": listed,
    }  # fmt: skip
    loss, of_rate = loss.sum(0), of_rate.sum(0)
    numbers = {
        NAME: (_keep(ap).mean(0), facts),
        "patch probe R": (1 - divide(loss, of_rate, of_rate > 0), {}),
        f"patch purity@{N_TOP}": (pure.mean(0), {}),
        f"patch coverage@{COVERS}": ((_keep(ap) >= COVERS).mean(0), {}),
        "pixel mAP": (_keep(pixel_ap).mean(0), {}),
        "pointing": (_keep(pointing).mean(0), {}),
    }
    return [Measured(name, float(values[0]), values[1:], True, about) for name, (values, about) in numbers.items()]


def _keep(values: Array) -> Array:
    """[K, n + 1] numbers of concepts, where a resample has none that on the images themselves."""
    return np.where(np.isnan(values), values[:, :1], values)
