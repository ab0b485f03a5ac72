"""encode(): encodes a store with the SAE of a run, shard by shard, and resumes where it was interrupted."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import NonFiniteError, SettingsError, open_stores
from actcache.artifacts import OutputLock, begin_artifact, missing_shards, read_records, record_path, seal_artifact
from actcache.machine import check_memory
from actcache.models import choose_device, free_memory
from actcache.progress import Progress
from actcache.schema import parse
from actcache.store import StoreGroup, Stores
from actcache.workers import find_worker
from saetrain.codes.settings import CodesRecord
from saetrain.codes.store import CodeStore
from saetrain.codes.writer import code_dtypes, codes_settings, prepare_codes, write_shard
from saetrain.model import Encoder, encoder_bytes, make_encoder
from saetrain.run import Run

logger = logging.getLogger(__name__)

UNDERFLOW_SHARE = 0.01
"""A warning is logged where a larger share of the codes is lost to float16."""


def encode(
    run: Run | str | Path,
    store: Stores | StoreGroup,
    codes: str | Path,
    *,
    device: str = "auto",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> CodeStore:
    """Encode a store with the SAE of a run: the store it was trained on, or any other of the same model.

    Repeating the call is safe: if the codes are complete, they are returned; if it was interrupted, it resumes. Under
    torchrun or srun, every process takes its own shards (`find_worker`).

    Args:
        store: one store, or several of one model, whose shards follow one another.
        device: affects speed only.
        on_progress: called with (images done, images in total) of this worker's share.

    Raises:
        ParentMismatchError: the store holds another model.
        SettingsError: --overwrite was given to several workers.
        IncompleteError: the run or the store is not complete; or this worker is done and others are not. The worker
            that finishes last seals the codes.
        NonFiniteError: a value does not fit into float16.
    """
    worker = find_worker()
    if overwrite and not worker.alone:
        raise SettingsError(
            "--overwrite with several workers would delete what the others write. Remove the codes by hand, and "
            "start the workers without it."
        )
    run = run if isinstance(run, Run) else Run.open(run)
    store = open_stores(store)
    run.check_store(store)
    target = choose_device(device)
    check_memory(
        encoder_bytes(run.sae_config.n_latents, run.d_model), free_memory(target), f"Encoding with {run.path}",
        "Take a machine with more memory.",
    )  # fmt: skip
    with OutputLock(codes, shared=not worker.alone) as lock:
        artifact = begin_artifact(
            codes,
            "codes",
            settings=codes_settings(run.artifact, store, run.hook_point),
            parents={**store.parents(), "run": (run.run_id, run.path), **store.image_parents()},
            provenance={
                "torch": torch.__version__,
                "quality": run.quality,
                "curves": run.curves(),
                "sae": {**run.artifact.settings["sae"], "hook_point": str(run.hook_point), "d_model": run.d_model},
                "source": {
                    **{
                        key: store.stores[0].artifact.provenance[key]
                        for key in ("images", "model", "pretrained")
                        if key in store.stores[0].artifact.provenance
                    },
                    **({"columns": dict(columns)} if (columns := store.stores[0].settings.columns) else {}),
                },
            },
            prepare=lambda folder: prepare_codes(folder, store, run),
            overwrite=overwrite,
            lock=lock,
        )
        if not artifact.complete:
            encoder = make_encoder(run.sae().to(target))
            shards = store.shards()
            todo = [shard for shard in missing_shards(artifact.path, len(shards)) if worker.owns(shard)]
            total = sum(len(images) for shard, images in enumerate(shards) if worker.owns(shard))
            done = total - sum(len(shards[shard]) for shard in todo)
            with ThreadPoolExecutor(1, thread_name_prefix="write codes") as pool:
                written: list[Future[None]] = []
                for shard in todo:
                    before = done

                    def report(n_images: int, before: int = before) -> None:
                        if on_progress:
                            on_progress(before + n_images, total)

                    arrays, n_underflowed = _encode_shard(encoder, run, store, shards[shard], report)
                    if written:  # one shard is written while the next one is encoded
                        written.pop().result()
                    written.append(pool.submit(write_shard, artifact, shard, arrays, n_underflowed))
                    done += len(shards[shard])
                for last in written:
                    last.result()
            worker.check_others(len(missing_shards(artifact.path, len(shards))), len(shards), "codes")
            advice = "Remove it and run the same command again: it encodes this shard anew."
            records = [
                parse(CodesRecord, record, record_path(artifact.path, record["shard"]), advice)
                for record in read_records(artifact.path)
            ]
            n_entries = sum(record.n_entries for record in records)
            n_underflowed = sum(record.n_underflowed or 0 for record in records)
            failed = {str(image): reason for image, reason in store.failed.items()}
            counted = all(record.n_underflowed is not None for record in records)
            more: dict[str, object] = {"n_underflowed": n_underflowed} if counted else {}
            more["patch_size"] = list(store.stores[0].settings.patch_size)
            seal_artifact(artifact.path, n_entries=n_entries, failed=failed, **more)
            if n_underflowed > UNDERFLOW_SHARE * (n_entries + n_underflowed):
                logger.warning(
                    "%s codes, %.1f %% of all, are below 6e-8 and became 0 in float16, so they are not in %s. The SAE "
                    "gives its codes a very small scale; train with --normalize, or scale the SAE's encoder up and its "
                    "decoder down.", f"{n_underflowed:,}", 100 * n_underflowed / (n_entries + n_underflowed),
                    artifact.path,
                )  # fmt: skip
        return CodeStore.open(artifact.path)


def _encode_shard(
    encoder: Encoder, run: Run, store: StoreGroup, images: range, report: Callable[[int], None]
) -> tuple[dict[str, NDArray[np.generic]], int]:
    """Encode one shard into its six arrays. Also returns the number of codes that are 0 in float16."""
    n_tokens, n_latents = store.n_tokens, run.sae_config.n_latents
    tokens = store.layout.token_kind(run.train_config.token_kind)
    first_token = 1 if tokens == "patch" else 0
    dtypes = code_dtypes(n_latents, store.n_images * n_tokens)
    rows, latents, values = [], [], []
    n_underflowed = 0
    step = store.layout.chunk_images
    cuts = [np.arange(first, min(first + step, images.stop)) for first in range(images.start, images.stop, step)]
    parts = [positions[store.valid[positions]] for positions in cuts]
    with ThreadPoolExecutor(1, thread_name_prefix="read activations") as pool:
        read_part = partial(store.read, run.hook_point, tokens=tokens, check=store.checks_cheaply)
        read = pool.submit(read_part, images=parts[0])
        for number, positions in enumerate(parts):
            x = torch.from_numpy(read.result())
            if number + 1 < len(parts):
                read = pool.submit(read_part, images=parts[number + 1])
            per_image = x.shape[1]
            row, latent, value = (part.cpu() for part in encoder(x.flatten(0, 1)))
            _check_values(value, row, positions, per_image, store)
            half = value.half()
            if not half.all():  # below 6e-8: an entry that rounds to 0 is not an entry
                fires = half != 0
                row, latent, half = row[fires], latent[fires], half[fires]
                n_underflowed += len(fires) - len(half)
            image = torch.from_numpy(positions)[row // per_image]
            rows.append((image * n_tokens + row % per_image + first_token).numpy().astype(dtypes["row"]))
            latents.append(latent.numpy().astype(dtypes["latent"]))
            values.append(half.numpy())
            report(int(cuts[number][-1]) + 1 - images.start)
    row_all, latent_all, value_all = np.concatenate(rows), np.concatenate(latents), np.concatenate(values)
    n_rows = len(images) * n_tokens
    by_row = np.bincount((row_all - images.start * n_tokens).astype(np.int64), minlength=n_rows)
    order = np.argsort(latent_all, kind="stable")  # radix sort for 16-bit latents
    by_latent = np.bincount(latent_all, minlength=n_latents)
    return {
        "indptr": np.concatenate([[0], np.cumsum(by_row)]),
        "latent": latent_all,
        "value": value_all,
        "latent_indptr": np.concatenate([[0], np.cumsum(by_latent)]),
        "row": row_all[order],
        "latent_value": value_all[order],
    }, n_underflowed


def _check_values(value: Tensor, row: Tensor, positions: NDArray[np.int64], per_image: int, store: StoreGroup) -> None:
    """Refuse values above 65,504: codes are stored as float16, where they would silently become infinite."""
    if len(value) and not float(value.max()) <= 65504:
        image = int(positions[int(row[value.argmax()]) // per_image])
        raise NonFiniteError(
            f"A code of image {store.images['uri'][image].as_py()} is {float(value.max()):g}, beyond the range of "
            "float16 (65,504). Train with --normalize center."
        )
