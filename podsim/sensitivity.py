"""How much the time of an operation follows the clock of the SMs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """By how many per cent a time grows at a clock that is one per cent lower.

    From `low`, where it waits for the memory, to `high`, where it waits for the SMs: in between
    with its FLOPs a byte, over those of the turn, to the power of `steepness`.
    """

    low: float
    high: float
    turn: float
    """FLOPs a byte."""
    steepness: float

    def at(self, intensity: Floats) -> Floats:
        """`intensity` is in FLOPs a byte, and may be infinite."""
        bytes_a_flop = 1 / np.maximum(intensity, 1e-9)
        share = 1 / (1 + (self.turn * bytes_a_flop) ** self.steepness)
        return np.asarray(self.low + (self.high - self.low) * share)

    def share(self, intensity: float) -> float:
        """The same of one."""
        turned: float = (self.turn / max(intensity, 1e-9)) ** self.steepness
        return self.low + (self.high - self.low) / (1 + turned)
