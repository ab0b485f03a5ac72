"""The model behind a table, opened when it is first asked: an image of the user through tower and SAE, the classifier's
answer when latents are changed, and latents that fit a text.

Cached images start from the stored activations, so only the blocks behind the hook point run.
"""

import base64
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actcache import PipelineError, SettingsError
from actcache.prompts import Towers, open_towers
from actcache.sources import decode_image
from actcache.store import StoreGroup
from actcache.text import visible
from analysis.classifier import (
    Classifier,
    Spliced,
    choose_classes,
    choose_judge,
    choose_tokens,
    choose_training,
    embed_directions,
    fit_probe,
    open_judge,
    splice,
)
from analysis.config import ModelOptions, ProbeConfig, TowerOptions
from analysis.explore.edit import Edit
from analysis.explore.encoding import short
from analysis.explore.images import describe_codes
from analysis.explore.records import EditAnswer, Found, ImageRecord, UploadAnswer
from analysis.explore.sources import Sources
from analysis.interventions import match_frequency
from analysis.lineage import open_parents
from analysis.pictures import encode_jpeg
from analysis.views import Pair, layout_of, open_pair, see_images
from saetrain import Run

MAX_PIXELS = 50_000_000
"""Of an uploaded image. RGB of this size takes 200 MB in Pillow."""
N_UPLOADS = 8
N_CLASSES, N_FOUND = 12, 50


@dataclass(frozen=True, eq=False)
class Upload:
    """An image of the user: its stream at the hook point, [1, T, D]."""

    stream: Tensor


class LiveModel:
    """Run, tower and judge of a table. One request at a time runs the model; the first one loads it."""

    def __init__(self, sources: Sources, options: ModelOptions) -> None:
        self.sources, self.options = sources, options
        self._uploads: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()

    # -----------------------------------------------------------------------------------------------------------------
    # What is opened

    @property
    def run(self) -> Run:
        if self.sources.run is None:
            raise SettingsError(self.sources.missing["run"])
        return self.sources.run

    @cached_property
    def stores(self) -> StoreGroup:
        """The activations. Raises ArtifactNotFoundError and others where they are not."""
        assert self.sources.codes is not None
        return open_parents(self.sources.codes, self.sources.store, has_flag=True)

    @cached_property
    def towers(self) -> Towers:
        return open_towers(
            self.stores.stores[0].artifact, model=self.options.model, pretrained=self.options.pretrained,
            device=self.options.device,
        )  # fmt: skip

    @cached_property
    def pair(self) -> Pair:
        """The SAE and the image tower, for images that are not stored."""
        run, options = self.run, self.options
        if self._has_store():
            sae = run.sae().to(self.towers.vision.device)
            return Pair(
                str(run.path), sae, self.towers.vision, run.path.name, run.hook_point, run.train_config.tokens, run
            )
        tower = TowerOptions(model=options.model, pretrained=options.pretrained, device=options.device)
        return open_pair(run, tower)

    def _has_store(self) -> bool:
        try:
            return bool(self.stores.stores)
        except PipelineError:  # open_pair says what is missing
            return False

    @cached_property
    def classifier(self) -> Classifier:
        """Raises SettingsError where the images have no classes, or the rest of the model cannot be run."""
        labeled = choose_classes(self.stores, self.run.hook_point)
        kind, probe = choose_judge("auto", labeled, self.towers), None
        if kind == "probe":
            training = choose_training(self.stores, ProbeConfig())
            probe = fit_probe(training, labeled.names, self.towers.vision, batch_size=self.options.batch_size)
        judge = open_judge(kind, labeled, self.towers, probe=probe)
        return Classifier.of(labeled, self.towers.vision, judge)

    # -----------------------------------------------------------------------------------------------------------------
    # An image of the user

    def upload(self, data: bytes) -> UploadAnswer:
        """The record of an uploaded image, kept for edits. Raises ImageSourceError for no image, or one too large."""
        with self._lock:
            pair = self.pair
            whole = decode_image(data, name="The image", max_pixels=MAX_PIXELS, preprocess=pair.tower.preprocess)
            (view,), stream = see_images(pair, ["upload"], [whole])
            number = secrets.token_hex(8)
            self._uploads[number] = Upload(stream)
            while len(self._uploads) > N_UPLOADS:
                self._uploads.popitem(last=False)
        codes = describe_codes(
            self.sources, view.token, view.latent, view.value, n_tokens=1 + view.grid[0] * view.grid[1],
            tokens=view.tokens,
        )  # fmt: skip
        record: ImageRecord = {"image": None, "uri": "upload", "label": "", "readable": 1, "columns": {}, **codes}
        picture = base64.b64encode(encode_jpeg(view.picture)).decode()
        return {"upload": number, "record": record, "picture": f"data:image/jpeg;base64,{picture}"}

    # -----------------------------------------------------------------------------------------------------------------
    # Changed latents

    @torch.no_grad()
    def edit(self, edit: Edit) -> EditAnswer:
        """Probabilities of the classes before and after, and after the same change of random latents."""
        with self._lock:
            classifier = self.classifier
            spliced = self._splice(edit)
            started = time.perf_counter()
            first = 0 if spliced.old.shape[1] > classifier.store.layout.n_patches else 1  # the token that comes first
            chosen = torch.ones(spliced.old.shape[1], dtype=torch.bool, device=spliced.x.device)
            if edit.at is not None:
                chosen[:] = False
                chosen[torch.tensor(edit.at, dtype=torch.long) + 1 - first] = True
            random = self._draw(edit, spliced, chosen)
            edits = [edit] if random is None else [edit, edit.of(random)]
            streams = [spliced.x, *(spliced.stream(change_latents(spliced, each, chosen)) for each in edits)]
            answers = classifier.logits(torch.cat(streams)).double().softmax(1).cpu().numpy()
            seconds = time.perf_counter() - started
        order = np.argsort(-answers[:2].max(0), kind="stable")[:N_CLASSES]
        fired, n_tokens = self.sources.n_fired, max(1, self.sources.concepts.summary_numbers()["n_tokens"])
        main = edit.latents[0] if edit.latents else None
        other = None if random is None or main is None else random[main]
        return {
            "judge": classifier.judge.facts.kind,
            "classes": [
                {"name": visible(classifier.names[c]), "before": short(answers[0, c]), "after": short(answers[1, c]),
                 "random": short(answers[2, c]) if len(answers) > 2 else None}
                for c in order.tolist()
            ],
            "random_latent": other,
            "random": None if random is None else list(random.items()),
            "frequency": [None if n is None else short(fired[n] / n_tokens) for n in (main, other)],
            "seconds": round(seconds, 3),
        }  # fmt: skip

    def _splice(self, edit: Edit) -> Spliced:
        layout, run, sae = self.stores.layout, self.run, self.pair.sae
        edit.check(n_latents=sae.config.n_latents, n_patches=layout.n_patches, n_images=self.stores.n_images)
        if edit.upload is not None:
            if edit.upload not in self._uploads:
                raise SettingsError("This upload is no longer kept. Choose the image again.")
            x = self._uploads[edit.upload].stream
            layout = layout_of(self.pair.tower)
        else:
            assert edit.image is not None
            if not self.stores.valid[edit.image]:
                raise SettingsError(f"Image {edit.image} could not be read when it was extracted.")
            x = self.classifier.read([edit.image])
        tokens = choose_tokens(run, layout, None)
        if edit.at is not None and tokens == "cls":
            raise SettingsError("The SAE reads CLS only, so no patch can be changed.")
        return splice(sae, x, layout, tokens)

    def _draw(self, edit: Edit, spliced: Spliced, chosen: Tensor) -> dict[int, int] | None:
        """A random latent for each that is changed, which fires about as often in all images; None if there is none.

        Latents that are kept or dropped are replaced by latents that fire on the same tokens, because to drop a latent
        that is silent changes nothing.
        """
        rng = np.random.Generator(np.random.Philox(sum(edit.latents)))
        here = np.zeros_like(self.sources.n_fired)
        live = spliced.latents[chosen[spliced.rows]].cpu().numpy()
        here[live] = self.sources.n_fired[live]
        found: dict[int, int] = {}
        for latents, frequency in ((edit.set, self.sources.n_fired), (edit.masked, here)):
            frequency = frequency.copy()
            frequency[[n for n in edit.latents if n not in latents] + list(found.values())] = 0
            if not len(latents):
                continue
            kept = self.sources.n_fired if not frequency.any() else frequency
            drawn = _match(list(latents), self.sources.n_fired, kept, rng)
            if drawn is None:
                return None
            found |= drawn
        return found or None

    # -----------------------------------------------------------------------------------------------------------------
    # Texts

    @torch.no_grad()
    def search(self, text: str) -> Found:
        """The latents whose direction, sent through the head, is nearest to a text; the empty text is taken off."""
        with self._lock:
            embedded = self.towers.text.embed([text, ""]).cpu()
            scores = (self._directions @ (embedded[0] - embedded[1])).numpy()
        scores = np.where(self.sources.n_fired > 0, scores, -np.inf)
        order = np.argsort(-scores, kind="stable")[:N_FOUND]
        return {"latents": [(n, short(float(scores[n]))) for n in order.tolist() if np.isfinite(scores[n])]}

    @cached_property
    def _directions(self) -> Tensor:
        """[F, E]."""
        return embed_directions(self.pair.sae, self.towers.vision)


def change_latents(spliced: Spliced, edit: Edit, chosen: Tensor) -> Tensor:
    """[1, t, D]: the tokens after an edit. What the SAE does not reconstruct stays, so nothing else changes.

    Args:
        chosen: [t] which tokens are edited.
    """
    moved = torch.zeros_like(spliced.old)
    if edit.keep is not None or edit.drop:
        n_latents = spliced.sae.config.n_latents
        table = torch.full((1, n_latents), edit.keep is None, dtype=torch.bool, device=spliced.x.device)
        table[0, list(edit.keep or ())] = True
        table[0, list(edit.drop)] = False
        table[0, list(edit.set)] = True  # what is set is moved from its own value
        moved += spliced.keep(table) - spliced.whole
    if edit.set:
        latents, values = torch.tensor(list(edit.set)), torch.tensor(list(edit.set.values()), dtype=torch.float32)
        moved += spliced.shift(latents, values, add=False)
    return spliced.old + moved * chosen[None, :, None]


def _match(
    latents: Sequence[int], counts: NDArray[np.int64], free: NDArray[np.int64], rng: np.random.Generator
) -> dict[int, int] | None:
    """latent -> one of the latents whose `free` is not 0, about as frequent, each once; None if there are too few."""
    frequency = free.copy()
    frequency[list(latents)] = np.maximum(counts[list(latents)], 1)
    drawn = match_frequency(np.array([list(latents)]), frequency, rng=rng)
    if drawn is None:
        return None
    by_count = sorted(latents, key=lambda n: (counts[n], n))  # drawn ascends in frequency
    return dict(zip(by_count, sorted(drawn[0].tolist(), key=lambda n: (counts[n], n)), strict=True))
