"""Latency models: how many seconds a step takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from podsim.attention_model import AttentionModel, Geometry
from podsim.batch import BatchShape
from podsim.model import Model
from podsim.profile import Profile

LAYER_OPS = {
    "rmsnorm": 2,
    "qkv": 1,
    "rope_and_cache": 1,
    "output": 1,
    "gate_up": 1,
    "silu_mul": 1,
    "down": 1,
}
"""How often each operation but attention runs in a layer."""

TOKEN_OPS = ("embedding", "rmsnorm")
SAMPLED_OPS = ("lm_head", "sampling")
"""What a step runs once, over all its tokens and over those that come out."""


class LatencyModel(Protocol):
    """Anything that knows the seconds of a step from its shape."""

    def step_time(self, shape: BatchShape) -> float:
        """Seconds of one forward pass over a batch of this shape."""


@runtime_checkable
class RunsOfDecodes(Protocol):
    """A latency model that knows many steps at once."""

    def decode_run_times(self, shape: BatchShape, num_steps: int) -> list[float]:
        """What `decode_run_times` says, equal to the last bit."""


def decode_run_times(model: LatencyModel, shape: BatchShape, num_steps: int) -> list[float]:
    """Seconds of each of `num_steps` steps of decodes, the contexts one longer in each.

    `shape` is that of the first. A model that only knows `step_time` is asked for every step.
    """
    if isinstance(model, RunsOfDecodes):
        return model.decode_run_times(shape, num_steps)
    n = shape.num_decodes
    return [
        model.step_time(
            BatchShape((), n, shape.decode_context_sum + n * i, shape.decode_context_max + i, n)
        )
        for i in range(num_steps)
    ]


@dataclass(frozen=True, slots=True)
class ConstantLatency:
    """Every step takes the same time: for tests and closed forms."""

    seconds: float

    def step_time(self, shape: BatchShape) -> float:
        return self.seconds


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Seconds of a step by what it spends them on."""

    attention: float
    layers: float
    """Everything else in the layers."""
    once: float
    """Embedding, final norm, LM head, sampling, the launch of the step and host time."""

    @property
    def total(self) -> float:
        return self.attention + self.layers + self.once


class ProfiledLatency:
    """The sum over a step's operations of their measured, interpolated or fitted times.

    It also counts how much of the time it predicted lies outside the measured range.
    """

    def __init__(
        self, profile: Profile, model: Model, strategy: str, host_overhead: float = 0.0
    ) -> None:
        self.profile = profile
        self.strategy = strategy
        self.num_layers = model.num_layers
        self.step_overhead = profile.launch["graph"] + host_overhead
        self.attention = AttentionModel(
            Geometry.of(model, profile.attention["geometry"]), profile.attention["coefficients"]
        )
        self._layer_time = _Table(profile, LAYER_OPS)
        self._token_time = _Table(profile, dict.fromkeys(TOKEN_OPS, 1))
        self._sampled_time = _Table(profile, dict.fromkeys(SAMPLED_OPS, 1))
        self.seconds_predicted = 0.0
        self.seconds_outside = 0.0

    def step_time(self, shape: BatchShape) -> float:
        seconds = self.breakdown(shape).total
        self.seconds_predicted += seconds
        if not self.is_inside(shape):
            self.seconds_outside += seconds
        return seconds

    def decode_run_times(self, shape: BatchShape, num_steps: int) -> list[float]:
        """See `decode_run_times`; NumPy does the arithmetic of `step_time` in the same order."""
        n = shape.num_decodes
        steps = np.arange(num_steps)
        sums = shape.decode_context_sum + n * steps
        longest = shape.decode_context_max + steps
        attention = self.num_layers * self.attention.decode_seconds(n, sums, longest)
        layers = self.num_layers * self._layer_time.at(n)
        once = self._token_time.at(n) + self._sampled_time.at(n) + self.step_overhead
        seconds = attention + layers + once
        hull = self.profile.hull
        outside = (sums > hull["decode_context_sum"]) | (longest > hull["context_len"])
        if not self.is_inside(shape):
            outside[:] = True
        self.seconds_predicted += float(seconds.sum())
        self.seconds_outside += float(seconds[outside].sum())
        times: list[float] = seconds.tolist()
        return times

    def breakdown(self, shape: BatchShape) -> Breakdown:
        """Where the seconds of a step go."""
        num_tokens = shape.num_tokens
        return Breakdown(
            attention=self.num_layers * self.attention.seconds(self.strategy, shape),
            layers=self.num_layers * self._layer_time.at(num_tokens),
            once=self._token_time.at(num_tokens)
            + self._sampled_time.at(shape.num_sampled)
            + self.step_overhead,
        )

    def is_inside(self, shape: BatchShape) -> bool:
        """Whether no number of the batch exceeds the largest that was measured."""
        hull = self.profile.hull
        longest = max([chunk.context_len for chunk in shape.prefills], default=0)
        return (
            shape.num_tokens <= hull["num_tokens"]
            and shape.num_sampled <= hull["num_sampled"]
            and max(longest, shape.decode_context_max) <= hull["context_len"]
            and shape.num_decodes <= hull["num_decodes"]
            and shape.decode_context_sum <= hull["decode_context_sum"]
        )

    def notes(self) -> Sequence[str]:
        """What a reader of the results should know of these predictions."""
        if not self.seconds_outside:
            return []
        share = self.seconds_outside / self.seconds_predicted
        return [f"{share:.1%} of the simulated step time was predicted beyond what was measured"]


def op_seconds(table: Mapping[str, Sequence[float]], num_tokens: ArrayLike) -> NDArray[np.float64]:
    """Of one operation of a profile: linear between the measured points of the same alignment.

    A number of tokens that is a multiple of 8 runs another matrix kernel than its neighbours.
    """
    wanted = np.asarray(num_tokens, dtype=np.int64)
    measured, seconds = np.array(table["num_tokens"]), np.array(table["seconds"])
    aligned = measured % 8 == 0
    on = np.interp(wanted, measured[aligned], seconds[aligned])
    off = np.interp(wanted, measured[~aligned], seconds[~aligned])
    return np.where(wanted % 8 == 0, on, off)


class _Table:
    """Seconds of some operations together, for every number of tokens.

    Beyond the last measured point, with the rate between it and the point of half its tokens.
    """

    def __init__(self, profile: Profile, counts: Mapping[str, int]) -> None:
        tables = [(profile.ops[name], count) for name, count in counts.items()]
        self._measured = min(int(table["num_tokens"][-1]) for table, _ in tables)
        num_tokens = np.arange(self._measured + 1)
        seconds = sum(count * op_seconds(table, num_tokens) for table, count in tables)
        self._seconds: list[float] = np.asarray(seconds).tolist()
        self._seconds[0] = 0.0
        half = self._measured // 2
        self._rate: float = (self._seconds[-1] - self._seconds[half]) / (self._measured - half)

    def at(self, num_tokens: int) -> float:
        if num_tokens <= self._measured:
            return self._seconds[num_tokens]
        return self._seconds[-1] + (num_tokens - self._measured) * self._rate
