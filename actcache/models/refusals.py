"""Image towers that are refused, by name and with the reason. `REFUSED` is the only list; the documentation shows it.

A tower is taken if one stream [B, T, D] runs through a list of blocks with the same T and D from the first to the
last, and if its output is computed from that stream alone.
"""

from typing import Any

import open_clip

from actcache.errors import ModelError
from actcache.models.trunks import TRUNKS

NATIVE = open_clip.transformer.VisionTransformer
WRAPPER = open_clip.timm_model.TimmModel
ACCEPTED = (
    "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "deit", "eva", "beit", "vitamin",
    "naflexvit",
)  # fmt: skip
"""timm's modules whose models are of the classes in TRUNKS."""

_FAMILIES = {
    "has stages: the number of tokens and of channels changes on the way": (
        "coat csatv2 davit edgenext efficientformer efficientformer_v2 efficientvim efficientvit_mit efficientvit_msra "
        "fastvit focalnet gcvit hiera hieradet_sam2 iformer levit lowformer maxxvit metaformer mobilenetv5 mobilevit "
        "mvitv2 nest nextvit pit pvt_v2 sequencer shvit swiftformer swin_transformer swin_transformer_v2 "
        "swin_transformer_v2_cr tiny_vit twins visformer volo"
    ),
    "is a convolutional network: it has no stream of tokens": (
        "byoanet byobnet convmixer convnext cpubone cspnet cspnext densenet dla dpn efficientnet fasternet ghostnet "
        "hardcorenas hgnet hrnet inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 mambaout "
        "mobilenetv3 modified_resnet nasnet nfnet pnasnet rdnet regnet repghost repvit res2net resnest resnet resnetv2 "
        "rexnet selecsls senet sknet starnet tresnet vgg vovnet xception xception_aligned"
    ),
    "mixes its tokens by an MLP: it has no attention": "mlp_mixer",
    "carries two streams through its blocks": "crossvit tnt",
    "puts CLS into the stream before a later block: the number of tokens changes on the way": "convit",
    "adds CLS only after its blocks, in class-attention blocks of their own": "cait xcit",
    "keeps its stream as an image [B, rows, columns, D] and attends within windows": "vision_transformer_sam",
    "is the encoder of a vision-language model: it feeds a language model and gives no embedding of an image": (
        "deepseek_vit gemma4_vit qwen3_vit"
    ),
}  # fmt: skip
REFUSED = {family: reason for reason, families in _FAMILIES.items() for family in families.split()}
"""Family -> what is wrong with it. A family is a module of timm (`timm.list_models(module=family)` lists its names), or
open_clip's `modified_resnet`."""

PROMPTS_REFUSED = {
    "pairs": "it adds a bias for every pair of its own tokens, and prompts have none",
    "no text": "it has no text tower, and the method puts prompts into texts",
    "transformers": "its text tower is a model of transformers, which takes no prompts between its blocks",
    "tokenizer": "its tokenizer is not CLIP's, and the method puts prompts between CLIP's start token and the words",
}
"""Why a model cannot be adapted by a method that puts prompts into its images (`pairs`) or into its texts (the others).
The documentation shows them."""

ADVICE = "Choose a plain ViT, such as ViT-B-16 or timm:vit_small_patch14_reg4_dinov2."


def check_family(name: str, family: str) -> None:
    """Raise ModelError if no model of this family can be used; `name` is what the message calls the model."""
    if family in REFUSED:
        raise ModelError(f"{name} cannot be used: it {REFUSED[family]}. {ADVICE}")


def check_tower(module: Any) -> None:
    """Raise ModelError unless this is an image tower that can be taken apart.

    Args:
        module: `visual` of a model of open_clip, or a model of timm.
    """
    kind = type(module.trunk if type(module) is WRAPPER else module)
    if kind is NATIVE or kind in TRUNKS:
        return
    check_family(kind.__name__, kind.__module__.rpartition(".")[2])
    known = ", ".join(each.__name__ for each in TRUNKS)
    raise ModelError(
        f"{kind.__name__} cannot be used: it is neither open_clip's VisionTransformer nor one of timm's {known}. "
        f"{ADVICE}"
    )
