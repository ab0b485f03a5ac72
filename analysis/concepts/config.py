"""AnalyzeConfig: what decides the content of a concept table. Importing it loads no heavy library."""

from dataclasses import dataclass

from actcache import SettingsError
from actcache.options import check_options, option
from analysis.config import SCORES, TAU


@dataclass(frozen=True)
class AnalyzeConfig:
    """The options of `analyze`. Raises SettingsError for a value that is out of range."""

    n_top: int = option(
        16, "Number of top images kept for each latent; the label entropy is computed over them.", at_least=1
    )
    score: str = option(
        "mean", "How a latent's images are ranked: by the mean over their tokens (PatchSAE), or by the max."
    )
    tau: float = option(TAU, "Activation above which a token counts for its class.", at_least=0)
    n_gallery: int = option(100, "Number of latents whose pictures are kept for the report.", at_least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.score not in SCORES:
            raise SettingsError(f"--score must be one of {', '.join(SCORES)}, got {self.score!r}.")
