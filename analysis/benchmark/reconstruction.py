"""Measure 1, reconstruction: one pass over the judged images that decodes codes and compares with the activations.

    fvu      sum ||x - x^||^2 / sum ||x - mean x||^2, the mean per dimension over the same tokens; sums are float64
    l0       active latents of a token
    cosine   mean cosine of x and x^
    dead     share of the latents that fire on no judged token
    dense    share of the latents that fire on more than a tenth of the judged tokens
    probe ratio  accuracy of a linear probe on reconstructions over that on originals (patch_probe.py)

Each is a function of sums over images, so its replicates are the same function of weighted sums. All sums are kept for
the judged images themselves (row 0) and for each resample (rows 1 to n), and memory does not grow with the images.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from actcache.store import Tokens
from analysis.benchmark.measured import Measured, Skipped
from analysis.benchmark.patch_probe import NAME, PatchProbe
from analysis.benchmark.resamples import divide
from analysis.benchmark.subject import Judged, Subject
from saetrain.metrics import DENSE

BIASED = "a resample leaves out a third of the images, on which alone a latent may fire, so its dead share is too large"

Array = NDArray[np.float64]


class _Sums:
    """Weighted sums over the tokens of one kind: [n + 1] each, and `total` [n + 1, D]."""

    def __init__(self, n: int, d_model: int) -> None:
        self.count, self.active, self.error, self.cosine, self.squares = (np.zeros(n + 1) for _ in range(5))
        self.total = np.zeros((n + 1, d_model))

    def add(self, weights: Array, x: Array, reconstruction: Array, cosine: Array, active: Array) -> None:
        """weights [n + 1, B], x and reconstruction [B, T, D], cosine and active [B, T]."""
        self.count += weights.sum(1) * x.shape[1]
        self.active += weights @ active.sum(1)
        self.cosine += weights @ cosine.sum(1)
        self.error += weights @ np.square(x - reconstruction).sum((1, 2))
        self.squares += weights @ np.square(x).sum((1, 2))
        self.total += weights @ x.sum(1)

    def fvu(self) -> Array:
        """[n + 1]; NaN where the activations do not vary."""
        variance = self.squares - np.square(self.total).sum(1) / self.count
        return divide(self.error, variance, variance > 1e-12)


@torch.no_grad()
def measure_reconstruction(
    subject: Subject,
    judged: Judged,
    probe: PatchProbe | Skipped,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Measured | Skipped]:
    """fvu, l0 and cosine of all tokens and of each kind, dead and dense shares, and the probe ratio.

    Args:
        probe: from `fit_patch_probe`, the same for all subjects.
        on_progress: called with (images done, in all).
    """
    store, codes, sae = judged.store, subject.codes, subject.run.sae()
    tokens = store.layout.token_kind(subject.tokens)
    kinds: tuple[Tokens, ...] = ("all", "cls", "patch") if tokens == "all" else (tokens,)
    n, d_model, n_latents = judged.resamples.n, sae.d_model, sae.config.n_latents
    sums = {kind: _Sums(n, d_model) for kind in kinds}
    fired = np.zeros((n + 1, n_latents))
    right = np.zeros((2, n + 1))  # of originals, of reconstructions
    labeled = np.zeros(n + 1)
    places = {"all": np.arange(codes.n_tokens), "cls": np.arange(1), "patch": np.arange(1, codes.n_tokens)}[tokens]
    step = store.layout.chunk_images
    for first in range(0, len(judged.images), step):
        images = judged.images[first : first + step]
        drawn = judged.resamples.weights(first, first + len(images))
        weights = np.concatenate([np.ones((1, len(images))), drawn])
        part = store.read(subject.run.hook_point, images=images, tokens=tokens, check=store.checks_cheaply)
        x = torch.from_numpy(part.astype(np.float32)).flatten(0, 1)
        rows = (images[:, None] * codes.n_tokens + places).reshape(-1)
        entries = codes.read_rows(rows)
        row = np.searchsorted(rows, entries.row)
        latent = torch.from_numpy(entries.latent)
        values = torch.from_numpy(entries.value.astype(np.float32))
        decoded = sae.decode(torch.from_numpy(row), latent, values, len(rows), like=x)
        shape = (len(images), len(places), d_model)
        active = np.bincount(row, minlength=len(rows)).reshape(shape[:2]).astype(np.float64)
        x64, r64 = x.double(), decoded.double()
        cosine = F.cosine_similarity(x64, r64).numpy().reshape(shape[:2])
        original, reconstruction = x64.numpy().reshape(shape), r64.numpy().reshape(shape)
        for kind in kinds:
            of = {"cls": slice(0, 1), "patch": slice(1, None)}[kind] if kind != tokens else slice(None)
            sums[kind].add(weights, original[:, of], reconstruction[:, of], cosine[:, of], active[:, of])
        place = row // len(places) * n_latents + entries.latent
        per_image = np.bincount(place, minlength=len(images) * n_latents).reshape(len(images), n_latents)
        fired += weights.astype(np.float32) @ per_image.astype(np.float32)  # whole numbers far below 2^24
        if isinstance(probe, PatchProbe):
            labels = probe.labels[first : first + len(images)]
            read = slice(1, None) if tokens == "all" else slice(None)
            known = (labels >= 0).astype(np.float64)
            labeled += weights @ known
            for i, what in enumerate((original, reconstruction)):
                right[i] += weights @ ((probe.predict(what[:, read].mean(1)) == labels) * known)
        on_progress(first + len(images), len(judged.images))
    measured: list[Measured | Skipped] = []
    for kind in kinds:
        of_kind = sums[kind]
        suffix = "" if kind == tokens else f" {kind}"
        facts: dict[str, object] = {"tokens": kind, "n_tokens": int(of_kind.count[0])}
        measured += [
            _describe(f"fvu{suffix}", of_kind.fvu(), False, facts),
            _describe(f"l0{suffix}", of_kind.active / of_kind.count, False, facts),
            _describe(f"cosine{suffix}", of_kind.cosine / of_kind.count, True, facts),
        ]
    n_tokens = sums[tokens].count
    dense = (fired > DENSE * n_tokens[:, None]).mean(1)
    silent = {"n_latents": n_latents, "no_interval": BIASED}
    measured.append(Measured("dead", float((fired[0] == 0).mean()), None, False, silent))
    measured.append(_describe("dense", dense, False, {"n_latents": n_latents, "above": DENSE}))
    measured.append(probe if isinstance(probe, Skipped) else _compare_probes(probe, right, labeled))
    return measured


def _describe(name: str, numbers: Array, higher_is_better: bool, details: dict[str, object]) -> Measured:
    """A measure from its value and replicates [n + 1]."""
    value = float(numbers[0])
    if not np.isfinite(value):
        return Measured(name, None, None, higher_is_better, {**details, "no_interval": "the activations do not vary"})
    return Measured(name, value, numbers[1:], higher_is_better, details)


def _compare_probes(probe: PatchProbe, right: Array, labeled: Array) -> Measured:
    original, reconstructed = (divide(each, labeled, labeled > 0) for each in right)
    details: dict[str, object] = {
        "accuracy_original": float(original[0]), "accuracy_reconstructed": float(reconstructed[0]), "c": probe.c,
        "n_fitted": probe.n_images, "n_judged": int(labeled[0]), "n_left_out": int((probe.labels < 0).sum()),
        "tokens": probe.tokens,
    }  # fmt: skip
    if not original[0] > 0:
        return Measured(NAME, None, None, True, {**details, "no_interval": "the probe is right on no original"})
    ratio = divide(reconstructed, original, original > 0)
    return Measured(NAME, float(ratio[0]), ratio[1:], True, details)
