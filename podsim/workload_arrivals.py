"""Arrival times drawn at random: `ARRIVALS`, the kinds of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError

Times = NDArray[np.float64]
Gaps = Callable[[np.random.Generator, int, float], Times]

# How the gaps between arrivals are drawn, with a mean of 1: (generator, count, burstiness).
ARRIVALS: dict[str, Gaps] = {
    "poisson": lambda rng, count, _: rng.exponential(size=count),
    "gamma": lambda rng, count, shape: rng.gamma(shape, 1 / shape, count),
    "weibull": lambda rng, count, shape: rng.weibull(shape, count) / math.gamma(1 + 1 / shape),
    "uniform": lambda rng, count, _: np.ones(count),
    "static": lambda rng, count, _: np.zeros(count),
}


def generator(seed: int) -> np.random.Generator:
    """The one source of randomness; InputError for a negative seed."""
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    return np.random.default_rng(seed)


def positive(what: str, value: float) -> None:
    """InputError unless the value is above 0 and finite."""
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{what} is {value:g}, expected a number above 0")


def arrival_times(
    kind: str, qps: float | None, count: int, rng: np.random.Generator, burstiness: float = 1.0
) -> Times:
    """`count` times in seconds from a first arrival at 0, `qps` a second in the mean.

    burstiness: the shape of gamma and Weibull gaps; 1 is Poisson, less is burstier.
    InputError: an unknown kind, or a number out of its range.
    """
    if kind not in ARRIVALS:
        raise InputError(f"arrivals are {kind!r}, expected one of {', '.join(ARRIVALS)}")
    positive("burstiness", burstiness)
    if burstiness != 1 and kind not in ("gamma", "weibull"):
        raise InputError(f"burstiness is {burstiness:g}, but only gamma and weibull have one")
    if kind == "weibull" and burstiness < 0.05:  # the mean of such gaps is beyond a float
        raise InputError(f"burstiness is {burstiness:g}, expected at least 0.05 for weibull")
    if kind == "static":
        if qps is not None:
            raise InputError(f"qps is {qps:g}, but static arrivals have none: all come at once")
        qps = 1.0
    if qps is None:
        raise InputError(f"qps is missing, {kind} arrivals need one")
    positive("qps", qps)
    gaps = ARRIVALS[kind](rng, count - 1, burstiness) / qps
    return np.concatenate([[0.0], np.cumsum(gaps)])


# ---- rates that change


@dataclass(frozen=True, slots=True)
class Ramp:
    """Poisson arrivals whose rate goes evenly from `qps` to `end_qps`, in requests/s."""

    qps: float
    end_qps: float

    def __post_init__(self) -> None:
        positive("qps", self.qps)
        positive("end qps", self.end_qps)

    def times(self, count: int, rng: np.random.Generator) -> Times:
        """`count` times in seconds from 0; the end of the ramp is about at the last."""
        expected = _unit_rate(count, rng)
        # Expected arrivals at t: qps * t + slope * t**2 / 2, `count` of them when the ramp ends.
        slope = (self.end_qps**2 - self.qps**2) / (2 * count)
        # The root without cancellation; below 0 only where a falling ramp would have ended.
        root = np.sqrt(np.maximum(self.qps**2 + 2 * slope * expected, self.end_qps**2 / 4))
        return _from_zero(2 * expected / (self.qps + root))


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson arrivals whose rate swings as a sine: qps * (1 + amplitude * sin(2 pi t / period)).

    Seconds and requests/s; amplitude from 0 to 1.
    """

    qps: float
    amplitude: float = 0.5
    period: float = 86_400.0

    def __post_init__(self) -> None:
        positive("qps", self.qps)
        positive("period", self.period)
        if not 0 <= self.amplitude <= 1:
            raise InputError(f"amplitude is {self.amplitude:g}, expected 0 to 1")

    def times(self, count: int, rng: np.random.Generator) -> Times:
        """`count` times in seconds from the first arrival."""
        expected = _unit_rate(count, rng)
        # The expected arrivals at t lie between qps * t and that + 2 * swing: halve between.
        swing = self.qps * self.amplitude * self.period / (2 * math.pi)
        low, high = (expected - 2 * swing) / self.qps, expected / self.qps
        for _ in range(60):
            middle = (low + high) / 2
            at_middle = self.qps * middle + swing * (1 - np.cos(2 * math.pi * middle / self.period))
            early = at_middle < expected
            low, high = np.where(early, middle, low), np.where(early, high, middle)
        return _from_zero(np.maximum.accumulate(high))


def _unit_rate(count: int, rng: np.random.Generator) -> Times:
    times: Times = np.cumsum(rng.exponential(size=count))
    return times


def _from_zero(times: Times) -> Times:
    rebased: Times = times - times[0]
    return rebased
