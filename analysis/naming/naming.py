"""name_latents(): a word for every latent from CLIP's text tower, with scores that say how far to trust it.

There are two methods, which give each latent a vector v. `lens` passes the decoder direction through the final
LayerNorm and projection, as if it were the residual stream of an image. `images` takes the mean embedding of the
latent's top images. The name is the word whose embedding has the largest cosine with v. A model without a text tower
borrows the words of another one that has seen the same images (`with_`); then only `images` is possible.

    alignment         cos(v, t_word) - cos(v, t_""); the empty text removes what all texts have in common
    clarity           mean pairwise cosine of the top images' embeddings: (||mean||^2 - 1/n) n / (n - 1)
    redundancy        largest cosine of v with the v of another latent
    polysemanticity   1 - cosine of the centroids of the top images' two clusters (k-means, k = 2)

Source: Dreyer et al. 2025 (arXiv 2505.20229). Shapes: F latents, V words, E embedding, n top images.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from actcache import SettingsError
from actcache.artifacts import digest, find_parent
from actcache.models import read_templates
from actcache.progress import Progress
from actcache.prompts import open_towers
from actcache.store import StoreGroup, Stores
from analysis.classifier import BATCH_IMAGES, BLOCK_LATENTS, embed_directions, embed_stored_images
from analysis.concepts import ConceptTable
from analysis.cosines import nearest_cosines
from analysis.lineage import open_parents, open_same_images
from analysis.naming.files import METHODS, write_name_table
from analysis.naming.vocabulary import read_vocabulary
from saetrain import CodeStore, Run

N_LLOYD = 10
"""Iterations of k-means."""


def name_latents(
    concepts: ConceptTable | str | Path,
    *,
    vocabulary: str | Path | None = None,
    methods: Sequence[str] = METHODS,
    template: str = "{}",
    codes: str | Path | None = None,
    run: str | Path | None = None,
    store: str | Path | None = None,
    images: str | Path | None = None,
    with_: Stores | StoreGroup | None = None,
    model: str | None = None,
    pretrained: str | None = None,
    device: str = "auto",
    batch_size: int = BATCH_IMAGES,
    on_progress: Progress | None = None,
) -> pa.Table:
    """Name the latents that fire, and keep names, methods and scores in the table's folder.

    Args:
        vocabulary: a file with one word per line; by default, the general vocabulary.
        methods: `images`, `lens`, or both.
        template: the text into which a word is put in place of {}.
        codes, run, store: where the table's ancestors are now, if they moved.
        images: compute the embeddings from these image files instead of the store.
        with_: a store of the same images by a model with a text tower, which gives embeddings and words.
        model, pretrained, device: see `open_towers`. batch_size: affects speed only.
        on_progress: called with (images embedded, images in all).

    Returns:
        What was written: latent, method, name, alignment, cosine, clarity, redundancy, polysemanticity. A score that a
        method does not have is NaN. Earlier names by other methods are removed.

    Raises:
        SettingsError: an invalid vocabulary, method or template, a word too long for the text tower, a model without
            one, or a single store for codes of several.
        ParentMismatchError: the codes, run, store or model are not those that the table was made from, or `with_` holds
            other images.
    """
    concepts = concepts if isinstance(concepts, ConceptTable) else ConceptTable.open(concepts)
    words = read_vocabulary(vocabulary)
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise SettingsError(f"--method must be one of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}.")
    (text,) = read_templates([template])
    opened_codes = CodeStore.open(find_parent(concepts.artifact, "codes", codes, has_flag=True))
    if with_ is None:
        opened_run = Run.open(find_parent(opened_codes.artifact, "run", run, has_flag=True))
        stores = open_parents(opened_codes, store, has_flag=True)
    elif "images" not in methods:
        raise SettingsError(
            "--method lens reads the decoder in its own model, so it cannot be used --with another one."
        )
    else:
        methods, stores = ("images",), open_same_images(opened_codes, with_)
    towers = open_towers(stores.stores[0].artifact, model=model, pretrained=pretrained, device=device)
    embedded_words = towers.text.embed([text.format(word) for word in words]).cpu()
    empty = towers.text.embed([""])[0].cpu()
    latents = np.flatnonzero(concepts.table["n_images"].to_numpy() > 0)
    tables = []
    for method in methods:
        if method == "lens":
            vectors = embed_directions(opened_run.sae(), towers.vision)[latents]
            clarity = polysemanticity = np.full(len(latents), np.nan)
        else:
            top = top_lists(concepts, latents)
            shown = np.unique(top[top >= 0])
            embedded = embed_stored_images(
                stores, shown, vision=towers.vision, files=images, batch_size=batch_size, on_progress=on_progress
            )
            lists = np.where(top >= 0, np.searchsorted(shown, top), -1)
            vectors, clarity, polysemanticity = score_images(embedded, lists)
        word, cosine, alignment = find_words(vectors, embedded_words, empty)
        columns = {
            "latent": latents, "method": np.full(len(latents), method, dtype=object),
            "name": np.array(words, dtype=object)[word], "alignment": alignment, "cosine": cosine, "clarity": clarity,
            "redundancy": redundancy(vectors), "polysemanticity": polysemanticity,
        }  # fmt: skip
        tables.append(pa.table(columns))
    table = pa.concat_tables(tables).combine_chunks()
    facts = {
        "vocabulary": "general" if vocabulary is None else Path(vocabulary).name, "words": digest(list(words)),
        "template": text, "model_id": stores.model_id,
    }  # fmt: skip
    if with_ is not None:
        ids = [member.store_id for member in stores.stores]
        facts |= {"with": stores.path.name, "store_id": ids[0] if len(ids) == 1 else digest(ids)}
    write_name_table(concepts, table, facts)
    return table


def top_lists(concepts: ConceptTable, latents: NDArray[np.int64]) -> NDArray[np.int64]:
    """The top images of some latents, strongest first: [n, n_top] stored positions, padded with -1."""
    top = concepts.top_images
    lists = np.full((concepts.table.num_rows, concepts.config.n_top), -1, dtype=np.int64)
    lists[top["latent"].to_numpy(), top["rank"].to_numpy()] = top["image"].to_numpy()
    return lists[latents]


def score_images(
    embedded: NDArray[np.float32], lists: NDArray[np.int64]
) -> tuple[Tensor, NDArray[np.float64], NDArray[np.float64]]:
    """Of each latent's top images: the mean embedding (unit vectors [F, E]), clarity [F] and polysemanticity [F].

    Args:
        embedded: [I, E] unit vectors. lists: [F, n] rows of `embedded`, padded with -1.
    """
    vectors, clarity, polysemanticity = [], [], []
    for first in range(0, len(lists), BLOCK_LATENTS):
        part = torch.from_numpy(lists[first : first + BLOCK_LATENTS])
        there = (part >= 0).double()
        points = torch.from_numpy(embedded)[part.clamp(min=0)].double() * there[..., None]  # [b, n, E]
        count = there.sum(1)
        mean = points.sum(1) / count[:, None]
        vectors.append(F.normalize(mean, dim=1).float())
        pairwise = (mean.square().sum(1) - 1 / count) * count / (count - 1)
        clarity.append(torch.where(count > 1, pairwise, torch.nan))
        polysemanticity.append(1 - _two_means(points, there > 0))
    return torch.cat(vectors), torch.cat(clarity).numpy(), torch.cat(polysemanticity).numpy()


def _two_means(points: Tensor, there: Tensor) -> Tensor:
    """Cosine [F] between the two centroids of k-means on points [F, n, E]; NaN with fewer than two points.

    It starts from the two points that are farthest apart, so the result is deterministic.
    """
    cosines = points @ points.transpose(1, 2)
    cosines = torch.where(there[:, :, None] & there[:, None], cosines, 2.0)
    pair = cosines.flatten(1).argmin(1)
    n = points.shape[1]
    rows = torch.arange(len(points))
    centers = torch.stack([points[rows, pair // n], points[rows, pair % n]], 1)  # [F, 2, E]
    for _ in range(N_LLOYD):
        nearest = torch.cdist(points, centers).argmin(2)  # [F, n]; ties go to the first
        member = torch.stack([(nearest == i) & there for i in (0, 1)], 1).double()
        sizes = member.sum(2, keepdim=True)
        centers = torch.where(sizes > 0, member @ points / sizes.clamp(min=1), centers)
    cosine = F.cosine_similarity(centers[:, 0], centers[:, 1], dim=1)
    return torch.where(there.sum(1) >= 2, cosine, torch.nan)


def find_words(
    vectors: Tensor, words: Tensor, empty: Tensor
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """For unit vectors [F, E] the nearest of the words [V, E]: (its number, cosine, alignment), [F] each."""
    nearest = nearest_cosines(vectors.numpy(), words.numpy(), 1)
    cosine = nearest.cosine[:, 0].astype(np.float64)
    alignment = cosine - (vectors @ empty).double().numpy()
    return nearest.neighbor[:, 0].astype(np.int64), cosine, alignment


def redundancy(vectors: Tensor) -> NDArray[np.float64]:
    """Largest cosine of each unit vector [F, E] with another one; NaN if there is only one."""
    if len(vectors) < 2:
        return np.full(len(vectors), np.nan)
    return nearest_cosines(vectors.numpy(), vectors.numpy(), 1, start=0).cosine[:, 0].astype(np.float64)
