"""How the work behind a step lowers the clock that it runs at.

Under its power limit an H200 runs matrix products and prefill attention at 1.3 to 1.6 GHz, and what
waits for the memory at 1.7 to 1.8. The limit is on a mean: within some 0.05 s of work the clock
falls, and by some per cent more within a second. Both are seen in whole steps that are timed one
after another from rest (`op` "sustained" of a profile's measurements), also with steps of decodes
alone between them ("duty"), and are fitted to them (`podsim.heat_fitting`).

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


class Heats(NamedTuple):
    """Means of what past steps drove, with weights that fall exponentially into the past."""

    fast: float = 0.0
    slow: float = 0.0


class Shares(NamedTuple):
    """Of a step with prefill, shares of its time. Overlapped, they may be more than 1."""

    products: float
    """Of matrix products."""
    attention: float
    """Of prefill attention, as far as it keeps the SMs busy."""
    decodes: float
    """Of decode attention."""

    @property
    def idle(self) -> float:
        """Of the rest."""
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
    idle: float = 0.0
    """What the rest of a step's time takes back: the card draws less than its limit meanwhile."""
    seconds: float = 0.05
    """Time constant of the fast mean,"""
    slow_seconds: float = 1.0
    """and of the slow one,"""
    slow_share: float = 0.0
    """of which the fall is so much."""
    rest: float = 0.0
    """Fall that a rest and steps of decodes alone drive to."""
    least: float = 0.0
    """Fall that is never less while the card works."""
    timed: float = 0.0
    """The slow mean at which whole steps of a profile are timed: what ran for seconds before."""

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
        return Heats(self.rest, self.rest)

    def drive(self, num_tokens: int, shares: Shares) -> float:
        """What the heats near in a row of steps with so many tokens."""
        fall = self.products_at.get(num_tokens, self.products)
        working = fall * shares.products + self.attention * shares.attention
        return working + self.decodes * shares.decodes - self.idle * shares.idle

    def fall(self, heats: Heats) -> float:
        """At these heats."""
        share = self.slow_share
        return max((1.0 - share) * heats.fast + share * heats.slow, self.least)

    def fall_as_timed(self, drive: float) -> float:
        """Of a whole step of a profile, after some of its own."""
        return self.fall(Heats(drive, self.timed))

    def fall_in(self, drive: float, heats: Heats, seconds: float) -> float:
        """Mean over a step of so many seconds that begins at these heats."""
        return self.fall(
            Heats(
                _mean(drive, heats.fast, seconds, self.seconds),
                _mean(drive, heats.slow, seconds, self.slow_seconds),
            )
        )

    def left(self, heats: Heats, since: float, seconds: float) -> float:
        """What goes with the clock takes longer in a step of decodes alone, as a share of its time.

        The step takes `seconds` and begins `since` seconds after those heats. Its own time is
        measured at rest. Once this is 0, it is so until the next step with prefill.
        """
        # One that is below the rest, after a short prompt, does not make up for the other: what is
        # left would come back then.
        rest, share, tau, slow_tau = self.rest, self.slow_share, self.seconds, self.slow_seconds
        fast = (1.0 - share) * max(heats.fast - rest, 0.0) * math.exp(-since / tau)
        slow = share * max(heats.slow - rest, 0.0) * math.exp(-since / slow_tau)
        fast *= tau / seconds * (1.0 - math.exp(-seconds / tau))
        slow *= slow_tau / seconds * (1.0 - math.exp(-seconds / slow_tau))
        beyond = max(rest + fast + slow, self.least) - max(rest, self.least)
        return math.expm1(beyond) if beyond > COLD else 0.0

    def rested(self, heats: Heats, seconds: float) -> Heats:
        """The heats after so many seconds without a step that has prefill."""
        return self.worked(heats, self.rest, seconds)

    def worked(self, heats: Heats, drive: float, seconds: float) -> Heats:
        """The heats after so many seconds of a drive."""
        return Heats(
            drive + (heats.fast - drive) * math.exp(-seconds / self.seconds),
            drive + (heats.slow - drive) * math.exp(-seconds / self.slow_seconds),
        )


def _mean(drive: float, heat: float, seconds: float, tau: float) -> float:
    """Of a heat that nears a drive for so many seconds."""
    return drive + (heat - drive) * tau / seconds * (1.0 - math.exp(-seconds / tau))
