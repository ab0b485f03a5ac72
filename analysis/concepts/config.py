"""AnalyzeConfig: what decides the content of a concept table. Importing it loads no heavy library."""

from dataclasses import dataclass

from actcache import SettingsError
from actcache.options import option
from analysis.config import SCORES, TAU


@dataclass(frozen=True)
class AnalyzeConfig:
    """Raises SettingsError for a value that is out of range."""

    n_top: int = option(16, "Number of top images kept for each latent; the label entropy is taken over them.")
    score: str = option("mean", "What orders a latent's images: mean over the image's tokens (PatchSAE), or max.")
    tau: float = option(TAU, "A token counts for its class when its activation is above this.")
    n_gallery: int = option(100, "Number of latents whose pictures are kept for the report.")

    def __post_init__(self) -> None:
        if self.n_top < 1:
            raise SettingsError(f"--n-top must be at least 1, got {self.n_top}.")
        if self.score not in SCORES:
            raise SettingsError(f"--score must be one of {', '.join(SCORES)}, got {self.score!r}.")
