"""What a measure returns: Measured, a number with its bootstrap replicates, or Skipped, the reason for its absence."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Measured:
    """One number of one subject.

    Attributes:
        value: None where the number does not exist, as the fvu of activations that do not vary.
        replicates: [n], the number on each resample of the judged images; None where resampling images says nothing
            about it, and then `details` has the reason as `no_interval`.
        details: what else is known of it, as plain JSON.
    """

    name: str
    value: float | None
    replicates: NDArray[np.float64] | None
    higher_is_better: bool
    details: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """A measure that could not be taken. `reason`: what is missing and how to give it, in one line."""

    name: str
    reason: str
