"""Synthetic workloads: lengths, shared prefixes and sessions drawn from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.trace_fields import MAX_TOKENS
from podsim.workload_arrivals import ARRIVALS, Diurnal, Ramp, arrival_times, generator, positive
from podsim.workload_trace import Trace

LengthSpec = int | str
Lengths = NDArray[np.int64]
MakeTimes = Callable[[int, np.random.Generator], NDArray[np.float64]]


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

    arrivals: "poisson"; "gamma" or "weibull", whose shape is `burstiness` (1 is Poisson, less is
    burstier: the coefficient of variation of gamma gaps is 1 / sqrt(burstiness)); "uniform", equal
    gaps; or "static", all at once, which takes no qps. The first request arrives at 0, and gaps
    are 1 / qps seconds in the mean.
    prompt_tokens, output_tokens: a number, "uniform:LOW:HIGH" (both included), or
    "lognormal:MEDIAN:SIGMA" (SIGMA: standard deviation of the logarithm, at most 3).
    InputError: any of these out of its range.
    """
    _at_least_one_request(num_requests)
    rng = generator(seed)
    prompts = draw_lengths("prompt tokens", prompt_tokens, num_requests, rng)
    outputs = draw_lengths("output tokens", output_tokens, num_requests, rng)
    times = arrival_times(arrivals, qps, num_requests, rng, burstiness)
    parameters = {
        "arrivals": arrivals,
        "qps": qps,
        "num_requests": num_requests,
        "prompt_tokens": str(prompt_tokens),
        "output_tokens": str(output_tokens),
        "seed": seed,
        "burstiness": burstiness,
    }
    return _trace(times, prompts, outputs, parameters)


def _trace(
    times: NDArray[np.float64], prompts: Lengths, outputs: Lengths, parameters: Mapping[str, object]
) -> Trace:
    return Trace(
        name="synthetic",
        arrival_time=times,
        num_prompt_tokens=prompts,
        num_output_tokens=outputs,
        rows_read=len(prompts),
        dropped={},
        notes=(", ".join(f"{name} {value}" for name, value in parameters.items()),),
        sha256=hashlib.sha256(json.dumps(parameters).encode()).hexdigest(),
    )


def _at_least_one_request(num_requests: int) -> None:
    if num_requests < 1:
        raise InputError(f"number of requests is {num_requests}, expected at least 1")


def draw_lengths(what: str, spec: LengthSpec, count: int, rng: np.random.Generator) -> Lengths:
    """`count` lengths as `spec` says (see synthetic_trace), each from 1 to MAX_TOKENS - 1."""
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


# ---- generate


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """What `generate` makes; seconds, tokens, requests/s. InputError for values that cannot be."""

    arrivals: str = "poisson"
    """A kind of `synthetic_trace`, "ramp" (from qps to end_qps) or "diurnal" (a sine)."""
    qps: float | None = None
    """Of requests; with several turns, of sessions."""
    burstiness: float = 1.0
    end_qps: float | None = None
    amplitude: float = 0.5
    period: float = 86_400.0
    num_requests: int = 1000
    prompt_tokens: str = "1500"
    """Of a first turn, or what each later turn adds to the conversation; without the prefix."""
    output_tokens: str = "300"
    prefix_tokens: int = 0
    """A prefix before the prompt of each session, one of num_prefixes that all share."""
    num_prefixes: int = 1
    turns: str = "1"
    """Turns of a session, written like prompt_tokens."""
    think_time: float = 10.0
    """Mean of the exponential time from a turn's completion to the next turn."""
    block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least_one_request(self.num_requests)
        if self.arrivals not in (kinds := [*ARRIVALS, "ramp", "diurnal"]):
            raise InputError(f"arrivals are {self.arrivals!r}, expected one of {', '.join(kinds)}")
        for name in ("num_prefixes", "block_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.prefix_tokens < MAX_TOKENS:
            raise InputError(f"prefix_tokens is {self.prefix_tokens}, expected 0 or more")
        if self.arrivals == "ramp" and self.end_qps is None:
            raise InputError("end qps is missing, ramp arrivals need one (--end-qps)")
        if self.arrivals in ("ramp", "diurnal") and self.qps is None:
            raise InputError(f"qps is missing, {self.arrivals} arrivals need one")
        positive("think time", self.think_time)

    def times(self, count: int, rng: np.random.Generator) -> NDArray[np.float64]:
        """Arrival times of `count` requests, or sessions, in seconds."""
        if self.arrivals == "ramp" and self.qps is not None and self.end_qps is not None:
            return Ramp(self.qps, self.end_qps).times(count, rng)
        if self.arrivals == "diurnal" and self.qps is not None:
            return Diurnal(self.qps, self.amplitude, self.period).times(count, rng)
        return arrival_times(self.arrivals, self.qps, count, rng, self.burstiness)


def generate(options: Synthetic, lengths_of: Trace | None = None) -> Trace:
    """Requests drawn at random; the same arguments give the same requests.

    lengths_of: a trace whose pairs of prompt and output lengths are drawn from, with replacement,
    in place of prompt_tokens and output_tokens. With more than one turn, a turn's prompt is all
    that its session said before, and what it adds; it arrives, in the open loop, a think time
    after the turn before it (which takes no time). Prefixes and turns give the trace hash_ids.
    """
    rng = generator(options.seed)
    count = options.num_requests
    if lengths_of is None:
        prompts = draw_lengths("prompt tokens", options.prompt_tokens, count, rng)
        outputs = draw_lengths("output tokens", options.output_tokens, count, rng)
    else:
        drawn = rng.integers(0, len(lengths_of), count)
        prompts, outputs = (
            lengths_of.num_prompt_tokens[drawn],
            lengths_of.num_output_tokens[drawn],
        )
    turns = np.minimum(draw_lengths("turns", options.turns, count, rng), count)
    num_sessions = int(np.searchsorted(np.cumsum(turns), count)) + 1
    session = np.repeat(np.arange(num_sessions), turns[:num_sessions])[:count]
    first = np.flatnonzero(np.diff(session, prepend=-1))
    starts = options.times(num_sessions, rng)
    prefix = rng.integers(0, options.num_prefixes, num_sessions)
    parameters = {**asdict(options), "lengths_of": lengths_of.sha256 if lengths_of else None}
    if num_sessions == count:
        times = starts
        think = None
    else:
        think = rng.exponential(options.think_time, count)
        think[first] = np.nan
        waited = np.cumsum(np.nan_to_num(think))
        times = starts[session] + waited - waited[first][session]
        before = np.cumsum(prompts + outputs) - (prompts + outputs)
        prompts = prompts + before - before[first][session]
    prompts = prompts + options.prefix_tokens
    if prompts.max() >= MAX_TOKENS:
        raise InputError(f"a prompt has {prompts.max()} tokens, expected fewer than {MAX_TOKENS}")
    trace = _trace(times, prompts, outputs, parameters)
    if think is not None or options.prefix_tokens:
        hash_ids = _hash_ids(prompts, session, prefix, options)
        trace = replace(trace, hash_ids=hash_ids, hash_block_size=options.block_size)
    if think is None:
        return trace
    note = "turns come after the turn before them: arrival times count its service as no time"
    trace = replace(trace, session_id=session, think_time=think, notes=(*trace.notes, note))
    return trace.reordered(np.argsort(times, kind="stable"))


def _hash_ids(
    prompts: Lengths, session: Lengths, prefix: Lengths, options: Synthetic
) -> tuple[Lengths, ...]:
    """Numbers of the blocks: those of prefixes first, then each session's own.

    A partial last block gets a number that no other has: the next turn continues it.
    """
    shared = options.prefix_tokens // options.block_size
    next_block = options.num_prefixes * shared
    full = prompts // options.block_size
    ids = []
    last_turn = np.searchsorted(session, session, side="right") - 1
    for turn, last in enumerate(full.tolist()):
        if turn == 0 or session[turn] != session[turn - 1]:
            own = next_block  # of the session's block number `shared`
            next_block += int(full[last_turn[turn]]) - shared
        blocks = np.arange(own - shared, own - shared + last)
        blocks[:shared] = prefix[session[turn]] * shared + np.arange(shared)
        if prompts[turn] % options.block_size:
            blocks = np.append(blocks, next_block)
            next_block += 1
        ids.append(blocks)
    return tuple(ids)
