"""StoreSettings: the fields that decide a store's bytes, parsed once from artifact.json.

No file is touched. The settings come from a file that may say anything, so every field is checked here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from actcache.artifacts import ARTIFACT_FILE, Artifact
from actcache.errors import CorruptError
from actcache.hook_point import HookPoint
from actcache.preprocess import Preprocess
from actcache.schema import parse
from actcache.store.codecs import check_dtype
from actcache.store.layout import StoreLayout
from actcache.store.shard_files import shard_path

_ADVICE = "docs/reference/format.md lists what is expected."
_POSITIVE = {"at_least": 1}

CLS_ALONE: tuple[Literal["cls"]] = ("cls",)
"""The prefix that the format had before it was a setting; it is not written, so that ids stay."""


@dataclass(frozen=True)
class _PromptFields:
    """How an adapted model was described, see `Prompts.description`."""

    method: str
    template: str
    position: str
    hash: str
    n_vision: int = field(metadata={"at_least": 0})


@dataclass(frozen=True)
class ImportedFrom:
    """Where the activations of an imported store come from.

    Attributes:
        format: npy, pt, safetensors or saev; or written, by a program through `StoreWriter`.
        source: what tells these activations from others: a fingerprint of the files, or a text of that program.
        layers: the layers along the files' axis of layers, where they have one.
        model: the name of a model that only a name is known of; None where model_id is that of a tower.
    """

    format: str
    source: str
    layers: tuple[int, ...] = ()
    model: str | None = None

    def to_json(self) -> dict[str, object]:
        fields: dict[str, object] = {"format": self.format, "source": self.source}
        if self.layers:
            fields["layers"] = list(self.layers)
        return fields if self.model is None else {**fields, "model": self.model}


@dataclass(frozen=True, kw_only=True)
class _StoredFields:
    """The settings as artifact.json holds them."""

    model_id: str
    rows_id: str
    hook_points: tuple[str, ...]
    dtype: Literal["float16", "float32"]
    precision: Literal["float32", "bfloat16"]
    codec: Literal["raw", "zstd"]
    n_images: int = field(metadata=_POSITIVE)
    grid: tuple[int, int] = field(metadata=_POSITIVE)
    patch_size: tuple[int, int] = field(metadata=_POSITIVE)
    d_model: int = field(metadata=_POSITIVE)
    n_extra: int = field(metadata={"at_least": 0})
    chunk_images: int = field(metadata=_POSITIVE)
    shard_images: int = field(metadata=_POSITIVE)
    seed: int
    limit: int | None = field(metadata=_POSITIVE)
    preprocess: Mapping[str, object]
    compile: bool = False
    prompts: _PromptFields | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prefix: tuple[Literal["cls", "reg", "dist"], ...] = CLS_ALONE
    imported: ImportedFrom | None = None

    def __post_init__(self) -> None:
        self.layout.check()
        if self.preprocess:  # a store that no model made has none
            Preprocess.from_json(self.preprocess)
        hooks = [HookPoint.parse(text) for text in self.hook_points]
        if not hooks or len(set(hooks)) < len(hooks):
            raise ValueError(f"hook_points must be distinct, and at least one, got {list(self.hook_points)}"[:200])

    @property
    def layout(self) -> StoreLayout:
        sizes = {name: getattr(self, name) for name in ("n_images", "d_model", "n_extra", "chunk_images", "prefix")}
        itemsize = check_dtype(self.dtype).itemsize
        return StoreLayout(grid=self.grid, shard_images=self.shard_images, itemsize=itemsize, **sizes)


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
        columns: the columns `path` and `label` of the source, where the user chose others than the usual ones.
        imported: where the activations come from, if not from `extract`.
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
    columns: Mapping[str, str] = field(default_factory=dict)
    imported: ImportedFrom | None = None

    @classmethod
    def of(cls, artifact: Artifact) -> "StoreSettings":
        """The settings of a store. Raises CorruptError, which names the field, when they are malformed."""
        settings = cls.from_json(artifact.settings)
        if artifact.schema < settings.schema:
            raise CorruptError(
                f"{artifact.path / ARTIFACT_FILE} has schema {artifact.schema}, but its prefix "
                f"{list(settings.prefix)} needs schema {settings.schema}. {_ADVICE}"
            )
        return settings

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "StoreSettings":
        """Parse the settings of an artifact. Raises CorruptError, which names the field, when they are malformed."""
        checked = parse(_StoredFields, fields, "The settings of this store", _ADVICE)
        return cls(
            **{name: getattr(checked, name) for name in ("model_id", "rows_id", "dtype", "precision", "codec", "seed")},
            hook_points=tuple(map(HookPoint.parse, checked.hook_points)),
            layout=checked.layout,
            patch_size=checked.patch_size,
            limit=checked.limit,
            preprocess=fields["preprocess"],
            compile=checked.compile,
            prompts=fields.get("prompts"),
            columns=dict(checked.columns),
            imported=checked.imported,
        )

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
            **({"columns": dict(self.columns)} if self.columns else {}),
            **({} if self.prefix == CLS_ALONE else {"prefix": list(self.prefix)}),
            **({} if self.imported is None else {"imported": self.imported.to_json()}),
        }

    @property
    def prefix(self) -> tuple[str, ...]:
        """The kinds of the special tokens, in the order of the stream."""
        return self.layout.prefix

    @property
    def schema(self) -> int:
        """The version of the format that a store with these settings has. A reader of schema 1 takes the first token
        for CLS, so any other prefix must be refused by it.
        """
        return 1 if self.prefix == CLS_ALONE else 2

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
