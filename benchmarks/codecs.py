"""Is lossless compression worth it? Ratio and speed of blosc settings on real activations, one core.

In: stores. Out: per store, hook point and setting: ratio (raw bytes / compressed), encode and decode GB/s of raw bytes
(best of `--repeat`), and memcpy of the same chunks in the same run (`limit_memcpy_gb_s`). Chunks are `--chunk-images`
x one patch row x d_model of `patches`, taken evenly over the store. `block_kib` is what blosc shuffles and compresses
at once; 0 is its own choice.

A reader that decodes on one core while it waits for the link gets min(link x ratio, decode) GB/s; raw gives `link`.
So compression wins below a link of `decode_gb_s`, and by the whole ratio below `pays_in_full_below_gb_s`.
`byte_entropy_ratio` is what a perfect coder of each byte position on its own would reach, neighbors unseen.

With `--folder`, the first hook point of every store is also written there by each codec of the format and read whole
by ActivationStore, warm: `reads`, with the bytes on disk.
"""

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numcodecs
import numcodecs.blosc
import numpy as np
from common import emit, parser, timed
from numpy.typing import NDArray

from actcache import ActivationStore, HookPoint
from actcache.sources import ImagePlan
from actcache.store.codecs import CODECS
from actcache.store.writer import ShardWriter, begin_store, seal_store

Key = tuple[str, str, int, int]
NAMES = ("codec", "shuffle", "level", "block_kib")

SHUFFLES = {"bitshuffle": numcodecs.Blosc.BITSHUFFLE, "shuffle": numcodecs.Blosc.SHUFFLE}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("stores", type=Path, nargs="+")
    arguments.add_argument("--codecs", nargs="+", default=["lz4", "zstd"])
    arguments.add_argument("--shuffles", nargs="+", default=list(SHUFFLES), choices=list(SHUFFLES))
    arguments.add_argument("--block-kib", type=int, nargs="+", default=[0, 512])
    arguments.add_argument("--levels", type=int, nargs="+", default=[1, 3, 5])
    arguments.add_argument("--chunk-images", type=int, help="default: as each store has it")
    arguments.add_argument("--chunks", type=int, default=32, help="of each hook point, at most")
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--folder", type=Path, help="where stores of every codec are written and read")
    options = arguments.parse_args()

    numcodecs.blosc.set_nthreads(1)
    numcodecs.blosc.use_threads = False
    results, reads = [], []
    for path in options.stores:
        store = ActivationStore.open(path)
        for hook in store.hook_points:
            chunks = read_chunks(store, hook, options.chunk_images or store.layout.chunk_images, options.chunks)
            about = {"store": path.stem, "hook_point": str(hook), "dtype": str(store.dtype)}
            about |= {"chunk_bytes": chunks[0].nbytes, "n_chunks": len(chunks)}
            results += [about | row for row in measure(chunks, options)]
        if options.folder:
            reads += [{"store": path.stem} | row for row in measure_reads(store, options)]
    options.stores = [path.name for path in options.stores]
    emit(options, results=results, reads=reads)


# ---------------------------------------------------------------------------------------------------------------------
# Chunks


def read_chunks(store: ActivationStore, hook: HookPoint, n_images: int, n_chunks: int) -> list[NDArray[Any]]:
    """Up to `n_chunks` whole chunks [n_images, columns, D], over all full blocks and patch rows."""
    rows, columns = store.layout.grid
    n_images = min(n_images, store.n_images)
    chosen = np.unique(np.linspace(0, store.n_images // n_images * rows - 1, n_chunks).astype(int))
    chunks = []
    for block, row in (divmod(int(number), rows) for number in chosen):
        x = store.read(hook, images=slice(block * n_images, (block + 1) * n_images), tokens="patch")
        chunks.append(np.ascontiguousarray(x[:, row * columns : (row + 1) * columns]))
    return chunks


def byte_entropy_ratio(chunks: list[NDArray[Any]]) -> float:
    """Bits of a value over the entropies of its bytes, each byte position taken for itself."""
    values = np.concatenate([chunk.reshape(-1) for chunk in chunks])
    planes, bits = values.view(np.uint8).reshape(-1, values.itemsize), 0.0
    for plane in planes.T:
        share = np.bincount(plane, minlength=256) / len(plane)
        share = share[share > 0]
        bits -= float((share * np.log2(share)).sum())
    return 8 * values.itemsize / bits


def measure(chunks: list[NDArray[Any]], options: Any) -> list[dict[str, Any]]:
    """A row a setting. The settings take turns, so that all see the same machine."""
    n_bytes = sum(chunk.nbytes for chunk in chunks)
    targets = [np.zeros_like(chunk) for chunk in chunks]
    keys: list[Key] = list(itertools.product(options.codecs, options.shuffles, options.levels, options.block_kib))
    encoders = {
        (codec, shuffle, level, kib): numcodecs.Blosc(
            codec, level, SHUFFLES[shuffle], blocksize=kib << 10, typesize=chunks[0].itemsize
        )
        for codec, shuffle, level, kib in keys
    }
    encoded = {key: [encoder.encode(chunk) for chunk in chunks] for key, encoder in encoders.items()}
    for key, parts in encoded.items():  # lossless, or nothing below means anything
        for chunk, part in zip(chunks, parts, strict=True):
            assert encoders[key].decode(part) == chunk.tobytes()

    def encode(key: Key) -> None:
        for chunk in chunks:
            encoders[key].encode(chunk)

    def decode(key: Key) -> None:
        for part, target in zip(encoded[key], targets, strict=True):
            encoders[key].decode(part, out=target)

    def copy() -> None:
        for chunk, target in zip(chunks, targets, strict=True):
            np.copyto(target, chunk)

    seconds: dict[Any, list[float]] = {}
    for _ in range(options.repeat):
        seconds.setdefault("copy", []).append(timed(copy))
        for key in keys:
            seconds.setdefault(("encode", key), []).append(timed(lambda key=key: encode(key)))
            seconds.setdefault(("decode", key), []).append(timed(lambda key=key: decode(key)))
    speed = {what: n_bytes / min(times) / 1e9 for what, times in seconds.items()}
    rows: list[dict[str, Any]] = [
        {
            **dict.fromkeys(NAMES),
            "codec": "raw",
            "ratio": 1.0,
            "byte_entropy_ratio": byte_entropy_ratio(chunks),
            "limit_memcpy_gb_s": speed["copy"],
        }
    ]
    for key in keys:
        ratio = n_bytes / sum(len(part) for part in encoded[key])
        rows.append(
            {
                **dict(zip(NAMES, key, strict=True)),
                "ratio": ratio,
                "encode_gb_s": speed["encode", key],
                "decode_gb_s": speed["decode", key],
                "limit_memcpy_gb_s": speed["copy"],
                "share_of_limit": speed["decode", key] / speed["copy"],
                "pays_in_full_below_gb_s": speed["decode", key] / ratio,
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Whole stores


def measure_reads(store: ActivationStore, options: Any) -> list[dict[str, Any]]:
    """A row a codec of the format: bytes on disk, GB/s of values that ActivationStore.read gives."""
    hook = store.hook_points[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stores = {codec: write_copy(store, hook, codec, Path(folder) / f"{codec}.acts") for codec in CODECS}
        out = store.read(hook)
        expected = out.copy()
        seconds: dict[str, list[float]] = {codec: [] for codec in CODECS}
        for _ in range(options.repeat):
            for codec, copy in stores.items():
                seconds[codec].append(timed(lambda copy=copy: copy.read(hook, out=out)))
                assert (out == expected).all()
        return [
            {
                "codec": codec,
                "n_bytes": sum(file.stat().st_size for file in copy.path.rglob("c/**/*") if file.is_file()),
                "read_gb_s": out.nbytes / min(seconds[codec]) / 1e9,
            }
            for codec, copy in stores.items()
        ]


def write_copy(store: ActivationStore, hook: HookPoint, codec: str, path: Path) -> ActivationStore:
    """One hook point of a store, stored by another codec."""
    layout = store.layout
    settings = {**store.artifact.settings, "hook_points": [str(hook)], "n_extra": 0, "codec": codec}
    plan = ImagePlan(store.images, str(settings["rows_id"]), 0)
    artifact = begin_store(path, plan=plan, images_path=store.path, settings=settings, provenance={})
    for shard in range(layout.n_shards):
        with ShardWriter(artifact, shard) as writer:
            for block in range(layout.n_blocks(shard)):
                images = np.array(layout.block_range(shard, block))
                x = store.read(hook, images=images)
                patches = x[:, 1:].reshape(len(x), *layout.grid, layout.d_model).transpose(1, 0, 2, 3)
                writer.write(hook, block, patches, x[:, 0], valid=store.valid[images])
            inside = layout.shard_range(shard)
            writer.commit({image: why for image, why in store.failed.items() if image in inside})
    seal_store(path)
    return ActivationStore.open(path)


if __name__ == "__main__":
    main()
