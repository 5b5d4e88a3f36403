"""Sequences of CUDA graphs that are timed for a profile; see `profile_run.TimedSequence`.

A timing is a graph's replay between two events; the host queues it while the card is still busy, so
that it is never waited for. Two small kernels around the timed repetitions read every SM's cycle
counter: the clock of a row is what its SMs really ran at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from podsim.measure_clock import SmClock
from podsim.profile_plan import DUTY_ENDS, SUSTAINED_ENDS, Job
from podsim.profile_run import LONG_ROUND, Round

REPEATS = 11
"""Of a round."""
STEP_REPEATS = 5
"""Of a round of whole steps, which take longer and vary less."""
FEWEST_REPEATS = 3
"""Of a round that would be long (`profile_run.LONG_ROUND`)."""
WARM_UP = 0.04
"""Seconds that a sequence runs before it is timed: the power limit acts within a few 10 ms."""
WARM_UP_AGAIN = 0.01
"""Seconds before each further round: the host has looked at the timings for a moment."""
HOST_SECONDS_PER_LAUNCH = 20e-6
"""At most, to queue a graph and an event."""
REST = 1.0
"""Seconds without work before sustained work, so that the clock is at its highest."""
SUSTAINED_SECONDS = max(SUSTAINED_ENDS[-1], DUTY_ENDS[-1]) + 0.1
MOST_QUEUED = 4
LEAST_LEAD = 2e-3
"""Seconds that the host gets ahead of a card that keeps up with it."""
SLEEP_CYCLES_PER_SECOND = 2e9

Launch = Callable[[], object]
Fault = Callable[[], str]
"""Tells why what was timed last cannot be believed, or nothing."""


def captured(launch: Launch) -> torch.cuda.CUDAGraph:
    """A CUDA graph of what is launched, which is compiled by a first launch."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        launch()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph


class Timed:
    """An operation captured as a CUDA graph, and compiled.

    It keeps the operation, because the graph reads tensors that only the operation refers to.
    """

    def __init__(self, name: str, launch_op: Launch) -> None:
        self.name = name
        self.launch_op = launch_op
        self.graph = captured(launch_op)


class Begin(NamedTuple):
    """What runs, untimed, before the first of so many repetitions, and before each so many more."""

    operation: Timed
    every: int


class GraphSequence:
    """Operations that run one after another, again and again; see `profile_run.TimedSequence`."""

    work: float | None = None

    def __init__(
        self,
        ops: Sequence[Timed],
        clock: SmClock,
        fault: Fault,
        repeats: int = REPEATS,
        begin: Begin | None = None,
    ) -> None:
        self._ops = ops
        self._clock = clock
        self._fault = fault
        self._repeats = repeats
        self._begin = begin
        self._count = 0

    def round(self, first: bool) -> Round:
        """Warm up, then time the repetitions of every operation whose name is not empty."""
        self._clock.clear()
        once = self._warm_up(WARM_UP if first else WARM_UP_AGAIN)
        self._clock.start()
        marks = []
        for _ in range(repeats_of(once, self._repeats)):
            self._begin_again()
            row = [torch.cuda.Event(enable_timing=True)]
            row[0].record()
            for op in self._ops:
                op.graph.replay()
                row.append(torch.cuda.Event(enable_timing=True))
                row[-1].record()
            marks.append(row)
        self._clock.stop()
        torch.cuda.synchronize()
        seconds = {
            op.name: [row[i].elapsed_time(row[i + 1]) / 1000 for row in marks]
            for i, op in enumerate(self._ops)
            if op.name
        }
        return Round(seconds, self._clock.mean_hertz(), self._fault())

    def _warm_up(self, seconds: float) -> float:
        """Run for so long, and leave the card busy while the host goes on; seconds of one run."""
        self._replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._replay()
        end.record()
        torch.cuda.synchronize()
        once: float = start.elapsed_time(end) / 1000
        for _ in range(math.ceil(seconds / once)):
            self._replay()
        host_seconds = HOST_SECONDS_PER_LAUNCH * len(self._ops)
        if once < 2 * host_seconds + LEAST_LEAD / self._repeats:  # the card keeps up with the host
            lead = max(self._repeats * host_seconds, LEAST_LEAD)
            torch.cuda._sleep(int(lead * SLEEP_CYCLES_PER_SECOND))
        return once

    def _replay(self) -> None:
        self._begin_again()
        for op in self._ops:
            op.graph.replay()

    def _begin_again(self) -> None:
        if self._begin is not None and self._count % self._begin.every == 0:
            self._begin.operation.graph.replay()
        self._count += 1


def repeats_of(once: float, most: int) -> int:
    """Of a sequence that takes `once` seconds: until a round is long, but a few."""
    return max(FEWEST_REPEATS, min(most, math.ceil(LONG_ROUND / once)))


class SustainedSequence:
    """Whole steps one after another, from rest; see `profile_run.TimedSequence`."""

    work: float | None = None

    def __init__(self, job: Job, steps: Sequence[Timed], clock: SmClock, fault: Fault) -> None:
        self._job = job
        self._steps = steps
        self._clock = clock
        self._fault = fault

    def round(self, first: bool) -> Round:
        """REST seconds without work, then the steps in turn until the last window has ended."""
        self._clock.clear()
        torch.cuda.synchronize()
        time.sleep(REST)
        marks = [torch.cuda.Event(enable_timing=True)]
        marks[0].record()
        self._clock.mark()
        started = time.perf_counter()
        each = len(self._steps)
        while time.perf_counter() - started < SUSTAINED_SECONDS or len(marks) <= each:
            self._steps[(len(marks) - 1) % each].graph.replay()
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
            self._clock.mark()
            if len(marks) > MOST_QUEUED:  # the host is not to run away from the card
                marks[-MOST_QUEUED].synchronize()
        torch.cuda.synchronize()
        ends = [marks[0].elapsed_time(mark) / 1000 for mark in marks]
        steps = np.diff(ends)
        clocks = np.array(self._clock.hertz_between_marks(), dtype=float)
        if self._job.kind == "sustained":
            means = windows(steps, ends, SUSTAINED_ENDS)
            hertz = windows(clocks, ends, SUSTAINED_ENDS)
        else:
            means, hertz = {}, {}
            mixed = self._job.mixed_steps
            for name in self._job.duty_steps:
                turns = range(mixed) if name == "mixed" else range(mixed, each)
                where = (ends, DUTY_ENDS, turns, each)
                means |= {f"{name} {end}": mean for end, mean in windows(steps, *where).items()}
                hertz |= {f"{name} {end}": mean for end, mean in windows(clocks, *where).items()}
        seconds = {name: [mean, mean] for name, mean in means.items()}
        known = {name: mean for name, mean in hertz.items() if math.isfinite(mean)}
        return Round(seconds, None, self._fault(), known)


def windows(
    values: NDArray[np.float64],
    ends: Sequence[float],
    window_ends: Sequence[float],
    turns: Sequence[int] = (0,),
    every: int = 1,
) -> dict[str, float]:
    """Of each window the mean of the values of its steps: of those `turns` of `every` steps.

    `ends` are when steps ended, the first of them when the first step began. A step counts in the
    window in which it ends; one that no step ends in has the mean of the step across it.
    """
    mine = np.isin(np.arange(len(values)) % every, turns)
    values, ended = values[mine], np.array(ends[1:])[mine]
    window = np.searchsorted(window_ends, ended, side="left")
    found = {}
    for i, end in enumerate(window_ends):
        inside = values[window == i]
        across = min(int(np.searchsorted(ended, end)), len(values) - 1)
        found[f"{end:g} s"] = float(inside.mean()) if len(inside) else float(values[across])
    return found
