"""Latency models: how many seconds a step takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from podsim.attention_model import AttentionModel
from podsim.batch import BatchShape
from podsim.collectives import StepCollectives
from podsim.graph_sizes import graph_size
from podsim.heat import Drive, Heats, Shares, Warming
from podsim.model import Model
from podsim.op_tables import (
    LAYER_OPS,
    MATRIX_OPS,
    SAMPLED_OPS,
    TOKEN_OPS,
    beyond_neighbours,
    op_seconds,
)
from podsim.profile import Profile
from podsim.roofline import attention_traffic, product_traffic
from podsim.scaling import Attention, AttentionTime, ScaledAttention
from podsim.sensitivity import Sensitivity

T = TypeVar("T", float, NDArray[np.float64])


class StepOfAttention(Protocol):
    """Seconds of steps from seconds of their attention in a layer."""

    def __call__(self, attention: T) -> T:
        """Of one step, or of an array of steps."""


USUAL_SENSITIVITY = {
    "products": Sensitivity(0.13, 0.95, 235.0, 5.2),
    "serial": Sensitivity(0.25, 1.0, 120.0, 1.1),
    "streams": Sensitivity(0.15, 1.0, 50.0, 2.0),
    "unified": Sensitivity(0.45, 1.0, 16.0, 3.0),
    "pod": Sensitivity(0.06, 0.92, 95.0, 1.2),
}
"""For profiles whose passes are too few or have no clocks: about the median of those that tell."""
WORTH_AN_ARRAY = 32
"""Steps of a run from which on NumPy is faster than a loop."""


class LatencyModel(Protocol):
    """Anything that knows the seconds of a step from its shape."""

    def step_time(self, shape: BatchShape) -> float:
        """Seconds of one forward pass over a batch of this shape."""


RunTimes = Callable[[BatchShape, int], list[float]]
"""Seconds of each of so many steps of decodes, the contexts one longer in each. The shape is that
of the first step; equal to the last bit to asking `step_time` for every step."""


@runtime_checkable
class RunsOfDecodes(Protocol):
    """A latency model that knows many steps at once."""

    def decode_run_times(self, shape: BatchShape, num_steps: int) -> list[float]:
        """See `RunTimes`."""


@runtime_checkable
class WarmsUp(Protocol):
    """A latency model whose steps take longer after matrix work, which lowers the clock."""

    warming: Warming | None
    """None: it knows nothing of the clock."""

    def step_time_at(self, shape: BatchShape, heats: Heats) -> tuple[float, Drive]:
        """Seconds of a step with prefill, and what it does to the clock."""

    def clocked_seconds(self, num_decodes: int, seconds: float) -> float:
        """Of a step of so many decodes alone, which takes `seconds`: what goes with the clock."""


def decode_steps(shape: BatchShape, num_steps: int) -> Iterator[BatchShape]:
    """The shapes of consecutive steps of decodes, the contexts one longer in each."""
    n = shape.num_decodes
    for step in range(num_steps):
        yield BatchShape.of_decodes(
            n, shape.decode_context_sum + n * step, shape.decode_context_max + step
        )


def decode_run_times(model: LatencyModel) -> RunTimes:
    """The model's own way to time a run of decodes, or `step_time` asked for every step."""
    if isinstance(model, RunsOfDecodes):
        return model.decode_run_times

    def one_by_one(shape: BatchShape, num_steps: int) -> list[float]:
        return [model.step_time(step) for step in decode_steps(shape, num_steps)]

    return one_by_one


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
    collectives: float
    """Of the GPUs that share the model; 0 if it is on one."""

    @property
    def total(self) -> float:
        return self.attention + self.layers + self.once + self.collectives


class Parts(NamedTuple):
    """Seconds of a step, each part at the clock that it is timed at."""

    attention: float
    layers: float
    once: float
    collectives: float
    """As in `Breakdown`."""
    clocked_attention: float
    """Of the attention, what goes with the clock,"""
    clocked_layers: float
    """and of the rest of the layers."""
    products: float
    """For how long matrix products would keep all SMs busy,"""
    drawing: float
    """and attention would,"""
    reading: float
    """and decodes beside prefill would take alone,"""
    beside: float
    """of which so much is saved by running both at once;"""
    balanced: float
    """in its place, by POD's tiles for batches that are not decode-heavy."""

    @property
    def shares(self) -> Shares:
        """Of the step's time without collectives: what they draw was not measured, and is taken to
        be what the rest does.
        """
        seconds = self.attention + self.layers + self.once
        return Shares(
            self.products / seconds,
            self.drawing / seconds,
            self.reading / seconds,
            self.beside / seconds,
            self.balanced / seconds,
        )


class Hull(NamedTuple):
    """The largest numbers of a batch that were measured."""

    num_tokens: int
    num_sampled: int
    context_len: int
    num_decodes: int
    decode_context_sum: int


class ProfiledLatency:
    """The sum over a step's operations of their measured, interpolated or fitted times.

    It also counts how much of the time it predicted lies outside the measured range. A step waits
    for `host_overhead`, `host_per_request` of each of its requests and, if it has prefill,
    `host_with_prefill`, in seconds; with `graph_padding` it computes as many tokens as the next
    CUDA graph has; `scale` multiplies it. Of a share of a model, without `collectives`, it is the
    time of one GPU's kernels alone.
    """

    def __init__(
        self,
        profile: Profile,
        model: Model,
        strategy: str,
        host_overhead: float = 0.0,
        scale: float = 1.0,
        collectives: StepCollectives | None = None,
        *,
        host_per_request: float = 0.0,
        host_with_prefill: float = 0.0,
        graph_padding: bool = False,
    ) -> None:
        self.profile = profile
        self.collectives = collectives
        self.strategy = strategy
        self.host_per_request = host_per_request
        self.host_with_prefill = host_with_prefill
        self.scale = scale
        self.num_layers = model.num_layers
        self.step_overhead = profile.launch["graph"] + host_overhead
        self.attention: Attention = AttentionModel.of(model, profile.attention)
        matrix_ratio = 1.0
        if profile.scaling is not None:
            self.attention = ScaledAttention(self.attention, profile.scaling)
            matrix_ratio = profile.scaling.flops_ratio
        self._layer_time = _Table(profile, LAYER_OPS, graph_padding)
        self._token_time = _Table(profile, dict.fromkeys(TOKEN_OPS, 1), graph_padding)
        self._sampled_time = _Table(profile, dict.fromkeys(SAMPLED_OPS, 1), graph_padding)
        self._gaps = model.num_layers * float(profile.sustained.get("layer_gap", 0.0))
        self.warming = Warming.of(profile.sustained)
        pair, key = attention_traffic(model, ((1, 1),), 0), attention_traffic(model, (), 1)
        self._pair_over_key = pair.flops / key.bytes
        self._attention_follows = sensitivity_of(profile, strategy)
        self._one_side_follows = sensitivity_of(profile, "serial")
        self._clocked_products = _clocked_products(profile, model, graph_padding)
        self._clock_falls, self._falls_beyond = _clock_falls(profile, graph_padding)
        self._matrix_seconds_per_token: float = (
            model.num_layers * profile.attention["geometry"]["linear_token_seconds"] * matrix_ratio
        )
        self._padded = graph_size if graph_padding else int
        self._hull = _common_hull(Hull(**profile.hull), collectives)
        self.seconds_predicted = 0.0
        self.seconds_outside = 0.0

    def step_time(self, shape: BatchShape) -> float:
        """As whole steps of a profile are timed, after some of their own; `step_time_at` after
        others.
        """
        return self._count(shape, self.breakdown(shape).total * self.scale)

    def step_time_at(self, shape: BatchShape, heats: Heats) -> tuple[float, Drive]:
        """See `WarmsUp`."""
        assert self.warming is not None
        parts = self.parts(shape)
        seconds = parts.attention + parts.layers + parts.once + parts.collectives
        drive = self.drive(self.warming, shape.num_tokens, parts.shares)
        fall = self.warming.fall_in(drive, heats, seconds)
        slower = self.warming.slower(fall, self.clock_fall(shape.num_tokens))
        seconds += (parts.clocked_attention + parts.clocked_layers) * slower
        return self._count(shape, seconds * self.scale), drive

    def _longer(self, shape: BatchShape, parts: Parts) -> tuple[float, float]:
        """What the attention and the rest of the layers take longer, as whole steps are timed."""
        if self.warming is None:
            return 0.0, 0.0
        fall = self.warming.fall_as_timed(self.drive(self.warming, shape.num_tokens, parts.shares))
        slower = self.warming.slower(fall, self.clock_fall(shape.num_tokens))
        return parts.clocked_attention * slower, parts.clocked_layers * slower

    def drive(self, warming: Warming, num_tokens: int, shares: Shares) -> Drive:
        """What a step with prefill of so many tokens, before padding, does to the clock."""
        return warming.drive(self._padded(num_tokens), shares, self.fall_beyond(num_tokens))

    def _count(self, shape: BatchShape, seconds: float) -> float:
        self.seconds_predicted += seconds
        if not self.is_inside(shape):
            self.seconds_outside += seconds
        return seconds

    def matrix_seconds(self, num_tokens: int) -> float:
        """Of the matrix products of so many tokens."""
        return self._matrix_seconds_per_token * num_tokens * self.scale

    def clocked_seconds(self, num_decodes: int, seconds: float) -> float:
        """See `WarmsUp`."""
        attention = seconds - self.num_layers * self._layer_time[num_decodes] * self.scale
        products = self.clocked_products(num_decodes) * self.scale
        return products + self._one_side_follows.low * max(attention, 0.0)

    def clocked_products(self, num_tokens: int) -> float:
        """Seconds of all layers' matrix products that go with the clock, before `scale`."""
        measured = len(self._clocked_products) - 1
        if num_tokens <= measured:
            return self._clocked_products[num_tokens]
        return self._clocked_products[measured] * num_tokens / measured

    def attention_follows(self, shape: BatchShape) -> float:
        """The share of a batch's attention that goes with the clock."""
        if not shape.prefills:
            return self._one_side_follows.low
        if not shape.num_decodes:
            return self._one_side_follows.high
        pairs = sum(n * context - n * (n - 1) / 2 for n, context in shape.prefills)
        intensity = self._pair_over_key * pairs / shape.decode_context_sum
        return self._attention_follows.share(intensity)

    def clock_fall(self, num_tokens: int) -> float:
        """At which layers over so many tokens are timed: see `podsim.heat`."""
        return self._clock_falls[min(num_tokens, len(self._clock_falls) - 1)]

    def fall_beyond(self, num_tokens: int) -> float:
        """By how much that lies beyond the fall of numbers of tokens near it."""
        return self._falls_beyond[min(num_tokens, len(self._falls_beyond) - 1)]

    def parts(self, shape: BatchShape) -> Parts:
        """What a step's kernels take as each is timed alone, and the gaps between them."""
        prefills, num_prefill_tokens, num_decodes, _, _, num_sampled = shape
        num_tokens = num_prefill_tokens + num_decodes
        attention, drawing, reading, beside, balanced = self.attention_time(shape)
        layers, once, collectives = self._beside_attention(
            num_tokens, num_sampled, num_decodes + len(prefills)
        )
        if prefills:
            once += self.host_with_prefill
        products = self._matrix_seconds_per_token * num_tokens
        quiet = 1.0 - min(1.0, products / (attention + layers))
        layers += self._gaps * (quiet * quiet)
        return Parts(
            attention,
            layers,
            once,
            collectives,
            clocked_attention=attention * self.attention_follows(shape),
            clocked_layers=self.clocked_products(num_tokens),
            products=products,
            drawing=drawing,
            reading=reading,
            beside=beside,
            balanced=balanced,
        )

    def attention_time(self, shape: BatchShape) -> AttentionTime:
        """Of all layers together, as each is timed alone."""
        n = self.num_layers
        return AttentionTime(*(n * each for each in self.attention.time(self.strategy, shape)))

    def _beside_attention(
        self, num_tokens: int, num_sampled: int, num_requests: int
    ) -> tuple[float, float, float]:
        """Seconds of the rest of the layers, of what a step runs once, and of collectives."""
        host = self.step_overhead + self.host_per_request * num_requests
        collectives = 0.0
        if self.collectives is not None:
            padded = self._padded(num_tokens), self._padded(num_sampled)
            collectives = self.collectives.seconds(*padded)
        return (
            self.num_layers * self._layer_time[num_tokens],
            self._token_time[num_tokens] + self._sampled_time[num_sampled] + host,
            collectives,
        )

    def step_times(self, shapes: Sequence[BatchShape]) -> NDArray[np.float64]:
        """`step_time` of many batches, to the last bit; those of as many decodes at once.

        The tiles of batches with prefill are handed to the SMs batch by batch.
        """
        times = np.empty(len(shapes))
        alike: dict[int, list[int]] = {}
        single = []
        for index, (prefills, _, n, _, _, num_sampled) in enumerate(shapes):
            if prefills or num_sampled != n:
                single.append(index)
            else:
                alike.setdefault(n, []).append(index)
        for n, where in alike.items():
            if len(where) < WORTH_AN_ARRAY:
                single += where
            else:
                times[where] = self._times_of_decodes(n, [shapes[index] for index in where])
        for index in single:
            times[index] = self.step_time(shapes[index])
        return times

    def _times_of_decodes(self, n: int, shapes: Sequence[BatchShape]) -> NDArray[np.float64]:
        keys = np.array([shape.decode_context_sum for shape in shapes])
        longest = np.array([shape.decode_context_max for shape in shapes])
        attention = self.attention.decode_seconds_of_run(n, keys, longest)
        times = self._around_decodes(n)(attention)
        for shape, seconds in zip(shapes, times.tolist(), strict=True):
            self._count(shape, seconds)
        return times

    def decode_run_times(self, shape: BatchShape, num_steps: int) -> list[float]:
        """See `RunTimes`; the arithmetic of `step_time` in the same order."""
        _, _, n, keys, longest, _ = shape
        seconds = self._around_decodes(n)
        times: list[float]
        if num_steps < WORTH_AN_ARRAY:
            one = self.attention.decode_seconds
            times = [seconds(one(n, keys + n * i, longest + i)) for i in range(num_steps)]
        else:
            steps = np.arange(num_steps)
            many = self.attention.decode_seconds_of_run
            times = seconds(many(n, keys + n * steps, longest + steps)).tolist()
        self.seconds_predicted += sum(times)
        num_inside = self._num_steps_inside(shape)
        if num_steps > num_inside:
            self.seconds_outside += sum(times[num_inside:])
        return times

    def _around_decodes(self, n: int) -> StepOfAttention:
        """Makes the seconds of steps of n decodes from those of attention in a layer."""
        layers, once, collectives = self._beside_attention(n, n, n)
        num_layers, gaps, scale = self.num_layers, self._gaps, self.scale
        matrix_seconds = self._matrix_seconds_per_token * n

        def seconds(attention: T) -> T:
            attention = num_layers * attention
            share = matrix_seconds / (attention + layers)
            quiet = 1.0 - (min(1.0, share) if isinstance(share, float) else np.minimum(1.0, share))
            in_layers = attention + (layers + gaps * (quiet * quiet))
            return (in_layers + once + collectives) * scale

        return seconds

    def _num_steps_inside(self, shape: BatchShape) -> int:
        """Of a run of decodes, however long, that begins with this shape."""
        if not self.is_inside(shape):
            return 0
        _, _, n, keys, longest, _ = shape
        hull = self._hull
        return 1 + min((hull.decode_context_sum - keys) // n, hull.context_len - longest)

    def breakdown(self, shape: BatchShape) -> Breakdown:
        """Where the seconds of a step go, as `step_time` has them before `scale`."""
        parts = self.parts(shape)
        attention, layers, once, collectives, *_ = parts
        if shape.prefills:
            longer = self._longer(shape, parts)
            attention, layers = attention + longer[0], layers + longer[1]
        return Breakdown(attention, layers, once, collectives)

    def scaled(self, scale: float) -> ProfiledLatency:
        """The same with every step `scale` times as long."""
        again = copy.copy(self)
        again.scale = self.scale * scale
        again.seconds_predicted = again.seconds_outside = 0.0
        return again

    def likely_scales(self) -> tuple[float, float]:
        """True over predicted time of whole steps: P10 and P90, from the held-out ones.

        Wider by `Scaling.width` where the costs are scaled from those of another GPU. Whole steps
        were measured on one GPU; where the collectives' errors are wider, theirs count.
        """
        errors = [self.profile.errors[f"step {self.strategy}"]]
        if self.collectives is not None:
            errors += self.collectives.errors
        most = max(error["signed_p90"] for error in errors)
        least = min(error["signed_p10"] for error in errors)
        width = self.profile.scaling.width if self.profile.scaling else 1.0
        return 1 / (1 + most) / width, width / (1 + least)

    def is_inside(self, shape: BatchShape) -> bool:
        """Whether no number of the batch exceeds the largest that was measured."""
        most_tokens, most_sampled, longest, most_decodes, largest_sum = self._hull
        prefills, num_prefill_tokens, num_decodes, context_sum, context_max, num_sampled = shape
        for _, context_len in prefills:
            if context_len > longest:
                return False
        return (
            context_sum <= largest_sum
            and num_decodes <= most_decodes
            and context_max <= longest
            and num_sampled <= most_sampled
            and num_prefill_tokens + num_decodes <= most_tokens
        )

    @property
    def outside_share(self) -> float:
        """Of the seconds predicted so far: beyond the measured range."""
        return self.seconds_outside / self.seconds_predicted if self.seconds_outside else 0.0

    def notes(self) -> Sequence[str]:
        """What a reader of the results should know of these predictions."""
        notes = [] if self.collectives is None else list(self.collectives.notes())
        if self.profile.scaling:
            notes.insert(0, self.profile.scaling.note)
        if self.seconds_outside:
            share = f"{self.outside_share:.1%} of the simulated step time"
            notes.append(f"{share} was predicted beyond what was measured")
        return notes


def _common_hull(hull: Hull, collectives: StepCollectives | None) -> Hull:
    """What both the kernels and the messages were measured for."""
    if collectives is None:
        return hull
    return hull._replace(
        num_tokens=min(hull.num_tokens, collectives.max_tokens),
        num_sampled=min(hull.num_sampled, collectives.max_sampled),
    )


@lru_cache(maxsize=8)
def _clock_falls(profile: Profile, graph_padding: bool) -> tuple[list[float], list[float]]:
    """For every number of tokens that was measured, and how far each lies beyond those near it; 0
    in a profile without clocks.
    """
    if not profile.clock_falls:
        return [0.0], [0.0]
    measured, falls = profile.clock_falls["num_tokens"], profile.clock_falls["falls"]
    num_tokens = _token_counts(int(measured[-1]), graph_padding)
    beyond = beyond_neighbours(np.array(measured), np.array(falls))
    tables = ({"num_tokens": measured, "seconds": values} for values in (falls, beyond))
    of_all, beyond_of_all = (op_seconds(table, num_tokens).tolist() for table in tables)
    return of_all, beyond_of_all


def sensitivity_of(profile: Profile, name: str) -> Sensitivity:
    """Of the products or of a strategy, as far as the profile's own passes tell it."""
    known = profile.clock_sensitivity.get(name)
    return USUAL_SENSITIVITY[name] if known is None else Sensitivity(**known)


def _clocked_products(profile: Profile, model: Model, graph_padding: bool) -> list[float]:
    """Of all layers, for every number of tokens that was measured."""
    follows = sensitivity_of(profile, "products")
    measured = min(int(profile.ops[op]["num_tokens"][-1]) for op in MATRIX_OPS)
    num_tokens = _token_counts(measured, graph_padding)
    seconds = np.zeros(len(num_tokens))
    for op in MATRIX_OPS:
        flops, touched = product_traffic(model, op, num_tokens)
        seconds += follows.at(flops / touched) * op_seconds(profile.ops[op], num_tokens)
    seconds[0] = 0.0
    clocked: list[float] = (model.num_layers * seconds).tolist()
    return clocked


def _token_counts(measured: int, graph_padding: bool) -> NDArray[np.int64]:
    """What steps of 0 to so many tokens compute, with graphs of whole sizes or without."""
    if not graph_padding:
        return np.arange(measured + 1)
    return np.minimum([graph_size(n) for n in range(measured + 1)], measured)


class _Table(dict[int, float]):
    """Seconds of some operations together, for every number of tokens.

    Beyond the last measured point, with the rate between it and the point of half its tokens. A
    dictionary, because a call would cost more than the look-up.
    """

    def __init__(
        self, profile: Profile, counts: Mapping[str, int], graph_padding: bool = False
    ) -> None:
        tables = [(profile.ops[name], count) for name, count in counts.items()]
        self._measured = min(int(table["num_tokens"][-1]) for table, _ in tables)
        num_tokens = _token_counts(self._measured, graph_padding)
        seconds = sum(count * op_seconds(table, num_tokens) for table, count in tables)
        super().__init__(enumerate(np.asarray(seconds).tolist()))
        self[0] = 0.0
        half = self._measured // 2
        self._rate = (self[self._measured] - self[half]) / (self._measured - half)

    def __missing__(self, num_tokens: int) -> float:
        return self[self._measured] + (num_tokens - self._measured) * self._rate
