"""ChannelStatistics: statistics of the values in a shard, kept in its record and computed while they are in memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ChannelStatistics:
    """Count, per-channel sum and sum of squares (float64), and absolute maximum of stored activations."""

    count: int
    sum: NDArray[np.float64]  # [D]
    sum_squares: NDArray[np.float64]  # [D]
    absmax: float

    @classmethod
    def of(cls, rows: NDArray[Any]) -> "ChannelStatistics":
        """Statistics of `rows` [B, D], accumulated in float64 a few thousand rows at a time."""
        total, squares = np.zeros(rows.shape[1]), np.zeros(rows.shape[1])
        for first in range(0, len(rows), 4096):
            part = rows[first : first + 4096].astype(np.float64)
            total += part.sum(0)
            squares += np.einsum("bd,bd->d", part, part)
        return cls(len(rows), total, squares, float(np.abs(rows).max(initial=0)))

    def __add__(self, other: "ChannelStatistics") -> "ChannelStatistics":
        return ChannelStatistics(
            self.count + other.count,
            self.sum + other.sum,
            self.sum_squares + other.sum_squares,
            max(self.absmax, other.absmax),
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        return self.sum / max(self.count, 1)

    @property
    def variance(self) -> NDArray[np.float64]:
        return np.maximum(self.sum_squares / max(self.count, 1) - self.mean**2, 0)

    def to_json(self) -> dict[str, object]:
        return {
            "count": self.count,
            "sum": self.sum.tolist(),
            "sum_squares": self.sum_squares.tolist(),
            "absmax": self.absmax,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ChannelStatistics":
        """Raises KeyError, TypeError, ValueError or OverflowError when `value` is malformed."""
        total, squares = (np.array(value[name], dtype=np.float64) for name in ("sum", "sum_squares"))
        return cls(int(value["count"]), total, squares, float(value["absmax"]))


def merge_statistics(
    parts: Iterable[Mapping[str, Mapping[str, ChannelStatistics]]],
) -> dict[str, dict[str, ChannelStatistics]]:
    """Add up {hook point: {token kind: statistics}} in the order given."""
    total: dict[str, dict[str, ChannelStatistics]] = {}
    for part in parts:
        for hook, kinds in part.items():
            merged = total.setdefault(hook, {})
            for kind, value in kinds.items():
                merged[kind] = merged[kind] + value if kind in merged else value
    return total
