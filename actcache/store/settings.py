"""StoreSettings: the fields that decide a store's bytes, parsed once from artifact.json.

No file is touched. The settings come from a file that may say anything, so every field is checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actcache.errors import CorruptError
from actcache.hook_point import HookPoint
from actcache.store.codecs import check_codec, check_dtype
from actcache.store.layout import StoreLayout
from actcache.store.shard_files import shard_path


@dataclass(frozen=True)
class StoreSettings:
    """What was stored, and how (docs/reference/format.md lists the fields).

    Attributes:
        model_id: hash of the architecture, the base weights and the preprocessing.
        rows_id: hash of the images and their order; stores with equal ids join row by row.
        precision: what was computed, float32 or bfloat16; `dtype` is what is stored.
        seed, limit: what `extract` was given; they are recorded and not read again.
        preprocess: the fields of `Preprocess`, as JSON.
        compile: whether the tower went through torch.compile.
        prompts: `Prompts.description` of an adapted model; None for a plain one.
    """

    model_id: str
    rows_id: str
    hook_points: tuple[HookPoint, ...]
    dtype: str
    precision: str
    codec: str
    layout: StoreLayout
    patch_size: tuple[int, int]
    seed: int
    limit: int | None
    preprocess: Mapping[str, object]
    compile: bool = False
    prompts: Mapping[str, object] | None = None

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "StoreSettings":
        """Parse the settings of an artifact. Raises CorruptError, which names the field, when they are malformed."""
        try:
            rows, columns = fields["grid"]
            sizes = {name: fields[name] for name in ("n_images", "d_model", "n_extra", "chunk_images", "shard_images")}
            layout = StoreLayout(grid=(rows, columns), itemsize=check_dtype(fields["dtype"]).itemsize, **sizes)
            layout.check()
            check_codec(fields["codec"])
            for name in ("model_id", "rows_id", "precision"):
                if not isinstance(fields[name], str):
                    raise TypeError(f"{name} must be a text, got {str(fields[name])[:80]}")
            for name in ("preprocess", "prompts"):
                if not isinstance(fields.get(name, {}), Mapping):
                    raise TypeError(f"{name} must be an object, got {str(fields[name])[:80]}")
            hooks = tuple(HookPoint.parse(text) for text in fields["hook_points"])
            if not hooks or len(set(hooks)) < len(hooks):
                raise ValueError(f"hook_points must be distinct, and at least one, got {fields['hook_points']}")
            height, width = fields["patch_size"]
            return cls(
                **{name: fields[name] for name in ("model_id", "rows_id", "dtype", "precision", "codec", "seed")},
                hook_points=hooks,
                layout=layout,
                patch_size=(height, width),
                limit=fields["limit"],
                preprocess=fields["preprocess"],
                compile=bool(fields.get("compile", False)),
                prompts=fields.get("prompts"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptError(
                f"The settings of this store have a missing or malformed field: {error}. "
                "docs/reference/format.md lists what is expected."
            ) from error

    def to_json(self) -> dict[str, object]:
        """The settings as artifact.json holds them; they are hashed into the store's id."""
        layout = self.layout
        return {
            "model_id": self.model_id,
            "rows_id": self.rows_id,
            "hook_points": [str(hook) for hook in self.hook_points],
            "dtype": self.dtype,
            "precision": self.precision,
            "codec": self.codec,
            "n_images": layout.n_images,
            "grid": list(layout.grid),
            "patch_size": list(self.patch_size),
            "d_model": layout.d_model,
            "n_extra": layout.n_extra,
            "chunk_images": layout.chunk_images,
            "shard_images": layout.shard_images,
            "seed": self.seed,
            "limit": self.limit,
            "preprocess": self.preprocess,
            **({"compile": True} if self.compile else {}),  # it changes the lowest bits
            **({"prompts": self.prompts} if self.prompts is not None else {}),
        }

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        return check_dtype(self.dtype)

    def shard_files(self, shard: int) -> dict[str, int]:
        """Names of a shard's files, relative to the store, and their sizes when stored raw."""
        return {
            str(shard_path(Path(), hook, array, shard)): self.layout.shard_bytes(array, shard)
            for hook in self.hook_points
            for array in self.layout.arrays()
        }
