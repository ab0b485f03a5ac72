"""Adaptation where the truth is known: does `compare` correctly say what prompts changed?

    python docs/recipes/demo_adaptation.py OUT

The demo's CLIP was trained on captions of generated scenes, and the words of these classes were in none of them. The
images are scenes with one object:

    renamed   dax, fep, zib: the object is solid, striped, checkered. The model knows textures, and the SAE has a
              latent for each; only the meaning of the words is missing. (Dotted is left out, because no single latent
              of this SAE recognizes it.)
    missing   nib, rop: the object is on the left, on the right. The captions named sides, but neither CLS nor any
              latent distinguishes them: prompts cannot help, or would have to create the concept.

For each case and method it prints the accuracy (zero-shot -> adapted texts, base images -> adapted), how well the best
latent of each class recognizes it before and after (AUROC on images it was not chosen on), what `compare` concludes,
and whether the two agree.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np

from actcache import PromptConfig, adapt, extract
from actcache.demo import MODEL, PRETRAINED, Truth, write_demo
from analysis import Comparison, ComparisonConfig, analyze, compare, write_adaptation_page
from analysis.localization.recovery import auroc_table, patch_scores
from saetrain import CodeStore, SAEConfig, TrainConfig, encode, train

CLIP: dict[str, Any] = {"model": MODEL, "pretrained": PRETRAINED}
LAYER = 2  # of 0..3: one block remains between the latents and the classifier
WORDS = {
    "renamed": {"texture:solid": "dax", "texture:striped": "fep", "texture:checkered": "zib"},
    "missing": {"on the left": "nib", "on the right": "rop"},
}
METHODS = {
    "coop": PromptConfig("coop", class_specific=True, n_prompts=4, lr=20.0, batch_size=640, n_epochs=200, shots=64),
    "maple": PromptConfig("maple", n_prompts=4, lr=0.5, batch_size=32, n_epochs=30, augment=False, shots=64),
}
EXISTS, ABSENT = 0.95, 0.65
"""A concept exists if the AUROC of its best latent is at least the first, and does not if it is below the second."""
MOST = 0.5
"""If no new concept is needed, the whole interval of the share is above this; if one was created, it is below."""


def main(out: Path, n_images: int = 2000, n_seeds: int = 5) -> None:
    learned, unseen = (write_demo(out / name, n_images=n_images, seed=i) for i, name in enumerate(("scenes", "unseen")))
    store = extract(learned.path / "images", out / "scenes.acts", **CLIP, layers=[LAYER], batch_size=64)
    config = TrainConfig(n_steps=800, batch_size=2048, lr=2e-3, dead_tokens=100_000)
    run = train(store, out / "sae", sae=SAEConfig(variant="batchtopk", n_latents=64, k=4), config=config)
    for case, words in WORDS.items():
        shots = write_table(out / f"{case}-shots.csv", learned, words)
        images = write_table(out / f"{case}.csv", unseen, words)
        tables, auroc = {}, {}
        for name in ("base", *METHODS):
            part, options = out / f"{case}-{name}", {}
            if name in METHODS:
                adapt(shots, part.with_suffix(".prompts"), **CLIP, config=METHODS[name], test=images)
                options = {"prompts": part.with_suffix(".prompts")}
            acts = extract(images, part.with_suffix(".acts"), **CLIP, layers=[LAYER], batch_size=64, **options)
            codes = encode(run, acts, part.with_suffix(".codes"))
            tables[name], auroc[name] = analyze(codes, part.with_suffix(".concepts")).path, best_latents(codes)
        for name in METHODS:
            file = out / f"{case}-{name}.json"
            comparison = compare(
                tables["base"], tables[name], file, ComparisonConfig(k=(2, 4, 8, 16), n_top=8, n_seeds=n_seeds)
            )
            write_adaptation_page(comparison, tables["base"], tables[name], file.with_suffix(".html"))
            print_verdict(f"{case}, {name}", auroc["base"], auroc[name], comparison)


def label_scenes(truth: Truth, words: dict[str, str]) -> list[tuple[str, str, str]]:
    """(path, class word, what it stands for) for every scene with one object to which one of the words applies."""
    rows = []
    for uri, caption, present, carriers in zip(truth.uris, truth.captions, truth.present, truth.carriers, strict=True):
        facts = {name for name, is_present in zip(truth.names, present, strict=True) if is_present}
        matching = [fact for fact in words if fact in facts or fact in caption]
        if max(number for numbers in carriers for number in numbers) == 1 and matching:
            rows.append((str((truth.path / "images" / uri).absolute()), words[matching[0]], matching[0]))
    return rows


def write_table(out: Path, truth: Truth, words: dict[str, str]) -> Path:
    with open(out, "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "stands_for"), *label_scenes(truth, words)])
    return out


def best_latents(codes: CodeStore) -> dict[str, float]:
    """AUROC of the best latent of each class, chosen on one half of the images and judged on the other."""
    labels = np.array(codes.images["label_name"].to_pylist())
    names: list[str] = sorted(set(labels.tolist()))
    present = np.stack([labels == name for name in names], axis=1)
    scores, half = patch_scores(codes), np.arange(len(labels)) % 2 == 0
    chosen = auroc_table(scores[:, half], present[half])
    judged = auroc_table(scores[:, ~half], present[~half])
    return {name: float(judged[np.nanargmax(chosen[:, c]), c]) for c, name in enumerate(names)}


def print_verdict(title: str, before: dict[str, float], after: dict[str, float], comparison: Comparison) -> None:
    """Print the truth, the conclusion of `compare`, and whether the two agree."""
    gain = comparison.conclusion.without_new_concepts
    if min(before.values()) >= EXISTS:
        truth, agree = "there is a latent for every class", (gain.low or 0) > MOST
    elif max(before.values()) >= ABSENT:
        truth, agree = "some classes have a latent", False
    elif max(after.values()) < ABSENT:
        truth, agree = "no class has a latent, before or after", gain.share is None
    else:
        truth, agree = "classes have a latent after adaptation only", gain.high is not None and gain.high < MOST
    conclusion = "a loss is certain" if gain.change else "no gain is certain"
    if gain.share is not None:
        conclusion = f"{gain.say()} of the gain needs no new concept"
    ranges = [f"{min(auroc.values()):.2f} to {max(auroc.values()):.2f}" for auroc in (before, after)]
    print(f"\n{title}: {' -> '.join(f'{n:.1%}' for n in accuracies(comparison))}")
    print(f"  truth:   {truth} (AUROC of the best latent: {ranges[0]} before, {ranges[1]} after)")
    print(f"  compare: {conclusion}; the two {'agree' if agree else 'do not agree'}")
    print(f"  {comparison.conclusion.sentence}")


def accuracies(comparison: Comparison) -> list[float]:
    """Of the zero-shot model, of the adapted texts with the images of the base model, and of the adapted model."""
    names = ("base image, base text", "base image, adapted text", "adapted image, adapted text")
    return [comparison.accuracy[name].accuracy for name in names]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(word) for word in sys.argv[2:]))
