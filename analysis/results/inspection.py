"""The result of inspect: how good dictionaries are, and how well each two of them match."""

from dataclasses import dataclass
from typing import ClassVar

from analysis.results.result import Result, Row


@dataclass(frozen=True)
class Gap:
    """What the encoder loses, on tokens of images that the run was not trained on.

    Attributes:
        fvu: FVU of the SAE.
        fvu_refit: FVU of the SAE's latents with the best values.
        fvu_pursuit: FVU of at most the same number of latents, chosen for each token by pursuit, or by the SAE and then
            refitted where that is better.
        gap: fvu - fvu_pursuit.
    """

    n_tokens: int
    l0: float
    fvu: float
    fvu_refit: float
    fvu_pursuit: float
    l0_pursuit: float
    gap: float


@dataclass(frozen=True)
class Coherence:
    """The largest |cosine| of each latent with another: maximum, mean and [10 %, 50 %, 90 %] over the latents."""

    largest: float
    mean: float
    quantiles: tuple[float, float, float]
    welch_bound: float


@dataclass(frozen=True)
class InspectedRun:
    """n_firing: number of latents that fire on the sample."""

    run: str
    n_latents: int
    n_firing: int
    gap: Gap
    coherence: Coherence


@dataclass(frozen=True)
class Matching:
    """Two dictionaries matched one to one; only latents that fire take part.

    Attributes:
        above_70, above_90: share of the smaller dictionary's latents that are matched above this cosine.
        mean_largest: mean over the first dictionary's latents of the largest cosine, not one to one (MMCS).
        mean_cosine_shuffled, mean_largest_shuffled: the same with the second dictionary's channels in random order. The
            best of thousands of partners is similar by chance; these values say how similar. None in older files.
    """

    first: str
    second: str
    n_first: int
    n_second: int
    mean_cosine: float
    above_70: float
    above_90: float
    mean_largest: float
    mean_cosine_shuffled: float | None = None
    mean_largest_shuffled: float | None = None


@dataclass(frozen=True)
class Inspection(Result):
    """Measures of dictionaries, and the matching of every pair of them."""

    KIND: ClassVar[str] = "inspection"

    runs: tuple[InspectedRun, ...]
    matchings: tuple[Matching, ...]

    def tables(self) -> list[list[Row]]:
        """A row per run, and a row per matching."""
        runs: list[Row] = [
            {"run": run.run, "latents": run.n_latents, "firing": run.n_firing, "l0": run.gap.l0, "fvu": run.gap.fvu,
             "refit": run.gap.fvu_refit, "pursuit": run.gap.fvu_pursuit, "gap": run.gap.gap,
             "nearest": run.coherence.quantiles[1]}
            for run in self.runs
        ]  # fmt: skip
        pairs: list[Row] = [
            {"first": pair.first, "second": pair.second, "cosine": pair.mean_cosine, "> 0.7": pair.above_70,
             "> 0.9": pair.above_90, "largest": pair.mean_largest, "by chance": pair.mean_largest_shuffled}
            for pair in self.matchings
        ]  # fmt: skip
        return [runs, pairs] if pairs else [runs]
