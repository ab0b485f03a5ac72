"""What is published, and what is known of it: the run, its stores, its concepts; and what a reader needs to use it.

In: the path of a run or of a concept table. Out: `Subject`, and `PublishedSAE`, which is what config.json says. Files
lose their folders, and the filter over the user's own columns is left out: nothing here says whose machine it was.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actcache import ActivationStore, PipelineError, SchemaError, SettingsError, open_stores
from actcache.artifacts import (
    ARTIFACT_FILE,
    file_sha256,
    find_parent,
    is_remote,
    open_artifact,
    open_checked,
    read_provenance,
)
from actcache.schema import parse
from actcache.seen import HASH_BYTES
from actcache.store import StoreGroup, find_origin, read_only_name, select_images
from analysis.concepts import ConceptTable
from saetrain import CodeStore, Run, split_images
from saetrain.interop import PublishedSAE, PublishedTower, PublishedTraining
from saetrain.run import LEARNED_FILE

FILES = (".json", ".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
"""Suffixes by which a name that lost its folder is told from a tag."""
LOCAL = ("timm:local-dir:", "local-dir:")
HUB = ("hf-hub:", "timm:hf-hub:")


@dataclass(frozen=True)
class Subject:
    """A run to publish, with what it was made from as far as that can be found.

    Attributes:
        stores: the activations that it was trained on.
        codes, concepts: of the run, if a concept table is published.
        left_out: what a reader will miss -> why.
    """

    run: Run
    stores: StoreGroup | None
    codes: CodeStore | None = None
    concepts: ConceptTable | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def parents(self) -> dict[str, Path]:
        """What an output must not lie in, by name."""
        found = {"run": self.run.path}
        if self.codes is not None and self.concepts is not None:
            found |= {"codes": self.codes.path, "concepts": self.concepts.path}
        stores = () if self.stores is None else self.stores.stores
        return found | {f"store {i + 1}": store.path for i, store in enumerate(stores)}

    @property
    def folder(self) -> str:
        """The name of the SAE's folder where nobody gave one."""
        config, hook = self.run.sae_config, self.run.hook_point
        kind = f"{config.variant}-k{config.k}" if config.top_k else config.variant
        return f"layer-{hook.layer}-{hook.site.replace('_', '-')}-{kind}-{config.n_latents}-{self.run.run_id[:8]}"


def open_subject(
    src: str | Path, *, codes: str | Path | None = None, run: str | Path | None = None, store: str | Path | None = None
) -> Subject:
    """Open a run or a concept table, and find what it was made from.

    Args:
        codes, run, store: where these lie now, if they have moved.

    Raises:
        SchemaError: something else is at `src`. ArtifactNotFoundError, ParentMismatchError: as `find_parent`.
        SettingsError: a path that a run has no use for.
    """
    artifact = open_artifact(src)
    if artifact.kind not in ("run", "concepts"):
        raise SchemaError(f"{src} is neither a run nor a concept table (x.concepts). Give one of these.")
    opened, concepts = None, None
    if artifact.kind == "run":
        if codes is not None or run is not None:
            raise SettingsError(f"--codes and --run belong to concepts, but {src} is a run. Leave them out.")
        own = Run(artifact)
    else:
        concepts = ConceptTable.open(src)
        opened = CodeStore.open(find_parent(concepts.artifact, "codes", codes, has_flag=True))
        own = Run.open(find_parent(opened.artifact, "run", run, has_flag=True))
    stores, left_out = _find_stores(own, store)
    return Subject(own, stores, opened, concepts, left_out)


def _find_stores(run: Run, given: str | Path | None) -> tuple[StoreGroup | None, dict[str, str]]:
    """The stores that a run was trained on, or the reason why they are not known. Raises for a path that was given."""
    names = [name for name in run.artifact.parents if name.split()[0] == "store"]
    try:
        places = [find_parent(run.artifact, name, given, has_flag=True) for name in names]
        stores = open_stores([ActivationStore.open(place) for place in places])
        reason = "the activations were imported with the name of their model only"
        only_name = read_only_name(stores.stores[0].artifact) is not None
        return stores, {"the tower's weights and its preprocessing": reason} if only_name else {}
    except PipelineError:
        if given is not None:
            raise
        reason = "the activations that the run was trained on cannot be found; name them with --store"
        return None, {"the model's name, its preprocessing and the number of training images": reason}


def describe_subject(subject: Subject, license: str | None = None) -> PublishedSAE:
    """What config.json says of an SAE."""
    run = subject.run
    return PublishedSAE(
        sae=run.sae_config, d_model=run.d_model, hook_point=str(run.hook_point), run_id=run.run_id,
        tower=_describe_tower(subject), training=_describe_training(subject), quality=run.quality, license=license,
    )  # fmt: skip


def _describe_tower(subject: Subject) -> PublishedTower:
    if subject.stores is None:
        return _describe_tower_of_codes(subject)
    store = subject.stores.stores[0]
    settings, artifact = store.settings, store.artifact
    if (name := read_only_name(artifact)) is not None:  # its preprocessing is made up, to show pictures
        layout = settings.layout
        return PublishedTower(settings.model_id, only_name=name, grid=layout.grid, prefix=settings.prefix)
    named = {**_name(artifact, "model"), **_name(artifact, "pretrained")}
    if "weights_file" in named and (weights := _find_file(artifact, "pretrained")) is not None:
        named["weights_sha256"] = file_sha256(weights)
    return PublishedTower(
        model_id=settings.model_id, **named, preprocess=dict(settings.preprocess) or None, grid=settings.layout.grid,
        patch_size=settings.patch_size, prefix=settings.prefix, precision=settings.precision,
        prompts=None if settings.prompts is None else dict(settings.prompts),
    )  # fmt: skip


def _describe_tower_of_codes(subject: Subject) -> PublishedTower:
    """What codes record of the model behind them."""
    if subject.codes is None or subject.concepts is None:
        return PublishedTower(subject.run.model_id)
    source, named = subject.concepts.source, dict[str, Any]()
    for kind, value, file in (("model", source.model, "model_file"), ("pretrained", source.pretrained, "weights_file")):
        if value != "unknown":
            named[file if value.lower().endswith(FILES) else kind] = value
    preprocess = dict(subject.codes.artifact.settings["preprocess"])
    return PublishedTower(subject.run.model_id, **named, preprocess=preprocess or None, grid=subject.codes.grid)


@dataclass(frozen=True)
class _Origin:
    """What a store records of its model."""

    model: str = "unknown"
    pretrained: str = "unknown"
    paths: Mapping[str, object] = field(default_factory=dict)


def _name(artifact: Any, kind: str) -> dict[str, str]:
    """The recorded name of `model` or `pretrained`, told from the path of a file, of which only the file's name stays.

    A store records what was a path as one relative to itself; on an object store, as it was given.
    """
    origin = read_provenance(artifact, _Origin)
    recorded = origin.paths.get(kind)
    value = recorded if isinstance(recorded, str) else getattr(origin, kind)
    if value == "unknown":
        return {}
    bare = value
    for prefix in LOCAL:
        bare = bare.removeprefix(prefix)
    path_like = "/" in bare and (is_remote(artifact.path) or bare.startswith(("..", "/")))
    if value.startswith(HUB) or (bare == value and not path_like and not bare.lower().endswith(FILES)):
        return {kind: value}
    return {"model_file" if kind == "model" else "weights_file": Path(bare).name}


def _find_file(artifact: Any, name: str) -> Path | None:
    try:
        path = Path(find_origin(artifact, name))
        return path if path.is_file() else None
    except PipelineError:
        return None


@dataclass(frozen=True)
class _Trained:
    """What the provenance of a run says of its training images, or of where its weights were read from."""

    rows: tuple[str, ...] = ()
    source: object = None


@dataclass(frozen=True)
class _Source:
    """A repository of the hub from which weights were read."""

    repo: str
    commit: str


def _describe_training(subject: Subject) -> PublishedTraining:
    run = subject.run
    imported = run.artifact.settings.get("imported")
    if imported is not None:  # the weights' own training is not known
        tokens, name = run.train_config.token_kind, str(imported["format"])
        return PublishedTraining(tokens, imported=name, source=_name_source(run))
    rows = read_provenance(run.artifact, _Trained).rows
    if not rows and subject.stores is not None:
        rows = tuple(store.rows_id for store in subject.stores.stores)
    settings = {name: value for name, value in asdict(run.train_config).items() if name != "where"}
    n_images, images_sha256 = _count_images(subject)
    return PublishedTraining(
        run.train_config.token_kind, rows=rows, n_images=n_images, images_sha256=images_sha256,
        is_part=run.train_config.where is not None, settings=settings,
    )  # fmt: skip


def _name_source(run: Run) -> str | None:
    """hf://OWNER/REPO@COMMIT from which an imported SAE was read; None for a file, which is its owner's own."""
    source = read_provenance(run.artifact, _Trained).source
    if not isinstance(source, dict):
        return None
    known: _Source = parse(_Source, source, run.path / ARTIFACT_FILE, run.artifact.remedy)
    return f"hf://{known.repo}@{known.commit}"


def _count_images(subject: Subject) -> tuple[int | None, str | None]:
    """(number of training images, the hash of their contents' hashes), each as far as it is known."""
    run, stores, learned, n_images = subject.run, subject.stores, None, None
    if (run.path / LEARNED_FILE).is_file():
        with open_checked(run.artifact, LEARNED_FILE) as file:
            learned = file.read()
        n_images = len(learned) // HASH_BYTES  # copies of an image count once
    if stores is not None:
        where = run.train_config.where
        wanted = stores.valid if where is None else stores.valid & select_images(stores.images, where)
        training, _ = split_images([store.n_images for store in stores.stores])
        n_images = int(np.count_nonzero(wanted[training]))
    return n_images, None if learned is None else hashlib.sha256(learned).hexdigest()
