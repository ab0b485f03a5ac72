"""The result of localize: how well latents find the pixels of known concepts."""

from dataclasses import asdict, dataclass
from typing import ClassVar

from analysis.results.result import Result, Row


@dataclass(frozen=True)
class LocalizedConcept:
    """A latent, chosen on one half of the images and judged on the other.

    Attributes:
        ap: average precision over pixels. chance: share of the pixels, the AP of a constant.
        pointing: share of images in which the middle of the latent's strongest patch carries the concept.
        iou: mean over images of the IoU of the thresholded heat map and the mask.
        chosen_ap: AP on the choosing half.
        n_images: images of the judging half that contain the concept.
    """

    concept: str
    latent: int
    ap: float
    chance: float
    pointing: float
    iou: float
    chosen_ap: float
    n_images: int


@dataclass(frozen=True)
class LocalizedConcepts(Result):
    """The latents that localize each concept of the pixel masks best, and how well they do."""

    KIND: ClassVar[str] = "localization"

    n_images: int  # with masks, in both halves
    concepts: tuple[LocalizedConcept, ...]

    def tables(self) -> list[list[Row]]:
        """A row per concept and latent."""
        return [[asdict(concept) for concept in self.concepts]]
