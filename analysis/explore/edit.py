"""Edit: what a person changes in the codes of an image. Parsed from JSON that anybody may have written."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from actcache import SettingsError

MAX_LATENTS = 1000
_LARGEST = 1e6


@dataclass(frozen=True)
class Edit:
    """A change of latents on some tokens of an image.

    Attributes:
        image, upload: the image: a stored position, or the id of an upload.
        at: row-major numbers of the patches; None for all tokens, CLS too.
        set: latent -> the value that it is held at, in the SAE's normalized units, as codes are.
        keep: the only latents that stay; None for all. drop: latents that become silent.
    """

    image: int | None
    upload: str | None
    at: tuple[int, ...] | None
    set: Mapping[int, float]
    keep: tuple[int, ...] | None
    drop: tuple[int, ...]

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> "Edit":
        """Raises SettingsError for a field of another type, or none of the two images."""
        image, upload, values = fields.get("image"), fields.get("upload"), fields.get("set") or {}
        if upload is not None and not isinstance(upload, str):
            raise SettingsError("upload must be the id of an upload.")
        if upload is None and not _is_whole(image):
            raise SettingsError("An edit needs an image, by its number, or an upload.")
        if not isinstance(values, dict) or len(values) > MAX_LATENTS:
            raise SettingsError(f"set must be an object of at most {MAX_LATENTS:,} latents and values.")
        at, keep, drop = (
            None if fields.get(name) is None else _read_numbers(name, fields[name]) for name in ("at", "keep", "drop")
        )
        edit = cls(
            None if upload is not None else image, upload, at,
            {_read_latent(latent): _read_value(value) for latent, value in values.items()}, keep, drop or (),
        )  # fmt: skip
        if not edit.set and not edit.drop and edit.keep is None:
            raise SettingsError("An edit sets, keeps or drops at least one latent.")
        return edit

    @property
    def masked(self) -> tuple[int, ...]:
        """The latents that are kept or dropped."""
        return tuple(dict.fromkeys([*self.drop, *(self.keep or ())]))

    @property
    def latents(self) -> tuple[int, ...]:
        """All latents that are named: set, dropped, kept."""
        return tuple(dict.fromkeys([*self.set, *self.masked]))

    def check(self, *, n_latents: int, n_patches: int, n_images: int) -> None:
        """Raise SettingsError for a latent, patch or image out of range."""
        for latent in self.latents:
            if not 0 <= latent < n_latents:
                raise SettingsError(f"A latent must lie in 0..{n_latents - 1}, got {latent}.")
        for patch in self.at or ():
            if not 0 <= patch < n_patches:
                raise SettingsError(f"A patch must lie in 0..{n_patches - 1}, got {patch}.")
        if self.image is not None and not 0 <= self.image < n_images:
            raise SettingsError(f"An image must lie in 0..{n_images - 1}, got {self.image}.")

    def of(self, others: Mapping[int, int]) -> "Edit":
        """The same change of other latents."""
        return replace(
            self,
            set={others.get(latent, latent): value for latent, value in self.set.items()},
            keep=None if self.keep is None else tuple(others.get(latent, latent) for latent in self.keep),
            drop=tuple(others.get(latent, latent) for latent in self.drop),
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_numbers(name: str, value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(_is_whole(number) for number in value) or len(value) > 1 << 16:
        raise SettingsError(f"{name} must be a list of numbers.")
    return tuple(dict.fromkeys(value))


def _read_latent(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise SettingsError(f"A latent is a number, got {text[:40]!r}.")
    return int(text)


def _read_value(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        raise SettingsError(f"A latent is set to a number up to {_LARGEST:,.0f}.")
    return float(value)
