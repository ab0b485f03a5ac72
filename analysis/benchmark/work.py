"""The work folder of a benchmark: its baselines as sealed runs, and the codes of everything that has none yet.

`OUT.work/` lies beside `OUT.json`. The name of a baseline ends in a hash of what it was made from, so that the same
command finds it there and another one makes its own: an interrupted benchmark goes on where it was, and the folder can
be deleted at any time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch

from actcache import PipelineError, SettingsError
from actcache.artifacts import digest, make_folders, storage_errors
from actcache.store import StoreGroup, Tokens
from analysis.benchmark.baselines import N_L0, make_clusters, make_signed, make_untrained, measure_l0
from analysis.benchmark.fitting import (
    N_CLUSTERED,
    N_FIT,
    TOKENS_PER_CENTROID,
    FittingTokens,
    Moments,
    fit_centroids,
    measure_moments,
)
from analysis.benchmark.subject import Judged, Subject
from saetrain import SAE, CodeStore, Run, encode
from saetrain.interop import write_imported

VERSION = 1
"""Raised when a baseline is made in another way, so that those of earlier versions are not taken for it."""
Report = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and of how much."""


def no_report(what: str, done: int, total: int) -> None:
    """The report that says nothing."""


def name_work_folder(out: str | Path) -> Path:
    """result.json -> result.work."""
    return Path(out).with_suffix(".work")


@dataclass
class Workshop:
    """Makes the subjects of a benchmark. Every run reads the same hook point and the same kind of tokens."""

    folder: Path
    judged: Judged
    runs: Sequence[Run]
    names: Sequence[str]
    device: str = "auto"
    report: Report = no_report

    def __post_init__(self) -> None:
        store, first = self.judged.store, self.runs[0]
        self.tokens: Tokens = store.layout.token_kind(first.train_config.token_kind)
        self.fitting = FittingTokens(store, first.hook_point, self.tokens, self.judged.choosing)
        self._moments: Moments | None = None
        self.n_active: dict[str, int] = {}  # of each run, by its name: the k of the baselines that it is compared with

    def make_subjects(self, codes: Sequence[CodeStore] = ()) -> list[Subject]:
        """The runs, an untrained SAE of each, and PCA, raw dimensions and k-means, all with codes.

        Args:
            codes: codes of runs on the store, which are taken instead of new ones.
        """
        with storage_errors(self.folder):
            make_folders(self.folder)
        given = {parent_run(each): each for each in codes}
        numbered = list(zip(self.names, self.runs, strict=True))
        members: list[tuple[str, str | None, str | None, Run]] = [(name, None, None, run) for name, run in numbered]
        x = self.fitting.sample(N_L0, self.judged.seed).rows(N_L0)
        l0s = {
            name: float(run.sae_config.k) if run.sae().variant.exact_k else measure_l0(run.sae(), x)
            for name, run in numbered
        }
        for name, run in numbered:  # one number for runs that differ only in their seed, so that they share baselines
            alike = [l0s[other] for other, each in numbered if key_without_seed(each) == key_without_seed(run)]
            self.n_active[name] = max(1, min(round(sum(alike) / len(alike)), run.d_model))
        for name, run in numbered:
            l0 = l0s[name]
            facts = {"of": run.run_id, "l0": l0}
            made = self._make("untrained", facts, partial(make_untrained, run, x, l0), run)
            members.append((f"untrained {name}", "untrained", name, made))
        for k in sorted(set(self.n_active.values())):
            made = self._make("pca", {"k": k}, partial(self._make_pca, k))
            members.append((f"pca k {k}", "pca", None, made))
            made = self._make("raw", {"k": k}, partial(self._make_raw, k))
            members.append((f"raw dimensions k {k}", "raw", None, made))
        n_centroids = max(run.sae_config.n_latents for run in self.runs)
        made = self._make("k-means", {"n": n_centroids}, partial(self._make_clusters, n_centroids))
        members.append((f"k-means {made.sae_config.n_latents:,}", "k-means", None, made))
        return [
            Subject(name, baseline, of, run, given.get(run.run_id) or self._encode(name, run, baseline))
            for name, baseline, of, run in members
        ]

    def _make(self, kind: str, facts: dict[str, object], make: Callable[[], SAE], of: Run | None = None) -> Run:
        """The baseline, if it is there already; or else make and write it."""
        store, hook_point = self.judged.store, self.runs[0].hook_point
        about = {
            "baseline": kind, **facts, "version": VERSION, "seed": self.judged.seed, "hook_point": str(hook_point),
            "tokens": self.tokens, "stores": [member.store_id for member in store.stores],
            "images": digest(self.judged.choosing.tolist()),
        }  # fmt: skip
        path = self.folder / f"{kind}-{digest(about)[:12]}"
        try:
            return Run.open(path)
        except PipelineError:  # it is not there, or was not finished
            self.report(f"fit {kind}", 0, 1)
        made = write_imported(
            path, make(), store, hook_point, format=f"baseline {kind}", tokens=self.tokens,
            provenance={"source": f"baseline {kind}", "baseline": about},
            seed=self.judged.seed if of is None else of.train_config.seed, overwrite=path.exists(),
        )  # fmt: skip
        self.report(f"fit {kind}", 1, 1)
        return made

    def encode_elsewhere(self, subject: Subject, store: StoreGroup) -> CodeStore:
        """The codes that a subject gives another store."""
        of_store = digest([member.store_id for member in store.stores])[:12]
        return self._encode(subject.name, subject.run, subject.baseline, store, f"-on-{of_store}")

    def _encode(
        self, name: str, run: Run, baseline: str | None, store: StoreGroup | None = None, suffix: str = ""
    ) -> CodeStore:
        stem = run.path.name if baseline else f"run-{run.run_id[:12]}"
        return encode(
            run, store or self.judged.store, self.folder / f"{stem}{suffix}.codes", device=self.device,
            on_progress=lambda done, total: self.report(f"encode {name}", done, total),
        )  # fmt: skip

    @property
    def moments(self) -> Moments:
        if self._moments is None:
            self._moments = measure_moments(self.fitting.sample(N_FIT, self.judged.seed))
        return self._moments

    def _make_pca(self, k: int) -> SAE:
        return make_signed(self.moments.mean, self.moments.components, k)

    def _make_raw(self, k: int) -> SAE:
        return make_signed(self.moments.mean, np.eye(len(self.moments.mean)), k)

    def _make_clusters(self, n_centroids: int) -> SAE:
        mean = self.moments.mean
        rows = self.fitting.sample(N_CLUSTERED, self.judged.seed).rows(N_CLUSTERED) - torch.from_numpy(mean).float()
        n_centroids = max(1, min(n_centroids, len(rows) // TOKENS_PER_CENTROID))
        return make_clusters(mean, fit_centroids(rows, n_centroids, self.judged.seed))


def key_without_seed(run: Run) -> object:
    """What runs have in common that differ only in their seed. An imported run does not say how it was trained."""
    settings = dict(run.artifact.settings)
    if "imported" in settings:
        return run.run_id
    train = {name: value for name, value in cast(dict[str, object], settings["train"]).items() if name != "seed"}
    parents = [parent.id for parent in run.artifact.parents.values()]
    return repr((sorted(settings["sae"].items(), key=str), sorted(train.items(), key=str), parents))


def parent_run(codes: CodeStore) -> str:
    """The id of the run that made codes."""
    return codes.artifact.parent("run").id


def check_codes(codes: Sequence[CodeStore], runs: Sequence[Run], judged: Judged) -> None:
    """Raise SettingsError unless the codes were made by the runs, each by another one, from the images of the store."""
    known = {run.run_id for run in runs}
    for each in codes:
        if parent_run(each) not in known:
            raise SettingsError(f"{each.path} was made by none of the runs. Leave it out, or name its run too.")
        stores = [parent.id for name, parent in each.artifact.parents.items() if name.split()[0] == "store"]
        if stores != [member.store_id for member in judged.store.stores]:
            raise SettingsError(
                f"{each.path} was made from other activations than {judged.store.path}. Leave it out, and the store is "
                "encoded again."
            )
    if len({parent_run(each) for each in codes}) < len(codes):
        raise SettingsError("--codes names two codes of the same run. Give one of them.")
