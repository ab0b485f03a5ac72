"""A study: a run, and the classifier behind its hook point, on images with labels.

evaluate, intervene, attribute and steer differ only in what they do with the batches: each encodes the stream at the
hook point, edits it and classifies. What they share is here: run_study() opens the inputs, returns the result that the
same command has written before, or else measures and writes it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from actcache import SettingsError, open_stores
from actcache.options import check_number
from actcache.progress import Progress
from actcache.prompts import Towers, open_towers
from actcache.seen import Seen, SeenImages
from actcache.store import StoreGroup, Stores
from analysis.classifier import (
    ClassifiedImages,
    Classifier,
    LinearProbe,
    ProbeTraining,
    Spliced,
    batches,
    choose_classes,
    choose_judge,
    choose_tokens,
    choose_training,
    describe_config,
    fit_probe,
    open_judge,
    splice,
)
from analysis.config import ModelOptions, StudyConfig
from analysis.lineage import name_parents
from analysis.results import Head, Result, describe_result, find_result, finish_result
from saetrain import SAE, CodeStore, Run
from saetrain.lineage import find_seen

R = TypeVar("R", bound=Result)


@dataclass(frozen=True)
class Study:
    """A run and the classifier behind its hook point, opened. `seen`: the images that they have learned from."""

    run: Run
    seen: Seen
    sae: SAE
    towers: Towers
    classifier: Classifier
    config: StudyConfig
    tokens: str
    batch_size: int

    def batches(
        self, images: NDArray[np.int64], on_progress: Progress | None = None
    ) -> Iterator[tuple[NDArray[np.int64], Spliced]]:
        """Images with their encoded stream; `on_progress` is called once the caller is done with a batch."""
        for part in batches(images, self.batch_size, on_progress):
            stream = self.classifier.read(part)
            yield part, splice(self.sae, stream, self.classifier.store.layout, self.tokens)

    @property
    def facts(self) -> tuple[str, str, str]:
        """What every result names after its head: run, hook_point, tokens."""
        return self.run.path.name, str(self.run.hook_point), self.tokens


def open_inputs(run: Run | str | Path, store: Stores | StoreGroup) -> tuple[Run, StoreGroup]:
    """A run and a store, opened if the caller gave paths."""
    return run if isinstance(run, Run) else Run.open(run), open_stores(store)


def run_study(
    record: type[R],
    runs: Sequence[Run],
    store: StoreGroup,
    out: str | Path | None,
    measure: Callable[[Head, Iterator[Study]], R],
    *,
    settings: Mapping[str, object],
    study: StudyConfig,
    model: ModelOptions,
    codes: CodeStore | None = None,
    overwrite: bool = False,
) -> R:
    """Find the result in `out`, or open a study of each run, measure, and write the result there.

    Args:
        record: the kind of result.
        measure: receives the result's head and the studies, opened one at a time.
        settings: what the result's identity holds in addition to `study`.
        codes: a further parent.

    Raises:
        SettingsError, ParentMismatchError: see `find_result`, `choose_training`, `choose_study_images`, and then, once
            the model is loaded, `open_towers` and `open_judge`.
    """
    training, parents = None, name_parents(runs, store, codes)
    if study.judge == "probe" or study.probe_store is not None:
        training = choose_training(store, study, other=study.probe_store, seed=study.seed)
        parents |= training.parents(store)
    head = describe_result(record, {**describe_config(study), **settings}, parents)
    if (earlier := find_result(record, out, head, overwrite=overwrite)) is not None:
        return earlier
    chosen = [choose_study_images(run, store, study, training if study.judge == "probe" else None) for run in runs]
    towers = open_towers(store.stores[0].artifact, model=model.model, pretrained=model.pretrained, device=model.device)
    kind, probe = choose_judge(study.judge, chosen[0].classified, towers), None
    if kind == "probe":
        if training is None:
            training = choose_training(store, study, seed=study.seed)
        chosen = [choose_study_images(run, store, study, training) for run in runs]
        names = sorted({name for images in chosen for name in images.classified.names})
        probe = fit_probe(training, names, towers.vision, batch_size=model.batch_size)
    judges = []

    def open_studies() -> Iterator[Study]:
        for run, images in zip(runs, chosen, strict=True):
            opened = open_study(run, images, towers, study, batch_size=model.batch_size, kind=kind, probe=probe)
            judges.append(opened.classifier.judge.facts)
            yield opened

    measured = measure(head, open_studies())
    counted = (*(images.counted for images in chosen), *(measured.seen or ()))
    return finish_result(out, replace(measured, seen=counted, judge=judges[0]))


class StudyImages(NamedTuple):
    """The images that a run is studied on, the images of the store that were learned from, and how many there are."""

    classified: ClassifiedImages
    seen: Seen
    counted: SeenImages


def choose_study_images(
    run: Run, store: StoreGroup, config: StudyConfig, training: ProbeTraining | None = None
) -> StudyImages:
    """The images that a run is studied on, none of which it has learned from. This checks all settings without a model.

    Args:
        training: the images of the probe that judges, if one does; they are not judged either.

    Raises ParentMismatchError for a store of another model, and SettingsError: see `choose_tokens`, `choose_classes`,
    `Seen.judge` and `ProbeTraining.of`.
    """
    run.check_store(store)
    choose_tokens(run, store.layout, config.tokens)
    seen = find_seen(store, [run])
    kept = seen if training is None else seen | training.seen_in(store)
    choose = partial(
        choose_classes, store, run.hook_point, templates=config.templates, class_names=config.class_names,
        where=config.where,
    )  # fmt: skip
    judged, counted = kept.judge(np.flatnonzero(choose().labels >= 0), config, str(store.path))
    classified = choose(within=judged, limit=config.limit, seed=config.seed)
    if training is not None:
        training.of(classified.names)
    return StudyImages(classified, seen, counted)


def open_study(
    run: Run, images: StudyImages, towers: Towers, config: StudyConfig, *, batch_size: int, kind: str = "zero-shot",
    probe: LinearProbe | None = None,
) -> Study:  # fmt: skip
    """Raises SettingsError: see `open_judge`."""
    judge = open_judge(kind, images.classified, towers, probe=probe)
    classifier = Classifier.of(images.classified, towers.vision, judge)
    sae = run.sae().to(classifier.vision.device)
    tokens = choose_tokens(run, classifier.store.layout, config.tokens)
    return Study(run, images.seen, sae, towers, classifier, config, tokens, batch_size)


def check_latents(run: Run, latents: Sequence[int]) -> list[int]:
    """Raise SettingsError for a latent that is out of range or given twice."""
    n_latents = run.sae_config.n_latents
    latents = [check_number("latent", latent, int) for latent in latents]
    for latent in latents:
        if not 0 <= latent < n_latents:
            raise SettingsError(f"--latent must lie in 0..{n_latents - 1}, got {latent}.")
    if len(set(latents)) < len(latents):
        raise SettingsError(f"--latent names a latent twice: {', '.join(map(str, latents))}.")
    return latents


def check_grid(flag: str, numbers: Sequence[int], n_latents: int, *, usual: Sequence[int]) -> list[int]:
    """The numbers, ascending and without repetition, all of which lie below the number of latents.

    Args:
        usual: the default, which fits every dictionary: it is cut where this one ends.

    Raises SettingsError for a number that the user chose and that is too large, or if no number is left.
    """
    too_large = sorted({n for n in numbers if n >= n_latents})
    grid = sorted(set(numbers).difference(too_large))
    if grid and (not too_large or list(numbers) == list(usual)):
        return grid
    given = ", ".join(map(str, too_large)) or "nothing"
    raise SettingsError(
        f"{flag} must be below the dictionary's {n_latents:,} latents, got {given}. Choose smaller numbers; all "
        "latents together are measured in any case."
    )
