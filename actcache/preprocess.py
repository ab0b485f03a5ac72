"""Preprocess: how an image becomes the pixels that the model sees."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from actcache.errors import CorruptError
from actcache.schema import parse

MAX_SIDE = 1 << 13
"""Largest height or width of a model's input; the largest that anybody uses is 1,024."""

Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos", "box", "hamming"]
ResizeMode = Literal["shortest", "squash", "longest"]

MAX_PIXELS = 178_956_970
"""Default for the number of pixels above which an image is not decoded. RGB of this size takes 683 MiB, as Pillow needs
four bytes per pixel. It is the number at which Pillow calls an image a decompression bomb."""
INTERPOLATIONS = ("bicubic", "bilinear")
"""Any other name would be taken as bicubic by open_clip's transform."""
RESIZE_MODES = ("shortest", "squash", "longest")


@dataclass(frozen=True)
class Preprocess:
    """The fields of open_clip's PreprocessCfg.

    Attributes:
        size: height and width of the pixels.
        mean, std: of each color channel, on the scale 0..1.
        interpolation: bicubic, bilinear, ...
        resize_mode: shortest (resize the shorter side, then crop the center), squash, or longest (pad).
        fill_color: gray value of the padding, 0..255.
    """

    size: tuple[int, int] = field(metadata={"at_least": 1, "at_most": MAX_SIDE})
    mode: str = "RGB"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = field(default=(0.26862954, 0.26130258, 0.27577711), metadata={"above": 0})
    interpolation: Interpolation = "bicubic"
    resize_mode: ResizeMode = "shortest"
    fill_color: int = field(default=0, metadata={"at_least": 0, "at_most": 255})

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Preprocess":
        """Raises CorruptError, which names the field, when `fields` are malformed."""
        names = "size, mode, mean, std, interpolation, resize_mode and fill_color"
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
        fields = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
