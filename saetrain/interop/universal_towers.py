"""What the authors of Universal SAE published beside its checkpoints: the constants of each tower, and k.

Each tower's activations are standardized by one mean and one deviation, (x - mean) / (deviation + 1e-5). Source:
YorkUCVIL/UniversalSAE, checkpoints/config_dino_siglip_vit.yaml.
"""

from dataclasses import dataclass
from pathlib import Path

UNIVERSAL_EPS = 1e-5
UNIVERSAL_K = 32


@dataclass(frozen=True)
class Tower:
    """One tower of Universal SAE: the width of its stream, and the mean and deviation of all its activations."""

    d_model: int
    mean: float
    deviation: float


UNIVERSAL_TOWERS = {
    "SigLIP": Tower(768, -0.030537348240613937, 2.231515407562256),
    "DinoV2": Tower(384, 0.03290482237935066, 2.474064350128174),
    "ViT": Tower(768, -0.028632672503590584, 2.1376500129699707),
}
"""By the word that the names of the published files have, uni_<word>_checkpoint_29.pth."""


def find_universal_tower(path: Path) -> tuple[str, Tower] | None:
    """The tower that the name of a file of Universal SAE says, if it is one of the three that were published."""
    words = path.name.split("_")
    return next(((name, tower) for name, tower in UNIVERSAL_TOWERS.items() if name in words), None)
