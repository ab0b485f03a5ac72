"""The writer: activations that a program computes become a store, block by block, in the order that the store wants.

In: the shape, what is said of the model, and blocks of activations. Out: a sealed `ActivationStore`. Promises: as for
`extract`: shards appear whole or not at all, the same call resumes and leaves out what is there, statistics and
checksums are recorded, and a value that is NaN or too large stops the writing of its shard. Memory holds one block.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.artifacts import ARTIFACT_FILE, WRITTEN, OutputLock, check_apart, missing_shards
from actcache.errors import ImageSourceError, NonFiniteError, SettingsError
from actcache.hook_point import HookPoint
from actcache.importing.config import ImportConfig
from actcache.importing.plan import Images, ImportPlan, plan_import
from actcache.machine import count_processors
from actcache.options import check_number
from actcache.seen import hash_content
from actcache.store import ActivationStore, ImportedFrom, ShardWriter, begin_store, check_space, seal_store
from actcache.workers import find_worker

Values = Any
"""[n, T, D] of the only hook point, as numpy's array or torch's tensor; or a mapping from hook points (or layers, or
names) to such arrays."""


def write_store(
    store: str | Path,
    config: ImportConfig | None = None,
    *,
    n_tokens: int,
    d_model: int,
    source: str,
    images: Images = None,
    n_images: int | None = None,
    overwrite: bool = False,
    **options: Any,
) -> "StoreWriter":
    """Write activations that a program of yours computes, e.g. those of a model that `extract` does not know.

        with write_store("x.acts", n_images=1000, n_tokens=197, d_model=768, layers=[10], model_name="my-vit",
                         source="commit 1a2b3c") as writer:
            for rows in writer:
                writer.write(activations[rows])  # [n, 197, 768]
        store = writer.store

    The loop gives the places (int64 [n], at most 64 of them) of images in your order, in the random order in which
    they are stored, so that a program may compute the activations of just these. When the block of `with` ends, the
    store is sealed if everything was written. Otherwise the same program goes on where this one stopped. Under
    torchrun or srun every process gets blocks of its own.

    Args:
        store: the store to write, e.g. `x.acts`.
        config: what is said of the activations; or give its fields as keywords (`options`), see `ImportConfig`.
        n_tokens, d_model: tokens of an image, special ones included; channels of a token.
        source: a text that tells these activations from others, e.g. a commit or the name of a file. It is a part of
            the identity: a store that was written with another one is not taken for this one.
        images: the images in your order: a folder (in the order of the sorted names), a table (in the order of its
            rows), or what else `extract` takes. Without them, an image is known by its place.
        n_images: their number, which must be given where `images` are not.
        overwrite: replace another store at this path.

    Raises:
        SettingsError: something is missing or does not fit. ImageSourceError, ModelError: see `extract`.
    """
    config = config or ImportConfig(**options)
    if not config.layers:
        raise SettingsError("Which layer do the activations come from? Say it, e.g. with layers=[10].")
    if images is None and n_images is None:
        raise SettingsError("Give the images, or their number as n_images.")
    plan = plan_import(
        store,
        config,
        images=images,
        n_images=None if n_images is None else check_number("n_images", n_images, int, at_least=1),
        n_tokens=check_number("n_tokens", n_tokens, int, at_least=1),
        d_model=check_number("d_model", d_model, int, at_least=1),
        hook_points=tuple(sorted(config.hook_points)),
        imported=ImportedFrom(WRITTEN, str(source)),
    )
    return StoreWriter(plan, overwrite=overwrite)


@dataclass
class _Block:
    """The block that the loop has reached."""

    shard: ShardWriter
    number: int
    images: range  # stored positions
    written: bool = False


class StoreWriter:
    """Writes a planned store; see `write_store`, which makes one. Nothing is written before the block of `with`."""

    def __init__(
        self, plan: ImportPlan, *, overwrite: bool = False, made_from: Mapping[str, Path] | None = None
    ) -> None:
        """`made_from`: name -> path of what the store may not lie in, or replace, beside the images."""
        self.plan, self.overwrite, self._made_from = plan, overwrite, dict(made_from or {})
        self._worker, self._stack, self._content = find_worker(), ExitStack(), list[str]()
        self._missing: list[int] = []
        self._begun = False  # whether there is a store to seal, of which all shards may be there already
        self._blocks: Iterator[NDArray[np.int64]] = iter(())
        self._block: _Block | None = None
        if overwrite and not self._worker.alone:
            raise SettingsError(
                "--overwrite with several workers would delete what the others write. Remove the store first."
            )

    @property
    def store(self) -> ActivationStore:
        """The store, opened. Raises IncompleteError before everything is written and the block of `with` has ended."""
        return ActivationStore.open(self.plan.path)

    @property
    def n_images(self) -> int:
        """Number of images that this process has still to write when the block of `with` begins."""
        return sum(len(self.plan.layout.shard_range(shard)) for shard in self._missing)

    def __enter__(self) -> "StoreWriter":
        path, plan, n_shards = self.plan.path, self.plan, self.plan.layout.n_shards
        new = not (path / ARTIFACT_FILE).exists()
        if new or self.overwrite:
            images = {} if plan.source is None else {"images": plan.source.path}
            check_apart(path, {**self._made_from, **images})
        if new:
            check_space(path, plan.settings, filter(self._worker.owns, range(n_shards)))
        with ExitStack() as stack:
            lock = stack.enter_context(OutputLock(path, shared=not self._worker.alone))
            artifact = begin_store(
                path,
                plan=plan.images,
                images_path=plan.images_path,
                settings=plan.settings,
                provenance=plan.provenance,
                overwrite=self.overwrite,
                lock=lock,
            )
            if not artifact.complete:
                self._begun = True
                self._missing = list(filter(self._worker.owns, missing_shards(path, n_shards)))
                check_space(path, plan.settings, self._missing)
                self._blocks = self._iterate(ShardWriter(artifact, shard) for shard in self._missing)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._stack:
            if close := getattr(self._blocks, "close", None):
                close()  # what was begun of a shard is removed
            self._block = None
            if kind is None and self._begun:
                left = missing_shards(self.plan.path, self.plan.layout.n_shards)
                if not any(map(self._worker.owns, left)):
                    seal_store(self.plan.path)
                    self._worker.check_others(len(left), self.plan.layout.n_shards, "store")

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        """The places of the images of each block that is not written yet, in the order of the activations."""
        return self._blocks

    def _iterate(self, shards: Iterator[ShardWriter]) -> Iterator[NDArray[np.int64]]:
        layout = self.plan.layout
        for shard in shards:
            self._content = []
            with shard:
                for number in range(layout.n_blocks(shard.shard)):
                    images = layout.block_range(shard.shard, number)
                    self._block = block = _Block(shard, number, images)
                    yield self.plan.rows[images.start : images.stop]
                    if not block.written:
                        raise SettingsError(
                            f"The {len(images)} images of a block were not written. Call write() once in each round of "
                            "the loop over the writer."
                        )
                self._block = None
                shard.commit({}, self._content)

    def write(self, values: Values) -> None:
        """Write the activations of the images whose places the loop gives. The values are not kept.

        Args:
            values: [n, T, D] of floating-point numbers, or {hook point, layer or name: such an array}. Special tokens
                come first, then the patches row by row.

        Raises:
            SettingsError: it is not the time for it, a hook point is missing, or a shape is another one.
            NonFiniteError: a value is NaN, infinite, or too large for the stored dtype; nothing of this shard is kept.
            StorageError: the disk is full or broken.
        """
        block = self._block
        if block is None or block.written:
            raise SettingsError("write() is called in the loop over the writer, once in each round.")
        given = {hook: self._check(hook, array, block.images) for hook, array in self._by_hook_point(values).items()}
        stored = {hook: self._round(hook, x, block.images) for hook, x in given.items()}
        layout = self.plan.layout
        n_cls, first = int(layout.has_cls), len(layout.prefix)
        for hook, x in stored.items():
            patches = x[:, first:].reshape(len(x), *layout.grid, layout.d_model).transpose(1, 0, 2, 3)
            block.shard.write(
                hook, block.number, patches, x[:, 0] if n_cls else None,
                registers=x[:, n_cls:first] if layout.n_registers else None,
            )  # fmt: skip
        self._content += self._hash(next(iter(given.values())), block.images)
        block.written = True

    def _by_hook_point(self, values: Values) -> dict[HookPoint, Any]:
        hooks = self.plan.settings.hook_points
        if not isinstance(values, Mapping):
            if len(hooks) > 1:
                raise SettingsError(f"Give an array for each of {', '.join(map(str, hooks))}, by its name or layer.")
            return {hooks[0]: values}
        known: dict[Any, HookPoint] = {name: hook for hook in hooks for name in (hook, str(hook), hook.layer)}
        given = {known.get(name): array for name, array in values.items()}
        if given.keys() != set(hooks):
            names = ", ".join(sorted(str(name) for name in values)) or "nothing"
            raise SettingsError(f"Expected activations of {', '.join(map(str, hooks))}, got {names[:200]}.")
        return {hook: given[hook] for hook in hooks}

    def _check(self, hook: HookPoint, values: Any, images: range) -> NDArray[Any]:
        """What a program gave, as an array of the right shape."""
        if hasattr(values, "detach"):  # a tensor of torch, whose bfloat16 numpy does not know
            values = values.detach().cpu().float().numpy()
        values, layout = np.asarray(values), self.plan.layout
        shape = (len(images), len(layout.prefix) + layout.n_patches, layout.d_model)
        if values.shape != shape or values.dtype.kind != "f":
            raise SettingsError(
                f"The activations of {hook} are {values.dtype} of shape {list(values.shape)}. Expected floating-point "
                f"numbers of shape {list(shape)}: images of this block, tokens, channels."
            )
        return np.asarray(values)

    def _round(self, hook: HookPoint, values: NDArray[Any], images: range) -> NDArray[Any]:
        """[n, T, D] in the stored dtype. Raises NonFiniteError."""
        with np.errstate(all="ignore"):
            stored = np.ascontiguousarray(values, dtype=self.plan.settings.stored_dtype)
        finite = np.isfinite(stored).all((1, 2))
        if not finite.all():
            k = int(np.argmin(finite))
            whole = np.isfinite(values[k]).all()
            what = f"is too large for {self.plan.settings.dtype}" if whole else "is NaN or infinite"
            advice = "Store float32 with --dtype float32." if whole else "Correct or leave out these activations."
            uri = self.plan.images.table["uri"][images[k]].as_py()
            raise NonFiniteError(
                f"{hook} {what} for image {uri} (number {self.plan.rows[images[k]]:,}, from 0). Nothing of this shard "
                f"was written. {advice}"
            )
        return stored

    def _hash(self, values: NDArray[Any], images: range) -> list[str]:
        """The content hash of each image: of its file, or, where there is none, of its activations as float32, so that
        it does not depend on the dtype in which they are stored.
        """
        source, uris = self.plan.source, self.plan.images.table["uri"]

        def hash_image(k: int) -> str:
            if source is None:
                with np.errstate(all="ignore"):
                    return hash_content(np.ascontiguousarray(values[k], dtype="<f4").data)
            try:
                return hash_content(source.read(uris[images[k]].as_py()))
            except ImageSourceError:
                return ""

        with ThreadPoolExecutor(count_processors()) as pool:
            return list(pool.map(hash_image, range(len(images))))
