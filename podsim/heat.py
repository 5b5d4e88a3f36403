"""How the work behind a step lowers the clock that it runs at.

Under its power limit an H200 runs matrix products and prefill attention at 1.3 to 1.6 GHz, and what
waits for the memory at 1.7 to 1.8. Within some 0.05 s of work the clock falls, and stays; a card
that has been at its limit for most of a second falls some per cent further, all at once. Both are
seen in whole steps that are timed one after another from rest (`op` "sustained" of a profile's
measurements), also with steps of decodes alone between them ("duty"), and are fitted to them
(`podsim.heat_fitting`). A part of the fall is there from the first moment of a step, by how much of
its time matrix products take.

A fall is the logarithm of the highest clock over the clock: the time of what goes with the clock
grows by its exponential.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

COLD = 1e-3
"""A fall that is no more beyond that of a rest changes steps of decodes no more: it would by some
hundredth of a per cent, and each of them for many seconds."""


SECOND = 1.0
"""In which the card looks at whether it was at its limit: a time constant."""
HALF = (0.45, 0.55)
"""About half of that time at the limit, and the card falls further: not at all, and in full."""


class Heats(NamedTuple):
    """Means over the past, with weights that fall exponentially."""

    fall: float = 0.0
    """Of what steps drove: that of the last hundredths of a second,"""
    limited: float = 0.0
    """and of whether the card was at its limit, 0 to 1: that of the last second."""


class Drive(NamedTuple):
    """What a step does to the clock."""

    fall: float
    """That the heats near in a row of such steps."""
    at_once: float
    """That there is from its first moment on."""


class Shares(NamedTuple):
    """Of a step with prefill, what it does as shares of its time: overlapped, more than 1."""

    products: float
    """Of matrix products."""
    attention: float
    """Of prefill attention, as far as it keeps the SMs busy."""
    decodes: float
    """Of decode attention."""
    overlapped: float = 0.0
    """Of what runs beside other work: by so much a step is shorter;"""
    balanced: float = 0.0
    """in its place, in POD's tiles for batches that are not decode-heavy."""

    @property
    def idle(self) -> float:
        """What the first three would leave of the time if nothing ran at once."""
        return max(0.0, 1.0 - self.products - self.attention - self.decodes)


@dataclass(frozen=True, slots=True)
class Warming:
    """What drives the clock down, how fast, and how far it is down in any case."""

    products: float
    """Fall under nothing but matrix products,"""
    products_at: Mapping[int, float] = field(default_factory=dict)
    """and of the numbers of tokens that were watched for seconds: each has kernels of its own, and
    a full token budget is always the same number."""
    attention: float = 0.0
    """Fall under nothing but prefill attention on all SMs,"""
    decodes: float = 0.0
    """and under nothing but decode attention, if there is prefill in the step."""
    overlap: float = 0.0
    """What work adds that runs beside other work: the card draws for both at once;"""
    balanced_overlap: float = 0.0
    """another kernel's tiles, those of POD for batches that are not decode-heavy, draw less."""
    idle: float = 0.0
    """What the rest of a step's time takes back: the card draws less than its limit meanwhile."""
    seconds: float = 0.05
    """Time constant of the fall."""
    rest: float = 0.0
    """Fall that a rest and steps of decodes alone drive to."""
    least: float = 0.0
    """Fall that is never less while the card works,"""
    at_once: float = 0.0
    """and what nothing but matrix products adds to that, before any heat."""
    follows: float = 1.0
    """Of what goes with the clock where operations are timed alone, how much does in a step,"""
    longer: float = 0.0
    """and what it takes longer there at the same clock, as a share."""
    at_limit: float = 0.05
    """So far beyond the rest the card is at its limit, and less far in part."""
    lower: float = 0.0
    """What a card at its limit falls further that was there for most of the last second,"""
    timed: float = 1.0
    """and the part of it that is in whole steps as a profile times them, one soon after another."""

    @classmethod
    def of(cls, sustained: Mapping[str, Any]) -> Warming | None:
        """Of a profile; None if its steps were not watched."""
        if "products" not in sustained:
            return None
        watched = {int(n): float(fall) for n, fall in sustained["products_at"].items()}
        others = [name for name in cls.__slots__ if name != "products_at"]
        return cls(products_at=watched, **{name: float(sustained[name]) for name in others})

    @property
    def at_rest(self) -> Heats:
        """After a long rest, or long after the last step with prefill."""
        return Heats(self.rest)

    def drive(self, num_tokens: int, shares: Shares, beyond: float = 0.0) -> Drive:
        """Of a step with prefill of so many tokens, whose layers alone are timed at a fall so far
        beyond that of numbers near it: their matrix kernels draw as much more.
        """
        products, attention, decodes, overlapped, balanced = shares
        fall = self.products_at.get(num_tokens, self.products + beyond)
        working = fall * products + self.attention * attention + self.decodes * decodes
        beside = self.overlap * overlapped + self.balanced_overlap * balanced
        return Drive(
            working + beside - self.idle * shares.idle,
            self.least + self.at_once * min(products, 1.0),
        )

    def limited(self, fall: float) -> float:
        """How far the card is at its limit, 0 to 1."""
        return smooth((fall - self.rest) / self.at_limit)

    def fall(self, heats: Heats) -> float:
        """At these heats."""
        return max(self._fall(heats.fall, _for_long(heats.limited)), self.least)

    def fall_as_timed(self, drive: Drive) -> float:
        """Of a whole step of a profile, after some of its own."""
        return max(self._fall(drive.fall, self.timed), drive.at_once)

    def _fall(self, fall: float, for_long: float) -> float:
        return fall + self.lower * for_long * self.limited(fall)

    def fall_in(self, drive: Drive, heats: Heats, seconds: float) -> float:
        """Mean over a step with prefill of so many seconds that begins at these heats."""
        limited = self.limited(_mean(drive.fall, heats.fall, seconds, self.seconds))
        for_long = _for_long(_mean(limited, heats.limited, seconds, SECOND))
        lower = self.lower * for_long * limited
        least = drive.at_once - lower
        return lower + _mean_above(least, drive.fall, heats.fall, seconds, self.seconds)

    def slower(self, fall: float, as_timed: float) -> float:
        """What goes with the clock takes so much longer, as a share of its time at the fall that it
        was timed at; in steps with prefill.
        """
        return self.longer + self.follows * math.expm1(fall - as_timed)

    def worked(self, heats: Heats, drive: Drive, seconds: float) -> Heats:
        """The heats after a step of so many seconds with this drive."""
        limited = self.limited(_mean(drive.fall, heats.fall, seconds, self.seconds))
        return Heats(
            _after(drive.fall, heats.fall, seconds, self.seconds),
            _after(limited, heats.limited, seconds, SECOND),
        )

    def rested(self, heats: Heats, seconds: float) -> Heats:
        """The heats after so many seconds without a step that has prefill."""
        tau, beyond = self.seconds, max((heats.fall - self.rest) / self.at_limit, 0.0)
        in_full = min(seconds, tau * math.log(beyond)) if beyond > 1.0 else 0.0
        limited = _after(1.0, heats.limited, in_full, SECOND)
        # Then less and less, by the square and the cube of what is left of the fall (`smooth`).
        part, left = min(beyond, 1.0), seconds - in_full
        forgotten = math.exp(-left / SECOND)
        limited *= forgotten
        for share, power in ((3.0, 2), (-2.0, 3)):
            mine = tau / power
            still = share * part**power * mine / (SECOND - mine)
            limited += still * (forgotten - math.exp(-left / mine))
        return Heats(_after(self.rest, heats.fall, seconds, tau), limited)

    def left(self, heats: Heats, since: float, seconds: float) -> float:
        """What goes with the clock takes longer in a step of decodes alone, as a share of its time.

        The step takes `seconds` and begins `since` seconds after those heats. Its own time is
        measured at rest. Once this is 0, it is so until the next step with prefill.
        """
        rest, tau = self.rest, self.seconds
        if heats.fall <= rest:  # a fall below the rest, after a short prompt, would come back
            return 0.0
        mean = math.exp(-since / tau) * tau / seconds * (1.0 - math.exp(-seconds / tau))
        # What is left is gone long before the card forgets that it was at its limit.
        fall = self.fall(Heats(rest + (heats.fall - rest) * mean, heats.limited))
        beyond = fall - max(rest, self.least)
        return math.expm1(beyond) if beyond > COLD else 0.0


def _for_long(limited: float) -> float:
    """How far a card has been at its limit for long, 0 to 1."""
    low, high = HALF
    return smooth((limited - low) / (high - low))


def smooth(part: float) -> float:
    """0 below 0, 1 above 1, and without a kink between: fits find their end."""
    part = min(max(part, 0.0), 1.0)
    return part * part * (3.0 - 2.0 * part)


def _mean(drive: float, heat: float, seconds: float, tau: float) -> float:
    """Of a heat that nears a drive for so many seconds."""
    return drive + (heat - drive) * tau / seconds * (1.0 - math.exp(-seconds / tau))


def _mean_above(least: float, drive: float, heat: float, seconds: float, tau: float) -> float:
    """The same of the greater of the heat and `least` in each moment."""
    end, above = _after(drive, heat, seconds, tau), seconds
    if heat < least or end < least:
        if heat <= least >= end:
            return least
        crossed = tau * math.log((heat - drive) / (least - drive))
        above = seconds - crossed if heat < least else crossed
        heat, end = max(heat, least), max(end, least)
    return drive + (heat - end) * tau / seconds + (least - drive) * (1.0 - above / seconds)


def _after(drive: float, heat: float, seconds: float, tau: float) -> float:
    """A heat that neared a drive for so many seconds."""
    return drive + (heat - drive) * math.exp(-seconds / tau)
