"""look(): images through a tower and an SAE, without a store.

Images are decoded and prepared as `extract` does; one pass stops at the hook point. Codes of stored activations differ
from these by the rounding to the store's dtype.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from actcache import ModelError, NonFiniteError, SettingsError
from actcache.models import VisionTower
from actcache.options import check_number
from actcache.preprocess import MAX_PIXELS, covered_shares
from actcache.progress import Progress
from actcache.sources import decode_image, resize_image
from actcache.store import StoreLayout
from analysis.concepts import ConceptTable
from analysis.config import TowerOptions
from analysis.naming import find_names_of
from analysis.pictures import Picture
from analysis.query import At
from analysis.views.tower import Pair, open_pair
from analysis.views.view import Look, View
from saetrain import Run
from saetrain.interop import read_constants

MAX_IMAGES = 200
"""More images belong into a store, which keeps them on disk."""
BATCH = 8


def look(
    images: str | Path | Sequence[str | Path], sae: Run | str | Path, options: TowerOptions | None = None, *,
    latents: Sequence[int] = (), at: At | None = None, n_top: int = 10,
    concepts: ConceptTable | str | Path | None = None, store: str | Path | None = None,
    input_mean: str | Path | ArrayLike | None = None, input_scale: str | Path | ArrayLike | None = None,
    on_progress: Progress | None = None, on_download: Progress | None = None, **more: object,
) -> Look:  # fmt: skip
    """Show what an SAE sees in images: the strongest latents, and where they fire.

        look("dog.jpg", "runs/l10")
        look(["dog.jpg", "cat.jpg"], "hf://OWNER/REPO", latents=[907]).draw("907.html")

    Args:
        images: image files.
        sae: a run, a checkpoint of another package, or hf://OWNER/REPO[/folder][@revision].
        options: the tower, or give its fields as keywords (`more`): model, pretrained, layer ...; by default what the
            SAE names.
        latents: show these latents instead of the strongest of each image.
        at: (row, column) of a patch, or a slice of each for a region, whose strongest latents are shown.
        n_top: number of latents for each image.
        concepts: a table with names of a run's latents; by default those beside the run.
        store: the activation store of a run, if it has moved.
        input_mean, input_scale: as for `convert`, for a checkpoint that has them in none of its files.
        on_progress: called with (images done, images in all).
        on_download: called with bytes while files of the hub are downloaded.

    Raises:
        ImageSourceError: an image cannot be read.
        SettingsError, ParentMismatchError, HubError, CorruptError, ModelError: see `open_pair`.
    """
    files = [images] if isinstance(images, str | Path) else list(images)
    if not 1 <= len(files) <= MAX_IMAGES:
        raise SettingsError(
            f"Give 1 to {MAX_IMAGES} images, got {len(files):,}. For more, use `extract`, `encode` and `query`."
        )
    if latents and at is not None:
        raise SettingsError("--latent does not go with --at, which finds latents. Leave one of them out.")
    n_top = check_number("n_top", n_top, int, at_least=1)
    wanted = [check_number("latent", latent, int, at_least=0) for latent in latents]
    tower_options = options or TowerOptions(**more)  # type: ignore[arg-type]
    constants = read_constants(input_mean, input_scale)
    pair = open_pair(sae, tower_options, store=store, constants=constants, on_progress=on_download)
    names = find_names_of(pair.run, concepts)
    if wanted and max(wanted) >= pair.sae.config.n_latents:
        raise SettingsError(f"There is no latent {max(wanted)}: the SAE has 0..{pair.sae.config.n_latents - 1}.")
    views: list[View] = []
    for first in range(0, len(files), BATCH):
        views += _look_at(pair, [str(file) for file in files[first : first + BATCH]])
        if on_progress:
            on_progress(len(views), len(files))
    if at is not None:
        views[0].find_patches(at)  # raises for a place outside of the grid
    return Look(
        sae=pair.name, model=pair.model, hook_point=str(pair.hook_point), views=tuple(views), latents=tuple(wanted),
        at=at, n_top=n_top, names=names, notes=pair.notes,
    )  # fmt: skip


def _look_at(pair: Pair, files: Sequence[str]) -> list[View]:
    """The views of a batch of image files. Raises as `look`."""
    preprocess = pair.tower.preprocess
    decoded = [decode_image(file, name=file, max_pixels=MAX_PIXELS, preprocess=preprocess) for file in files]
    return see_images(pair, files, decoded)[0]


@torch.no_grad()
def see_images(pair: Pair, names: Sequence[str], decoded: Sequence[Picture]) -> tuple[list[View], Tensor]:
    """The views of a batch of images, and the stream at the hook point, [B, T, D] float32.

    Args:
        names: what the images are called. decoded: from `decode_image`, with the tower's preprocessing.

    Raises ModelError, NonFiniteError as `look`.
    """
    tower, preprocess = pair.tower, pair.tower.preprocess
    stream = tower.run(torch.stack([tower.transform(image) for image in decoded]), [pair.hook_point])[pair.hook_point]
    layout = layout_of(tower)
    if stream.shape[1:] != (layout.n_stream, layout.d_model):
        raise ModelError(
            f"{pair.model} makes {stream.shape[1]} tokens of an image; expected were {layout.n_stream} "
            f"({len(layout.prefix)} special tokens and {layout.grid[0]} x {layout.grid[1]} patches). Choose another "
            "--image-size."
        )
    x = torch.cat([stream[:, place] for place in layout.token_places(pair.tokens)], 1)
    if not x.isfinite().all():
        raise NonFiniteError(f"{pair.model} gives numbers that are not finite. Try --precision float32.")
    tokens = layout.token_kind(pair.tokens)
    first_token = 1 if tokens == "patch" else 0
    row, latent, value = (part.cpu() for part in pair.sae.to(x.device).encode(x.flatten(0, 1)))
    image, token = row // x.shape[1], row % x.shape[1] + first_token
    views = []
    covered = covered_shares(preprocess.size, layout.grid, pair.tower.patch_size)
    for number, (name, whole) in enumerate(zip(names, decoded, strict=True)):
        mine = image == number
        entries = [part[mine].numpy() for part in (token, latent, value.float())]
        picture = resize_image(whole, preprocess)
        views.append(View(name, picture, layout.grid, covered, pair.sae.config.n_latents, tokens, *entries))
    return views, stream


def layout_of(tower: VisionTower) -> StoreLayout:
    """Where the tokens of an image lie in the tower's stream."""
    return StoreLayout(
        n_images=1, grid=tower.grid, d_model=tower.d_model, chunk_images=1, shard_images=1, n_extra=tower.n_extra,
        prefix=tower.prefix,
    )  # fmt: skip
