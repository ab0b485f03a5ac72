"""Preprocess: how an image becomes the pixels that the model sees."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from actcache.errors import CorruptError

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

    size: tuple[int, int]
    mode: str = "RGB"
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Preprocess":
        """Raises CorruptError, which names the field, when `fields` are malformed."""
        try:
            size = fields["size"]
            height, width = (size, size) if isinstance(size, int) else size
            return cls(
                size=(int(height), int(width)),
                mode=str(fields["mode"]),
                mean=tuple(fields["mean"]),
                std=tuple(fields["std"]),
                interpolation=str(fields["interpolation"]),
                resize_mode=str(fields["resize_mode"]),
                fill_color=fields["fill_color"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(
                f"The preprocessing settings have a missing or malformed field: {error}. "
                "Expected size, mode, mean, std, interpolation, resize_mode and fill_color."
            ) from error

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
