"""ImportConfig: what is said of activations that others have made, beside the files and the images. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from actcache.errors import SettingsError
from actcache.hook_point import HookPoint
from actcache.options import check_options, option
from actcache.store import check_codec, check_dtype

MAX_SPECIAL = 1024
"""Largest number of special tokens that --prefix takes."""


@dataclass(frozen=True)
class ImportConfig:
    """The options of `import` that change what is stored. Raises SettingsError for a bad value."""

    layers: Sequence[int] = option(
        (), "0-based index of the block the activations come from; repeat it in the order of an axis of layers.",
        at_least=0,
    )  # fmt: skip
    site: str = option("resid_post", "Site in the block: resid_post, resid_mid, attn_out or mlp_out.")
    model: str | None = option(
        None, "Model that made them, as `extract --model` takes it; its tokens, grid and identity are used."
    )
    pretrained: str | None = option(None, "Weights of that model, as `extract --pretrained` takes them.")
    image_size: str | None = option(
        None, "Height, or height x width such as 224x336, of the model's images; its own by default."
    )
    preprocess: str | Path | None = option(
        None, "How the images were prepared, where the weights do not say it, as `extract --preprocess` takes it."
    )
    model_name: str | None = option(
        None, "Name of the model instead, if its weights are not at hand: stores of one name go together."
    )
    prefix: str | None = option(
        None, "Tokens before the patches: none, cls, or e.g. cls,reg:4; guessed from the number of tokens by default."
    )
    grid: str | None = option(None, "Rows x columns of the patches, such as 14x14; a square by default.")
    n_tokens: int | None = option(
        None, "Number of tokens of an image, where each row of the files is one token.", at_least=1
    )
    dtype: str = option("float16", "Number format of the stored activations: float16 or float32.")
    precision: str = option("float32", "Precision in which they were computed: float32 or bfloat16.")
    codec: str = option("raw", "How chunks are stored: raw, or zstd (lossless compression).")
    shard_images: int | None = option(
        None, "Number of images in a shard, a multiple of 16; chosen from the number of images by default.", at_least=16
    )
    seed: int = option(0, "Random seed for the order in which images are stored.", at_least=0)
    class_level: int | None = option(
        None, "Which folder of an image's path is its class, as `extract --class-level` takes it.",
        at_least=-64, at_most=64,
    )  # fmt: skip
    path_column: str | None = option(
        None, "Column of a table that holds the images' paths, or the images; found by its name by default."
    )
    label: str | None = option(None, "Column of a table that holds the labels; found by its name by default.")
    masks: str | Path | None = option(None, "Folder of PNG pixel masks that mirrors the image folder, for `localize`.")

    def __post_init__(self) -> None:
        check_options(self)
        check_dtype(self.dtype)
        check_codec(self.codec)
        if self.precision not in ("float32", "bfloat16"):
            raise SettingsError(f"--precision must be float32 or bfloat16, got {self.precision!r}.")
        if len(set(self.layers)) < len(self.layers):
            raise SettingsError(f"--layer names a layer twice: {', '.join(map(str, self.layers))}. Name each one once.")
        if self.model is not None and self.model_name is not None:
            raise SettingsError("--model and --model-name exclude each other. Give --model if its weights are at hand.")
        if self.model is None and (self.pretrained or self.image_size or self.preprocess):
            raise SettingsError("--pretrained, --image-size and --preprocess need --model. Name the model, too.")
        if self.model_name is not None and not self.model_name.strip():
            raise SettingsError("--model-name is empty. Give the name of the model that made the activations.")
        for layer in (0, *self.layers):
            HookPoint(layer, self.site)  # an unknown site
        self.special, self.rows_columns  # noqa: B018 (malformed ones)

    @cached_property
    def hook_points(self) -> tuple[HookPoint, ...]:
        """The hook point of each named layer, in the order given."""
        return tuple(HookPoint(layer, self.site) for layer in self.layers)

    @cached_property
    def special(self) -> tuple[str, ...] | None:
        """The kinds of the tokens before the patches; None if they shall be guessed."""
        if self.prefix is None:
            return None
        kinds: list[str] = []
        for part in [] if self.prefix.strip() == "none" else self.prefix.split(","):
            match = re.fullmatch(r"\s*(cls|reg|dist)(?::(\d{1,4}))?\s*", part, re.ASCII)
            n_kinds = int(match[2] or 1) if match else 0
            if match is None or not 1 <= n_kinds <= MAX_SPECIAL - len(kinds):
                raise SettingsError(
                    f"--prefix must be none, cls, or a list of cls, reg and dist such as cls,reg:4, got "
                    f"{self.prefix!r:.80}."
                )
            kinds += [match[1]] * n_kinds
        if "cls" in kinds[1:]:
            raise SettingsError(f"--prefix may hold cls once, and in front only, got {self.prefix!r:.80}.")
        return tuple(kinds)

    @cached_property
    def rows_columns(self) -> tuple[int, int] | None:
        """Rows and columns of the patches; None if they shall be guessed."""
        if self.grid is None:
            return None
        match = re.fullmatch(r"\s*(\d{1,6})\s*x\s*(\d{1,6})\s*", self.grid, re.ASCII)
        if match is None or not (int(match[1]) and int(match[2])):
            raise SettingsError(f"--grid must be rows x columns such as 14x14, got {self.grid!r:.80}.")
        return int(match[1]), int(match[2])
