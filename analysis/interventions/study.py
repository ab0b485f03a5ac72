"""A study: a run, and the classifier behind its hook point, on the images that it is judged on.

In: a run and a store with labels. Out: their batches, encoded, which evaluate, intervene, attribute and steer edit and
classify. What they share is here: how they are judged, what a result says it was made from, and their checks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError, open_stores
from actcache.artifacts import Artifact
from actcache.models import read_templates
from actcache.prompts import Towers
from actcache.store import StoreGroup, Stores
from analysis.classifier import BATCH_IMAGES, Spliced, ZeroShot, batches, choose_tokens, open_zero_shot, splice
from analysis.lineage import unseen_images
from saetrain import SAE, CodeStore, Run

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Judge:
    """On which images, against which texts and on which tokens interventions are judged. Part of a result's identity.

    Attributes:
        templates, where, limit, seed: see `open_zero_shot`.
        tokens: what is replaced: all, patch or cls; None: what the run was trained on.
    """

    templates: str | Sequence[str] = "photo"
    tokens: str | None = None
    where: str | None = None
    limit: int | None = None
    seed: int = 0


PLAIN_JUDGE = Judge()


@dataclass(frozen=True)
class Study:
    """A run and the classifier behind its hook point, opened."""

    run: Run
    sae: SAE
    scene: ZeroShot
    tokens: str
    templates: tuple[str, ...]
    batch_size: int

    def batches(
        self, images: NDArray[np.int64], on_progress: Report | None = None
    ) -> Iterator[tuple[NDArray[np.int64], Spliced]]:
        """Images with their stream, encoded; `on_progress` hears of a batch when the caller is done with it."""
        done = 0
        for part in batches(images, self.batch_size):
            yield part, splice(self.sae, self.scene.read(part), self.scene.store.n_tokens, self.tokens)
            done += len(part)
            if on_progress:
                on_progress(done, len(images))

    def facts(self) -> dict[str, Any]:
        """What every result says first."""
        return {"run": self.run.path.name, "hook_point": str(self.run.hook_point), "tokens": self.tokens}


def open_inputs(run: Run | str | Path, store: Stores | StoreGroup) -> tuple[Run, StoreGroup]:
    """A run and a store, as a caller gave them, opened."""
    return run if isinstance(run, Run) else Run.open(run), open_stores(store)


def open_study(
    run: Run,
    store: StoreGroup,
    judge: Judge,
    *,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    towers: Towers | None = None,
) -> Study:
    """Raises SettingsError, ParentMismatchError: see `open_zero_shot`, `choose_tokens`."""
    run.check_store(store)
    tokens = choose_tokens(run, judge.tokens)
    scene = open_zero_shot(
        store, run.hook_point, templates=judge.templates, where=judge.where, within=unseen_images(run, store),
        limit=judge.limit, seed=judge.seed, model=model, pretrained=pretrained, device=device, towers=towers,
    )  # fmt: skip
    sae = run.sae().to(scene.vision.device)
    return Study(run, sae, scene, tokens, read_templates(judge.templates), batch_size)


def study_parents(runs: Sequence[Run], store: StoreGroup, codes: CodeStore | None = None) -> dict[str, Artifact]:
    """What a result names as its parents: run, run 2, ..., store, store 2, ..., codes."""
    parents = {_numbered("run", i): one.artifact for i, one in enumerate(runs)}
    parents |= {_numbered("store", i): one.artifact for i, one in enumerate(store.stores)}
    return parents if codes is None else {**parents, "codes": codes.artifact}


def _numbered(name: str, index: int) -> str:
    return name if index == 0 else f"{name} {index + 1}"


def check_latents(run: Run, latents: Sequence[int]) -> list[int]:
    """Raise SettingsError for a latent out of range, or one that is named twice."""
    n_latents = run.sae_config.size
    for latent in latents:
        if not 0 <= latent < n_latents:
            raise SettingsError(f"--latent must lie in 0..{n_latents - 1}, got {latent}.")
    if len(set(latents)) < len(latents):
        raise SettingsError(f"--latent names one twice: {', '.join(map(str, latents))}.")
    return list(latents)


def check_grid(flag: str, numbers: Sequence[int]) -> list[int]:
    """How many latents are looked at, ascending, none twice. Raises SettingsError for none, or one below 1."""
    if not numbers or min(numbers) < 1:
        raise SettingsError(f"{flag} must be at least 1, got {', '.join(map(str, numbers)) or 'nothing'}.")
    return sorted(set(numbers))
