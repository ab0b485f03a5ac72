"""The adaptation methods as a table: what each learns, where that goes, and its published training values.

    method   image tower                            text tower
    coop     nothing                                ctx, shared by all classes or one for each class
    cocoop   nothing                                ctx + meta_net(image embedding), different for each image
    vpt      VPT, VPT_shallow of the blocks         nothing: the text is fixed
    ivlp     VPT, VPT_shallow of the blocks         ctx, VPT_shallow of the blocks
    maple    a linear map of each text prompt       ctx, compound prompts

Sources: Zhou et al. 2022 (CoOp; CoCoOp), Jia et al. 2022 (VPT), Khattak et al. 2023 (MaPLe, IVLP).
"""

from dataclasses import dataclass

VPT = "image_encoder.VPT"
VPT_BLOCKS = "image_encoder.transformer.resblocks.{}.VPT_shallow"
TEXT_BLOCKS = "text_encoder.transformer.resblocks.{}.VPT_shallow"
COMPOUND = "prompt_learner.compound_prompts_text.{}"
FIRST_NUMBER = {VPT_BLOCKS: 1, TEXT_BLOCKS: 1, COMPOUND: 0}
"""The number with which a series of names starts: that of a block, or MaPLe's own count."""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        n_prompts, depth, n_epochs, batch_size, lr, augment: published values for 16 shots on ViT-B/16; image embeddings
            that are computed once allow no augmentation.
        folder: where the original code looks for `model.pth.tar-N`.
        keys: a checkpoint belongs to the first method in METHODS of which a key begins one of its tensors' names.
        text: name of the prompts at the text tower's input; None where the text is fixed.
        text_blocks: names of the prompts before the text tower's next blocks.
        vision: name of the image tower's own prompts; None where it has none.
        maps_text: the image tower's prompts are linear maps of the text tower's.
        texts_by_image: every image has its own text embeddings.
        class_specific: every class may have prompts of its own.
        positions: where the class name may stand among the prompts.
        begins_with_words: training starts from the embeddings of the template's own words.
        keeps_words: the rest of the template stays where the prompts replace only its first words.
    """

    n_prompts: int
    depth: int
    n_epochs: int
    batch_size: int
    lr: float
    augment: bool
    folder: str
    keys: tuple[str, ...]
    text: str | None
    text_blocks: str | None = None
    vision: str | None = None
    maps_text: bool = False
    texts_by_image: bool = False
    class_specific: bool = False
    positions: tuple[str, ...] = ("end",)
    begins_with_words: bool = True
    keeps_words: bool = False

    @property
    def adapts_images(self) -> bool:
        """Whether the image tower changes. The original code of these methods saves the whole model."""
        return self.maps_text or self.vision is not None


METHODS = {
    "cocoop": Method(
        4, 1, 10, 1, 0.002, False, "prompt_learner", keys=("meta_net.",), text="ctx", texts_by_image=True,
    ),
    "coop": Method(
        16, 1, 200, 32, 0.002, False, "prompt_learner", keys=("ctx",), text="ctx", class_specific=True,
        positions=("end", "middle", "front"), begins_with_words=False,
    ),
    "maple": Method(
        2, 9, 5, 4, 0.0035, True, "MultiModalPromptLearner",
        keys=("prompt_learner.proj.weight", COMPOUND.removesuffix("{}")),
        text="prompt_learner.ctx", text_blocks=COMPOUND, maps_text=True, keeps_words=True,
    ),
    "ivlp": Method(
        2, 12, 5, 4, 0.0035, True, "VLPromptLearner", keys=("prompt_learner.ctx",),
        text="prompt_learner.ctx", text_blocks=TEXT_BLOCKS, vision=VPT, keeps_words=True,
    ),
    "vpt": Method(8, 12, 5, 4, 0.0025, True, "prompt_learner", keys=(VPT,), text=None, vision=VPT),
}  # fmt: skip
