"""ExtractConfig: what decides the bytes of a store, beside the images. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from actcache.errors import SettingsError
from actcache.hook_point import HookPoint
from actcache.options import check_options, option, required
from actcache.preprocess import MAX_PIXELS
from actcache.store import check_codec, check_dtype


@dataclass(frozen=True)
class ExtractConfig:
    """The options of `extract` that change what is stored. Raises SettingsError for a bad value."""

    model: str = required(
        "open_clip architecture, timm:NAME, folder of a model (local-dir:DIR), hf-hub:OWNER/NAME, or a config JSON."
    )
    layers: Sequence[int] = required("0-based index of a block; repeat the option for several.", at_least=0)
    pretrained: str | None = option(
        None, "Tag, file or folder of weights, or random:SEED; a folder's own weights by default."
    )
    image_size: str | None = option(
        None, "Height, or height x width such as 224x336, of the model's images; its own by default."
    )
    preprocess: str | Path | None = option(
        None,
        "How images are prepared, where the weights do not say it: a JSON file, an open_clip or timm name with a tag "
        "(NAME.TAG) whose preprocessing is taken, or default.",
    )
    sites: Sequence[str] = option(
        ("resid_post",), "Site in the block: resid_post, resid_mid, attn_out or mlp_out; repeatable."
    )
    prompts: str | Path | None = option(
        None, "Prompts of an adapted model: an x.prompts directory or an original checkpoint."
    )
    dtype: str = option("float16", "Number format of the stored activations: float16 or float32.")
    precision: str = option("auto", "Precision of the computation: auto, float32 or bfloat16.")
    codec: str = option("raw", "How chunks are stored: raw, or zstd (lossless compression).")
    shard_images: int | None = option(
        None, "Number of images in a shard, a multiple of 16; chosen from the number of images by default.", at_least=16
    )
    limit: int | None = option(None, "Number of images to sample at random; all by default.", at_least=1)
    seed: int = option(0, "Random seed for the order in which images are stored.", at_least=0)
    not_in: Sequence[str | Path] = option((), "Store whose images are left out; repeatable.")
    class_level: int | None = option(
        None,
        "Which folder of a path is the class: 1 for the first, 2 ..., -1 for the innermost, 0 for none; by default the "
        "first, or the second where the first ones are called train, val, test ...",
        at_least=-64,
        at_most=64,
    )
    class_names: str | Path | None = option(
        None, "File with a text for each class: lines such as `n02012849,crane`, or a JSON object."
    )
    max_pixels: int = option(MAX_PIXELS, "Number of pixels above which an image is not decoded.", at_least=1)
    masks: str | Path | None = option(None, "Folder of PNG pixel masks that mirrors the image folder, for `localize`.")
    path_column: str | None = option(
        None, "Column of a table that holds the images' paths, or the images; found by its name by default."
    )
    label: str | None = option(None, "Column of a table that holds the labels; found by its name by default.")
    compile: bool = option(False, "Run the model through torch.compile, which changes the lowest bits.")

    def __post_init__(self) -> None:
        check_options(self)
        check_dtype(self.dtype)
        check_codec(self.codec)
        if not self.hook_points:
            raise SettingsError("No layer is given. Name at least one with --layer.")

    @cached_property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """Every wanted site of every wanted layer, in the order in which a forward pass reaches them."""
        return tuple(sorted({HookPoint(layer, site) for layer in self.layers for site in self.sites}))
