"""quickstart(): the whole pipeline on the built-in demo, and how much of the ground truth the SAE finds.

Only the images, the model and the ground truth are special to the demo; every step is a public verb.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from actcache import ActivationStore, extract
from actcache.demo import MODEL, PRETRAINED, Truth, write_demo, write_pairs
from actcache.options import check_number
from analysis.concepts import analyze
from analysis.localization import Labeled, Recovered, recover_concepts
from analysis.report import write_report
from saetrain import CodeStore, SAEConfig, TrainConfig, encode, train

LAYER = 3
SAE = SAEConfig(variant="batchtopk", n_latents=64, k=4)
STEPS = 800
AUROC_BAR = 0.95

OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Quickstart:
    """The outcome of quickstart."""

    fvu: float
    l0: float
    concepts: list[Recovered]
    report: Path

    @property
    def n_found(self) -> int:
        """Number of concepts with a latent of AUROC >= 0.95 on images that took no part in choosing it."""
        return sum(concept.auroc >= AUROC_BAR for concept in self.concepts)

    @property
    def mean_iou(self) -> float:
        """Mean over the concepts of the IoU of their latents' heat maps with the true pixel masks."""
        return float(np.mean([concept.iou for concept in self.concepts]))

    def to_json(self) -> dict[str, object]:
        """Every fact that is shown."""
        return {
            "fvu": self.fvu,
            "l0": self.l0,
            "n_concepts": len(self.concepts),
            "n_found": self.n_found,
            "mean_iou": self.mean_iou,
            "report": str(self.report),
            "concepts": [asdict(concept) for concept in self.concepts],
        }

    def lines(self) -> list[str]:
        """The report that the command line prints."""
        rows = [
            f"  {c.concept:<20} latent {c.latent:>5}   AUROC {c.auroc:.3f}   IoU {c.iou:.2f}" for c in self.concepts
        ]
        share = self.n_found / len(self.concepts)
        return [
            *rows,
            f"held-out FVU {self.fvu:.3f} at L0 {self.l0:.1f}",
            f"{self.n_found} of {len(self.concepts)} known concepts ({share:.0%}) have a latent with AUROC >= 0.95 "
            "on unseen images",
            f"mean IoU of their heat maps with the true masks: {self.mean_iou:.2f}",
            f"report: {self.report}",
        ]


def quickstart(
    out: str | Path, *, n_images: int = 2000, seed: int = 0, on_step: OnStep = lambda step, done, total: None
) -> Quickstart:
    """Generate images, extract, train, encode, analyze and report; then compare with the truth. Resumes like its steps.

    A second, smaller set of images (another seed) is never trained on; latents are chosen on the first set and judged
    on the second. A third set, pairs of images that differ in one attribute, is extracted for `benchmark --pairs`.

    Args:
        on_step: called with (name of the step, done, total).
    """
    out, n_images = Path(out), check_number("n_images", n_images, int, at_least=1)

    def report_as(step: str) -> Callable[..., None]:
        return lambda done, total, *rest: on_step(step, done, total)

    truth = write_demo(out / "scenes", n_images=n_images, seed=seed, on_progress=report_as("generate images"))
    unseen = write_demo(
        out / "unseen-scenes", n_images=max(n_images // 4, 1), seed=seed + 1, on_progress=report_as("unseen images")
    )
    pairs = write_pairs(
        out / "paired-scenes", n_pairs=max(n_images // 4, 1), seed=seed + 1, on_progress=report_as("paired images")
    )
    store = _extract(truth, out / "scenes.acts", seed, report_as("extract"))
    unseen_store = _extract(unseen, out / "unseen.acts", seed, report_as("extract unseen"))
    _extract(pairs, out / "pairs.acts", seed, report_as("extract pairs"))
    run = train(
        store,
        out / "run",
        sae=SAE,
        config=TrainConfig(n_steps=STEPS, batch_size=2048, lr=2e-3, dead_tokens=100_000, seed=seed),
        on_progress=report_as("train"),
    )
    codes = encode(run, store, out / "scenes.codes", on_progress=report_as("encode"))
    unseen_codes = encode(run, unseen_store, out / "unseen.codes", on_progress=report_as("encode unseen"))
    concepts = analyze(codes, out / "scenes.concepts", on_progress=report_as("analyze"))
    report = write_report(concepts, out / "report.html")
    on_step("compare with the truth", 0, 1)
    recovered = recover_concepts(truth.names, _labeled(codes, truth), _labeled(unseen_codes, unseen))
    on_step("compare with the truth", 1, 1)
    return Quickstart(run.fvu, float(run.quality["all"]["l0"]), recovered, report)


def _extract(truth: Truth, store: Path, seed: int, on_progress: Callable[..., None]) -> ActivationStore:
    return extract(
        truth.path / "images", store, model=MODEL, pretrained=PRETRAINED, layers=[LAYER], masks=truth.path / "objects",
        batch_size=64, seed=seed, on_progress=on_progress,
    )  # fmt: skip


def _labeled(codes: CodeStore, truth: Truth) -> Labeled:
    """The truth, which is in file order, brought into stored order."""
    position = {uri: i for i, uri in enumerate(truth.uris)}
    order = np.array([position[uri] for uri in codes.images["uri"].to_pylist()])

    def masks(images: NDArray[np.int64], concept: int) -> NDArray[np.bool_]:
        return truth.masks(order[images].tolist(), concept)

    return Labeled(codes, truth.present[order], masks)
