"""Measures extraction end to end against the bare forward pass of the same blocks at the same precision.

The two alternate. `share_of_limit` is images/s of extract() (with decoding, statistics, checksums, writing and
sealing, but without loading the model) over images/s of the tower alone on decoded batches. `stop_speedup` is the time
of the full forward pass over the time when it stops at `--stop-layer`. The peak memory is that of this process.
"""

import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from common import emit, pairs, parser, timed

import torch

from actcache import HookPoint, extract, load_vision_tower
from actcache.models import choose_device
from actcache.sources import decode_image, open_source


def main() -> None:
    arguments = parser(
        __doc__, model="ViT-B-16", pretrained="random:0", stop_layer=5, precision="auto", batch_size=32, pairs=3,
        folder=Path(), device="auto",
    )  # fmt: skip
    arguments.add_argument("--images", type=Path, required=True)
    arguments.add_argument("--layer", type=int, action="append")
    arguments.add_argument("--limit", type=int)
    options = arguments.parse_args()
    layers = options.layer or [10]
    tower = load_vision_tower(options.model, options.pretrained, precision=options.precision, device=options.device)
    hooks = [HookPoint(layer) for layer in layers]
    source = open_source(options.images)
    uris = source.plan(limit=options.limit, seed=0).table["uri"].to_pylist()
    decode_s = timed(lambda: [tower.transform(decode_image(source.read(uri))) for uri in uris[: options.batch_size]])
    batch = torch.stack([tower.transform(decode_image(source.read(uri))) for uri in uris[: options.batch_size]])
    n_batches = -(-len(uris) // options.batch_size)
    tower.run(batch, hooks)
    seconds: list[float] = []

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:

        def run_extract() -> None:
            shutil.rmtree(f"{folder}/x.acts", ignore_errors=True)
            marks: list[float] = []
            extract(
                options.images, f"{folder}/x.acts", model=options.model, pretrained=options.pretrained, layers=layers,
                precision=options.precision, batch_size=options.batch_size, limit=options.limit, device=options.device,
                on_progress=lambda done, total: marks.append(time.perf_counter()),
            )  # fmt: skip
            seconds.append(time.perf_counter() - marks[0])

        def run_bare() -> None:
            for _ in range(n_batches):
                tower.run(batch, hooks)

        _, bare, _ = pairs(run_extract, run_bare, options.pairs)
    bare_rate = n_batches * options.batch_size / bare
    rate = len(uris) / statistics.median(seconds)
    last = [HookPoint(tower.n_layers - 1)]
    _, full, stop_speedup = pairs(
        lambda: tower.run(batch, [HookPoint(options.stop_layer)]), lambda: tower.run(batch, last), 5
    )
    emit(
        options,
        device=str(choose_device(options.device)),
        precision=tower.precision,
        n_images=len(uris),
        images_per_s=rate,
        tokens_per_s=rate * (1 + tower.grid[0] * tower.grid[1]),
        limit_bare_forward_images_s=bare_rate,
        share_of_limit=rate / bare_rate,
        decode_ms_an_image=decode_s / min(options.batch_size, len(uris)) * 1e3,
        full_forward_images_s=options.batch_size / full,
        stop_speedup=stop_speedup,
        peak_memory_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    )


if __name__ == "__main__":
    main()
