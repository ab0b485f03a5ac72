"""Activations in files of others, as if they were one array [I, T, D] for each hook point; read image by image.

In: `Files`, and what the user says of them. Out: `Activations`. Promises: the shapes of all files agree before anything
else is done; memory holds the images that are asked for. What the axes of an array are:

    rows that are images     [images, tokens, D]; [images, D] (one vector an image); [images, layers, tokens, D]
    rows that are tokens     [tokens, D]; [tokens, layers, D], as ViT-Prisma caches them; an image may begin in one file
                             and end in the next
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.errors import SettingsError
from actcache.hook_point import HookPoint
from actcache.importing.config import ImportConfig
from actcache.importing.files import Files
from actcache.importing.mapped import Mapped

Hooks = tuple[HookPoint, ...]


@dataclass(frozen=True)
class Activations:
    """Activations of `n_images` images in the order of the files.

    Attributes:
        arrays: the files' arrays for each hook point, one after the other along their first axis.
        per_image: rows of an image along that axis: 1, or n_tokens where rows are tokens.
        layers: those along the files' axis of layers; empty if they have none.
    """

    arrays: Mapping[HookPoint, Sequence[Mapped]]
    n_images: int
    n_tokens: int
    d_model: int
    per_image: int
    layers: tuple[int, ...]

    @property
    def hook_points(self) -> Hooks:
        return tuple(self.arrays)

    def read(self, hook: HookPoint, images: NDArray[np.int64]) -> NDArray[Any]:
        """[n, T, D] float16, float32 or float64 of images, at least one, in any order."""
        arrays = self.arrays[hook]
        rows = (images[:, None] * self.per_image + np.arange(self.per_image)).reshape(-1)
        starts = np.cumsum([0, *(array.shape[0] for array in arrays)])
        number = np.searchsorted(starts, rows, side="right") - 1
        parts = {each: number == each for each in np.unique(number).tolist()}
        taken = {each: arrays[each].take(rows[mine] - starts[each]) for each, mine in parts.items()}
        dtype = np.result_type(*taken.values())
        out = np.empty((len(rows), *next(iter(taken.values())).shape[1:]), dtype=dtype)
        for each, mine in parts.items():
            out[mine] = taken[each]
        return out.reshape(len(images), self.n_tokens, self.d_model)


def arrange(files: Files, config: ImportConfig) -> Activations:
    """Find out which array and which axes hold what.

    Raises SettingsError: shapes do not fit each other or the options, or something was not said that the files do not
    say.
    """
    hooks, slots = _choose_hooks(files, config)
    arrays = {hook: [_choose_array(files, file, hook) for file in files.arrays] for hook in hooks}
    shape = _check_shapes([array for several in arrays.values() for array in several])
    layered = _has_layers(files, config, shape, slots, shared=arrays[hooks[0]][0] is arrays[hooks[-1]][0])
    if layered:
        arrays = {hook: [each.layer(slots.index(hook)) for each in arrays[hook]] for hook in hooks}
        shape = (shape[0], *shape[2:])
    n_rows = sum(array.shape[0] for array in arrays[hooks[0]])
    per_image = config.n_tokens or 1
    if n_rows % per_image:
        raise SettingsError(
            f"{files.name} holds {n_rows:,} tokens, which are no whole number of images of --n-tokens {per_image:,} "
            "each. Give the number of all tokens of an image, special ones included."
        )
    for hook in hooks:
        if [array.shape for array in arrays[hook]] != [array.shape for array in arrays[hooks[0]]]:
            raise SettingsError(f"{files.name} holds another number of rows of {hook} than of {hooks[0]}.")
    n_tokens = config.n_tokens or (shape[1] if len(shape) == 3 else 1)
    layers = tuple(slot.layer for slot in slots) if layered else ()
    return Activations(arrays, n_rows // per_image, n_tokens, shape[-1], per_image, layers)


def _choose_hooks(files: Files, config: ImportConfig) -> tuple[Hooks, Hooks]:
    """(the hook points to import, in the order of a forward pass; those along an axis of layers, in its order)."""
    if files.layers is not None:
        slots = tuple(HookPoint(layer, config.site) for layer in files.layers)
        if lacking := [layer for layer in config.layers if layer not in files.layers]:
            raise SettingsError(
                f"{files.name} has no layer {lacking[0]}. It has {', '.join(map(str, files.layers))}: choose --layer "
                "among these."
            )
        return tuple(sorted(config.hook_points or slots)), slots
    hooks = tuple(sorted(config.hook_points))
    if files.n_layers is not None and files.n_layers != len(hooks):
        raise SettingsError(
            f"{files.name} counts its {files.n_layers} layer(s) from the end. Name each one with --layer, "
            "counted from 0."
        )
    if not hooks:
        raise SettingsError(f"{files.name} does not say which layer it holds. Name it with --layer, counted from 0.")
    return hooks, hooks if files.n_layers else config.hook_points


def _choose_array(files: Files, file: Mapping[str, Mapped], hook: HookPoint) -> Mapped:
    """The array of a hook point: that of its name, or the only one of the file."""
    if str(hook) in file:
        return file[str(hook)]
    if len(file) > 1:
        names = ", ".join(ascii(name)[:60] for name in sorted(file)[:10])
        raise SettingsError(
            f"{files.name} holds {len(file)} arrays in a file ({names}), and none is called {hook}. Save the array "
            "under this name, or alone."
        )
    name, alone = next(iter(file.items()))
    if _is_hook_point(name):
        raise SettingsError(
            f"{files.name} holds an array that is called {name}, but --layer and --site say {hook}. Give the ones of "
            "the array, or save it under another name."
        )
    return alone


def _is_hook_point(name: str) -> bool:
    try:
        HookPoint.parse(name)
    except SettingsError:
        return False
    return True


def _check_shapes(arrays: Sequence[Mapped]) -> tuple[int, ...]:
    """The shape of the first array, which the others have beyond the axis of rows."""
    first = arrays[0]
    for each in arrays:
        if not 2 <= len(each.shape) <= 4:
            raise SettingsError(
                f"{each.file} has the shape {list(each.shape)}. Expected [images, tokens, channels] or [images, "
                "channels], or rows that are tokens, with --n-tokens."
            )
        if each.shape[1:] != first.shape[1:]:
            raise SettingsError(
                f"{first.file} has the shape {list(first.shape)}, but {each.file} has {list(each.shape)}. Expected the "
                "same lengths of all axes but the first. Import them into stores of their own."
            )
    return first.shape


def _has_layers(files: Files, config: ImportConfig, shape: tuple[int, ...], slots: Hooks, *, shared: bool) -> bool:
    """Whether axis 1 is one of layers. Raises SettingsError for a shape that means nothing."""
    plain, layered = ((2,), 3) if config.n_tokens else ((2, 3), 4)
    if len(shape) in plain:
        if len(slots) > 1 and shared:
            raise SettingsError(
                f"{files.name} has the shape {list(shape)}, which holds one layer, but {len(slots)} were named with "
                "--layer. Name one, or give an array with an axis of layers."
            )
        return False
    if len(shape) != layered or not shared:
        ways = "[tokens, channels], or [tokens, layers, channels]" if config.n_tokens else "[images, tokens, channels]"
        flag = "with --n-tokens" if config.n_tokens else "without --n-tokens"
        raise SettingsError(f"{files.name} has the shape {list(shape)}. Expected {ways} {flag}.")
    if shape[1] != len(slots):
        raise SettingsError(
            f"{files.name} has the shape {list(shape)}, whose axis of layers holds {shape[1]}, but {len(slots)} were "
            "named with --layer. Name all of them in the order of that axis."
        )
    return True
