"""Changes of a trace: ties spread over ticks, windows, context limits, sessions kept with it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podsim.errors import InputError
from podsim.workload import Trace

NAN = math.nan


def make(times: list[float], **columns: list[float]) -> Trace:
    """Requests of 10, 11, 12, ... prompt tokens and one output token."""
    optional = {name: np.array(values) for name, values in columns.items()}
    return Trace(
        name="made",
        arrival_time=np.array(times, dtype=np.float64),
        num_prompt_tokens=np.arange(10, 10 + len(times)),
        num_output_tokens=np.ones(len(times), dtype=np.int64),
        rows_read=len(times),
        dropped={},
        notes=(),
        sha256="",
        **optional,  # type: ignore[arg-type]
    )


@pytest.fixture
def trace() -> Trace:
    """Two sessions and a request without one."""
    return make(
        [0.0, 3.0, 3.0, 3.0, 6.0, 9.0],
        session_id=[0, 1, -1, 0, 1, 0],
        think_time=[NAN, NAN, NAN, 2.0, 1.0, 4.0],
    )


def thinks(trace: Trace) -> list[float | None]:
    assert trace.think_time is not None
    return [None if math.isnan(t) else t for t in trace.think_time.tolist()]


def test_previous_turns(trace: Trace) -> None:
    assert trace.previous_turn.tolist() == [-1, -1, -1, 0, 1, 3]
    assert make([0.0, 1.0]).previous_turn.tolist() == [-1, -1]
    assert make([0.0, 1.0], session_id=[-1, -1]).previous_turn.tolist() == [-1, -1]


# ---- ties


def test_ties_are_spread_over_their_tick_in_order(trace: Trace) -> None:
    spread = trace.spread_ties(seed=1)
    assert spread.arrival_time[[0, 4, 5]].tolist() == [0.0, 6.0, 9.0]
    tied = spread.arrival_time[1:4]
    assert 3.0 < tied[0] < tied[1] < tied[2] < 6.0
    assert spread.num_prompt_tokens.tolist() == trace.num_prompt_tokens.tolist()
    assert spread.notes == ("3 requests that arrived at once spread over ticks of 3 s, seed 1",)
    assert spread.arrival_time.tolist() == trace.spread_ties(seed=1).arrival_time.tolist()
    assert spread.arrival_time.tolist() != trace.spread_ties(seed=2).arrival_time.tolist()


def test_a_tick_may_be_given(trace: Trace) -> None:
    assert (trace.spread_ties(tick=0.5).arrival_time[1:4] < 3.5).all()
    at_once = make([0.0, 0.0])
    assert 0 < at_once.spread_ties(tick=2).duration < 2
    with pytest.raises(InputError, match=r"^made: all requests arrive at once, give a tick"):
        at_once.spread_ties()
    with pytest.raises(InputError, match=r"^tick is -1, expected a number above 0"):
        trace.spread_ties(tick=-1)


def test_spread_ties_are_uniform_in_the_tick() -> None:
    ticks = np.repeat(np.arange(2000) * 3.0, 5)[4:]  # the first is alone
    offsets = (make(ticks.tolist()).spread_ties(seed=3).arrival_time - ticks)[1:]
    assert 0 <= offsets.min() < 0.01
    assert 2.99 < offsets.max() < 3
    assert offsets.mean() == pytest.approx(1.5, abs=0.03)
    assert offsets.std() == pytest.approx(3 / math.sqrt(12), abs=0.02)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(0, 99))
def test_spreading_never_reorders_ticks(ticks: list[int], seed: int) -> None:
    times = np.sort(np.array(ticks, dtype=np.float64))
    times -= times[0]
    spread = make(times.tolist()).spread_ties(seed, tick=1.0).arrival_time
    shift = spread[-1] - times[-1]
    assert (np.diff(spread) >= 0).all()
    assert np.abs(spread - times).max() <= 1
    assert shift <= 1


# ---- cuts


def test_between_keeps_its_start_and_counts_time_anew(trace: Trace) -> None:
    part = trace.between(3.0, 9.0)
    assert part.arrival_time.tolist() == [0.0, 0.0, 0.0, 3.0]
    assert part.num_prompt_tokens.tolist() == [11, 12, 13, 14]
    assert part.dropped == {"outside 3 s to 9 s": 2}
    assert part.rows_read == 6
    assert part.session_id is not None
    assert part.session_id.tolist() == [1, -1, 0, 1]
    assert thinks(part) == [None, None, None, 1.0]  # the turn before the third is gone


def test_rows(trace: Trace) -> None:
    assert trace.rows(4, 99).num_prompt_tokens.tolist() == [14, 15]
    assert trace.rows(0, 6) is trace
    twice = trace.rows(0, 5).rows(0, 5).rows(0, 4)
    assert twice.dropped == {"outside rows 0 to 5": 1, "outside rows 0 to 4": 1}


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda t: t.between(10, 20), "made: has no request in 10 s to 20 s"),
        (lambda t: t.between(4, 4), "made: has no request in 4 s to 4 s"),
        (lambda t: t.rows(6, 9), "made: has no request in rows 6 to 9"),
        (lambda t: t.within_context(5), "made: no request fits 5 tokens"),
        (lambda t: t.within_context(1), "max tokens is 1, expected at least 2"),
        (lambda t: t.within_context(9, "clip"), "overflow is 'clip', expected 'drop' or "
         "'truncate'"),
    ],
)  # fmt: skip
def test_wrong_cuts(trace: Trace, cut: Callable[[Trace], Trace], message: str) -> None:
    with pytest.raises(InputError) as error:
        cut(trace)
    assert str(error.value) == message


def test_the_same_reason_twice_is_counted_twice(trace: Trace) -> None:
    assert trace.between(0, 9).between(0, 9) is not trace
    assert trace.between(3, 9).between(0, 3).dropped == {
        "outside 3 s to 9 s": 2,
        "outside 0 s to 3 s": 1,
    }


def test_overlong_requests_are_dropped_and_counted(trace: Trace) -> None:
    kept = trace.within_context(13)
    assert kept.num_prompt_tokens.tolist() == [10, 11, 12]
    assert kept.dropped == {"longer than 13 tokens": 3}
    assert trace.within_context(16) is trace


def test_overlong_requests_are_cut_when_asked() -> None:
    trace = Trace(
        **{"name": "made", "arrival_time": np.array([0.0, 1.0, 2.0])},
        **{"num_prompt_tokens": np.array([40, 100, 5]), "rows_read": 3},
        **{"num_output_tokens": np.array([10, 30, 90]), "dropped": {}, "notes": (), "sha256": ""},
        hash_ids=(np.arange(3), np.arange(7), np.arange(1)),
        hash_block_size=16,
    )  # type: ignore[arg-type]
    cut = trace.within_context(64, "truncate")
    assert cut.num_prompt_tokens.tolist() == [40, 34, 1]
    assert cut.num_output_tokens.tolist() == [10, 30, 63]
    assert cut.hash_ids is not None
    assert [len(ids) for ids in cut.hash_ids] == [3, 3, 1]
    assert cut.notes == ("2 requests cut to 64 tokens, the prompt first",)
    assert cut.dropped == {}


def test_scaling_stretches_think_times_too(trace: Trace) -> None:
    assert thinks(trace.scaled(2)) == [None, None, None, 1.0, 0.5, 2.0]
