"""inspect_dictionaries(): how good the dictionaries of runs are, without labels, concepts or the model.

In: runs, a store. Out, for each run: its amortization gap (what the encoder loses against a pursuit over the same
dictionary with the same number of latents, on tokens it was not trained on) and its coherence (how alike latents are).
For each two runs, and for a known dictionary: a one-to-one matching of latents by cosine.

    gap       FVU of the SAE - FVU of the pursuit; between them the FVU of the SAE's own latents with the best values
    coherence max over j of |cos(d_i, d_j)|: its distribution over latents, with Welch's bound, below which the largest
              of F directions in D dimensions cannot lie: sqrt((F - D) / (D (F - 1)))
    matching  Hungarian: the sum of cosines is as large as can be; latents left over count 0

Source: Klindt et al. 2025 (arXiv 2503.01824) for the gap; Paulo and Belrose 2025 (arXiv 2501.16615) for matching seeds;
Sharkey et al. 2022 for the mean of the largest cosines (MMCS). No (F, F) array: cosines are taken block by block.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import SettingsError, open_stores
from actcache.store import StoreGroup, Stores
from analysis.dictionary.pursuit import pursue, refit
from analysis.lineage import find_runs, unseen_images
from saetrain import Run

BLOCK_LATENTS = 512
N_CANDIDATES = 64
"""Latents of the other dictionary that one may be matched with: the nearest ones."""
FIRING_TOKENS = 8
"""So many times the coded tokens say which latents fire."""


@dataclass(frozen=True)
class Gap:
    """What the encoder loses, on tokens of images that the run was not trained on."""

    n_tokens: int
    l0: float
    fvu: float  # the SAE
    fvu_refit: float  # its latents, best values
    fvu_pursuit: float  # at most as many latents, chosen by pursuit
    l0_pursuit: float

    @property
    def gap(self) -> float:
        return self.fvu - self.fvu_pursuit


@dataclass(frozen=True)
class Coherence:
    """Of each latent the largest |cosine| with another one: [10 %, 50 %, 90 %] of the latents, mean and maximum."""

    largest: float
    mean: float
    quantiles: tuple[float, float, float]
    welch_bound: float


@dataclass(frozen=True)
class Inspected:
    """One run. firing: latents that fire on the sample."""

    run: str
    n_latents: int
    n_firing: int
    gap: Gap
    coherence: Coherence


@dataclass(frozen=True)
class Matching:
    """Two dictionaries, one to one, only latents that fire. Shares are of the smaller one's latents."""

    first: str
    second: str
    n_first: int
    n_second: int
    mean_cosine: float
    above_70: float
    above_90: float
    mean_largest: float  # MMCS: of the first's latents' largest cosines, not one to one


@dataclass(frozen=True)
class Inspection:
    runs: tuple[Inspected, ...]
    matchings: tuple[Matching, ...]

    def to_json(self) -> dict[str, Any]:
        runs = [{**asdict(one), "gap": {**asdict(one.gap), "gap": one.gap.gap}} for one in self.runs]
        return {"runs": runs, "matchings": [asdict(one) for one in self.matchings]}


def inspect_dictionaries(
    runs: Run | str | Path | Sequence[Run | str | Path],
    store: Stores | StoreGroup,
    *,
    n_tokens: int = 2048,
    seed: int = 0,
    truth: NDArray[np.floating] | str | Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Measure dictionaries, and match each two.

    Args:
        runs: one or several, or folders of runs, that read one hook point.
        store: of their model; of a store that a run was trained on, only its held-out images are used.
        n_tokens: a random sample that is coded by pursuit.
        truth: a known dictionary [N, D], or its .npy file, that every run is matched with (`first`).
        on_progress: called with (runs and matchings done, in all).

    Raises:
        SettingsError: runs of different hook points, a truth of another width, scikit-learn's scipy is missing.
        ParentMismatchError: a store of another model.
    """
    listed = [runs] if isinstance(runs, Run | str | Path) else list(runs)
    opened = [one for item in listed for one in find_runs(item)]
    store = open_stores(store)
    if n_tokens < 1:
        raise SettingsError(f"--n-tokens must be at least 1, got {n_tokens}.")
    if len({one.run_id for one in opened}) < len(opened):
        raise SettingsError("A run is given twice. Give runs that differ, e.g. in their seed.")
    if len({str(one.hook_point) for one in opened}) > 1:
        hooks = ", ".join(sorted({str(one.hook_point) for one in opened}))
        raise SettingsError(f"The runs read different hook points ({hooks}); their latents cannot be matched.")
    for one in opened:
        one.check_store(store)
    known = None if truth is None else _read_truth(truth, opened[0].d_model)
    if len(opened) > 1 or known is not None:
        _require_scipy()
    names = _names(opened)
    total = len(opened) * (len(opened) + 1) // 2 + (len(opened) if known is not None else 0)
    inspected: list[Inspected] = []
    firing: list[Tensor] = []
    matchings: list[Matching] = []

    def report() -> None:
        if on_progress:
            on_progress(len(inspected) + len(matchings), total)

    for name, one in zip(names, opened, strict=True):
        rows, found = _inspect(name, one, store, n_tokens, seed)
        inspected.append(found)
        firing.append(rows)
        report()
    for i, j in combinations(range(len(opened)), 2):
        matchings.append(match_latents(firing[i], firing[j], names=(names[i], names[j])))
        report()
    for name, rows in zip(names, firing, strict=True):
        if known is not None:
            matchings.append(match_latents(known, rows, names=("truth", name)))
            report()
    return Inspection(tuple(inspected), tuple(matchings))


@torch.no_grad()
def _inspect(name: str, run: Run, store: StoreGroup, n_tokens: int, seed: int) -> tuple[Tensor, Inspected]:
    """(unit dictionary rows of the latents that fire, the numbers)."""
    sae, x = run.sae(), sample_tokens(run, store, FIRING_TOKENS * n_tokens, seed)
    dictionary = F.normalize(sae.decoder.detach())
    fires = torch.zeros(sae.config.size, dtype=torch.bool)
    for part in torch.split(x, 4096):
        fires[sae.encode(part)[1]] = True
    x = x[:n_tokens]
    rows, latents, values = sae.encode(x)
    centered = sae.normalize(x) - sae.b_dec
    counts = torch.bincount(rows, minlength=len(x))
    found, n_used = pursue(centered, dictionary, counts)
    variance = float((centered - centered.mean(0)).double().square().sum())
    decoded = sae.normalize(sae.decode(rows, latents, values, len(x))) - sae.b_dec

    def fvu(reconstruction: Tensor) -> float:
        return float((centered - reconstruction).double().square().sum()) / max(variance, 1e-12)

    gap = Gap(
        n_tokens=len(x), l0=float(counts.double().mean()), fvu=fvu(decoded),
        fvu_refit=fvu(refit(centered, dictionary, rows, latents)), fvu_pursuit=fvu(found),
        l0_pursuit=float(n_used.double().mean()),
    )  # fmt: skip
    return dictionary[fires], Inspected(name, sae.config.size, int(fires.sum()), gap, measure_coherence(dictionary))


def sample_tokens(run: Run, store: StoreGroup, n_tokens: int, seed: int) -> Tensor:
    """At most `n_tokens` rows [N, D] float32 in random order, of images that the run was not trained on."""
    images = unseen_images(run, store)
    images = images[store.valid[images]]
    if not len(images):
        raise SettingsError(f"{run.path} was trained on every readable image of {store.path}. Give another store.")
    rng = np.random.Generator(np.random.Philox(seed))
    kind = run.train_config.tokens
    per_image = {"all": store.layout.n_tokens, "patch": store.layout.n_tokens - 1, "cls": 1}[kind]
    chosen = np.sort(rng.permutation(images)[: -(-n_tokens // per_image)])
    values = store.read(run.hook_point, images=chosen, tokens=kind)  # type: ignore[arg-type]
    rows = values.reshape(-1, values.shape[-1])
    return torch.from_numpy(rows[rng.permutation(len(rows))[:n_tokens]]).float()


def measure_coherence(dictionary: Tensor) -> Coherence:
    """Of unit rows [F, D]."""
    n_latents, d_model = dictionary.shape
    nearest = torch.zeros(n_latents)
    for first, cosines in _blocks(dictionary, dictionary):
        cosines.abs_()
        own = torch.arange(len(cosines))
        cosines[own, first + own] = 0
        nearest[first : first + len(cosines)] = cosines.amax(1)
    low, middle, high = nearest.double().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    bound = max(0.0, (n_latents - d_model) / (d_model * max(n_latents - 1, 1))) ** 0.5
    return Coherence(float(nearest.max()), float(nearest.double().mean()), (low, middle, high), bound)


def match_latents(
    first: Tensor | NDArray[np.floating], second: Tensor | NDArray[np.floating], *,
    names: tuple[str, str] = ("first", "second"), n_candidates: int = N_CANDIDATES,
) -> Matching:  # fmt: skip
    """Match two dictionaries [N, D] and [M, D], each latent with one of the `n_candidates` nearest of the other.

    A latent may stay alone, at cosine 0: no matching takes an opposite direction.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    one, other = (F.normalize(torch.as_tensor(part).float()) for part in (first, second))
    n, m = len(one), len(other)
    here, there = _nearest(one, other, n_candidates), _nearest(other, one, n_candidates)
    key = np.unique(np.concatenate([here.row * m + here.column, there.column * m + there.row]))
    row, column = np.divmod(key, m)
    cosine = _cosines(one, other, row, column)
    kept = cosine > 0
    row, column, cosine = row[kept], column[kept], cosine[kept]
    alone = np.arange(n)  # a place of its own for every row, at cosine 0; a cost of 0 would be no edge
    costs = csr_array(
        (np.concatenate([2 - cosine, np.full(n, 2.0)]), (np.r_[row, alone], np.r_[column, m + alone])),
        shape=(n, m + n),
    )
    rows, columns = min_weight_full_bipartite_matching(costs)
    matched = 2 - np.asarray(costs[rows, columns]).reshape(-1)
    size = max(1, min(n, m))
    return Matching(
        first=names[0], second=names[1], n_first=n, n_second=m, mean_cosine=float(matched.sum() / size),
        above_70=float((matched > 0.7).sum() / size), above_90=float((matched > 0.9).sum() / size),
        mean_largest=float(here.largest.mean()) if n else 0.0,
    )  # fmt: skip


@dataclass(frozen=True)
class _Nearest:
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    largest: NDArray[np.float64]


def _nearest(one: Tensor, other: Tensor, n_candidates: int) -> _Nearest:
    k = min(n_candidates, len(other))
    found = [cosines.topk(k, dim=1) for _, cosines in _blocks(one, other)]
    column = torch.cat([top.indices for top in found]).numpy()
    largest = torch.cat([top.values[:, 0] for top in found]).double().numpy()
    return _Nearest(np.repeat(np.arange(len(one)), k), column.reshape(-1), largest)


def _cosines(one: Tensor, other: Tensor, row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.float64]:
    """Of pairs, [N]."""
    parts = [
        (one[row[i : i + 65536]].double() * other[column[i : i + 65536]].double()).sum(1).numpy()
        for i in range(0, len(row), 65536)
    ]
    return np.concatenate(parts) if parts else np.empty(0)


def _blocks(one: Tensor, other: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, its block of cosines [b, M])."""
    for first in range(0, len(one), BLOCK_LATENTS):
        yield first, one[first : first + BLOCK_LATENTS] @ other.T


def _read_truth(truth: NDArray[np.floating] | str | Path, d_model: int) -> Tensor:
    try:
        known = np.load(truth, allow_pickle=False) if isinstance(truth, str | Path) else np.asarray(truth)
    except (OSError, ValueError) as error:
        raise SettingsError(f"--truth {truth} is not a .npy file of numbers ({error}).") from error
    if known.ndim != 2 or known.shape[1] != d_model or known.dtype.kind != "f" or not len(known):
        raise SettingsError(
            f"--truth must hold directions [N, {d_model}] in floats, got {known.dtype} {list(known.shape)}."
        )
    if not np.isfinite(known).all():
        raise SettingsError("--truth holds numbers that are not finite.")
    return torch.from_numpy(known.astype(np.float32))


def _names(runs: Sequence[Run]) -> list[str]:
    """Their folders' names, with the folder above where two are the same."""
    short = [run.path.name for run in runs]
    return short if len(set(short)) == len(short) else [f"{run.path.parent.name}/{run.path.name}" for run in runs]


def _require_scipy() -> None:
    if importlib.util.find_spec("scipy") is None:
        raise SettingsError("Matching dictionaries needs the package scipy: pip install 'patchsae[quality]'.")
