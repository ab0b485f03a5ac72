"""A map of the latents: decoder directions in two dimensions."""

from typing import Any

from numpy.typing import NDArray

from analysis.explore.sources import Sources


def read_map(sources: Sources) -> dict[str, NDArray[Any]]:
    """The columns map_x and map_y [F]; none if the map has not been made."""
    return {}
