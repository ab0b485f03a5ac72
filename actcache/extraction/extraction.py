"""extract(): images -> vision tower -> shards. Only this module uses all three.

Three things run at the same time: threads decode two batches ahead, the tower runs, and one thread writes. Memory holds
two blocks (of 16 or 64 images) of each hook point: one is being filled, the other written. The batches of a shard start
at its first image, so a resumed run computes the same bytes.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from actcache.artifacts import (
    ARTIFACT_FILE,
    OutputLock,
    check_apart,
    missing_shards,
    read_records,
    remove_artifact,
)
from actcache.errors import ImageSourceError, SettingsError
from actcache.extraction.block import Block
from actcache.extraction.config import ExtractConfig
from actcache.extraction.plan import ExtractionPlan, check_stream, plan_extraction
from actcache.hook_point import HookPoint
from actcache.machine import count_processors
from actcache.models import VisionTower
from actcache.options import check_number
from actcache.progress import Progress
from actcache.seen import hash_content
from actcache.sources import ImagePlan, ImageSource, describe_failures
from actcache.store import (
    ActivationStore,
    ShardWriter,
    StoreLayout,
    begin_store,
    check_space,
    read_images,
    seal_store,
)
from actcache.workers import Worker, find_worker

ON_ERROR = ("stop", "skip")


def extract(
    images: ImageSource | str | Path,
    store: str | Path,
    config: ExtractConfig | None = None,
    *,
    batch_size: int = 32,
    device: str = "auto",
    n_threads: int | None = None,
    on_error: str = "stop",
    overwrite: bool = False,
    on_progress: Progress | None = None,
    on_plan: Callable[[ImagePlan], None] | None = None,
    **options: Any,
) -> ActivationStore:
    """Run the tower once over the images and keep its activations at the wanted hook points.

        extract("images/", "val.acts", model="ViT-B-16-quickgelu", pretrained="openai", layers=[10])

    The same call twice is safe: if the store is complete, it is returned; if it was interrupted, the call resumes; with
    other settings it raises and shows the differing fields. Under torchrun or srun every process takes its own shards
    (`find_worker`).

    Args:
        images: a folder of images, a table of paths, webdataset tars, or a Hugging Face dataset on disk.
        store: the store to write, e.g. `val.acts` or `s3://bucket/val.acts`.
        config: what decides the bytes; or give its fields as keywords (`options`): model, pretrained and layers are
            required, the others are optional, see `ExtractConfig`.
        batch_size, device, n_threads: they change the speed; batch_size and device also the lowest bit of few values
            (another batch size 2.4e-4 of the float16 values that are computed in float32).
        on_error: `stop` at an image that cannot be read, or `skip` it: its row stays, marked, and readers leave it out.
        on_progress: called with (images done, images in all) of this worker's share.
        on_plan: called once before the model is loaded, with the images, their classes and what is left out.

    Raises:
        ImageSourceError, ModelError, SettingsError, NonFiniteError, StorageError: what is committed stays.
        IncompleteError: this worker is done, others are not; the last one to finish seals the store.
    """
    if on_error not in ON_ERROR:
        raise SettingsError(f"--on-error must be one of {', '.join(ON_ERROR)}, got {on_error!r}.")
    batch_size = check_number("batch_size", batch_size, int, at_least=1)
    n_threads = None if n_threads is None else check_number("n_threads", n_threads, int, at_least=1)
    if overwrite and not find_worker().alone:
        raise SettingsError(
            "--overwrite with several workers would delete what the others write. Remove the store first."
        )
    plan = plan_extraction(images, store, config or ExtractConfig(**options), device, on_plan, overwrite=overwrite)
    with OutputLock(plan.path, shared=not find_worker().alone) as lock:
        return run_plan(
            plan, lock, batch_size=batch_size, n_threads=n_threads, skip=on_error == "skip", overwrite=overwrite,
            on_progress=on_progress,
        )  # fmt: skip


def run_plan(
    plan: ExtractionPlan, lock: OutputLock, *, batch_size: int = 32, n_threads: int | None = None, skip: bool = False,
    overwrite: bool = False, repairing: bool = False, on_progress: Progress | None = None,
) -> ActivationStore:  # fmt: skip
    """Write what is missing of the planned store, seal it, and open it.

    Args:
        skip: keep the row of an image that cannot be read, marked, and go on.
        repairing: keep the store even if none of its images can be read.
    """
    worker, n_shards = find_worker(), plan.layout.n_shards
    new = not (plan.path / ARTIFACT_FILE).exists()
    if new:  # its images would not be the same the next time
        check_apart(plan.path, {"images": plan.source.path})
    if new or overwrite:
        check_stream(plan)
    artifact = begin_store(
        plan.path,
        plan=plan.images,
        images_path=plan.source.path,
        settings=plan.settings,
        provenance=plan.provenance,
        overwrite=overwrite,
        lock=lock,
    )
    if artifact.complete:
        _check_names(plan)
    else:
        missing = [shard for shard in missing_shards(plan.path, n_shards) if worker.owns(shard)]
        check_space(plan.path, plan.settings, missing)
        writers = (ShardWriter(artifact, shard) for shard in missing)
        with warnings.catch_warnings():
            # Decoders warn about metadata that nobody needs, and would do so in the middle of the progress bar.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            _fill_shards(plan, writers, missing, worker, batch_size, n_threads, skip, on_progress)
        _check_not_empty(plan, remove=not repairing)
        seal_store(plan.path)
        worker.check_others(len(missing_shards(plan.path, n_shards)), n_shards, "store")
    return ActivationStore.open(plan.path)


def _check_names(plan: ExtractionPlan) -> None:
    """Raise SettingsError if classes were chosen on the command line, and a complete store has others."""
    if plan.names_given and not read_images(plan.path)["label_name"].equals(plan.images.table["label_name"]):
        raise SettingsError(
            f"{plan.path} was stored with other names of classes than --class-level and --class-names give now. "
            "Choose another path, or pass --overwrite to replace it."
        )


def _check_not_empty(plan: ExtractionPlan, remove: bool) -> None:
    """Raise ImageSourceError, and `remove` the store, if every shard is written and no image could be read."""
    if missing_shards(plan.path, plan.layout.n_shards):
        return
    failed: dict[str, str] = {}
    for record in read_records(plan.path):
        failed |= record["failed"]
    if len(failed) < plan.images.n_images:
        return
    if remove:
        remove_artifact(plan.path)
    uris = plan.images.table["uri"]
    shown = describe_failures([(uris[int(image)].as_py(), reason) for image, reason in failed.items()], 3)
    raise ImageSourceError(
        f"None of the {plan.images.n_images:,} images of {plan.source.path} can be read, so nothing was stored: "
        f"{shown} Repair them, or give another source."
    )


class _Batch(NamedTuple):
    """Consecutive images of one block."""

    shard: int
    block: int
    images: range  # stored positions
    first: int  # position of the first image within the block

    def ends_block(self, layout: StoreLayout) -> bool:
        return self.images.stop == layout.block_range(self.shard, self.block).stop

    def ends_shard(self, layout: StoreLayout) -> bool:
        return self.images.stop == layout.shard_range(self.shard).stop


def _cut_batches(layout: StoreLayout, shards: Sequence[int], batch_size: int) -> Iterator[_Batch]:
    for shard in shards:
        for block in range(layout.n_blocks(shard)):
            images = layout.block_range(shard, block)
            for first in range(0, len(images), batch_size):
                yield _Batch(shard, block, images[first : first + batch_size], first)


def _fill_shards(
    plan: ExtractionPlan,
    writers: Iterator[ShardWriter],
    shards: Sequence[int],
    worker: Worker,
    batch_size: int,
    n_threads: int | None,
    skip: bool,
    on_progress: Progress | None,
) -> None:
    """Compute shards batch by batch, write them block by block, commit each. Unreadable images raise unless `skip`."""
    layout = plan.layout
    owned = [shard for shard in range(layout.n_shards) if worker.owns(shard)]
    total = sum(len(layout.shard_range(shard)) for shard in owned)
    done = total - sum(len(layout.shard_range(shard)) for shard in shards)
    uris = plan.images.table["uri"]
    blocks = [Block(plan), Block(plan)]
    reasons: dict[int, str] = {}
    content: list[str] = []
    with ExitStack() as stack, ThreadPoolExecutor(n_threads or count_processors(), "decode") as decoders, \
            ThreadPoolExecutor(1, "write") as thread:  # fmt: skip
        write = _Background(thread)  # it ends before `stack` abandons what was not committed
        writer: ShardWriter | None = None
        if on_progress:
            on_progress(done, total)
        for batch, decoded in _decode_ahead(plan, _cut_batches(layout, shards, batch_size), decoders):
            if writer is None:
                writer = stack.enter_context(next(writers))
                reasons, content = {}, []
            reasons |= {
                image: loaded.pixels
                for image, loaded in zip(batch.images, decoded, strict=True)
                if isinstance(loaded.pixels, str)
            }
            content += [loaded.content for loaded in decoded]
            if reasons and not skip:
                failed = [(uris[image].as_py(), reason) for image, reason in reasons.items()]
                raise ImageSourceError(
                    f"{len(reasons)} image(s) cannot be read: {describe_failures(failed)} "
                    "Pass --on-error skip to keep their rows, marked, or repair them and start again with --overwrite."
                )
            good = {k: loaded.pixels for k, loaded in enumerate(decoded) if not isinstance(loaded.pixels, str)}
            streams = _run_tower(plan.tower, plan.settings.hook_points, list(good.values())) if good else {}
            blocks[0].put(batch.first, len(batch.images), list(good), streams)
            if batch.ends_block(layout):
                first = batch.images.start - batch.first
                statistics = blocks[0].statistics(uris.slice(first, layout.chunk_images).to_pylist())
                write.wait()  # now the other block is free
                write.start(blocks[0].write, writer, batch.block, statistics)
                blocks.reverse()
            if batch.ends_shard(layout):
                write.start(writer.commit, dict(reasons), list(content))
                writer = None
            done += len(batch.images)
            if on_progress:
                on_progress(done, total)
        write.wait()


class _Background:
    """Calls that one thread makes one after the other, at most two ahead; `wait` raises their errors.

    After a call that failed no other one is made: a shard is not committed whose block was not written.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._pending: deque[Future[Any]] = deque()
        self._failed = False

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        self._pending.append(self._pool.submit(self._call, function, args))

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if not self._failed:
            self._failed = True
            function(*args)
            self._failed = False

    def wait(self) -> None:
        while self._pending:
            self._pending.popleft().result()


class _Loaded(NamedTuple):
    """An image, or the reason why it cannot be read; and the hash of its bytes, "" if there are none."""

    pixels: Tensor | str
    content: str


def _decode_ahead(
    plan: ExtractionPlan, batches: Iterator[_Batch], pool: ThreadPoolExecutor
) -> Iterator[tuple[_Batch, list[_Loaded]]]:
    """Read and decode batches in order, two ahead of the consumer."""
    uris = plan.images.table["uri"]

    def load(image: int) -> _Loaded:
        uri, content = uris[image].as_py(), ""
        try:
            data = plan.source.read(uri)
            content = hash_content(data)
            return _Loaded(plan.decode(data, uri), content)
        except ImageSourceError as error:
            return _Loaded(str(error), content)

    ahead: deque[tuple[_Batch, list[Future[_Loaded]]]] = deque()
    try:
        for batch in batches:
            ahead.append((batch, [pool.submit(load, image) for image in batch.images]))
            if len(ahead) == 3:
                first, futures = ahead.popleft()
                yield first, [future.result() for future in futures]
        while ahead:
            first, futures = ahead.popleft()
            yield first, [future.result() for future in futures]
    finally:
        for _, futures in ahead:
            for future in futures:
                future.cancel()


@torch.no_grad()  # not inference_mode: autocast's weight cache does not work inside it (4 instead of 18 images/s)
def _run_tower(tower: VisionTower, hooks: Sequence[HookPoint], images: Sequence[Tensor]) -> dict[HookPoint, Tensor]:
    """Activations [B, T, D] float32 of the hook points, in one pass that stops at the last one."""
    return tower.run(torch.stack(list(images)), hooks)
