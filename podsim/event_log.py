"""What happened in a simulation, as raw columns; the metrics are computed from it afterwards."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from podsim.request import Request

REQUEST_COLUMNS = {
    "request_id": "q",
    "arrival_time": "d",
    "num_prompt_tokens": "q",
    "num_output_tokens": "q",
    "replica": "i",
    "scheduled_time": "d",
    "first_token_time": "d",
    "finish_time": "d",
    "num_cached_tokens": "q",
    "num_preemptions": "i",
}
STEP_COLUMNS = {
    "replica": "i",
    "start": "d",
    "duration": "d",
    "num_prefills": "i",
    "num_prefill_tokens": "i",
    "num_decodes": "i",
    "decode_context_sum": "q",
    "num_waiting": "i",
    "num_running": "i",
    "num_used_blocks": "i",
}
"""Columns and their array type codes. Seconds, tokens, requests, blocks."""

Columns = dict[str, "array[Any]"]

_request_row = attrgetter(*REQUEST_COLUMNS)

CHUNK = 65536


def _columns(codes: dict[str, str]) -> Columns:
    return {name: array(code) for name, code in codes.items()}


@dataclass(slots=True)
class StepTotals:
    """Sums and maxima over steps: seconds, and numbers weighted by seconds."""

    num_steps: int = 0
    busy: float = 0.0
    mixed: float = 0.0
    used_blocks: float = 0.0
    max_used_blocks: int = 0
    batch: float = 0.0
    max_batch: int = 0

    def add(self, columns: Mapping[str, Sequence[float]]) -> None:
        seconds = np.asarray(columns["duration"])
        used = np.asarray(columns["num_used_blocks"])
        prefills, decodes = (np.asarray(columns[f"num_{kind}"]) for kind in ("prefills", "decodes"))
        batch = prefills + decodes
        self.num_steps += len(seconds)
        self.busy += float(seconds.sum())
        self.mixed += float(seconds[(prefills > 0) & (decodes > 0)].sum())
        self.used_blocks += float((seconds * used).sum())
        self.max_used_blocks = max(self.max_used_blocks, int(used.max(initial=0)))
        self.batch += float((seconds * batch).sum())
        self.max_batch = max(self.max_batch, int(batch.max(initial=0)))


SameInRun = tuple[int, int, int, int, int, int]
"""Of the steps of a run: replica, num_prefills, num_prefill_tokens, num_decodes, the
decode_context_sum of the first, num_running."""


@dataclass(slots=True)
class RecentSteps:
    """Steps as they are recorded, run by run, before they are written out as columns."""

    starts: array[float] = field(default_factory=lambda: array("d"))
    """Of each run, as are its num_steps; `same` has a SameInRun of each. The rest is of steps."""
    num_steps: array[int] = field(default_factory=lambda: array("q"))
    same: array[int] = field(default_factory=lambda: array("q"))
    ends: array[float] = field(default_factory=lambda: array("d"))
    num_waiting: array[int] = field(default_factory=lambda: array("i"))
    num_used_blocks: array[int] = field(default_factory=lambda: array("i"))

    def columns(self) -> dict[str, NDArray[Any]]:
        """The columns of STEP_COLUMNS."""
        num_steps = np.asarray(self.num_steps)
        first = np.cumsum(num_steps) - num_steps
        step = np.arange(len(self.ends)) - np.repeat(first, num_steps)
        same = np.repeat(np.asarray(self.same).reshape(-1, 6), num_steps, axis=0).T
        replica, num_prefills, num_prefill_tokens, num_decodes, context_sum, num_running = same
        ends = np.asarray(self.ends)
        start = np.roll(ends, 1)
        start[first] = self.starts
        return {
            "replica": replica,
            "start": start,
            "duration": ends - start,
            "num_prefills": num_prefills,
            "num_prefill_tokens": num_prefill_tokens,
            "num_decodes": num_decodes,
            "decode_context_sum": context_sum + num_decodes * step,
            "num_waiting": np.asarray(self.num_waiting),
            "num_running": num_running,
            "num_used_blocks": np.asarray(self.num_used_blocks),
        }


@dataclass(slots=True)
class EventLog:
    """Every request, every step, and every gap between two tokens of a request.

    Most requests of a step decode one token, so their gaps are one duration with a count: memory
    grows with requests and steps, not with tokens.
    """

    refused: dict[int, str] = field(default_factory=dict)
    """Why a request, by its id, was not served."""
    keep_steps: bool = True
    """Otherwise rows of steps are added up and dropped, and memory does not grow with steps."""
    when_full: Callable[[], None] | None = None
    """Told when a chunk of requests is complete, and expected to call `drop_requests`."""
    gap_duration: array[float] = field(default_factory=lambda: array("d"))
    gap_count: array[int] = field(default_factory=lambda: array("q"))
    preempted_id: array[int] = field(default_factory=lambda: array("q"))
    preempted_time: array[float] = field(default_factory=lambda: array("d"))
    resumed_time: array[float] = field(default_factory=lambda: array("d"))
    _requests: array[float] = field(default_factory=lambda: array("d"))
    """Row after row: every number of a request is exact in it."""
    _steps: Columns = field(default_factory=lambda: _columns(STEP_COLUMNS))
    _recent: RecentSteps = field(default_factory=lambda: RecentSteps())
    _totals: StepTotals = field(default_factory=lambda: StepTotals())
    _waiting_to_resume: dict[int, int] = field(default_factory=dict)

    def record_request(self, request: Request, refused: str = "") -> None:
        """A request that leaves: finished, or refused for a reason."""
        self._requests.extend(_request_row(request))
        if refused:
            self.refused[request.request_id] = refused
        if self.when_full is not None and len(self._requests) >= CHUNK * len(REQUEST_COLUMNS):
            self.when_full()

    @property
    def requests(self) -> dict[str, NDArray[Any]]:
        """The columns of REQUEST_COLUMNS, in order of leaving."""
        rows = np.asarray(self._requests).reshape(-1, len(REQUEST_COLUMNS))
        return {
            name: column.astype(code)
            for (name, code), column in zip(REQUEST_COLUMNS.items(), rows.T, strict=True)
        }

    def drop_requests(self) -> None:
        """Forget the requests so far."""
        self._requests = array("d")
        self.refused = {}

    def record_steps(
        self,
        start: float,
        ends: Sequence[float],
        num_waiting: Sequence[int],
        num_used_blocks: Sequence[int],
        same: SameInRun,
    ) -> None:
        """Consecutive steps of a batch: what each has of its own, and what is the same in all."""
        recent = self._recent
        recent.starts.append(start)
        recent.num_steps.append(len(ends))
        recent.same.extend(same)
        recent.ends.extend(ends)
        recent.num_waiting.extend(num_waiting)
        recent.num_used_blocks.extend(num_used_blocks)
        if len(recent.ends) >= CHUNK:
            self._settle()

    @property
    def steps(self) -> Columns:
        """The columns of STEP_COLUMNS, in order of completion."""
        self._settle()
        return self._steps

    def _settle(self) -> None:
        """Write out the recent steps; if none are kept, add up full chunks and drop them."""
        for name, values in self._recent.columns().items():
            self._steps[name].frombytes(values.astype(STEP_COLUMNS[name]).tobytes())
        self._recent = RecentSteps()
        while not self.keep_steps and len(self._steps["start"]) >= CHUNK:
            self._totals.add({name: column[:CHUNK] for name, column in self._steps.items()})
            for column in self._steps.values():
                del column[:CHUNK]

    def step_totals(self) -> StepTotals:
        """Sums over all steps, the same whether they were kept or not."""
        steps = self.steps
        totals = replace(self._totals)
        for start in range(0, len(steps["start"]), CHUNK):
            chunk = slice(start, start + CHUNK)
            totals.add({name: column[chunk] for name, column in steps.items()})
        return totals

    def record_preemption(self, request: Request, time: float) -> None:
        self._waiting_to_resume[request.request_id] = len(self.preempted_id)
        self.preempted_id.append(request.request_id)
        self.preempted_time.append(time)
        self.resumed_time.append(math.nan)

    def record_resumption(self, request: Request, time: float) -> None:
        """A request that was preempted, if it was, is worked on again."""
        row = self._waiting_to_resume.pop(request.request_id, None)
        if row is not None:
            self.resumed_time[row] = time

    def record_gap(self, duration: float, count: int) -> None:
        self.gap_duration.append(duration)
        self.gap_count.append(count)


class TokenGaps:
    """The gaps between the tokens of one replica's decodes, without a time for every token.

    Members of the group got their latest token when the group last took a step, or later, when
    they joined it: a few times, each with a count.
    """

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.last_step = -1.0
        """When the group last took a step."""
        self._latest: dict[float, int] = {}
        self._count = 0

    def emitted(self, request: Request, time: float, joins: bool) -> None:
        """A request got a token by itself, and joins the decodes or is finished."""
        if request.first_token_time < 0:
            request.first_token_time = time
        else:
            self.log.record_gap(time - request.last_token_time, 1)
        request.last_token_time = time
        if joins:
            self._latest[time] = self._latest.get(time, 0) + 1
            self._count += 1

    def preempted(self, request: Request) -> None:
        """A decode leaves the group before its time."""
        request.last_token_time = max(request.last_token_time, self.last_step)
        self._latest[request.last_token_time] -= 1
        self._count -= 1

    def decoded(self, ends: Sequence[float], num_finished: int) -> None:
        """Every member got a token at each of these times; then some are finished."""
        durations, counts = self.log.gap_duration, self.log.gap_count
        for time, members in self._latest.items():
            if members:
                durations.append(ends[0] - time)
                counts.append(members)
        if len(ends) > 1:
            durations.extend(map(float.__sub__, ends[1:], ends))
            counts.extend([self._count] * (len(ends) - 1))
        self.last_step = ends[-1]
        self._count -= num_finished
        self._latest = {self.last_step: self._count}
