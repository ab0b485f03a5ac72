"""Few-shot training of prompts: a frozen CLIP, a few images per class, SGD on the prompts alone.

In: both towers, images, `ResolvedPromptConfig`. Out: trained `Prompts`. Promises: the batch and the random numbers of a
step depend on (seed, step) only, so an interrupted run continues bit for bit from its last checkpoint; what does not
change is computed once: image embeddings for CoOp and CoCoOp, text embeddings for VPT, or class means where the model
has no texts.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from actcache.artifacts import write_atomic
from actcache.errors import CorruptError, NonFiniteError
from actcache.progress import ProgressWithNote
from actcache.prompts.class_means import LOGIT_SCALE, ClassMeans, measure_class_means
from actcache.prompts.config import ResolvedPromptConfig
from actcache.prompts.methods import FIRST_NUMBER, METHODS, VPT_BLOCKS
from actcache.prompts.pixels import Shots, embed_all
from actcache.prompts.prompts import Prompts
from actcache.prompts.towers import Towers, classify, embed_images, prompt_text, prompt_vision

CHECKPOINT_FILE = "checkpoint.safetensors"

INIT_STD = 0.02


class PromptTraining:
    """The state of a training run. `step` counts finished updates."""

    def __init__(self, towers: Towers, shots: Shots, config: ResolvedPromptConfig) -> None:
        """Prepare; no image is read. Raises SettingsError: see `prompt_text`."""
        self.towers, self.shots, self.config = towers, shots, config
        initial = init_prompts(towers, config, len(shots.names))
        self.learned = {name: value.clone().requires_grad_() for name, value in initial.items()}
        self.text = None
        if towers.text_tower is not None:
            self.text = prompt_text(towers.text, self.prompts, shots.names, precision=towers.vision.precision)
        self.optimizer = torch.optim.SGD(
            list(self.learned.values()), lr=1.0, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.batches = len(shots.labels) // self._batch_size
        self.losses = torch.zeros(self.n_steps)
        self.step = 0

    @property
    def prompts(self) -> Prompts:
        return Prompts(self.config.method, self.learned, self.config.template, self.config.position)

    @property
    def _batch_size(self) -> int:
        return min(self.config.batch_size, len(self.shots.labels))

    @property
    def n_steps(self) -> int:
        return self.batches * self.config.n_epochs

    def run(self, folder: Path, *, checkpoint_every: int, on_progress: ProgressWithNote | None = None) -> Prompts:
        """Train to the end, from the beginning or from the checkpoint in `folder`.

        Raises:
            NonFiniteError: the loss is not finite.
            ImageSourceError: an image cannot be read.
            CorruptError: the checkpoint is damaged.
        """
        self._restore(folder)
        with ThreadPoolExecutor(thread_name_prefix="decode") as pool:
            while self.step < self.n_steps:
                epoch, batch = divmod(self.step, self.batches)
                rows = self._order(epoch)[batch * self._batch_size : (batch + 1) * self._batch_size]
                loss = self._update(rows, learning_rate(self.config, epoch), pool)
                self.losses[self.step - 1] = loss
                if self.step % checkpoint_every == 0 and self.step < self.n_steps:
                    self.checkpoint(folder)
                if on_progress:
                    on_progress(self.step, self.n_steps, f"loss {loss:.3f}")
        return self.prompts

    def _order(self, epoch: int) -> NDArray[np.int64]:
        return _generator(self.config.seed, "order", epoch).permutation(len(self.shots.labels))

    def _update(self, rows: NDArray[np.int64], rate: float, pool: ThreadPoolExecutor) -> float:
        logits = self._logits(rows, pool)
        loss = F.cross_entropy(logits, torch.from_numpy(self.shots.labels[rows]).to(logits.device))
        if not torch.isfinite(loss):
            raise NonFiniteError(
                f"The loss is {loss.item()} at step {self.step:,}. Train with a lower --lr into another folder."
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        self.step += 1
        return float(loss.detach())

    def _logits(self, rows: NDArray[np.int64], pool: ThreadPoolExecutor) -> Tensor:
        """[B, C]; gradients reach the prompts."""
        prompts = self.prompts
        if self.text is not None and not prompts.n_vision:
            images = self._embeddings[torch.from_numpy(rows)]
            return classify(images, self.text.embed(prompts, images), self.towers.text.logit_scale)
        x = self.shots.pixels.read(rows.tolist(), pool)
        if self.config.augment:
            x = crop_and_flip(x, _generator(self.config.seed, "crop", self.step))
        vision = prompt_vision(self.towers.vision, prompts)
        if self.class_means is not None:
            return classify(self.class_means.embed(vision, x), self.class_means.means, LOGIT_SCALE)
        assert self.text is not None
        texts = self.text.embed(prompts) if prompts.text else self._fixed_texts
        return classify(embed_images(vision, x), texts, self.towers.text.logit_scale)

    @cached_property
    def class_means(self) -> ClassMeans | None:
        """What tells classes apart in a model without texts."""
        return measure_class_means(self.towers.vision, self.shots) if self.text is None else None

    @cached_property
    def _fixed_texts(self) -> Tensor:
        assert self.text is not None
        with torch.no_grad():
            return self.text.embed(self.prompts)

    @cached_property
    def _embeddings(self) -> Tensor:
        """[N, E]: embeddings of all shots by the plain image tower."""
        return embed_all(self.towers.vision, self.shots.pixels)

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoint

    def checkpoint(self, folder: Path) -> None:
        """Write prompts, momentum, losses and step in one atomic file."""
        tensors = {f"prompt.{name}": value.detach().cpu() for name, value in self.learned.items()}
        for name, value in self.learned.items():
            momentum = self.optimizer.state[value]["momentum_buffer"]
            tensors[f"momentum.{name}"] = momentum.cpu()
        data = save({**tensors, "losses": self.losses}, metadata={"step": str(self.step)})
        write_atomic(folder / CHECKPOINT_FILE, data)

    def _restore(self, folder: Path) -> None:
        file = folder / CHECKPOINT_FILE
        if not file.exists():
            return
        try:
            with safetensors.safe_open(file, framework="pt") as stored:
                step = int(stored.metadata()["step"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  it is not a mapping
            self.losses.copy_(tensors["losses"])
            with torch.no_grad():
                for name, value in self.learned.items():
                    value.copy_(tensors[f"prompt.{name}"])
                    momentum = tensors[f"momentum.{name}"].to(value.device)
                    self.optimizer.state[value] = {"momentum_buffer": momentum}
            self.step = step
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptError(f"{file} is not a complete checkpoint ({error}). Remove it to start again.") from error


def learning_rate(config: ResolvedPromptConfig, epoch: int) -> float:
    """A small constant rate in the first epoch, then a cosine over all epochs (Zhou et al. 2022)."""
    if epoch == 0 and config.n_epochs != 1:
        return config.warmup_lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * epoch / config.n_epochs))


def init_prompts(towers: Towers, config: ResolvedPromptConfig, n_classes: int) -> dict[str, Tensor]:
    """Initial values: the template's words if there are enough, else small random numbers; linear maps as in torch."""
    vision, n, kind = towers.vision, config.n_prompts, METHODS[config.method]
    generator = torch.Generator().manual_seed(int(_generator(config.seed, "init", 0).integers(1 << 62)))
    made: dict[str, Tensor] = {}

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * INIT_STD

    def linear(name: str, n_in: int, n_out: int) -> dict[str, Tensor]:
        bound = n_in**-0.5
        weight, bias = torch.rand(n_out, n_in, generator=generator), torch.rand(n_out, generator=generator)
        return {f"{name}.weight": (2 * weight - 1) * bound, f"{name}.bias": (2 * bias - 1) * bound}

    if kind.text:
        text, words = towers.text, config.template.split("{}")[0].split()
        embedded = text.embed_tokens([" ".join(words)])[0]
        width = embedded.shape[-1]
        if kind.begins_with_words and len(words) >= n:
            made[kind.text] = embedded[1 : 1 + n].cpu()
        else:
            made[kind.text] = noise(*((n_classes,) if config.class_specific else ()), n, width)
    if kind.texts_by_image:
        hidden = max(1, text.embed_dim // 16)
        made |= linear("meta_net.linear1", text.embed_dim, hidden) | linear("meta_net.linear2", hidden, width)
    if kind.maps_text:
        made |= linear("prompt_learner.proj", width, vision.d_model)
    if kind.vision:
        made[kind.vision] = noise(n, vision.d_model)
        made |= {VPT_BLOCKS.format(i): noise(n, vision.d_model) for i in range(1, config.depth)}
    if kind.text_blocks:
        first = FIRST_NUMBER[kind.text_blocks]
        depth = config.depth if kind.maps_text else min(config.depth, text.n_layers)
        for i in range(first, first + depth - 1):
            made[kind.text_blocks.format(i)] = noise(n, width)
            if kind.maps_text:
                made |= linear(f"prompt_learner.compound_prompt_projections.{i}", width, vision.d_model)
    return {name: value.to(vision.device) for name, value in made.items()}


def crop_and_flip(x: Tensor, generator: np.random.Generator) -> Tensor:
    """A random crop of each image [B, 3, H, W] (8-100 % of the area, 3:4 to 4:3), resized back; half are mirrored."""
    n = len(x)
    area = generator.uniform(0.08, 1.0, n)
    ratio = np.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3), n))
    size = np.minimum(
        np.sqrt(area * np.stack([ratio, 1 / ratio])), 1.0
    )  # [width and height, B], relative to the image's
    center = (1 - size) * generator.uniform(-1, 1, (2, n))
    mirror = np.where(generator.random(n) < 0.5, -1.0, 1.0)
    theta = np.zeros((n, 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 1, 1] = size[0] * mirror, size[1]
    theta[:, 0, 2], theta[:, 1, 2] = center
    grid = F.affine_grid(torch.from_numpy(theta), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _generator(seed: int, what: str, number: int) -> np.random.Generator:
    """Random numbers for one purpose and step, independent of what was drawn before."""
    streams = {"order": 0, "crop": 1, "init": 2}
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, streams[what], number])))
