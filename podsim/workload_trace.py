"""`Trace`: the requests of a workload as columns, and how they are cut, stretched and spread."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.workload_arrivals import arrival_times, generator, positive

MOST_SECONDS = 2.0**62 / 1e9
"""From the first arrival to the last: traces are written in nanoseconds."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests as columns, in arrival order; equal arrival times keep the order of the file.

    Every request that was read is accounted for: rows_read == len(self) + sum(dropped.values()).
    """

    name: str
    arrival_time: NDArray[np.float64]
    """Seconds from the first arrival; all NaN if the file holds lengths only (see has_times)."""
    num_prompt_tokens: NDArray[np.int64]
    num_output_tokens: NDArray[np.int64]
    rows_read: int
    dropped: Mapping[str, int]
    """Why rows were left out, and how many."""
    notes: tuple[str, ...]
    """What a reader of the results should know about how the trace was read or changed."""
    sha256: str
    """Of the file as it lies on disk, or of the parameters of a synthetic trace."""
    hash_ids: tuple[NDArray[np.int64], ...] | None = None
    """Of each request: numbers of its prompt's blocks, each implying all blocks before it.

    At most one for each started block; empty where nothing is known.
    """
    hash_block_size: int | None = None
    """Tokens in a block of hash_ids; the last block of a prompt may be partial."""
    session_id: NDArray[np.int64] | None = None
    """The session each request is a turn of, -1 for none; its turns are in order of arrival."""
    parent_session: NDArray[np.int64] | None = None
    """The session for which the request's own works, -1 for none: a subagent's. It starts after a
    turn of that session, whose next turn waits for its last one.
    """
    think_time: NDArray[np.float64] | None = None
    """Seconds from the completion of all that a turn waits for to this turn; NaN where there is
    nothing, or it is not known. A closed-loop replay waits for it; arrival_time is the open loop's.
    """
    priority: NDArray[np.int64] | None = None
    """The lower, the sooner a request is let in, where the scheduler's order is priority."""
    format: str | None = None
    """The name of the file's format, of podsim.trace_formats; None if it is from no file."""

    @classmethod
    def of(cls, *requests: tuple[float, int, int], name: str = "by hand") -> Trace:
        """Requests given as (arrival_time, num_prompt_tokens, num_output_tokens), in order."""
        times, prompts, outputs = zip(*requests, strict=True)
        return cls(
            name=name,
            arrival_time=np.array(times, dtype=np.float64),
            num_prompt_tokens=np.array(prompts, dtype=np.int64),
            num_output_tokens=np.array(outputs, dtype=np.int64),
            rows_read=len(requests),
            dropped={},
            notes=(),
            sha256=hashlib.sha256(repr(requests).encode()).hexdigest(),
        )

    def __post_init__(self) -> None:
        assert len(self) > 0, "a trace holds at least one request"
        assert self.rows_read == len(self) + sum(self.dropped.values())
        assert self.hash_ids is None or len(self.hash_ids) == len(self)
        columns = (
            *(self.arrival_time, self.num_prompt_tokens, self.num_output_tokens),
            *(self.session_id, self.parent_session, self.think_time, self.priority),
        )
        for column in columns:
            if column is not None:
                assert len(column) == len(self)
                column.flags.writeable = False
        if self.arrival_time[-1] >= MOST_SECONDS:
            last = f"{self.arrival_time[-1]:.3g}"
            raise InputError(f"{self.name}: last arrival at {last} s, expected below 146 years")

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)

    @property
    def has_times(self) -> bool:
        """False for lengths alone, which need `with_arrivals` before they can be simulated."""
        return not math.isnan(self.arrival_time[0])

    def require_times(self) -> None:
        """InputError if the trace holds lengths only."""
        if not self.has_times:
            raise InputError(f"{self.name}: has no arrival times, give it some (--arrivals, --qps)")

    @property
    def duration(self) -> float:
        """Seconds from the first to the last arrival. InputError without times."""
        self.require_times()
        return float(self.arrival_time[-1] - self.arrival_time[0])

    @property
    def qps(self) -> float:
        """Mean rate in requests/s: the inverse of the mean gap, (n - 1) / duration.

        Infinite where all requests arrive at once. InputError without times.
        """
        return (len(self) - 1) / self.duration if self.duration > 0 else math.inf

    @property
    def previous_turn(self) -> NDArray[np.int64]:
        """Of each request: the index of its session's turn before it; -1 if there is none."""
        previous = np.full(len(self), -1)
        if self.session_id is not None:
            turns = np.argsort(self.session_id, kind="stable")  # each session in order of arrival
            session = self.session_id[turns]
            follows = np.flatnonzero((session[1:] == session[:-1]) & (session[1:] >= 0))
            previous[turns[follows + 1]] = turns[follows]
        return previous

    @property
    def parent_turns(self) -> list[tuple[int, int, int, int]]:
        """Of each session that works for another: its first and its last turn, the turn of the
        other that started it, and that which waits for it (-1: none). Indices of requests.
        """
        if self.session_id is None or self.parent_session is None:
            return []
        turns: dict[int, list[int]] = {}
        for index, session in enumerate(self.session_id.tolist()):
            if session >= 0:
                turns.setdefault(session, []).append(index)
        found = []
        for own in turns.values():
            others = turns.get(int(self.parent_session[own[0]]), [])
            place = bisect(others, own[0] - 1)
            if place:  # else the turn that started it is not in the trace
                after = others[place] if place < len(others) else -1
                found.append((own[0], own[-1], others[place - 1], after))
        return found

    # ---- time

    def scaled(self, rate_scale: float) -> Trace:
        """The same requests `rate_scale` times as fast: time is divided by it, no request is lost.

        The shape of the arrivals (their coefficient of variation) stays; think times shrink alike.
        InputError unless rate_scale is above 0 and the trace has times.
        """
        positive("rate scale", rate_scale)
        return self._stretched(1 / rate_scale, f"arrival rate multiplied by {rate_scale:g}")

    def at_rate(self, qps: float) -> Trace:
        """The same requests with time stretched so that the mean rate, `Trace.qps`, is `qps`.

        InputError where all requests arrive at once: there is nothing to stretch.
        """
        positive("qps", qps)
        if math.isinf(self.qps):
            raise InputError(
                f"{self.name}: all requests arrive at once, so no stretching gives {qps:g} "
                "requests/s; replace the arrivals (--arrivals)"
            )
        return self._stretched(self.qps / qps, f"arrivals stretched to {qps:g} requests/s")

    def _stretched(self, factor: float, note: str) -> Trace:
        self.require_times()
        return replace(
            self,
            arrival_time=self.arrival_time * factor,
            think_time=None if self.think_time is None else self.think_time * factor,
            notes=(*self.notes, note),
        )

    def with_arrivals(
        self, kind: str, qps: float | None = None, seed: int = 0, burstiness: float = 1.0
    ) -> Trace:
        """The same requests in the same order, arriving anew; see `synthetic_trace`."""
        times = arrival_times(kind, qps, len(self), generator(seed), burstiness)
        rate = "" if qps is None else f" at {qps:g} requests/s"
        shape = f", burstiness {burstiness:g}" if kind in ("gamma", "weibull") else ""
        note = f"arrival times made: {kind}{rate}{shape}, seed {seed}"
        return replace(self, arrival_time=times, notes=(*self.notes, note))

    def spread_ties(self, seed: int = 0, tick: float | None = None) -> Trace:
        """Requests that arrive at once, spread over the tick of the clock; their order stays.

        A tick is `tick` seconds (default: the median gap between different arrival times), and
        ends early where the next arrival is sooner. Uniform in it. InputError without times, for
        a tick of 0 or less, or if there is no gap to take it from.
        """
        self.require_times()
        distinct, count = np.unique(self.arrival_time, return_counts=True)
        if tick is None:
            if len(distinct) < 2:
                raise InputError(f"{self.name}: all requests arrive at once, give a tick (--tick)")
            tick = float(np.median(np.diff(distinct)))
        positive("tick", tick)
        room = np.minimum(np.diff(distinct, append=np.inf), tick)
        room[count == 1] = 0
        times = self.arrival_time + np.repeat(room, count) * generator(seed).random(len(self))
        times.sort()  # within each tick; ticks do not overlap
        tied = int(count[count > 1].sum())
        note = f"{tied} requests that arrived at once spread over ticks of {tick:g} s, seed {seed}"
        return replace(self, arrival_time=times - times[0], notes=(*self.notes, note))

    def with_session_starts(self, qps: float, seed: int = 0) -> Trace:
        """Sessions start anew, as a Poisson process of `qps` sessions/s, in the order of their
        first turns; within a session, and those that work for it, the time between turns stays.
        InputError without sessions.
        """
        self.require_times()
        if self.session_id is None:
            raise InputError(f"{self.name}: has no sessions, so none can start at {qps:g} /s")
        sessions = self.session_id.copy()
        for turn, _, started_by, _ in self.parent_turns:  # in order of their first turns
            sessions[self.session_id == self.session_id[turn]] = sessions[started_by]
        lone = self.session_id < 0  # each request without a session is one of its own
        sessions = np.where(lone, -1 - np.arange(len(self)), sessions)
        _, first, inverse = np.unique(sessions, return_index=True, return_inverse=True)
        starts = np.empty(len(first))
        starts[np.argsort(first)] = arrival_times("poisson", qps, len(first), generator(seed))
        times = self.arrival_time + (starts - self.arrival_time[first])[inverse]
        note = f"sessions start anew: poisson at {qps:g} sessions/s, seed {seed}"
        moved = replace(self, arrival_time=times, notes=(*self.notes, note))
        return moved.reordered(np.argsort(times, kind="stable"))

    def reordered(self, order: NDArray[np.int64]) -> Trace:
        """The same requests in another order, which must be that of arrival."""
        assert len(order) == len(self)
        return self._taken(order)

    # ---- cuts

    def head(self, num_requests: int) -> Trace:
        """The first `num_requests` requests, or all if there are fewer. InputError below 1."""
        if num_requests < 1:
            raise InputError(f"number of requests is {num_requests}, expected at least 1")
        return self._first(num_requests, f"after the first {num_requests} requests")

    def until(self, duration: float) -> Trace:
        """The requests that arrive in the first `duration` seconds (before, not at, its end).

        InputError unless duration is above 0 and the trace has times.
        """
        positive("duration", duration)
        self.require_times()
        count = int(np.searchsorted(self.arrival_time, duration))
        return self._first(count, f"after the first {duration:g} s")

    def between(self, start: float, end: float) -> Trace:
        """The requests that arrive from `start` to before `end`, in seconds; time counts anew.

        InputError if there are none, or the trace has no times.
        """
        self.require_times()
        first, last = np.searchsorted(self.arrival_time, [start, end])
        return self._range(int(first), int(last), f"{start:g} s to {end:g} s")

    def rows(self, first: int, last: int) -> Trace:
        """The requests number `first` (from 0) to before `last`, in order of arrival; time counts
        anew. InputError if there are none.
        """
        return self._range(max(first, 0), min(last, len(self)), f"rows {first} to {last}")

    def within_context(self, max_tokens: int, overflow: str = "drop") -> Trace:
        """Requests whose prompt and output together are `max_tokens` at most.

        overflow: "drop" the others, counted; or "truncate" the prompt of each (and the output, if
        it alone does not fit), noted. InputError if none is left.
        """
        if overflow not in ("drop", "truncate"):
            raise InputError(f"overflow is {overflow!r}, expected 'drop' or 'truncate'")
        if max_tokens < 2:
            raise InputError(f"max tokens is {max_tokens}, expected at least 2")
        fits = self.num_prompt_tokens + self.num_output_tokens <= max_tokens
        if fits.all():
            return self
        if overflow == "drop":
            if not fits.any():
                raise InputError(f"{self.name}: no request fits {max_tokens} tokens")
            kept = self._taken(np.flatnonzero(fits), f"longer than {max_tokens} tokens")
            return kept._from_zero()
        outputs = np.minimum(self.num_output_tokens, max_tokens - 1)
        prompts = np.minimum(self.num_prompt_tokens, max_tokens - outputs)
        note = f"{np.count_nonzero(~fits)} requests cut to {max_tokens} tokens, the prompt first"
        return replace(
            self,
            num_prompt_tokens=prompts,
            num_output_tokens=outputs,
            hash_ids=self._hash_ids_of(prompts),
            notes=(*self.notes, note),
        )

    def _hash_ids_of(self, prompts: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...] | None:
        if self.hash_ids is None or self.hash_block_size is None:
            return None
        blocks = -(-prompts // self.hash_block_size)
        return tuple(ids[:n] for ids, n in zip(self.hash_ids, blocks.tolist(), strict=True))

    def _range(self, first: int, last: int, what: str) -> Trace:
        if first >= last:
            raise InputError(f"{self.name}: has no request in {what}")
        if (first, last) == (0, len(self)):
            return self
        return self._taken(slice(first, last), f"outside {what}")._from_zero()

    def _from_zero(self) -> Trace:
        return replace(self, arrival_time=self.arrival_time - self.arrival_time[0])

    def _first(self, count: int, reason: str) -> Trace:
        return self if count >= len(self) else self._taken(slice(count), reason)

    def _taken(self, which: slice | NDArray[np.int64], reason: str = "") -> Trace:
        """These requests, in this order; the others are dropped for the reason."""
        prompts = self.num_prompt_tokens[which]
        hash_ids = self.hash_ids
        if hash_ids is not None:
            picked = np.arange(len(self))[which]
            hash_ids = tuple(hash_ids[i] for i in picked.tolist())
        session_id = None if self.session_id is None else self.session_id[which]
        think_time = None if self.think_time is None else self.think_time[which].copy()
        if session_id is not None and think_time is not None and len(prompts) < len(self):
            first_turns = np.unique(session_id, return_index=True)[1]
            think_time[first_turns] = np.nan  # the turn before may be among those dropped
        dropped = dict(self.dropped)
        if lost := len(self) - len(prompts):
            dropped[reason] = dropped.get(reason, 0) + lost
        return replace(
            self,
            arrival_time=self.arrival_time[which],
            num_prompt_tokens=prompts,
            num_output_tokens=self.num_output_tokens[which],
            dropped=dropped,
            hash_ids=hash_ids,
            session_id=session_id,
            parent_session=None if self.parent_session is None else self.parent_session[which],
            think_time=think_time,
            priority=None if self.priority is None else self.priority[which],
        )
