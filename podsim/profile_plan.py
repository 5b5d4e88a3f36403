"""What a profile measures: every timed sequence, in its order, known before the first one runs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from podsim.config import STRATEGIES
from podsim.hardware import Gpu
from podsim.model import Model
from podsim.op_tables import ALIGNED, LAYER_OPS
from podsim.points import (
    NUM_STEPS,
    AttentionPoint,
    attention_points,
    budget_points,
    burst_points,
    duty_points,
    graph_points,
    linear_points,
    long_points,
    more_held_out,
    points_behind_edges,
    points_between,
    step_points,
    sustained_points,
)

PASSES = 2
"""Times the whole list of points is gone through, each time in another order, because what a
point takes drifts with what ran before it."""
BUDGET_PASSES = 6
"""Times that matrix products of a usual token budget are timed in all: under load nearly every step
has that many tokens, so the chance of one row is in all of them."""
HELD_OUT_PASSES = {"linear": 4, "once": 4, "attention": 3}
"""Times that held-out products and batches of prefill alone are timed: they follow the clock, of
which two passes have too much chance to judge a fit by."""
MOST_LAYERS_TWICE = 64
"""Whole steps of a model of more layers are long, and timed in the first pass alone."""
MAX_SAMPLED = 512
LAUNCH_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Empty kernels in a graph: what a launch and what an event costs."""
QUICK_SHARE = 10
"""--quick measures one point in so many."""
QUICK_SLOWER = 1.8
"""Times as long as a sequence of a whole plan takes one of --quick, as measured: more of them are
the first to run their kernels, which are compiled then."""

CEILINGS = (
    *("read_bandwidth", "matvec_bandwidth", "decode_bandwidth", "copy_bandwidth"),
    *("matrix_rate", "layer_matrix_rate"),
    *("host_to_device", "device_to_host", "launch_latency"),
)
"""What is measured first: names of the rows with op "ceiling", in their column "strategy"."""

ONCE_OPS = ("embedding", "lm_head", "sampling")
"""Timed together, as a step runs them once."""

KINDS = ("ceiling", "launch", "linear", "once", "attention", "step", "sustained", "duty")

SUSTAINED_ENDS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.4)
"""Whole steps one after another from rest: seconds at which the windows end that are rows."""

DUTY_ENDS = (0.4, 0.8, 1.6, 2.4)
"""The same where steps with prefill have steps of decodes alone between them,"""
DUTY_STEPS = ("mixed", "decode")
"""of which the rows are apart."""

SECONDS_PER_SEQUENCE = 0.068
"""Of the first H200 profile: 6.5 minutes for the start and 5,330 timed sequences."""
SECONDS_TO_START = 30.0
"""Loading torch, compiling the kernels and filling the KV pool."""
SECONDS_TO_FIT = 5.0


class Key(NamedTuple):
    """The columns that name a row, beside its pass."""

    op: str
    strategy: str
    split: str
    num_tokens: int
    prefills: str
    decodes: str


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence of operations that is timed together."""

    kind: str
    split: str
    num_tokens: int
    point: AttentionPoint | None = None
    """Of attention and whole steps: the batch."""
    strategy: str = ""
    """Of attention and whole steps; of a ceiling its name. Rows of sustained work have the end of
    their window there, those of a duty which of its steps too."""
    mixed_steps: int = 1
    decode_steps: int = 0
    """Of a duty: steps of the batch in a row, and those of its decodes alone that follow."""

    @property
    def attention(self) -> str:
        """The strategy of steps one after another: the split tells it, or it is serial."""
        return self.split if self.split in STRATEGIES else "serial"

    @property
    def keys(self) -> tuple[Key, ...]:
        """Of the rows that it gives, in order."""
        ops = {"linear": tuple(LAYER_OPS), "once": ONCE_OPS}.get(self.kind, (self.kind,))
        texts = (self.point.prefills_text, self.point.decodes_text) if self.point else ("", "")
        if self.kind == "sustained":
            windows = (f"{end:g} s" for end in SUSTAINED_ENDS)
            return tuple(Key(self.kind, w, self.split, self.num_tokens, *texts) for w in windows)
        if self.kind == "duty":
            labels = [f"{step} {end:g} s" for step in self.duty_steps for end in DUTY_ENDS]
            return tuple(Key(self.kind, w, self.split, self.num_tokens, *texts) for w in labels)
        return tuple(Key(op, self.strategy, self.split, self.num_tokens, *texts) for op in ops)

    @property
    def duty_steps(self) -> tuple[str, ...]:
        """Which steps a duty has."""
        return DUTY_STEPS if self.decode_steps else DUTY_STEPS[:1]

    def label(self, key: Key) -> str:
        """What tells its rows apart."""
        return key.strategy if self.kind in ("sustained", "duty") else key.op


class Turn(NamedTuple):
    """A job in the order of a plan."""

    job: Job
    number: int
    """The pass, from 0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a profile's timed sequences."""

    turns: tuple[Turn, ...]
    quick: bool

    def rows(self) -> Iterator[tuple[Key, int]]:
        """Key and pass of every row."""
        for job, number in self.turns:
            for key in job.keys:
                yield key, number

    def sha256(self) -> str:
        return rows_sha256(self.rows())

    def counts(self) -> dict[str, dict[str, int]]:
        """Of each kind of job: how many points, timed sequences and rows."""
        points = {kind: set[object]() for kind in KINDS}
        sequences: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        for job, _ in self.turns:
            points[job.kind].add(job.point or (job.num_tokens, job.strategy))
            sequences[job.kind] += 1
            rows[job.kind] += len(job.keys)
        return {
            kind: {
                "points": len(points[kind]),
                "sequences": sequences[kind],
                "rows": rows[kind],
            }
            for kind in KINDS
        }

    def seconds(self, per_sequence: Mapping[str, float] | None = None) -> dict[str, float]:
        """Of each kind of job: how long it will take, from measured seconds a sequence."""
        each, slower = per_sequence or {}, QUICK_SLOWER if self.quick else 1.0
        return {
            kind: slower * count["sequences"] * each.get(kind, SECONDS_PER_SEQUENCE)
            for kind, count in self.counts().items()
        }


def plan_profile(model: Model, gpu: Gpu, quick: bool = False) -> Plan:
    """The ceilings, then every point in each pass, in an order that mixes small and large.

    The sizes of CUDA graphs that no other point has come after all that, then the duties, the usual
    token budgets again, more batches of several chunks, the numbers behind edges of tiles, and long
    contexts for seconds. With `quick`, one point in ten of each kind, whole steps once, and not
    those.
    """
    rng = np.random.default_rng(0)
    linear = linear_points(rng)
    batches = list(dict.fromkeys(attention_points(rng, model, gpu)))
    num_steps, sustained = NUM_STEPS, sustained_points()
    if quick:
        linear, batches = _few_linear(rng, linear), _few_batches(rng, batches)
        num_steps, sustained = NUM_STEPS // QUICK_SHARE, sustained[::QUICK_SHARE]
    groups = [
        tuple(Job("launch", "", count) for count in LAUNCH_COUNTS),
        *(_linear_jobs(num_tokens, split) for num_tokens, split in linear),
        *(_jobs_of("attention", point) for point in batches),
        *(_jobs_of("step", point) for point in step_points(batches, num_steps)),
    ]
    turns = [Turn(Job("ceiling", "", 0, strategy=name), 0) for name in CEILINGS]
    turns += [_sustained(point) for point in sustained]
    once = quick or model.num_layers > MOST_LAYERS_TWICE
    for number in range(PASSES):
        for index in rng.permutation(len(groups)):
            turns += [Turn(job, number) for job in groups[index] if number < _passes(job, once)]
    if not quick:  # last, so that profiles from before they were planned can be extended by them
        turns += _mixed(rng, graph_points(linear))
        turns += [_duty(point) for point in duty_points()]
        turns += _mixed(rng, points_between(linear, model, [2]))
        turns += [_duty(point) for point in burst_points()]
        turns += _mixed(rng, points_between(linear, model, [1, 3]))
        turns += _mixed(rng, budget_points(), range(PASSES, BUDGET_PASSES))
        chunks = more_held_out(rng, batches)
        turns += _in_passes(rng, [_jobs_of("attention", point) for point in chunks])
        turns += _mixed(rng, points_behind_edges([*linear, *graph_points(linear)]))
        turns += _held_out_again(rng, linear, [*batches, *chunks])
        turns += [_sustained(point) for point in long_points()]
    return Plan(tuple(turns), quick)


def _sustained(point: AttentionPoint) -> Turn:
    return Turn(Job("sustained", point.split, point.num_tokens, point), 0)


def _duty(point: AttentionPoint) -> Turn:
    mixed, of_all = map(int, point.split.split(" in "))
    rows = point.split, point.num_tokens, point
    return Turn(Job("duty", *rows, mixed_steps=mixed, decode_steps=of_all - mixed), 0)


def _mixed(
    rng: Generator, points: Sequence[tuple[int, str]], passes: Iterable[int] = range(PASSES)
) -> list[Turn]:
    """Linear layers in every pass, small and large mixed."""
    return _in_passes(rng, [_linear_jobs(*point) for point in points], passes)


def _in_passes(
    rng: Generator, jobs: Sequence[tuple[Job, ...]], passes: Iterable[int] = range(PASSES)
) -> list[Turn]:
    orders = [(number, rng.permutation(len(jobs))) for number in passes]
    return [Turn(job, number) for number, order in orders for i in order for job in jobs[i]]


def _held_out_again(
    rng: Generator, linear: Sequence[tuple[int, str]], batches: Sequence[AttentionPoint]
) -> list[Turn]:
    """What goes with the clock: products, and batches of prefill alone."""
    judged = [_linear_jobs(num_tokens, split) for num_tokens, split in linear if split != "grid"]
    prefill = [point for point in batches if not point.decode_contexts and point.split != "grid"]
    judged += [_jobs_of("attention", point) for point in prefill]
    turns = _in_passes(rng, judged, range(PASSES, max(HELD_OUT_PASSES.values())))
    return [turn for turn in turns if turn.number < HELD_OUT_PASSES[turn.job.kind]]


def _passes(job: Job, steps_once: bool) -> int:
    """Whole steps to fit on are timed once, and under serial alone: the fit needs no others."""
    if job.kind == "step" and job.split == "grid":
        return int(job.strategy == "serial")
    return 1 if job.kind == "step" and steps_once else PASSES


def rows_sha256(rows: Iterator[tuple[Key, int]]) -> str:
    """Of which rows there are, whatever their order."""
    lines = sorted(f"{'|'.join(map(str, key))}|{number}\n" for key, number in rows)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _linear_jobs(num_tokens: int, split: str) -> tuple[Job, ...]:
    layer = Job("linear", split, num_tokens)
    if num_tokens > MAX_SAMPLED:
        return (layer,)
    return layer, Job("once", split, num_tokens)


def _jobs_of(kind: str, point: AttentionPoint) -> tuple[Job, ...]:
    strategies = strategies_for(point)
    return tuple(Job(kind, point.split, point.num_tokens, point, name) for name in strategies)


def strategies_for(point: AttentionPoint) -> tuple[str, ...]:
    """A batch with one side only runs that side's own kernel, whatever the strategy."""
    return STRATEGIES if point.is_mixed else ("serial",)


def _few_linear(rng: Generator, points: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """Of each split and alignment one in QUICK_SHARE, the smallest and largest among them."""
    kept: set[tuple[int, str]] = set()
    for split in ("grid", "held_out"):
        for aligned in (True, False):
            some = [p for p in points if p[1] == split and (p[0] % ALIGNED == 0) is aligned]
            ends = {some[0], some[-1]} if split == "grid" else set()
            kept |= {some[index] for index in _few(rng, len(some))} | ends
    return [point for point in points if point in kept]


def _few_batches(rng: Generator, points: Sequence[AttentionPoint]) -> list[AttentionPoint]:
    """Of each kind of batch one in QUICK_SHARE."""
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, point in enumerate(points):
        kind = (point.split, min(len(point.prefills), 2), bool(point.decode_contexts))
        kinds.setdefault(kind, []).append(index)
    kept = {kind[i] for kind in kinds.values() for i in _few(rng, len(kind))}
    return [points[index] for index in sorted(kept)]


def _few(rng: Generator, count: int) -> list[int]:
    chosen: list[int] = rng.choice(count, size=-(-count // QUICK_SHARE), replace=False).tolist()
    return chosen
