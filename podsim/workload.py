"""The requests to simulate: `Trace`, read from a file, shipped with podsim or made from a seed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.trace_files import read_rows
from podsim.trace_formats import MAX_TOKENS

LengthSpec = int | str


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
    """Of each request: numbers of its prompt's blocks, each implying all blocks before it."""
    hash_block_size: int | None = None
    """Tokens in a block of hash_ids; the last block of a prompt may be partial."""

    def __post_init__(self) -> None:
        assert len(self) > 0, "a trace holds at least one request"
        assert len(self) == len(self.arrival_time) == len(self.num_output_tokens)
        assert self.rows_read == len(self) + sum(self.dropped.values())
        for column in (self.arrival_time, self.num_prompt_tokens, self.num_output_tokens):
            column.flags.writeable = False

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

    def scaled(self, rate_scale: float) -> Trace:
        """The same requests `rate_scale` times as fast: time is divided by it, no request is lost.

        The shape of the arrivals (their coefficient of variation) stays. InputError unless
        rate_scale is above 0 and the trace has times.
        """
        _positive("rate scale", rate_scale)
        return self._stretched(1 / rate_scale, f"arrival rate multiplied by {rate_scale:g}")

    def at_rate(self, qps: float) -> Trace:
        """The same requests with time stretched so that the mean rate, `Trace.qps`, is `qps`.

        InputError where all requests arrive at once: there is nothing to stretch.
        """
        _positive("qps", qps)
        if math.isinf(self.qps):
            raise InputError(
                f"{self.name}: all requests arrive at once, so no stretching gives {qps:g} "
                "requests/s; replace the arrivals (--arrivals)"
            )
        return self._stretched(self.qps / qps, f"arrivals stretched to {qps:g} requests/s")

    def head(self, num_requests: int) -> Trace:
        """The first `num_requests` requests, or all if there are fewer. InputError below 1."""
        if num_requests < 1:
            raise InputError(f"number of requests is {num_requests}, expected at least 1")
        return self._first(num_requests, f"after the first {num_requests} requests")

    def until(self, duration: float) -> Trace:
        """The requests that arrive in the first `duration` seconds (before, not at, its end).

        InputError unless duration is above 0 and the trace has times.
        """
        _positive("duration", duration)
        self.require_times()
        count = int(np.searchsorted(self.arrival_time, duration))
        return self._first(count, f"after the first {duration:g} s")

    def with_arrivals(
        self, kind: str, qps: float | None = None, seed: int = 0, burstiness: float = 1.0
    ) -> Trace:
        """The same requests in the same order, arriving anew; see `synthetic_trace`."""
        gaps = _gaps(kind, qps, burstiness, len(self) - 1, _generator(seed))
        rate = "" if qps is None else f" at {qps:g} requests/s"
        shape = f", burstiness {burstiness:g}" if kind == "gamma" else ""
        note = f"arrival times made: {kind}{rate}{shape}, seed {seed}"
        return replace(self, arrival_time=_times(gaps), notes=(*self.notes, note))

    def _stretched(self, factor: float, note: str) -> Trace:
        self.require_times()
        return replace(self, arrival_time=self.arrival_time * factor, notes=(*self.notes, note))

    def _first(self, count: int, reason: str) -> Trace:
        if count >= len(self):
            return self
        return replace(
            self,
            arrival_time=self.arrival_time[:count],
            num_prompt_tokens=self.num_prompt_tokens[:count],
            num_output_tokens=self.num_output_tokens[:count],
            dropped={**self.dropped, reason: len(self) - count},
            hash_ids=self.hash_ids[:count] if self.hash_ids is not None else None,
        )


# ---- files


def shipped_traces() -> list[str]:
    """The names that `load_trace` knows without a path."""
    names = [entry.name for entry in files("podsim.traces").iterdir()]
    return sorted(name.removesuffix(".csv") for name in names if name.endswith(".csv"))


def load_trace(source: str | Path, *, zero_length: str = "error") -> Trace:
    """Read a trace from a file, plain or gzipped, or by the name of one that podsim ships.

    The formats are in `podsim.trace_formats`. Rows without a prompt or an output token are an
    error, or with zero_length="drop" left out and counted. Rows out of time order are sorted.
    InputError: no such file, an unknown format, or a wrong line, named by its number.
    """
    if zero_length not in ("error", "drop"):
        raise InputError(f"zero length is {zero_length!r}, expected 'error' or 'drop'")
    allow_zero = zero_length == "drop"
    if source in shipped_traces():
        with as_file(files("podsim.traces") / f"{source}.csv") as path:
            return _load(path, str(source), allow_zero)
    if not os.path.exists(source):
        shipped = ", ".join(shipped_traces())
        raise InputError(f"{source}: no such file, nor a trace that podsim ships ({shipped})")
    return _load(Path(source), Path(source).name, allow_zero)


def _load(path: Path, name: str, allow_zero: bool) -> Trace:
    rows = read_rows(path, allow_zero=allow_zero)
    notes = []
    if rows.ignored:
        notes.append(f"columns not used: {', '.join(rows.ignored)}")
    no_output = rows.num_output_tokens == 0
    no_prompt = (rows.num_prompt_tokens == 0) & ~no_output
    dropped = {
        "zero output tokens": int(no_output.sum()),
        "zero prompt tokens": int(no_prompt.sum()),
    }
    order = np.flatnonzero(~(no_output | no_prompt))
    if not len(order):
        raise InputError(f"{path}: all {len(rows.lines)} rows have zero tokens, none is left")
    if rows.time_ns is None:
        notes.append("the file holds lengths only, no arrival times")
        arrival_time = np.full(len(order), np.nan)
    else:
        kept = rows.time_ns[order]
        early = np.maximum.accumulate(kept) - kept
        if early.any():
            notes.append(
                f"{np.count_nonzero(early)} rows were not in time order: sorted (line "
                f"{rows.lines[order][early.argmax()]} goes back furthest, {early.max() / 1e9:g} s)"
            )
        by_time = np.argsort(kept, kind="stable")
        order = order[by_time]
        arrival_time = (kept[by_time] - kept.min()) / 1e9
    return Trace(
        name=name,
        arrival_time=arrival_time,
        num_prompt_tokens=rows.num_prompt_tokens[order],
        num_output_tokens=rows.num_output_tokens[order],
        rows_read=len(rows.lines),
        dropped={reason: count for reason, count in dropped.items() if count},
        notes=tuple(notes),
        sha256=rows.sha256,
        hash_ids=tuple(rows.hash_ids[i] for i in order) if rows.hash_ids is not None else None,
        hash_block_size=rows.format.hash_block_size if rows.hash_ids is not None else None,
    )


# ---- synthetic requests

Gaps = Callable[[np.random.Generator, int, float], NDArray[np.float64]]

# How the gaps between arrivals are drawn, with a mean of 1: (generator, count, burstiness).
ARRIVALS: dict[str, Gaps] = {
    "poisson": lambda rng, count, _: rng.exponential(size=count),
    "gamma": lambda rng, count, burstiness: rng.gamma(burstiness, 1 / burstiness, count),
    "uniform": lambda rng, count, _: np.ones(count),
    "static": lambda rng, count, _: np.zeros(count),
}


def synthetic_trace(
    arrivals: str,
    qps: float | None,
    num_requests: int,
    prompt_tokens: LengthSpec,
    output_tokens: LengthSpec,
    seed: int = 0,
    burstiness: float = 1.0,
) -> Trace:
    """Requests drawn at random; the same arguments give the same requests.

    arrivals: "poisson"; "gamma", whose shape is `burstiness` (1 is Poisson, less is burstier: the
    gaps' coefficient of variation is 1 / sqrt(burstiness)); "uniform", equal gaps; or "static",
    all at once, which takes no qps. The first request arrives at 0, and gaps are 1 / qps seconds
    in the mean.
    prompt_tokens, output_tokens: a number, "uniform:LOW:HIGH" (both included), or
    "lognormal:MEDIAN:SIGMA" (SIGMA: standard deviation of the logarithm, at most 3).
    InputError: any of these out of its range.
    """
    if num_requests < 1:
        raise InputError(f"number of requests is {num_requests}, expected at least 1")
    rng = _generator(seed)
    prompts = _lengths("prompt tokens", prompt_tokens, num_requests, rng)
    outputs = _lengths("output tokens", output_tokens, num_requests, rng)
    gaps = _gaps(arrivals, qps, burstiness, num_requests - 1, rng)
    parameters = {
        "arrivals": arrivals,
        "qps": qps,
        "num_requests": num_requests,
        "prompt_tokens": str(prompt_tokens),
        "output_tokens": str(output_tokens),
        "seed": seed,
        "burstiness": burstiness,
    }
    return Trace(
        name="synthetic",
        arrival_time=_times(gaps),
        num_prompt_tokens=prompts,
        num_output_tokens=outputs,
        rows_read=num_requests,
        dropped={},
        notes=(", ".join(f"{name} {value}" for name, value in parameters.items()),),
        sha256=hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
    )


def _generator(seed: int) -> np.random.Generator:
    if seed < 0:
        raise InputError(f"seed is {seed}, expected 0 or more")
    return np.random.default_rng(seed)


def _times(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.concatenate([[0.0], np.cumsum(gaps)])


def _gaps(
    kind: str, qps: float | None, burstiness: float, count: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    if kind not in ARRIVALS:
        raise InputError(f"arrivals are {kind!r}, expected one of {', '.join(ARRIVALS)}")
    _positive("burstiness", burstiness)
    if burstiness != 1 and kind != "gamma":
        raise InputError(f"burstiness is {burstiness:g}, but only gamma arrivals have one")
    if kind == "static":
        if qps is not None:
            raise InputError(f"qps is {qps:g}, but static arrivals have none: all come at once")
        return ARRIVALS[kind](rng, count, burstiness)
    if qps is None:
        raise InputError(f"qps is missing, {kind} arrivals need one")
    _positive("qps", qps)
    return ARRIVALS[kind](rng, count, burstiness) / qps


def _lengths(
    what: str, spec: LengthSpec, count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`count` lengths as `spec` says, each from 1 to MAX_TOKENS - 1."""
    kind, *texts = str(spec).split(":")
    kind, texts = (kind, texts) if texts else ("fixed", [kind])
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        numbers = []
    tokens = numbers[:1] if kind == "lognormal" else numbers
    whole = all(1 <= number < MAX_TOKENS and number == int(number) for number in tokens)
    match kind, numbers:
        case "fixed", [length] if whole:
            return np.full(count, int(length))
        case "uniform", [low, high] if whole and low <= high:
            return rng.integers(int(low), int(high), count, endpoint=True)
        case "lognormal", [median, sigma] if whole and 0 <= sigma <= 3:
            drawn = np.rint(median * np.exp(sigma * rng.standard_normal(count)))
            return np.clip(drawn, 1, MAX_TOKENS - 1).astype(np.int64)
    raise InputError(
        f"{what} are {str(spec)!r}, expected a number from 1, uniform:LOW:HIGH or "
        "lognormal:MEDIAN:SIGMA with SIGMA from 0 to 3"
    )


def _positive(what: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{what} is {value:g}, expected a number above 0")
