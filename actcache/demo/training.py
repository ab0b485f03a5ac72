"""The script that trained the demo's CLIP: contrastive learning on generated scenes and their captions.

    python -m actcache.demo.training demo-clip.safetensors

Both towers are open_clip's, with the config in model/demo-clip.json. Images come from a pool that is rendered first;
their captions are worded differently each time. There are two losses: captions against CLS (CLIP's loss), and the short
phrase of every concept ("a star") against every patch, since it is known to which concepts the pixels of a patch
belong: a sigmoid for each pair (as in SigLIP), and a softmax within each family of concepts. Without the second loss,
the patches of such a small model never learn shapes. Training is seeded; weights are written as float16.
model/README.md has the figures of the shipped file.
"""

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from actcache.demo.scenes import Scene, caption_scene, concept_names, render_scene

CONFIG = Path(__file__).parent / "model" / "demo-clip.json"
POOL_SEED, TEST_SEED = 1_000_003, 1_000_033
"""They differ from each other and from the small seeds that datasets use."""

IMAGE_SIZE, PATCH_SIZE = 64, 8

TEMPLATES = {"background": "a thing on {}", "shape": "a {}"}
"""The short phrase of a concept; "a {} thing" for the other families."""

PATCH_SCALE = 9.0
"""Fixed, not learned: a patch of an object has four concepts at once, so no cosine can be much above 0.5, and with a
small scale the loss is low only if each concept takes an equal part of the embedding. A learned scale grows and leaves
shapes so little of the variance that no SAE finds them."""


def train_clip(
    out: Path, *, n_steps: int, init: Path | None, batch_size: int, pool_size: int, lr: float, seed: int
) -> dict[str, float]:
    """Train, write the weights, and return their `zero_shot` accuracies."""
    config = json.loads(CONFIG.read_text())
    torch.manual_seed(seed)
    clip: Any = open_clip.CLIP(**config)
    tokenizer = open_clip.SimpleTokenizer(context_length=config["text_cfg"]["context_length"])
    scenes, pool, shares = render_pool(POOL_SEED, pool_size)
    phrases = tokenizer(concept_phrases())
    families = [
        [i for i, name in enumerate(concept_names()) if name.startswith(f"{family}:")]
        for family in dict.fromkeys(name.split(":")[0] for name in concept_names())
    ]
    patch_bias = torch.nn.Parameter(torch.tensor(-3.0))
    if init:
        clip.load_state_dict({name: value.float() for name, value in load_file(init).items()})
    decay = [p for p in clip.parameters() if p.ndim >= 2]
    rest = [*(p for p in clip.parameters() if p.ndim < 2), patch_bias]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    rng = np.random.default_rng(seed)
    started = time.perf_counter()
    for step in range(n_steps):
        rate = lr * min(1.0, (step + 1) / 200) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / n_steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        picked = rng.integers(0, pool_size, batch_size)
        texts = tokenizer([caption_scene(scenes[i], rng) for i in picked])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image, patches = embed_images(clip, pool[picked])
            text = F.normalize(clip.encode_text(torch.cat([texts, phrases])).float(), dim=-1)
        logits = clip.logit_scale.exp() * image @ text[:batch_size].T
        target = torch.arange(batch_size)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        patch_logits = PATCH_SCALE * patches @ text[batch_size:].T + patch_bias
        share = torch.from_numpy(shares[picked]).float() / 255
        patch_loss = F.binary_cross_entropy_with_logits(patch_logits, share) * len(phrases)
        for family in families:
            inside = share[..., family]
            log_odds = F.log_softmax(patch_logits[..., family], dim=-1)
            patch_loss = patch_loss - (log_odds * inside).sum() / inside.sum()
        loss = loss + patch_loss
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        if (step + 1) % 50 == 0:
            accuracy = float((logits.argmax(1) == target).float().mean())
            rate = (step + 1) * batch_size / (time.perf_counter() - started)
            print(f"step {step + 1}  loss {float(loss.detach()):.3f}  patch loss {float(patch_loss.detach()):.3f}  "
                  f"in-batch accuracy {accuracy:.3f}  {rate:.0f} images/s", flush=True)  # fmt: skip
        if (step + 1) % 500 == 0 or step + 1 == n_steps:
            save_file({name: value.half().contiguous() for name, value in clip.state_dict().items()}, out)
            print({name: round(value, 3) for name, value in zero_shot(clip, tokenizer).items()}, flush=True)
    return zero_shot(clip, tokenizer)


def embed_images(clip: Any, pixels: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """Unit embeddings of images [B, E] and of their patches [B, P, E], both after ln_post and the projection."""
    clip.visual.output_tokens = True
    pooled, tokens = clip.visual(preprocess(pixels))
    return F.normalize(pooled.float(), dim=-1), F.normalize((tokens @ clip.visual.proj).float(), dim=-1)


def preprocess(images: NDArray[np.uint8]) -> Tensor:
    """[B, H, W, 3] uint8 -> normalized [B, 3, H, W], as open_clip's default transform does."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = open_clip.constants.OPENAI_DATASET_MEAN, open_clip.constants.OPENAI_DATASET_STD
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def concept_phrases() -> list[str]:
    """A phrase for every concept, in the order of concept_names()."""
    pairs = [name.split(":") for name in concept_names()]
    return [TEMPLATES.get(family, "a {} thing").format(word) for family, word in pairs]


def render_pool(seed: int, n: int) -> tuple[list[Scene], NDArray[np.uint8], NDArray[np.uint8]]:
    """`n` scenes, their pixels [n, H, W, 3], and the part of each patch that shows a concept [n, P, C], in 255ths."""
    with ProcessPoolExecutor() as workers:
        parts = list(workers.map(partial(_render, seed), range(0, n, 500), [min(i + 500, n) for i in range(0, n, 500)]))
    scenes, pixels, shares = zip(*parts, strict=True)
    return [scene for part in scenes for scene in part], np.concatenate(pixels), np.concatenate(shares)


def _render(seed: int, start: int, stop: int) -> tuple[list[Scene], NDArray[np.uint8], NDArray[np.uint8]]:
    scenes, pixels, objects = zip(*(render_scene(seed, i, IMAGE_SIZE) for i in range(start, stop)), strict=True)
    shares = np.stack([_concept_shares(scene, numbers) for scene, numbers in zip(scenes, objects, strict=True)])
    return list(scenes), np.stack(pixels), shares


def _concept_shares(scene: Scene, objects: NDArray[np.uint8]) -> NDArray[np.uint8]:
    grid = IMAGE_SIZE // PATCH_SIZE
    carriers = scene.carriers()
    masks = np.stack([np.isin(objects, carriers.get(name, [])) for name in concept_names()])
    share = masks.reshape(-1, grid, PATCH_SIZE, grid, PATCH_SIZE).mean((2, 4))
    return np.asarray((255 * share).astype(np.uint8).reshape(len(masks), -1).T)


@torch.no_grad()
def zero_shot(clip: Any, tokenizer: Any, n: int = 1500) -> dict[str, float]:
    """Accuracy in choosing the right word of a concept family, on unseen scenes with one object, and on patches that
    one concept of the family fills (`patch_` + family).
    """
    scenes, pool, shares = render_pool(TEST_SEED, n)
    image, patches = embed_images(clip, pool)
    single = [i for i, scene in enumerate(scenes) if len(scene.objects) == 1]
    text = F.normalize(clip.encode_text(tokenizer(concept_phrases())), dim=-1)
    families = [name.split(":")[0] for name in concept_names()]
    accuracy = {}
    for family in dict.fromkeys(families):
        columns = [i for i, name in enumerate(families) if name == family]
        words = [concept_names()[i].split(":")[1] for i in columns]
        truth = [
            scenes[i].background if family == "background" else getattr(scenes[i].objects[0], family) for i in single
        ]
        guess = (image[single] @ text[columns].T).argmax(1).tolist()
        accuracy[family] = sum(words[g] == t for g, t in zip(guess, truth, strict=True)) / len(single)
        filled = shares[..., columns].max(-1) > 250
        hit = (patches @ text[columns].T).argmax(-1).numpy() == shares[..., columns].argmax(-1)
        accuracy[f"patch_{family}"] = float(hit[filled].mean())
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n-steps", type=int, default=2400)
    parser.add_argument("--init", type=Path, help="initial weights")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--pool-size", type=int, default=40_000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    print(train_clip(**vars(parser.parse_args())))
