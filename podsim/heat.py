"""How the matrix work behind a step slows it down: the power limit lowers the clock, twice.

Within about 0.05 s of matrix work the clock falls by a tenth and more; a second, slower control
takes some per cent more after about a second. Both are seen in whole steps that are timed one after
another from rest (`op` "sustained" of a profile's measurements), and both are fitted to them. The
limit is on a mean: work that waits for the memory draws less than it allows, and makes up for
matrix work around it (`op` "duty": steps with prefill between steps of decodes alone).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

COLD = 1e-6
"""A heat that is no more slows nothing down."""


class Heats(NamedTuple):
    """Means of what past steps drove, with weights that fall exponentially into the past.

    A step's load is the share of its layers' time that is matrix products: what a lower clock
    slows. Its drive is the load times how far the clock falls under nothing but such steps, which
    is measured for every number of tokens: products that fill the SMs draw the most power.
    """

    fast: float = 0.0
    slow: float = 0.0


@dataclass(frozen=True, slots=True)
class Warming:
    """What each heat adds to a step's layers, and its time constant in seconds.

    At the load l and the heats f and s, layers take 1 + l (heating f + slow_heating s) of their
    time after a long rest. What a profile's operations and whole steps are timed at lies between:
    after some 0.1 s of their own work, f is their drive and s is still 0. Decodes and a rest drive
    both to minus the `headroom`, and only what of a heat is above 0 slows steps down.
    """

    heating: float
    seconds: float
    slow_heating: float
    slow_seconds: float
    headroom: float = 0.0

    @property
    def at_rest(self) -> Heats:
        """After a long rest, or long after the last step with prefill."""
        return Heats(-self.headroom, -self.headroom)

    @classmethod
    def of(cls, sustained: Mapping[str, float]) -> Warming:
        """Of a profile; the first profiles lack the slow heat, later ones the headroom."""
        return cls(
            sustained["heating"],
            sustained["heat_seconds"],
            sustained.get("slow_heating", 0.0),
            sustained.get("slow_heat_seconds", 1.0),
            sustained.get("headroom", 0.0),
        )

    def factor(self, load: float, drive: float, heats: Heats, seconds: float) -> float:
        """Time of a step's layers over their measured time; a step takes `seconds` or so.

        The heats at its start near the drive while it runs; their means count.
        """
        fast = max(_mean(drive, heats.fast, seconds, self.seconds), 0.0)
        slow = max(_mean(drive, heats.slow, seconds, self.slow_seconds), 0.0)
        added = load * (self.heating * fast + self.slow_heating * slow)
        return (1.0 + added) / (1.0 + self.heating * load * drive)

    def left(self, heats: Heats, since: float, seconds: float) -> float:
        """What matrix work takes longer in a step of decodes alone, as a share of its time.

        The step takes `seconds` and begins `since` seconds after those heats. Its own time is
        measured at the full clock. Once this is 0, it is so until the next step with prefill.
        """
        room, tau, slow_tau = self.headroom, self.seconds, self.slow_seconds
        fast = (heats.fast + room) * math.exp(-since / tau)
        slow = (heats.slow + room) * math.exp(-since / slow_tau)
        if fast <= room + COLD and slow <= room + COLD:
            return 0.0
        fast *= tau / seconds * (1.0 - math.exp(-seconds / tau))
        slow *= slow_tau / seconds * (1.0 - math.exp(-seconds / slow_tau))
        added = self.heating * (fast - room) if fast > room else 0.0
        return added + self.slow_heating * (slow - room) if slow > room else added

    def rested(self, heats: Heats, seconds: float) -> Heats:
        """The heats after so many seconds without a step that has prefill."""
        return self.worked(heats, -self.headroom, seconds)

    def worked(self, heats: Heats, drive: float, seconds: float) -> Heats:
        """The heats after so many seconds of a drive."""
        return Heats(
            drive + (heats.fast - drive) * math.exp(-seconds / self.seconds),
            drive + (heats.slow - drive) * math.exp(-seconds / self.slow_seconds),
        )


def _mean(drive: float, heat: float, seconds: float, tau: float) -> float:
    """Of a heat that nears a drive for so many seconds."""
    return drive + (heat - drive) * tau / seconds * (1.0 - math.exp(-seconds / tau))
