"""The SAE and the image tower that `look` puts together: a run of ours, or a checkpoint of another package.

In: where the SAE is, and what the user says about the tower. Out: a Pair. A run's tower is known by its model_id; that
of a checkpoint is the one that it names, unless the user names another, and what is guessed or differs is noted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actcache import HookPoint, ParentMismatchError, PipelineError, SettingsError
from actcache.artifacts import Artifact, find_parent, open_artifact
from actcache.models import VisionTower, load_clip, make_vision_tower
from actcache.progress import Progress
from actcache.prompts import open_vision_tower
from analysis.config import TowerOptions
from saetrain import SAE, Run
from saetrain.interop import OF_EMBEDDINGS, InputConstants, TowerHint, find_source, name_tower, read_foreign


@dataclass(frozen=True, eq=False)
class Pair:
    """An SAE and the tower whose activations it reads.

    Attributes:
        name: where the SAE is, as the user gave it.
        model: the tower, in words.
        tokens: all, patch or cls: those that the SAE was trained on.
        run: the SAE's run, if it is one.
        notes: what is guessed, or differs from what the SAE names, one sentence each.
    """

    name: str
    sae: SAE
    tower: VisionTower
    model: str
    hook_point: HookPoint
    tokens: str
    run: Run | None = None
    notes: tuple[str, ...] = ()


def open_pair(
    sae: Run | str | Path, options: TowerOptions, *, store: str | Path | None = None,
    constants: InputConstants | None = None, on_progress: Progress | None = None,
) -> Pair:  # fmt: skip
    """Read an SAE and load its tower.

    Args:
        sae: a run, a checkpoint of another package, or hf://OWNER/REPO[/folder][@revision].
        store: the activation store of a run, if it has moved.
        constants: the normalization of a checkpoint's input, where it lies in none of its files.
        on_progress: called with bytes while files of the hub are downloaded.

    Raises:
        SettingsError: it is not known which tower or hook point the SAE reads, or it reads another width.
        ParentMismatchError: the tower is not the one that a run was trained on.
        HubError, CorruptError, ModelError: see `find_source`, `read_foreign`, `load_clip`.
    """
    if isinstance(sae, Run):
        return _pair_of_run(sae, str(sae.path), options, store)
    source = find_source(sae, on_progress)
    if not source.path.exists():
        raise SettingsError(f"--sae {sae} does not exist. Give a run, a checkpoint, or hf://OWNER/REPO.")
    if (source.path / "artifact.json").exists():
        return _pair_of_run(Run.open(source.path), str(sae), options, store)
    if store is not None:
        raise SettingsError(f"--store is for a run whose activations have moved, and {sae} is none. Leave it out.")
    return _pair_of_checkpoint(source.path, str(sae), options, constants)


def _pair_of_run(run: Run, name: str, options: TowerOptions, store: str | Path | None) -> Pair:
    hook_point, notes = _choose_hook_point(options, run.hook_point, f"{name} was trained on", name)
    parent = _find_store(run, store)
    if parent is not None:
        if options.image_size or options.preprocess:
            raise SettingsError(
                "--image-size and --preprocess do not go with a run whose activations are there, because they record "
                "both. Leave them out."
            )
        tower = open_vision_tower(
            parent, model=options.model, pretrained=options.pretrained, device=options.device,
            precision=options.precision,
        )  # fmt: skip
        words = [str(parent.provenance.get(key, "unknown")) for key in ("model", "pretrained")]
    else:
        tower, words = _tower_without_store(run, name, options)
    return _check(Pair(name, run.sae(), tower, _say(*words), hook_point, run.train_config.tokens, run, notes))


def _find_store(run: Run, given: str | Path | None) -> Artifact | None:
    """The store that a run was trained on, or None if it is not where it was. Raises as `find_parent` for a path."""
    try:
        return open_artifact(find_parent(run.artifact, "store", given, has_flag=True), "acts")
    except PipelineError:
        if given is not None:
            raise
        return None


def _tower_without_store(run: Run, name: str, options: TowerOptions) -> tuple[VisionTower, list[str]]:
    """The tower that a run names, or that the user does; it has to be the run's."""
    known = run.tower
    model, pretrained = options.model or known.model, options.pretrained or known.pretrained
    if model is None or (pretrained is None and options.model is None):
        what = "model" if model is None else "weights"
        raise SettingsError(
            f"The activations that {name} was trained on are not there, and it does not name its {what}. Name them "
            "with --model and --pretrained, or the activations with --store."
        )
    own: Mapping[str, Any] | None = None if options.preprocess or options.image_size else known.preprocess or None
    tower, words = _load(model, pretrained, options, own)
    if tower.model_id != run.model_id:
        raise ParentMismatchError(
            f"{_say(*words)} is not the model that {name} was trained on: architecture, weights or preprocessing "
            "differ. Name the right ones with --model, --pretrained and --preprocess, or the activations with --store."
        )
    return tower, words


def _pair_of_checkpoint(path: Path, name: str, options: TowerOptions, constants: InputConstants | None) -> Pair:
    foreign = read_foreign(path, constants)
    if foreign.format in OF_EMBEDDINGS:
        raise SettingsError(
            f"{name} reads the embedding of a whole image and not the patches of a block, so there is no place to look "
            "at. Give an SAE of a hook point."
        )
    if foreign.lacks_constants:
        raise SettingsError(
            f"{name} normalizes its input by constants that are in none of its files. Give them with --input-mean and "
            "--input-scale, or make a run of it with `convert --store`, which estimates them, and look through the run."
        )
    hint = name_tower(foreign.format, foreign.path, name if "://" in name else "")
    model, pretrained = options.model, options.pretrained
    if model is None and hint is not None and hint.model is not None:
        model, pretrained = hint.model, pretrained or hint.pretrained
    if hint is not None and hint.files and options.model is None and (model is None or pretrained is None):
        raise SettingsError(
            f"The tower of {name} was read from {' and '.join(map(repr, hint.files))}, which it does not hold. Name "
            "your copies with --model and --pretrained."
            if model is None
            else f"The weights that {name} reads are in {hint.files[-1]!r}, which it does not hold. Name your "
            "copy with --pretrained."
        )
    if model is None:
        raise SettingsError(
            f"Which model {name} reads is not known. {hint.caution} Name it with --model and --pretrained."
            if hint is not None and hint.caution
            else f"{name} does not say which model it reads, and its name gives no hint. Name it with --model and "
            "--pretrained."
        )
    named = None if hint is None else hint.hook_point
    hook_point, notes = _choose_hook_point(options, named, "It names", name)
    same = hint is not None and hint.model in (None, model) and not (options.preprocess or options.image_size)
    tower, words = _load(model, pretrained, options, hint.preprocess if hint is not None and same else None)
    notes = (*foreign.notes, *_describe_hint(hint, options, tower.model_id), *notes)
    tokens = "all" if hint is None or hint.tokens is None else hint.tokens
    return _check(Pair(name, foreign.sae, tower, _say(*words), hook_point, tokens, None, notes))


def _describe_hint(hint: TowerHint | None, options: TowerOptions, model_id: str) -> list[str]:
    """What the user has to know of a tower that was loaded for a hint, a sentence each."""
    if hint is None:
        return []
    if hint.model_id is not None and hint.stated:  # nothing is guessed
        other = "This is not the tower that it was trained on: architecture, weights or preprocessing differ."
        return ([other] if hint.model_id != model_id else []) + ([hint.caution] if hint.caution else [])
    weights = options.pretrained or (hint.pretrained if options.model is None else None)
    differs = hint.model is not None and (options.model or hint.model, weights) != (hint.model, hint.pretrained)
    notes = [f"By {hint.origin}, it reads {hint}; you named another model."] if differs and hint.stated else []
    if not hint.stated and options.model is None and hint.model is not None:
        notes.append(f"Its settings do not name the model. That it reads {hint} is guessed from {hint.origin}.")
    elif not hint.layer_stated and options.layer is None:
        notes.append(f"Its settings do not name the layer. That it reads {hint.hook_point} is guessed.")
    return notes + ([hint.caution] if hint.caution else [])


def _choose_hook_point(
    options: TowerOptions, named: HookPoint | None, says: str, name: str
) -> tuple[HookPoint, tuple[str, ...]]:
    """The hook point that the user names, or else the SAE; a note if they differ."""
    if options.layer is None and named is None:
        raise SettingsError(f"{name} does not say which layer it reads. Name it with --layer.")
    if options.layer is None and options.site is not None and named is not None:
        chosen: HookPoint | None = replace(named, site=options.site)
    else:
        chosen = named if options.layer is None else HookPoint(options.layer, options.site or "resid_post")
    assert chosen is not None
    differs = named is not None and named != chosen
    return chosen, (f"{says} {named}; you asked for {chosen}.",) if differs else ()


def _load(
    model: str, pretrained: str | None, options: TowerOptions, preprocess: Mapping[str, Any] | None
) -> tuple[VisionTower, list[str]]:
    given = None if options.preprocess is None else str(options.preprocess)
    clip = load_clip(model, pretrained, preprocess=preprocess, image_size=options.image_size, preprocess_as=given)
    tower = make_vision_tower(clip, precision=options.precision, device=options.device)
    name = model if model.startswith(("hf-hub:", "timm:")) else Path(model).name
    return tower, [name, Path(pretrained or clip.source.sources["weights"]).name]


def _say(model: str, pretrained: str) -> str:
    return f"{model} with {pretrained}"


def _check(pair: Pair) -> Pair:
    """Raise SettingsError where the SAE and the tower do not fit."""
    pair.tower.check_hooks([pair.hook_point])
    if pair.tower.d_model != pair.sae.d_model:
        raise SettingsError(
            f"{pair.name} reads activations of width {pair.sae.d_model}, but {pair.model} has width "
            f"{pair.tower.d_model}. Name the model that it was trained on with --model and --pretrained."
        )
    return pair
