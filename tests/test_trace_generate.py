"""Synthetic workloads: rates that change, shared prefixes, sessions, lengths of a trace."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.trace_prefix import hit_blocks
from podsim.workload import Synthetic, Trace, generate, load_trace, synthetic_trace
from podsim.workload_arrivals import Diurnal, Ramp


def draw(**options: object) -> Trace:
    return generate(Synthetic(**{"qps": 5.0, **options}))  # type: ignore[arg-type]


def counts(times: NDArray[np.float64], edges: list[float]) -> list[int]:
    found: list[int] = np.histogram(times, edges)[0].tolist()
    return found


# ---- arrivals


@pytest.mark.parametrize("shape", [0.5, 1.0, 2.0])
def test_weibull_gaps(shape: float) -> None:
    trace = synthetic_trace("weibull", 5, 100_000, 1, 1, seed=1, burstiness=shape)
    gaps = np.diff(trace.arrival_time)
    assert gaps.mean() == pytest.approx(0.2, rel=0.02)
    variance = math.gamma(1 + 2 / shape) / math.gamma(1 + 1 / shape) ** 2 - 1
    assert gaps.std() / gaps.mean() == pytest.approx(math.sqrt(variance), rel=0.03)


@pytest.mark.parametrize(("start", "end"), [(1.0, 9.0), (9.0, 1.0), (5.0, 5.0)])
def test_a_ramp_ends_at_its_rate(start: float, end: float) -> None:
    times = Ramp(start, end).times(20_000, np.random.default_rng(1))
    assert times[0] == 0
    assert (np.diff(times) >= 0).all()
    length = 2 * 20_000 / (start + end)
    assert times[-1] == pytest.approx(length, rel=0.05)
    first, last = counts(times, [0, length / 2, length * 1.2])
    # Half the time at (3 start + end) / 4 in the mean, half at (start + 3 end) / 4.
    assert first == pytest.approx(length / 2 * (3 * start + end) / 4, rel=0.03)
    assert first + last == 20_000


def test_a_diurnal_rate_swings() -> None:
    times = Diurnal(qps=10, amplitude=0.8, period=1000).times(20_000, np.random.default_rng(1))
    assert (np.diff(times) >= 0).all()
    assert times[-1] == pytest.approx(2000, rel=0.03)
    quarters = counts(times, [0, 500, 1000, 1500, 1999])
    high, low = 5000 + 8000 / math.pi, 5000 - 8000 / math.pi  # the integral of a half swing
    assert quarters == pytest.approx([high, low, high, low], rel=0.06)


def test_kinds_reach_generate() -> None:
    ramp = draw(arrivals="ramp", qps=1.0, end_qps=9.0, num_requests=5000)
    assert ramp.duration == pytest.approx(1000, rel=0.05)
    diurnal = draw(arrivals="diurnal", qps=10.0, amplitude=1.0, period=100.0, num_requests=5000)
    assert diurnal.duration == pytest.approx(500, rel=0.05)
    gamma = draw(arrivals="gamma", burstiness=0.25, num_requests=20_000)
    gaps = np.diff(gamma.arrival_time)
    assert gaps.std() / gaps.mean() == pytest.approx(2, rel=0.05)


# ---- lengths


def test_lengths_of_a_trace_are_drawn_in_pairs(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n10,1\n20,2\n30,3\n")
    trace = generate(Synthetic(qps=1.0, num_requests=3000), load_trace(path))
    pairs = list(
        zip(trace.num_prompt_tokens.tolist(), trace.num_output_tokens.tolist(), strict=True)
    )
    assert {pair: pairs.count(pair) for pair in set(pairs)} == pytest.approx(
        {(10, 1): 1000, (20, 2): 1000, (30, 3): 1000}, rel=0.1
    )


def test_without_prefix_and_turns_there_are_no_columns_for_them() -> None:
    trace = draw(num_requests=5)
    assert (trace.hash_ids, trace.session_id, trace.think_time) == (None, None, None)
    assert trace.num_prompt_tokens.tolist() == [1500] * 5


# ---- prefixes and sessions


def test_prefixes_are_shared_in_full_blocks() -> None:
    trace = draw(num_requests=200, prefix_tokens=40, num_prefixes=3, prompt_tokens="30")
    assert trace.num_prompt_tokens.tolist() == [70] * 200
    assert trace.hash_ids is not None
    assert {len(ids) for ids in trace.hash_ids} == {5}
    prefixes = {tuple(ids[:2].tolist()) for ids in trace.hash_ids}  # 40 tokens: 2 blocks of 16
    assert len(prefixes) == 3
    rest = np.concatenate([ids[2:] for ids in trace.hash_ids])
    assert len(np.unique(rest)) == 600  # the others are nobody else's
    assert hit_blocks(trace.hash_ids)[0].sum() == (200 - 3) * 2


def test_turns_continue_their_session() -> None:
    trace = draw(
        num_requests=300, turns="uniform:1:6", think_time=20.0, prefix_tokens=32,
        prompt_tokens="uniform:10:90", output_tokens="uniform:5:50", seed=2,
    )  # fmt: skip
    assert len(trace) == 300
    assert (np.diff(trace.arrival_time) >= 0).all()
    assert trace.session_id is not None
    assert trace.think_time is not None
    assert trace.hash_ids is not None
    for session in np.unique(trace.session_id).tolist():
        turns = np.flatnonzero(trace.session_id == session).tolist()
        assert math.isnan(trace.think_time[turns[0]])
        for before, turn in itertools.pairwise(turns):
            waited = trace.arrival_time[turn] - trace.arrival_time[before]
            assert waited == pytest.approx(trace.think_time[turn])
            said = trace.num_prompt_tokens[before] + trace.num_output_tokens[before]
            assert 10 <= trace.num_prompt_tokens[turn] - said <= 90
            full = trace.num_prompt_tokens[before] // 16
            ids, earlier = trace.hash_ids[turn], trace.hash_ids[before]
            assert ids[:full].tolist() == earlier[:full].tolist()
            assert not set(ids[full:].tolist()) & set(earlier.tolist())
    known = trace.think_time[~np.isnan(trace.think_time)]
    assert known.mean() == pytest.approx(20, rel=0.2)
    assert known.min() > 0


def test_blocks_are_one_for_each_started_block() -> None:
    trace = draw(num_requests=300, turns="4", prefix_tokens=50, prompt_tokens="uniform:1:90")
    assert trace.hash_ids is not None
    blocks = -(-trace.num_prompt_tokens // 16)
    assert [len(ids) for ids in trace.hash_ids] == blocks.tolist()
    # A block that two requests share is one of the prefix or of an earlier turn of the session.
    assert trace.session_id is not None
    owner: dict[int, int] = {}
    for session, ids in zip(trace.session_id.tolist(), trace.hash_ids, strict=True):
        for block in ids[3:].tolist():
            assert owner.setdefault(block, session) == session


def test_the_seed_decides() -> None:
    options = {"turns": "uniform:1:4", "prefix_tokens": 20, "num_prefixes": 2}
    first, again, other = (draw(num_requests=50, seed=seed, **options) for seed in (1, 1, 2))
    assert first.arrival_time.tolist() == again.arrival_time.tolist()
    assert first.sha256 == again.sha256 != other.sha256
    assert first.arrival_time.tolist() != other.arrival_time.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arrivals": "ramp"}, "end qps is missing, ramp arrivals need one (--end-qps)"),
        ({"arrivals": "ramp", "end_qps": 0.0}, "end qps is 0, expected a number above 0"),
        ({"arrivals": "diurnal", "qps": None}, "qps is missing, diurnal arrivals need one"),
        ({"arrivals": "diurnal", "amplitude": 1.5}, "amplitude is 1.5, expected 0 to 1"),
        ({"arrivals": "x"}, "arrivals are 'x', expected one of poisson, gamma, weibull, uniform, "
         "static, ramp, diurnal"),
        ({"arrivals": "weibull", "burstiness": 0.01}, "burstiness is 0.01, expected at least 0.05 "
         "for weibull"),
        ({"num_requests": 0}, "number of requests is 0, expected at least 1"),
        ({"num_prefixes": 0}, "num_prefixes is 0, expected at least 1"),
        ({"prefix_tokens": -1}, "prefix_tokens is -1, expected 0 or more"),
        ({"turns": "0"}, "turns are '0', expected a number from 1, uniform:LOW:HIGH or "
         "lognormal:MEDIAN:SIGMA with SIGMA from 0 to 3"),
        ({"think_time": 0.0}, "think time is 0, expected a number above 0"),
        ({"turns": "3", "prompt_tokens": "999999999"}, "a prompt has 3000000597 tokens, expected "
         "fewer than 1000000000"),
    ],
)  # fmt: skip
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        draw(**{"num_requests": 3, **options})
    assert str(error.value) == message
