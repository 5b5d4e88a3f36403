"""A run as a Chrome trace, `trace.json`, for ui.perfetto.dev and chrome://tracing.

Each replica is a process: a lane of steps named by kind, counters, and a span for each request
with its phases inside. Times are microseconds of simulated time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.metrics import STEP_KINDS, step_kinds
from podsim.simulation import Result

STEP_LANE = 1
_CHROME_COLOURS = dict(
    zip(STEP_KINDS, ("thread_state_iowait", "thread_state_running", "rail_response"), strict=True)
)  # names of chrome://tracing; Perfetto colours by the name of the slice

Event = dict[str, object]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Written:
    """How much of a run its trace.json holds."""

    events: int
    of: int
    until: float
    """Simulated seconds at which the trace ends; infinite if it holds everything."""

    @property
    def note(self) -> str:
        if self.events == self.of:
            return f"all {self.of:,} events"
        return (
            f"the first {self.events:,} of {self.of:,} events, to {self.until:.6f} s of simulated "
            f"time; --trace-events {self.of} writes all"
        )


def write_trace_events(result: Result, path: Path, limit: int) -> Written:
    """Write trace.json with at most `limit` events, the first to begin; names come on top.

    A span that begins before the cut keeps its true end.
    """
    requests, steps = result.requests, result.steps
    groups: list[_Steps | _Requests] = [
        *(_Steps.of(steps, replica) for replica in range(result.deployment.replicas)),
        _Requests.of(requests, result),
    ]
    starts = np.concatenate([group.start_ns for group in groups])
    sizes = np.concatenate([group.num_events for group in groups])
    order = np.argsort(starts, kind="stable")
    fits = np.cumsum(sizes[order]) <= limit
    if fits.all():
        cut, written = np.inf, Written(int(sizes.sum()), int(sizes.sum()), np.inf)
    else:
        cut = float(starts[order][np.argmin(fits)])
        kept = int(sizes[starts < cut].sum())
        written = Written(kept, int(sizes.sum()), cut / 1e9)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        header = {"displayTimeUnit": "ms", "otherData": {"trace": result.trace.name}}
        header["otherData"] |= {"holds": written.note, "sha256": result.trace.sha256}  # type: ignore[operator]
        file.write(json.dumps(header)[:-1] + ', "traceEvents": [\n')
        file.write(",\n".join(json.dumps(event) for event in _names(result)))
        if cut < np.inf:
            shown = {"name": f"cut: {written.note}", "ph": "i", "s": "g", "ts": cut / 1000}
            file.write(",\n" + json.dumps(shown | {"pid": 1, "tid": STEP_LANE}))
        for group in groups:
            for event in group.events(cut):
                file.write(",\n" + json.dumps(event))
        file.write("\n]}\n")
    return written


def _names(result: Result) -> Iterator[Event]:
    replicas = result.deployment.replicas
    names = [f"replica {index}" for index in range(replicas)]
    if (result.requests["refused"] != "").any():
        names.append("refused requests")
    for pid, name in enumerate(names, start=1):
        for kind, tid, args in (
            ("process_name", 0, {"name": name}),
            ("process_sort_index", 0, {"sort_index": pid}),
            ("thread_name", STEP_LANE, {"name": "steps"}),
        ):
            if pid <= replicas or kind != "thread_name":
                yield {"name": kind, "ph": "M", "pid": pid, "tid": tid, "args": args}


def _nanoseconds(seconds: pd.Series) -> Ints:
    """Whole nanoseconds, so that rounding cannot make two steps overlap; -1 for never."""
    return np.rint(seconds.fillna(-1e-9).to_numpy(dtype=np.float64) * 1e9).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps of one replica, and its counters."""

    pid: int
    start_ns: Ints
    end_ns: Ints
    num_events: Ints
    is_idle_after: NDArray[np.bool_]
    new_requests: NDArray[np.bool_]
    """Whether the counter of requests changes at the step's start; likewise of KV blocks."""
    new_blocks: NDArray[np.bool_]
    table: pd.DataFrame

    @classmethod
    def of(cls, steps: pd.DataFrame, replica: int) -> _Steps:
        table = steps[steps["replica"] == replica]
        start = _nanoseconds(table["start"])
        end = _nanoseconds(table["start"] + table["duration"])
        next_start = np.append(start[1:], np.iinfo(np.int64).max)
        end = np.minimum(end, next_start)
        is_idle_after = next_start - end > 1
        was_idle = np.append(True, is_idle_after[:-1])[: len(table)]
        running, waiting, blocks = (
            _differs_from_last(table[name].to_numpy(), was_idle)
            for name in ("num_running", "num_waiting", "num_used_blocks")
        )
        # A step, its counters where they change, and their return to zero when idle.
        counters = np.stack([running | waiting, blocks, is_idle_after, is_idle_after])
        num_events = 1 + counters.astype(np.int64).sum(axis=0)
        return cls(
            *(replica + 1, start, end, num_events, is_idle_after, running | waiting, blocks, table)
        )

    def events(self, cut: float) -> Iterator[Event]:
        names = (
            *("num_prefills", "num_prefill_tokens", "num_decodes", "decode_context_sum"),
            *("num_waiting", "num_running", "num_used_blocks"),
        )
        rows = zip(
            self.start_ns.tolist(),
            self.end_ns.tolist(),
            self.is_idle_after.tolist(),
            self.new_requests.tolist(),
            self.new_blocks.tolist(),
            step_kinds(self.table).tolist(),
            *(self.table[name].tolist() for name in names),
            strict=True,
        )
        for start, end, idle_after, new_requests, new_blocks, kind, *numbers in rows:
            if start >= cut:
                return
            args = dict(zip(names, numbers, strict=True))
            step = {"name": STEP_KINDS[kind], "cat": "step", "ph": "X", "ts": start / 1000}
            step |= {"dur": (end - start) / 1000, "pid": self.pid, "tid": STEP_LANE, "args": args}
            yield step | {"cname": _CHROME_COLOURS[STEP_KINDS[kind]]}
            waiting, running, blocks = numbers[-3:]
            if new_requests:
                yield self._counter(start, "requests", {"running": running, "waiting": waiting})
            if new_blocks:
                yield self._counter(start, "KV blocks", {"used": blocks})
            if idle_after:
                yield self._counter(end, "requests", {"running": 0, "waiting": 0})
                yield self._counter(end, "KV blocks", {"used": 0})

    def _counter(self, at: int, name: str, values: dict[str, int]) -> Event:
        return {"ph": "C", "ts": at / 1000, "pid": self.pid, "name": name, "args": values}


def _differs_from_last(values: Ints, was_idle: NDArray[np.bool_]) -> NDArray[np.bool_]:
    last = np.append(0, values[:-1])[: len(values)]
    return np.asarray(values != np.where(was_idle, 0, last))


PHASES = ("queued", "prefill", "decode")


@dataclass(frozen=True, slots=True)
class _Requests:
    """A span for each request on its replica; an instant for each that was refused."""

    start_ns: Ints
    num_events: Ints
    edges_ns: Ints
    """Of each request: arrival, first step, first token, last token."""
    table: pd.DataFrame
    num_replicas: int
    preemptions: dict[int, list[tuple[float, float]]]

    @classmethod
    def of(cls, requests: pd.DataFrame, result: Result) -> _Requests:
        columns = ("arrival_time", "scheduled_time", "first_token_time", "finish_time")
        edges = np.stack([_nanoseconds(requests[name]) for name in columns], axis=1)
        served = requests["refused"].to_numpy() == ""
        preemptions: dict[int, list[tuple[float, float]]] = {}
        for request_id, *span in result.preemptions.itertuples(index=False):
            preemptions.setdefault(int(request_id), []).append(tuple(span))
        num_marks = [len(preemptions.get(i, ())) for i in requests["request_id"].tolist()]
        num_phases = (np.diff(edges, axis=1) > 0).sum(axis=1)
        num_events = np.where(served, 2 + 2 * num_phases + 2 * np.array(num_marks, dtype=int), 1)
        num_replicas = result.deployment.replicas
        return cls(edges[:, 0], num_events, edges, requests, num_replicas, preemptions)

    def events(self, cut: float) -> Iterator[Event]:
        names = (
            *("request_id", "replica", "num_prompt_tokens", "num_output_tokens"),
            *("num_preemptions", "refused"),
        )
        columns = [self.table[name].tolist() for name in names]
        for edges, *values in zip(self.edges_ns.tolist(), *columns, strict=True):
            if edges[0] >= cut:
                return
            args = dict(zip(names, values, strict=True))
            if args.pop("refused"):
                shared = {"ph": "i", "s": "p", "ts": edges[0] / 1000}
                shared |= {"pid": self.num_replicas + 1, "tid": 0}
                yield shared | {"name": f"refused: {values[-1]}", "args": args}
            else:
                yield from self._span(edges, args)

    def _span(self, edges: list[int], args: dict[str, object]) -> Iterator[Event]:
        request_id, replica = args["request_id"], args["replica"]
        assert isinstance(request_id, int)
        assert isinstance(replica, int)
        # A local id puts the span under its replica; Perfetto shows global ones in a group apart.
        shared = {"cat": "request", "id2": {"local": str(request_id)}, "pid": replica + 1, "tid": 0}
        yield shared | {"name": "request", "ph": "b", "ts": edges[0] / 1000, "args": args}
        for name, start, end in zip(PHASES, edges, edges[1:], strict=False):
            if end > start:
                yield shared | {"name": name, "ph": "b", "ts": start / 1000}
                yield from self._preempted(request_id, shared, start, end)
                yield shared | {"name": name, "ph": "e", "ts": end / 1000}
        yield shared | {"name": "request", "ph": "e", "ts": edges[-1] / 1000}

    def _preempted(
        self, request_id: int, shared: dict[str, object], start: int, end: int
    ) -> Iterator[Event]:
        """From the loss of its blocks until it is worked on again, inside the phase it fell in."""
        for span in self.preemptions.get(request_id, ()):
            lost, resumed = (round(time * 1e9) for time in span)
            if start <= lost < end:
                yield shared | {"name": "preempted", "ph": "b", "ts": lost / 1000}
                yield shared | {"name": "preempted", "ph": "e", "ts": min(resumed, end) / 1000}
