"""Preprocess: how an image becomes the pixels that the model sees, as open_clip or as timm spells it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from actcache.errors import CorruptError
from actcache.schema import parse

MAX_SIDE = 1 << 13
"""Largest height or width of a model's input; the largest that anybody uses is 1,024."""

Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]
ResizeMode = Literal["shortest", "squash", "longest"]
CropMode = Literal["center", "squash", "border"]
Library = Literal["open_clip", "timm"]

MAX_PIXELS = 178_956_970
"""Default for the number of pixels above which an image is not decoded. RGB of this size takes 683 MiB, as Pillow needs
four bytes per pixel. It is the number at which Pillow calls an image a decompression bomb."""
INTERPOLATIONS = ("bicubic", "bilinear")
"""Any other name would be taken as bicubic by open_clip's transform."""
RESIZE_MODES = ("shortest", "squash", "longest")


_OPEN_CLIP = ("size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color")
_TIMM = ("library", "size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""The fields of each spelling, in the order in which they are stored."""
_RESIZE_MODES: dict[CropMode, ResizeMode] = {"center": "shortest", "squash": "squash", "border": "longest"}


@dataclass(frozen=True)
class Preprocess:
    """The fields of open_clip's PreprocessCfg, or those of timm's data config.

    The two libraries resize differently, so a record names its library: timm resizes to a larger rectangle, the
    model's size divided by `crop_pct`, and crops the center; open_clip resizes to the model's size itself.

    Attributes:
        size: height and width of the pixels.
        mean, std: of each color channel, on the scale 0..1.
        interpolation: bicubic, bilinear, ...
        resize_mode: of open_clip: shortest (resize the shorter side, then crop the center), squash, or longest (pad).
        fill_color: of open_clip: gray value of the padding, 0..255.
        library: whose transform this is.
        crop_pct: of timm: share of the resized image's side that is kept; None for open_clip.
        crop_mode: of timm: center, squash or border (shortest, squash and longest of open_clip); None for open_clip.
    """

    size: tuple[int, int] = field(metadata={"at_least": 1, "at_most": MAX_SIDE})
    mode: str = "RGB"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = field(default=(0.26862954, 0.26130258, 0.27577711), metadata={"above": 0})
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    fill_color: int = field(default=0, metadata={"at_least": 0, "at_most": 255})
    library: Library = "open_clip"
    crop_pct: float | None = field(default=None, metadata={"at_least": 0.1, "at_most": 1})
    crop_mode: CropMode | None = None

    def __post_init__(self) -> None:
        given = {self.crop_pct is not None, self.crop_mode is not None}
        if given != {self.library == "timm"}:
            raise ValueError("crop_pct and crop_mode belong to library timm, which needs both")

    @property
    def scale(self) -> tuple[int, int]:
        """Height and width of the rectangle to which an image is resized, before its center is cropped to `size`."""
        if self.crop_pct is None:
            return self.size
        return math.floor(self.size[0] / self.crop_pct), math.floor(self.size[1] / self.crop_pct)

    @property
    def fit(self) -> ResizeMode:
        """How an image is fitted to `scale`, in open_clip's words for both libraries."""
        return self.resize_mode if self.crop_mode is None else _RESIZE_MODES[self.crop_mode]

    @property
    def fill(self) -> tuple[int, int, int]:
        """Color of the padding, 0..255: open_clip's gray value, or the mean color as timm has it."""
        if self.library == "open_clip":
            return (self.fill_color,) * 3
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Preprocess":
        """Raises CorruptError, which names the field, when `fields` are malformed."""
        names = "size, mode, mean, std, interpolation, resize_mode and fill_color, or timm's crop_pct and crop_mode"
        if isinstance(fields, Mapping) and isinstance(fields.get("size"), int):  # open_clip's notation of a square
            fields = {**fields, "size": [fields["size"]] * 2}
        return parse(cls, fields, "The preprocessing settings", f"Expected {names}.")

    def check(self) -> None:
        """Raise CorruptError for values with which no image can be prepared."""
        numbers = [*self.mean, *self.std, *self.size, self.fill_color]
        good = all(isinstance(number, int | float) and math.isfinite(number) for number in numbers)
        checks = {
            "mean": good and len(self.mean) == 3, "std": good and len(self.std) == 3 and min(self.std) > 0,
            "mode": self.mode == "RGB", "interpolation": self.interpolation in INTERPOLATIONS,
            "resize_mode": self.resize_mode in RESIZE_MODES, "fill_color": good and 0 <= self.fill_color <= 255,
        }  # fmt: skip
        for name, holds in checks.items():
            if not holds:
                raise CorruptError(
                    f"{name} is {ascii(getattr(self, name))[:80]}. Expected three numbers for mean and std, mode RGB, "
                    f"one of {', '.join(INTERPOLATIONS)}, and one of {', '.join(RESIZE_MODES)}."
                )

    def to_json(self) -> dict[str, object]:
        """The fields as they are stored and hashed into a model_id."""
        fields = {name: getattr(self, name) for name in (_TIMM if self.library == "timm" else _OPEN_CLIP)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def covered_shares(
    size: tuple[int, int], grid: tuple[int, int], patch_size: tuple[int | None, int | None]
) -> tuple[float, float]:
    """The share of a picture's height and of its width that lies under patches, from its upper left corner.

    A tower cuts off what is smaller than a patch: 27 patches of 14 pixels cover 378 of 384. A patch size of None is the
    side divided by the number of patches.
    """
    shares = []
    for side, n, patch in zip(size, grid, patch_size, strict=True):
        patch = patch or max(1, side // n)
        # what cannot be a row of patches from the corner on, such as those of a padded picture, is all of it
        shares.append(n * patch / side if side // patch == n else 1.0)
    return shares[0], shares[1]
