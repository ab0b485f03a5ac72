"""Which image tower a checkpoint of another package reads: what its settings state, or what its name lets us guess.

In: a format, the checkpoint's path, and where it came from (an hf:// address). Out: a TowerHint. The tensors are not
read, except where the settings are in the same file. Nothing is downloaded.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from actcache import HookPoint, PipelineError, SettingsError
from saetrain.interop.fields import shorten
from saetrain.interop.files import load_tensors, read_settings
from saetrain.interop.pickles import load_checkpoint
from saetrain.interop.prisma import config_of
from saetrain.interop.publication import read_published
from saetrain.interop.tower_names import BACKBONES, count_layers, spell_hook_point, spell_model

OF_EMBEDDINGS = ("msae", "discover_then_name", "lasgroup")
"""Formats whose SAEs read the image embedding, after the projection, and no hook point of the tower."""
N_PARTS = 6
"""How many of the last parts of a path are searched for names."""


@dataclass(frozen=True)
class TowerHint:
    """The tower and the place in it whose activations an SAE reads, as far as its source tells.

    Attributes:
        model, pretrained: as `--model` and `--pretrained` take them; None if unknown. A model with its own weights has
            no `pretrained`.
        layer, site: of the hook point; None if unknown.
        tokens: all, patch or cls, those that it was trained on; None if unknown.
        stated: whether the settings name the model. Otherwise it is guessed from the name of a folder or repository.
        origin: where they are from, in messages.
        caution: what to know before using it, as a sentence; empty if nothing.
        layer_stated: whether the settings name the hook point. Otherwise it is guessed from a name, or is what the
            package usually reads.
        model_id: of the tower, where a store's can be compared with it; only an SAE of ours names it.
        preprocess: how an image becomes pixels, the fields of `Preprocess`; only an SAE of ours names it.
        files: names of files that the tower was read from, where it has no public name.
    """

    model: str | None
    pretrained: str | None
    layer: int | None
    site: str | None
    tokens: str | None
    stated: bool
    origin: str
    caution: str = ""
    layer_stated: bool = True
    model_id: str | None = None
    preprocess: Mapping[str, object] | None = None
    files: tuple[str, ...] = ()

    @property
    def hook_point(self) -> HookPoint | None:
        return None if self.layer is None else HookPoint(self.layer, self.site or "resid_post")

    def __str__(self) -> str:
        weights = f" with {self.pretrained}" if self.pretrained else ""
        parts = [f"{self.model}{weights}"] if self.model else []
        parts += [str(self.hook_point)] if self.layer is not None else []
        return ", ".join(parts) or "nothing"


def name_tower(format_name: str, path: Path, origin: str = "") -> TowerHint | None:
    """The tower that a checkpoint names; None if nothing names one. A damaged settings file names none.

    Args:
        path: the folder or file that the format's reader takes.
        origin: where it was downloaded from, e.g. hf://OWNER/NAME/folder.
    """
    place = "/".join([origin.removeprefix("hf://"), *path.absolute().parts[-N_PARTS:]]).replace("--", "/")
    try:
        hint = TOWERS.get(format_name, _by_place)(path, place)
    except PipelineError:  # the reader of the format says what is wrong with its files
        return None
    guess = _by_place(path, place)
    if hint is None or guess is None or hint.model or not guess.model:
        return hint or guess
    layer, site = (guess.layer, guess.site) if hint.layer is None else (hint.layer, hint.site)
    return replace(
        hint, model=guess.model, pretrained=guess.pretrained, layer=layer, site=site,
        tokens=hint.tokens or guess.tokens, stated=False, origin=guess.origin, caution=hint.caution or guess.caution,
        layer_stated=hint.layer is not None and hint.layer_stated,
    )  # fmt: skip


def _make(
    origin: str, *, model: object = None, hook_point: HookPoint | None = None, tokens: str | None = None,
    stated: bool = True, layer_stated: bool | None = None, caution: str = "",
) -> TowerHint | None:  # fmt: skip
    """A hint from a name in another package's spelling; None if neither model nor hook point is known."""
    spelled = spell_model(model)
    if spelled is None and hook_point is None:
        return None
    if spelled is None and isinstance(model, str) and model.strip():
        unknown = f"It names the model {shorten(model)}, by which no weights are known here."
        caution = f"{unknown} {caution}".rstrip()
    if spelled and spelled.pretrained is None and spelled.model.startswith("timm:") and "." not in spelled.model:
        caution = caution or f"It does not say which weights of {spelled.model} it reads; timm's default is taken."
    layer, site = (None, None) if hook_point is None else (hook_point.layer, hook_point.site)
    name, pretrained = spelled or (None, None)
    if layer_stated is None:
        layer_stated = stated
    return TowerHint(name, pretrained, layer, site, tokens, stated, origin, caution, layer_stated)


def _find_settings(path: Path, *names: str) -> tuple[Mapping[str, object], str]:
    """The fields of the first settings file in a folder, or beside a file, and its name; ({}, "") if there is none."""
    folder = path if path.is_dir() else path.parent
    for name in names:
        if (folder / name).is_file():
            return read_settings(folder / name), name
    return {}, ""


def _find_file(path: Path) -> Path:
    """The file of a checkpoint, given itself or the folder that holds it alone."""
    files = [path] if path.is_file() else sorted(path.glob("*.pt"))
    return files[0] if files else path


def _hook(layer: object, site: str = "resid_post", model: object = None) -> HookPoint | None:
    """The hook point of a layer, which is counted from the end if it is negative and the model's depth is known."""
    if isinstance(layer, bool) or not isinstance(layer, int):
        return None
    if layer < 0 and (spelled := spell_model(model)) and (depth := count_layers(spelled.model)):
        layer += depth
    try:
        return HookPoint(layer, site)
    except SettingsError:  # a negative layer, or a site that we do not store
        return None


# ---------------------------------------------------------------------------------------------------------------------
# What the settings of each format state


def _prisma(path: Path, place: str) -> TowerHint | None:
    config, name = _find_settings(path, "config.json")
    if not config:
        config, name = config_of(load_tensors(_find_file(path), mapped=True)), _find_file(path).name
    model, site = config.get("model_name"), str(config.get("layer_subtype", "hook_resid_post")).removeprefix("hook_")
    only_cls = config.get("cls_token_only") is True or config.get("context_size") == 1
    tokens = "cls" if only_cls else "patch" if config.get("use_patches_only") is True else "all"
    centered = isinstance(model, str) and not model.startswith(("open-clip", "openai", "laion"))
    caution = "ViT-Prisma subtracts each token's mean from the stream of models like this one; ours are not centered."
    hook_point = _hook(config.get("hook_point_layer"), site) or spell_hook_point(config.get("hook_point"))
    return _make(
        f"model_name and hook_point_layer in {name}", model=model, hook_point=hook_point, tokens=tokens,
        caution=caution if centered else "",
    )  # fmt: skip


def _saelens(path: Path, place: str) -> TowerHint | None:
    config, name = _find_settings(path, "cfg.json")
    inner = config.get("metadata")
    fields: Mapping[str, object] = {**config, **(inner if isinstance(inner, dict) else {})}
    hook_point = spell_hook_point(fields.get("hook_name", fields.get("hook_point")))
    where = f"metadata in {name}" if isinstance(inner, dict) else name
    return _make(where, model=fields.get("model_name"), hook_point=hook_point)


def _saelens_pickle(path: Path, place: str) -> TowerHint | None:
    config = config_of(load_checkpoint(path))
    return _make(path.name, model=config.get("model_name"), hook_point=spell_hook_point(config.get("hook_point")))


def _dictionary_learning(path: Path, place: str) -> TowerHint | None:
    config, name = _find_settings(path, "config.json")
    trainer, run = config.get("trainer"), config.get("run")
    trainer = trainer if isinstance(trainer, dict) else {}
    subset = run.get("token_subset") if isinstance(run, dict) else None
    caution = ""
    if isinstance(subset, str) and "register" in subset:
        caution = "It was trained on positions 257 to 260, which are the last patches here and not the registers."
    model = trainer.get("lm_name")
    hook_point = spell_hook_point(trainer.get("submodule_name")) or _hook(trainer.get("layer"), model=model)
    tokens = {"patches": "patch", "patch": "patch", "cls": "cls", "all": "all"}.get(str(subset))
    return _make(f"trainer in {name}", model=model, hook_point=hook_point, tokens=tokens, caution=caution)


def _saev(path: Path, place: str) -> TowerHint | None:
    """Only the metadata of the activations name the model, and lie beside an SAE where somebody has put them there."""
    config, name = _find_settings(path, "metadata.json")
    model, layers = config.get("ckpt", config.get("vit_ckpt")), config.get("layers")
    layer = layers[0] if isinstance(layers, list) and len(layers) == 1 else None
    return _make(f"family and ckpt in {name}", model=model, hook_point=_hook(layer, model=model)) if model else None


def _patchsae(path: Path, place: str) -> TowerHint | None:
    file = _find_file(path)
    config = config_of(load_tensors(file, mapped=True))
    model = config.get("model_name")
    site = {"resid": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}.get(str(config.get("module_name")), "")
    hook_point = _hook(config.get("block_layer"), site, model)
    tokens = "cls" if config.get("class_token") is True else "all"
    return _make(f"model_name and block_layer in {file.name}", model=model, hook_point=hook_point, tokens=tokens)


def _visaebench(path: Path, place: str) -> TowerHint | None:
    """ViSAEBench's packages read the last block's output, which their settings do not say."""
    config, name = _find_settings(path, "config.json", "config.yaml")
    model = config.get("backbone")
    if not isinstance(model, str) or model not in BACKBONES:
        return None
    caution = ""
    if model.startswith("dinov2"):
        caution = "ViSAEBench's loader takes DINOv2's tokens after the last norm, our hook points come before it."
    stated = _hook(config.get("layer"), model=model)
    return _make(
        f"backbone in {name}", model=model, hook_point=stated or HookPoint(11), tokens="patch", caution=caution,
        layer_stated=stated is not None,
    )  # fmt: skip


def _clipscope(path: Path, place: str) -> TowerHint | None:
    """CLIP-Scope has one model; the folder, as in 20_resid/1200013184.pt, is the block whose output was read."""
    match = re.search(r"(?:^|/)(\d{1,2})_resid(?:/|$)", place)
    hook_point = HookPoint(int(match[1])) if match else None
    model, where = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", f"the folder {match[1]}_resid" if match else "its format"
    return _make(f"{where} of CLIP-Scope", model=model, hook_point=hook_point, tokens="all")


def _universal_sae(path: Path, place: str) -> TowerHint | None:
    """Universal SAE reads the last layer of three small and base towers, which all have 12 blocks."""
    return _make("what Universal SAE reads", hook_point=HookPoint(11), tokens="patch", stated=False)


def _published(path: Path, place: str) -> TowerHint | None:
    """Our own format says everything, except where the files of a model lie that has no public name."""
    published = read_published(path)
    tower, hook = published.tower, HookPoint.parse(published.hook_point)
    if tower.only_name is not None:
        hint = _make(
            "the name under which its activations were imported", model=tower.only_name, hook_point=hook,
            tokens=published.training.tokens, stated=False, layer_stated=True,
        )  # fmt: skip
        return None if hint is None else replace(hint, model_id=tower.model_id)
    files = tuple(name for name in (tower.model_file, tower.weights_file) if name)
    caution = "" if tower.prompts is None else "It was trained on a tower with prompts, which are not published."
    pretrained = None if tower.pretrained == tower.model else tower.pretrained
    return TowerHint(
        tower.model, pretrained, hook.layer, hook.site, published.training.tokens, True, "tower in config.json",
        caution, model_id=tower.model_id, preprocess=tower.preprocess, files=files,
    )  # fmt: skip


def _ra_sae(path: Path, place: str) -> TowerHint | None:
    """One such SAE is published: of the last layer of DINOv2 with registers, which its settings do not say."""
    caution = "It is not published whether it reads the tokens before the tower's last norm, as here, or after it."
    return _make(
        "what RA-SAE-DINOv2-32k reads", model="dinov2_vitb14_reg", hook_point=HookPoint(11), tokens="all", stated=False,
        caution=caution,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What names let us guess

REPOSITORIES = (
    ("SAE_CLIP_24K_ViT-B-16", "openai/clip-vit-base-patch16", 10, "patch"),
    ("SAE-CLIP-24K-ViT-B-16", "openai/clip-vit-base-patch16", 10, "patch"),
    ("SAE_DINOv2_24K_ViT-B-14", "dinov2_vitb14", 10, "patch"),
    ("SAE_BioCLIP_24K_ViT-B-16", "imageomics/bioclip", 10, "patch"),
    ("SAE_DINOv3_ViT-S-16", "facebook/dinov3-vits16-pretrain-lvd1689m", None, "patch"),
    ("SAE_DINOv3_ViT-B-16", "facebook/dinov3-vitb16-pretrain-lvd1689m", None, "patch"),
    ("SAE_DINOv3_ViT-L-16", "facebook/dinov3-vitl16-pretrain-lvd1689m", None, "patch"),
    ("SAE_DINOv3_TopK_ViT-L-16", "facebook/dinov3-vitl16-pretrain-lvd1689m", None, "patch"),
    ("CLIP-ViT-L-scope", "laion/CLIP-ViT-L-14-laion2B-s32B-b82K", None, "all"),
    ("visaebench/clip-vitb16", "clip_vitb16", 11, "patch"), ("visaebench/dinov2-vitb14", "dinov2_vitb14", 11, "patch"),
    ("visaebench/siglip-vitb16", "siglip_vitb16", 11, "patch"), ("visaebench/mae-vitb16", "mae_vitb16", 11, "patch"),
    ("visaebench/deit-vitb16", "deit_vitb16", 11, "patch"), ("RA-SAE-DINOv2-32k", "dinov2_vitb14_reg", 11, "all"),
)  # fmt: skip
"""Part of the name of a public repository -> model, layer and tokens, from its card."""
_LAYER = re.compile(r"(?:^|/)(?:layer_|layers\.|(?:[a-z_]+\.)+layers?\.|blocks\.)(\d{1,2})(?:\.hook_\w+)?(?=/|$)")
_NEELVARMA = re.compile(r"(facebook)_(dinov2-with-registers-\w+)/enc_res_out_layer_(\d{1,2})_")
_SAE_FOR_VLM = re.compile(r"_train_activations_([\w.-]+?)_(\d{1,2})_(?:in|out|post|resid)")
_ANYWHERE = re.compile(r"(?:^|[/_])(clip-vit-[a-z]+-patch\d\d(?:-336)?)(?:_(-?\d{1,2})_resid)?(?=[/_]|$)")


def _by_place(path: Path, place: str) -> TowerHint | None:
    """A guess from the names of the repository, the folders and the file."""
    found = _LAYER.search(place)
    layer = HookPoint(int(found[1])) if found else None
    for part, model, usual, tokens in REPOSITORIES:
        if part in place:
            hook_point = layer or (None if usual is None else HookPoint(usual))
            return _make(f"the name {part}", model=model, hook_point=hook_point, tokens=tokens, stated=False)
    if match := _NEELVARMA.search(place):
        caution = "It was trained on positions 257 to 260, which are the last patches here."
        return _make(
            f"the folder {match[0].split('/')[0]}", model=f"{match[1]}/{match[2]}", hook_point=HookPoint(int(match[3])),
            stated=False, caution=caution if "registers_only" in place else "",
        )  # fmt: skip
    if match := _SAE_FOR_VLM.search(place):
        hook_point = HookPoint(int(match[2]))
        return _make(
            f"the folder {match[0].strip('_')}", model=match[1], hook_point=hook_point, tokens="cls", stated=False
        )
    if match := _ANYWHERE.search(place):
        hook_point = (_hook(int(match[2]), model=match[1]) if match[2] else None) or layer
        return _make(f"the name {match[1]}", model=match[1], hook_point=hook_point, stated=False)
    return _make(f"the folder {found[0].strip('/')}", hook_point=layer, stated=False) if found else None


TOWERS: Mapping[str, Callable[[Path, str], TowerHint | None]] = {
    "prisma": _prisma, "saelens": _saelens, "dictionary_learning": _dictionary_learning, "saev": _saev,
    "saelens_pickle": _saelens_pickle, "patchsae": _patchsae, "overcomplete": _visaebench, "visaebench": _visaebench,
    "clipscope": _clipscope, "universal_sae": _universal_sae, "ra_sae": _ra_sae, "published": _published,
}  # fmt: skip
"""Format -> what its settings state of the tower, given the checkpoint's path and the names in its place."""
