"""inspect_dictionaries(): how good the dictionaries of runs are, without labels, concepts or the model.

In: runs and a store. Out, for each run: its amortization gap (what the encoder loses against a pursuit over the same
dictionary with the same number of latents, on tokens it was not trained on) and its coherence (how similar its latents
are). For each pair of runs, and for a known dictionary: a one-to-one matching of latents by cosine.

    gap       FVU of the SAE - FVU of the pursuit; beside them stands the FVU of the SAE's latents with the best values
    coherence max over j of |cos(d_i, d_j)|: its distribution over latents, beside Welch's bound, which the largest
              of F directions in D dimensions cannot fall below: sqrt((F - D) / (D (F - 1)))
    matching  Hungarian: the sum of cosines is as large as possible; unmatched latents count 0

Source: Klindt et al. 2025 (arXiv 2503.01824) for the gap; Paulo and Belrose 2025 (arXiv 2501.16615) for matching seeds;
Sharkey et al. 2022 for the mean of the largest cosines (MMCS).
"""

import hashlib
import importlib.util
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import SettingsError, open_stores
from actcache.machine import available_bytes, check_memory
from actcache.options import JudgingConfig, check_number, identity_of
from actcache.progress import Progress
from actcache.seen import SeenImages
from actcache.store import StoreGroup, Stores
from analysis.cosines import nearest_cosines, shuffle_channels
from analysis.dictionary.pursuit import pursue, refit
from analysis.lineage import find_runs, name_parents
from analysis.results import (
    Coherence,
    Gap,
    InspectedRun,
    Inspection,
    Matching,
    describe_result,
    find_result,
    finish_result,
)
from saetrain import Run
from saetrain.lineage import find_seen

N_CANDIDATES = 64
"""Latents of the other dictionary that a latent may be matched with: the nearest ones."""
FIRING_TOKENS = 8
"""Whether a latent fires is measured on this many times the tokens that are coded by pursuit."""


def inspect_dictionaries(
    runs: Run | str | Path | Sequence[Run | str | Path],
    store: Stores | StoreGroup,
    out: str | Path | None = None,
    *,
    n_tokens: int = 2048,
    seed: int = 0,
    truth: NDArray[np.floating] | str | Path | None = None,
    judging: JudgingConfig = JudgingConfig(),
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Inspection:
    """Measure dictionaries, and match every pair of them.

    Args:
        runs: one or several runs, or folders of runs, that read the same hook point.
        store: a store of their model. Images that a run has learned from are left out.
        out: a JSON file for the result; the same call again returns what the file holds.
        n_tokens: size of the random sample that is encoded by pursuit.
        truth: a known dictionary [N, D], or its .npy file, that every run is matched with (`first`).
        on_progress: called with (runs and matchings done, in all).

    Raises:
        SettingsError: runs of different hook points, a truth of another width, scipy is missing.
        ParentMismatchError: a store of another model.
    """
    listed = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    opened = [run for item in listed for run in find_runs(item)]
    store = open_stores(store)
    n_tokens = check_number("n_tokens", n_tokens, int, at_least=1)
    seed = check_number("seed", seed, int, at_least=0)
    if len({run.run_id for run in opened}) < len(opened):
        raise SettingsError("A run is given twice. Give runs that differ, e.g. in their seed.")
    if len({str(run.hook_point) for run in opened}) > 1:
        hooks = ", ".join(sorted({str(run.hook_point) for run in opened}))
        raise SettingsError(f"The runs read different hook points ({hooks}), so their latents cannot be matched.")
    for run in opened:
        run.check_store(store)
    _check_memory([run.sae_config.n_latents for run in opened], opened[0].d_model)
    known = None if truth is None else _read_truth(truth, opened[0].d_model)
    if (len(opened) > 1 or known is not None) and importlib.util.find_spec("scipy") is None:
        raise SettingsError("Matching dictionaries needs the package scipy: pip install 'patchsae[quality]'.")
    content = None if known is None else hashlib.sha256(known.numpy().tobytes()).hexdigest()[:16]
    settings = {"n_tokens": n_tokens, "seed": seed, "truth": content, **identity_of(judging)}
    head = describe_result(Inspection, settings, name_parents(opened, store))
    if (earlier := find_result(Inspection, out, head, overwrite=overwrite)) is not None:
        return earlier
    names = _name_runs(opened)
    chosen = [_choose_images(run, store, judging) for run in opened]
    total = len(opened) * (len(opened) + 1) // 2 + (len(opened) if known is not None else 0)
    inspected: list[InspectedRun] = []
    firing: list[Tensor] = []
    matchings: list[Matching] = []

    def report() -> None:
        if on_progress:
            on_progress(len(inspected) + len(matchings), total)

    for name, run, (images, _) in zip(names, opened, chosen, strict=True):
        rows, measured = _inspect(name, run, store, images, n_tokens, seed)
        inspected.append(measured)
        firing.append(rows)
        report()
    for i, j in combinations(range(len(opened)), 2):
        matchings.append(match_latents(firing[i], firing[j], names=(names[i], names[j])))
        report()
    for name, rows in zip(names, firing, strict=True):
        if known is not None:
            matchings.append(match_latents(known, rows, names=("truth", name)))
            report()
    seen = tuple(counted for _, counted in chosen)
    return finish_result(out, Inspection(*head, tuple(inspected), tuple(matchings), seen=seen))


@torch.no_grad()
def _inspect(
    name: str, run: Run, store: StoreGroup, images: NDArray[np.int64], n_tokens: int, seed: int
) -> tuple[Tensor, InspectedRun]:
    """(unit dictionary rows of the latents that fire, the numbers)."""
    sae, x = run.sae(), sample_tokens(run, store, FIRING_TOKENS * n_tokens, seed, images)
    dictionary = F.normalize(sae.decoder.detach())
    fires = torch.zeros(sae.config.n_latents, dtype=torch.bool)
    for part in torch.split(x, 4096):
        fires[sae.encode(part)[1]] = True
    x = x[:n_tokens]
    rows, latents, values = sae.encode(x)
    centered = sae.normalize(x) - sae.b_dec
    counts = torch.bincount(rows, minlength=len(x))
    pursued, n_used = pursue(centered, dictionary, counts)
    refitted = refit(centered, dictionary, rows, latents)
    # A greedy choice is now and then worse than the SAE's own, so the better of the two bounds what an encoder can do.
    better = (centered - refitted).square().sum(1) < (centered - pursued).square().sum(1)
    pursued, n_used = torch.where(better[:, None], refitted, pursued), torch.where(better, counts, n_used)
    variance = float((centered - centered.mean(0)).double().square().sum())
    decoded = sae.normalize(sae.decode(rows, latents, values, len(x), like=x), like=x) - sae.b_dec

    def fvu(reconstruction: Tensor) -> float:
        return float((centered - reconstruction).double().square().sum()) / max(variance, 1e-12)

    gap = Gap(
        n_tokens=len(x), l0=float(counts.double().mean()), fvu=fvu(decoded),
        fvu_refit=fvu(refitted), fvu_pursuit=fvu(pursued),
        l0_pursuit=float(n_used.double().mean()), gap=fvu(decoded) - fvu(pursued),
    )  # fmt: skip
    measured = InspectedRun(name, sae.config.n_latents, int(fires.sum()), gap, measure_coherence(dictionary))
    return dictionary[fires], measured


def _check_memory(n_latents: Sequence[int], d_model: int) -> None:
    """Raise SettingsError if dictionaries of these sizes cannot be held and matched.

    All are kept as float32 rows, the largest SAE is held beside them, and matching keeps a row number, a column number
    and a cosine (24 bytes) of every candidate of two of them.
    """
    largest = sorted(n_latents)[-2:]
    candidates = 24 * N_CANDIDATES * sum(largest) if len(largest) > 1 else 0
    needed = 4 * d_model * sum(n_latents) + 8 * d_model * largest[-1] + candidates
    check_memory(needed, available_bytes(), "Inspecting these runs", "Give fewer runs at once.")


def _choose_images(run: Run, store: StoreGroup, judging: JudgingConfig) -> tuple[NDArray[np.int64], SeenImages]:
    """The readable images that the run has not learned from. Raises SettingsError if there are none."""
    readable = np.flatnonzero(store.valid)
    if not len(readable):
        raise SettingsError(f"No image of {store.path} could be read. Give another store.")
    return find_seen(store, [run]).judge(readable, judging, str(store.path))


def sample_tokens(
    run: Run, store: StoreGroup, n_tokens: int, seed: int, images: NDArray[np.int64] | None = None
) -> Tensor:
    """At most `n_tokens` rows [N, D] float32 in random order, of some images; by default of those new to the run."""
    images = _choose_images(run, store, JudgingConfig())[0] if images is None else images
    rng = np.random.Generator(np.random.Philox(seed))
    kind = run.train_config.token_kind
    chosen = np.sort(rng.permutation(images)[: -(-n_tokens // store.n_read_tokens(kind))])
    values = store.read(run.hook_point, images=chosen, tokens=kind, check=store.checks_cheaply)
    rows = values.reshape(-1, values.shape[-1])
    return torch.from_numpy(rows[rng.permutation(len(rows))[:n_tokens]]).float()


def measure_coherence(dictionary: Tensor) -> Coherence:
    """Coherence of unit rows [F, D]."""
    n_latents, d_model = dictionary.shape
    nearest = np.zeros(1)  # a single latent has no other
    if n_latents > 1:
        rows = dictionary.numpy()
        nearest = nearest_cosines(rows, rows, 1, start=0, absolute=True).cosine[:, 0].astype(np.float64)
    low, middle, high = np.quantile(nearest, [0.1, 0.5, 0.9]).tolist()
    bound = max(0.0, (n_latents - d_model) / (d_model * max(n_latents - 1, 1))) ** 0.5
    return Coherence(float(nearest.max()), float(nearest.mean()), (low, middle, high), bound)


def match_latents(
    first: Tensor | NDArray[np.floating], second: Tensor | NDArray[np.floating], *,
    names: tuple[str, str] = ("first", "second"), n_candidates: int = N_CANDIDATES,
) -> Matching:  # fmt: skip
    """Match two dictionaries [N, D] and [M, D], each latent with one of the `n_candidates` nearest of the other.

    A latent may remain unmatched, at cosine 0, so no latent is matched with an opposite direction.
    """
    a, b = (F.normalize(torch.as_tensor(part).float()).numpy() for part in (first, second))
    n, m = len(a), len(b)
    matched = _pair(a, b, n_candidates)
    by_chance = _pair(a, shuffle_channels(b), n_candidates)
    size = max(1, min(n, m))
    return Matching(
        first=names[0], second=names[1], n_first=n, n_second=m, mean_cosine=float(matched.cosine.sum() / size),
        above_70=float((matched.cosine > 0.7).sum() / size), above_90=float((matched.cosine > 0.9).sum() / size),
        mean_largest=matched.mean_largest, mean_cosine_shuffled=float(by_chance.cosine.sum() / size),
        mean_largest_shuffled=by_chance.mean_largest,
    )  # fmt: skip


class PairedLatents(NamedTuple):
    """The matched pairs of two dictionaries, ascending in the first.

    Attributes:
        first, second: [P] rows of each dictionary. cosine: [P], above 0.
        mean_largest: mean over the first dictionary of the largest cosine with the second, matched or not.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosine: NDArray[np.float64]
    mean_largest: float


def pair_latents(
    first: Tensor | NDArray[np.floating], second: Tensor | NDArray[np.floating], *, n_candidates: int = N_CANDIDATES
) -> PairedLatents:
    """Which latent of one dictionary [N, D] belongs to which of another [M, D], as `match_latents` matches them."""
    a, b = (F.normalize(torch.as_tensor(part).float()).numpy() for part in (first, second))
    return _pair(a, b, n_candidates)


def _pair(a: NDArray[np.float32], b: NDArray[np.float32], n_candidates: int) -> PairedLatents:
    """The matching of unit rows [N, D] and [M, D]."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    n, m = len(a), len(b)
    if not n or not m:
        none = np.empty(0, dtype=np.int64)
        return PairedLatents(none, none, np.empty(0), 0.0)
    forward, backward = (nearest_cosines(x, y, min(n_candidates, len(y))) for x, y in ((a, b), (b, a)))
    pairs = [
        (np.arange(n)[:, None] * m + forward.neighbor).reshape(-1),
        (backward.neighbor.astype(np.int64) * m + np.arange(m)[:, None]).reshape(-1),
    ]
    row, column = np.divmod(np.unique(np.concatenate(pairs)), m)
    cosine = _pair_cosines(a, b, row, column)
    kept = cosine > 0
    row, column, cosine = row[kept], column[kept], cosine[kept]
    own = np.arange(n)  # every row has a column of its own at cosine 0; a cost of 0 would be no edge
    places = np.r_[row, own].astype(np.int32), np.r_[column, m + own].astype(np.int32)  # csgraph knows no others
    costs = csr_array((np.concatenate([2 - cosine, np.full(n, 2.0)]), places), shape=(n, m + n))
    rows, columns = min_weight_full_bipartite_matching(costs)
    cosine = 2 - np.asarray(costs[rows, columns]).reshape(-1)
    kept = columns < m
    rows, columns = rows[kept].astype(np.int64), columns[kept].astype(np.int64)
    return PairedLatents(rows, columns, cosine[kept], float(forward.cosine[:, 0].mean(dtype=np.float64)))


def _pair_cosines(
    a: NDArray[np.float32], b: NDArray[np.float32], row: NDArray[np.int64], column: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Cosines of pairs of rows, [N], in blocks: a pair takes 12 kB at width 768."""
    parts = [
        np.einsum("nd,nd->n", a[row[i : i + 65536]], b[column[i : i + 65536]], dtype=np.float64)
        for i in range(0, len(row), 65536)
    ]
    return np.concatenate([np.empty(0), *parts])


def _read_truth(truth: NDArray[np.floating] | str | Path, d_model: int) -> Tensor:
    try:
        known = np.load(truth, allow_pickle=False) if isinstance(truth, str | Path) else np.asarray(truth)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--truth {truth} is not a .npy file of numbers ({error}).") from error
    if known.ndim != 2 or known.shape[1] != d_model or known.dtype.kind != "f" or not len(known):
        raise SettingsError(
            f"--truth must hold floating-point directions [N, {d_model}], got {known.dtype} {list(known.shape)}."
        )
    if not np.isfinite(known).all():
        raise SettingsError("--truth holds numbers that are not finite. Expected finite directions.")
    return torch.from_numpy(known.astype(np.float32))


def _name_runs(runs: Sequence[Run]) -> list[str]:
    """The names of their folders, with the parent folder where two names are equal."""
    short = [run.path.name for run in runs]
    return short if len(set(short)) == len(short) else [f"{run.path.parent.name}/{run.path.name}" for run in runs]
