"""Measures the cost of masks: the masking curve from cached activations against as many full forward passes.

The masks are ten k, each kept and dropped, and the original, which makes 21; all latents and no latents come on top.
Reading, encoding, decoding and classifying count. The two alternate: a full forward pass with pixels in memory is timed
once per round and multiplied by 21.
"""

import tempfile
from pathlib import Path
from statistics import median

from common import emit, parser, timed

import numpy as np
import torch
from PIL import Image

from actcache import extract, open_stores
from actcache.prompts import open_towers
from analysis.classifier.streams import as_numpy, batches
from analysis.config import StudyConfig
from analysis.interventions.latent_choice import LatentCounts
from analysis.interventions.latent_masks import classify_masked, make_masks
from analysis.interventions.study import choose_study_images, open_study
from saetrain import SAEConfig, TrainConfig, train

N_MASKS = 21


def main() -> None:
    arguments = parser(
        __doc__, model="ViT-B-16-quickgelu", pretrained="random:0", layer=10, n_latents=12288, k=32, images=32,
        pixels=224, batch_size=32, rounds=3, folder=Path(),
        device="auto",
    )  # fmt: skip
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_images(folder / "images", options.images, options.pixels)
        extract(
            folder / "images", folder / "x.acts", model=options.model, pretrained=options.pretrained,
            layers=[options.layer], device=options.device,
        )  # fmt: skip
        sae = SAEConfig("topk", options.n_latents, options.k)
        steps = TrainConfig(n_steps=3, batch_size=64)
        run = train(folder / "x.acts", folder / "run", sae=sae, config=steps, device=options.device)
        # the same images again, in another order
        extract(
            folder / "images", folder / "y.acts", model=options.model, pretrained=options.pretrained,
            layers=[options.layer], seed=1, device=options.device,
        )  # fmt: skip
        store = open_stores(folder / "y.acts")
        towers = open_towers(store.stores[0].artifact, device=options.device)
        config = StudyConfig(on_seen="use")
        images = choose_study_images(run, store, config)
        study = open_study(run, images, towers, config, batch_size=options.batch_size)
        grid = sorted(
            {max(1, options.n_latents * i // 12288) + i for i in (1, 2, 5, 10, 50, 100, 500, 1000, 2000, 4000)}
        )
        masks = make_masks(count(study), grid, 0, np.random.default_rng(0))
        masks = [mask for mask in masks if mask.selection == "class"]
        vision, images = study.classifier.vision, study.classifier.images
        pixels = torch.randn(len(images), 3, *vision.image_size)

        @torch.no_grad()
        def whole() -> None:
            for part in batches(np.arange(len(images)), options.batch_size):
                vision.head(vision.run_blocks(vision.embed(pixels[part]), 0, vision.n_layers))

        @torch.no_grad()
        def rest() -> None:
            for part in batches(images, options.batch_size):
                study.classifier.embed(study.classifier.read(part))

        @torch.no_grad()
        def mask() -> None:
            classify_masked(
                {"": study.classifier}, study.sae, study.tokens, images, masks, modes=("keep", "drop"),
                keep_errors=(False,), batch_size=options.batch_size,
            )  # fmt: skip

        whole(), mask()
        times = [(timed(mask), timed(whole), timed(rest)) for _ in range(options.rounds)]
    masked_s, whole_s, rest_s = (median(column) for column in zip(*times, strict=True))
    emit(
        options,
        n_masks=N_MASKS,
        masks_s=masked_s,
        whole_forwards_s=N_MASKS * whole_s,
        speedup=median(N_MASKS * b / a for a, b, _ in times),
        limit_rest_of_model_s=N_MASKS * rest_s,
        share_of_limit=median(N_MASKS * c / a for a, _, c in times),
        images_per_s=N_MASKS * len(images) / masked_s,
        tokens_per_s=N_MASKS * len(images) * vision.n_tokens / masked_s,
    )


def make_images(folder: Path, n_images: int, pixels: int) -> None:
    """Images of noise, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(n_images):
        path = folder / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (pixels, pixels, 3), np.uint8)).save(path)


@torch.no_grad()
def count(study) -> LatentCounts:  # type: ignore[no-untyped-def]
    counts = LatentCounts.empty(len(study.classifier.names), study.sae.config.n_latents)
    for images, spliced in study.batches(study.classifier.images):
        counts.add(study.classifier.labels[images[as_numpy(spliced.images)]], as_numpy(spliced.latents))
    return counts


if __name__ == "__main__":
    main()
