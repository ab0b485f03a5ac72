"""StoreGroup: one or several stores of the same model, read as one. The images of the first store come first.

New images go into another store; training and encoding read the stores together.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from actcache.artifacts import digest
from actcache.cache_lines import empty_at_line
from actcache.errors import ParentMismatchError, SettingsError
from actcache.hook_point import HookPoint
from actcache.store.channel_statistics import ChannelStatistics
from actcache.store.layout import Tokens
from actcache.store.reader import ActivationStore, Images

Stores = ActivationStore | str | Path | Sequence[ActivationStore | str | Path]
"""What functions that read stores accept."""


class StoreGroup:
    """group = open_stores(["a.acts", "b.acts"]); group.read(10, images=[0, 70_000])"""

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        """Raises ParentMismatchError unless all have the same model and shape; SettingsError for none or duplicates."""
        if not stores:
            raise SettingsError("No store was given. Give at least one.")
        self.stores = tuple(stores)
        self.starts = np.cumsum(
            [0, *(store.n_images for store in stores)]
        )  # group-wide number of each store's first image
        self.layout, self.dtype, self.path = stores[0].layout, stores[0].dtype, stores[0].path
        self.n_images, self.n_tokens, self.model_id = int(self.starts[-1]), stores[0].n_tokens, stores[0].model_id
        for store in stores[1:]:
            if store.model_id != stores[0].model_id:
                raise ParentMismatchError(
                    f"{self.path} holds model {self.model_id}, but {store.path} holds model {store.model_id}. "
                    "Give stores of the same CLIP weights, architecture and preprocessing."
                )
            for name, mine, other in (
                ("patch grids", self.layout.grid, store.layout.grid),
                ("special tokens", list(self.layout.prefix), list(store.layout.prefix)),
                ("storage dtypes", self.dtype, store.dtype),
                ("precisions", stores[0].settings.precision, store.settings.precision),
            ):
                if mine != other:
                    raise ParentMismatchError(
                        f"{self.path} and {store.path} have different {name}: {mine} and {other}. "
                        "Extract one of them again."
                    )
        if len({store.store_id for store in stores}) < len(stores):
            raise SettingsError(f"A store was given twice: {', '.join(str(store.path) for store in stores)}.")

    @property
    def rows_id(self) -> str:
        """Hash of the images and their order; for a single store, that of the store."""
        ids = [store.rows_id for store in self.stores]
        return ids[0] if len(ids) == 1 else digest(ids)

    def parents(self) -> dict[str, tuple[str, Path]]:
        """The stores as an artifact's parents: `store`, `store 2`, ..."""
        return {_numbered("store", i): (store.store_id, store.path) for i, store in enumerate(self.stores)}

    def image_parents(self) -> dict[str, tuple[str, Path]]:
        """The image sources as an artifact's parents: `images`, `images 2`, ..."""
        artifacts = [store.artifact for store in self.stores]
        return {
            _numbered("images", i): (artifact.parent("images").id, artifact.parent_path("images"))
            for i, artifact in enumerate(artifacts)
        }

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """[I]: true where the image was read."""
        return np.concatenate([store.valid for store in self.stores])

    @cached_property
    def failed(self) -> dict[int, str]:
        """Images that could not be read -> reason."""
        pairs = zip(self.starts.tolist(), self.stores, strict=False)
        return {start + image: reason for start, store in pairs for image, reason in store.failed.items()}

    @cached_property
    def images(self) -> pa.Table:
        """images.parquet of all stores, numbered by `store` if there are several; a missing column is null."""
        if len(self.stores) == 1:
            return self.stores[0].images
        tables = [
            store.images.append_column("store", pa.array(np.full(store.n_images, i, np.int32)))
            for i, store in enumerate(self.stores)
        ]
        return pa.concat_tables(tables, promote_options="permissive")

    def hook_point(self, layer: int | HookPoint | None) -> HookPoint:
        """The hook point of a layer, which all stores must have. Raises SettingsError."""
        hook = self.stores[0].hook_point(layer)
        for store in self.stores[1:]:
            store.hook_point(hook)
        return hook

    def statistics(self, layer: int | HookPoint | None, tokens: Tokens = "all") -> ChannelStatistics:
        """Statistics of the stored values of all stores, merged in their order."""
        first, *others = [store.statistics(layer, tokens) for store in self.stores]
        return sum(others, first)

    @property
    def checks_cheaply(self) -> bool:
        """Whether `check` costs little for all stores, so that training, encoding and measuring use it."""
        return all(store.checks_cheaply for store in self.stores)

    def n_read_tokens(self, tokens: Tokens) -> int:
        return self.stores[0].n_read_tokens(tokens)

    def shards(self) -> list[range]:
        """The images of every shard, store by store."""
        return [
            range(int(start) + images.start, int(start) + images.stop)
            for start, store in zip(self.starts, self.stores, strict=False)
            for images in map(store.layout.shard_range, range(store.layout.n_shards))
        ]

    def blocks(self, images: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Split ascending images at block boundaries: each part can be read together."""
        if not len(images):
            return []
        store = np.searchsorted(self.starts, images, side="right") - 1
        sizes = np.array([store.layout.chunk_images for store in self.stores])
        block = (images - self.starts[store]) // sizes[store]
        return np.split(images, np.flatnonzero((np.diff(store) != 0) | (np.diff(block) != 0)) + 1)

    def read(
        self,
        layer: int | HookPoint | None = None,
        *,
        images: Images = slice(None),
        tokens: Tokens = "all",
        out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:
        """Like ActivationStore.read, with images numbered across all stores."""
        how = {"tokens": tokens, "check": check}
        return self._read(ActivationStore.read, self.n_read_tokens(tokens), layer, images, out, how)

    def read_registers(
        self, layer: int | HookPoint | None = None, *, images: Images = slice(None), out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:  # fmt: skip
        """Like ActivationStore.read_registers, with images numbered across all stores."""
        n_tokens = self.layout.n_registers
        return self._read(ActivationStore.read_registers, n_tokens, layer, images, out, {"check": check})

    def read_extra(
        self, layer: int | HookPoint | None = None, *, images: Images = slice(None), out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:  # fmt: skip
        """Like ActivationStore.read_extra, with images numbered across all stores.

        Raises ParentMismatchError, too, for stores of different prompts.
        """
        self._check_prompts()
        return self._read(ActivationStore.read_extra, self.layout.n_extra, layer, images, out, {"check": check})

    def read_stream(
        self, layer: int | HookPoint | None = None, *, images: Images = slice(None), out: NDArray[Any] | None = None,
        check: bool = False,
    ) -> NDArray[Any]:  # fmt: skip
        """Like ActivationStore.read_stream, with images numbered across all stores.

        Raises ParentMismatchError, too, for stores of different prompts, whose streams belong to different models.
        """
        self._check_prompts()
        n_tokens = self.layout.n_stream
        return self._read(ActivationStore.read_stream, n_tokens, layer, images, out, {"check": check})

    def _check_prompts(self) -> None:
        """Raise ParentMismatchError unless all stores have the same prompts among their tokens, or all have none."""
        first = self.stores[0]
        for store in self.stores[1:]:
            if _image_prompts(store) != _image_prompts(first):
                raise ParentMismatchError(
                    f"{first.path} was extracted with {_describe_prompts(first)} and {store.path} with "
                    f"{_describe_prompts(store)}, so later blocks cannot be run on both. Give stores of the same "
                    "--prompts, or one store at a time."
                )

    def _read(
        self, method: Callable[..., NDArray[Any]], n_tokens: int, layer: int | HookPoint | None, images: Images,
        out: NDArray[Any] | None, how: dict[str, Any],
    ) -> NDArray[Any]:  # fmt: skip
        """Have each store read its own images, `n_tokens` tokens each."""
        if len(self.stores) == 1:
            return method(self.stores[0], layer, images=images, out=out, **how)
        chosen = np.arange(self.n_images)[images] if isinstance(images, slice) else np.asarray(images)
        if chosen.size and (chosen.min() < 0 or chosen.max() >= self.n_images):
            given = f"{chosen.min()}..{chosen.max()}"
            raise SettingsError(f"Image indices must lie in 0..{self.n_images - 1}, got {given}.")
        if out is None:
            out = empty_at_line((len(chosen), n_tokens, self.layout.d_model), self.dtype)
        numbers = np.searchsorted(self.starts, chosen, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(chosen)]
        for first, stop in pairwise(edges):
            if first < stop:
                number = int(numbers[first])
                local = chosen[first:stop] - self.starts[number]
                method(self.stores[number], layer, images=local, out=out[first:stop], **how)
        return out


def open_stores(stores: "Stores | StoreGroup") -> StoreGroup:
    """Open a store, a path, or several of either, as one group."""
    if isinstance(stores, StoreGroup):
        return stores
    several: Any = stores if isinstance(stores, list | tuple) else [stores]
    return StoreGroup([s if isinstance(s, ActivationStore) else ActivationStore.open(s) for s in several])


def _numbered(name: str, index: int) -> str:
    return name if index == 0 else f"{name} {index + 1}"


def _image_prompts(store: ActivationStore) -> object:
    """What identifies the prompts among a store's tokens. Prompts of texts leave an image's tokens as they are."""
    return store.layout.n_extra, store.settings.prompts if store.layout.n_extra else None


def _describe_prompts(store: ActivationStore) -> str:
    n, prompts = store.layout.n_extra, store.settings.prompts or {}
    hashed = f" ({str(prompts['hash'])[:8]})" if "hash" in prompts else ""
    return f"{n} prompts of {prompts.get('method', 'unknown')}{hashed}" if n else "no prompts among its tokens"
