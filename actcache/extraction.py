"""extract(): images -> vision tower -> shards. The only file that sees all three.

Decoding runs in threads one batch ahead of the model; a block (16 or 64 images) of each hook point is all that is
held in memory. A shard's batches start at its first image, so a resumed run computes the same bytes.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import open_clip
import torch
import torchvision
from torch import Tensor

from actcache.artifact import (
    missing_shards,
    remove_litter,
)
from actcache.codecs import check_codec, check_dtype
from actcache.errors import ImageSourceError, NonFiniteError, SettingsError
from actcache.hook_point import HookPoint
from actcache.images import ImageFolder, ImagePlan, decode_image, describe_failures
from actcache.layout import StoreLayout, choose_shape
from actcache.store import ActivationStore, layout_of
from actcache.vision_tower import VisionTower, load_vision_tower
from actcache.writer import ShardWriter, begin_store, seal_store

ON_ERROR = ("stop", "skip")


def extract(
    images: ImageFolder | str | Path,
    store: str | Path,
    *,
    model: str,
    pretrained: str,
    layers: Sequence[int],
    site: str = "resid_post",
    dtype: str = "float16",
    precision: str = "auto",
    codec: str = "raw",
    shard_images: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    device: str = "auto",
    n_threads: int | None = None,
    on_error: str = "stop",
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> ActivationStore:
    """Run the tower once over the images and keep the residual stream at the wanted layers.

    The same call twice is safe: complete, it returns the store; interrupted, it resumes; with other settings it
    raises and shows the differing fields.

    Args:
        images: a folder of images.
        store: the store to write, e.g. `val.acts`.
        model, pretrained: see `load_vision_tower`.
        layers: 0-based block indices, in any order; blocks after the last one wanted are not run.
        dtype: what is stored, float16 or float32.
        precision: what is computed: auto, float32 or bfloat16 (float32 stream, bfloat16 branches).
        codec: raw, lz4 or zstd (lossless).
        shard_images: images a shard, a multiple of 16; chosen from the number of images when None.
        limit: take only so many images, a random sample.
        seed: of the stored order.
        batch_size, device, n_threads: speed only.
        on_error: `stop` at an image that cannot be read, or `skip` it: its row stays, marked, and readers leave it out.
        on_progress: called with (images done, images in all).

    Raises:
        ImageSourceError, ModelError, SettingsError, NonFiniteError; what is committed stays.
    """
    source = images if isinstance(images, ImageFolder) else ImageFolder(images)
    check_dtype(dtype)
    check_codec(codec)
    if on_error not in ON_ERROR:
        raise SettingsError(f"--on-error must be one of {', '.join(ON_ERROR)}, got {on_error!r}.")
    if batch_size < 1:
        raise SettingsError(f"--batch-size must be at least 1, got {batch_size}.")
    hooks = sorted({HookPoint(layer, site) for layer in layers})
    plan = source.plan(limit=limit, seed=seed)
    tower = load_vision_tower(model, pretrained, precision=precision, device=device)
    _check_layers(hooks, tower, model)
    chunk_images, shard_images = choose_shape(plan.n_images, shard_images)
    settings = {
        "model_id": tower.model_id,
        "rows_id": plan.rows_id,
        "hook_points": [str(hook) for hook in hooks],
        "dtype": dtype,
        "precision": tower.precision,
        "codec": codec,
        "n_images": plan.n_images,
        "grid": list(tower.grid),
        "patch_size": list(tower.patch_size),
        "d_model": tower.d_model,
        "n_extra": 0,
        "chunk_images": chunk_images,
        "shard_images": shard_images,
        "seed": seed,
        "limit": limit,
        "preprocess": tower.preprocess,
    }
    provenance = {
        "model": Path(model).name,
        "pretrained": Path(pretrained).name,
        "images": source.path.name,
        "open_clip": open_clip.__version__,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    artifact = begin_store(
        store,
        plan=plan,
        images_path=source.path,
        settings=settings,
        provenance=provenance,
        overwrite=overwrite,
    )
    if not artifact.complete:
        remove_litter(artifact.path)
        layout = layout_of(artifact.settings)
        todo = missing_shards(artifact.path, layout.n_shards)
        done = layout.n_images - sum(len(layout.shard_range(shard)) for shard in todo)
        with ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
            for shard in todo:

                def report(n_images: int, before: int = done) -> None:
                    if on_progress:
                        on_progress(before + n_images, layout.n_images)

                report(0)
                with ShardWriter(artifact, shard) as writer:
                    _fill_shard(
                        writer, layout, plan, source.path, tower, hooks, batch_size, pool, on_error == "skip", report
                    )
                done += len(layout.shard_range(shard))
        seal_store(artifact.path)
    return ActivationStore.open(artifact.path)


def _fill_shard(
    writer: ShardWriter,
    layout: StoreLayout,
    plan: ImagePlan,
    folder: Path,
    tower: VisionTower,
    hooks: Sequence[HookPoint],
    batch_size: int,
    pool: ThreadPoolExecutor,
    skip: bool,
    report: Callable[[int], None],
) -> None:
    """Compute one shard block by block and commit it. Without `skip` an unreadable image raises."""
    images = layout.shard_range(writer.shard)
    uris = plan.table["uri"].slice(images.start, len(images)).to_pylist()
    batches = [
        range(first, min(first + batch_size, block.stop))
        for block in (layout.block_range(writer.shard, b) for b in range(layout.n_blocks(writer.shard)))
        for first in range(block.start, block.stop, batch_size)
    ]
    reasons: dict[int, str] = {}
    held: dict[HookPoint, list[Tensor]] = {hook: [] for hook in hooks}
    paths = [[folder / uris[i - images.start] for i in batch] for batch in batches]
    for batch, decoded in zip(batches, _decode_ahead(paths, tower, pool), strict=True):
        reasons |= {image: pixels for image, pixels in zip(batch, decoded, strict=True) if isinstance(pixels, str)}
        if reasons and not skip:
            raise ImageSourceError(
                f"{len(reasons)} image(s) cannot be read: "
                f"{describe_failures([(uris[i - images.start], reason) for i, reason in reasons.items()])} "
                "Pass --on-error skip to keep their rows marked, or repair them and begin anew with --overwrite."
            )
        good = [pixels for pixels in decoded if not isinstance(pixels, str)]
        keep = [k for k, pixels in enumerate(decoded) if not isinstance(pixels, str)]
        streams = _run_tower(tower, hooks, good)
        for hook in hooks:
            full = torch.zeros(len(batch), layout.n_tokens, layout.d_model, device=tower.device)
            if keep:
                _check_finite(streams[hook], writer, hook, [uris[batch[k] - images.start] for k in keep])
                full[keep] = streams[hook]
            held[hook].append(full)
        block = (batch.start - images.start) // layout.chunk_images
        block_range = layout.block_range(writer.shard, block)
        if batch.stop == block_range.stop:
            valid = torch.tensor([image not in reasons for image in block_range]).numpy()
            for hook, parts in held.items():
                x = torch.cat(parts).to(_torch_dtype(writer))  # [n, T, D]
                patches = (
                    x[:, 1:].reshape(len(x), *layout.grid, -1).transpose(0, 1).contiguous()
                )  # [rows, n, columns, D]
                writer.write(hook, block, patches.cpu().numpy(), x[:, 0].cpu().numpy(), valid=valid)
                parts.clear()
        report(batch.stop - images.start)
    writer.commit(reasons)


def _decode_ahead(
    paths: Sequence[Sequence[Path]], tower: VisionTower, pool: ThreadPoolExecutor
) -> Iterator[list[Tensor | str]]:
    """Decode batches in order, one batch ahead of the consumer. A str is the reason an image cannot be read."""

    def load(path: Path) -> Tensor | str:
        try:
            return tower.transform(decode_image(path))
        except ImageSourceError as error:
            return str(error)

    ahead: deque[list[Future[Tensor | str]]] = deque()
    try:
        for batch in paths:
            ahead.append([pool.submit(load, path) for path in batch])
            if len(ahead) == 2:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        for batch_futures in ahead:
            for future in batch_futures:
                future.cancel()


@torch.no_grad()  # not inference_mode: autocast's weight cache does not work inside it (4 instead of 18 images/s)
def _run_tower(tower: VisionTower, hooks: Sequence[HookPoint], images: Sequence[Tensor]) -> dict[HookPoint, Tensor]:
    """The residual stream at each hook point, [B, T, D] float32, in one pass that stops at the last one."""
    if not images:
        return {}
    x = tower.embed(torch.stack(list(images)))
    streams: dict[HookPoint, Tensor] = {}
    layer = 0
    for hook in hooks:
        x = tower.run_blocks(x, layer, hook.layer + 1)
        layer = hook.layer + 1
        streams[hook] = x
    return streams


def _check_finite(stream: Tensor, writer: ShardWriter, hook: HookPoint, uris: Sequence[str]) -> None:
    stored = stream.to(_torch_dtype(writer))
    bad = ~torch.isfinite(stored).flatten(1).all(1)
    if bad.any():
        k = int(bad.nonzero()[0, 0])
        peak = float(stream[k].abs().max())
        raise NonFiniteError(
            f"{hook} is not finite for image {uris[k]} (largest value {peak:g}, stored as {writer.dtype.name}). "
            "Nothing of this shard was written. Try --precision float32 and --dtype float32, or check the checkpoint."
        )


def _torch_dtype(writer: ShardWriter) -> torch.dtype:
    dtype: Any = getattr(torch, writer.dtype.name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _check_layers(hooks: Sequence[HookPoint], tower: VisionTower, model: str) -> None:
    if not hooks:
        raise SettingsError("Name at least one layer with --layer.")
    for hook in hooks:
        if hook.layer >= tower.n_layers:
            raise SettingsError(
                f"{Path(model).name} has no layer {hook.layer}: its blocks are 0..{tower.n_layers - 1}. "
                f"Choose --layer within that range."
            )
