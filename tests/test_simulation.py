"""Timelines of a few requests, made by hand, with steps of one second."""

from __future__ import annotations

from collections import deque

import numpy as np
import pandas as pd
import pytest

from podsim import event_log
from podsim.batch import Batch, BatchShape, Chunk
from podsim.config import Deployment
from podsim.decode_group import DecodeGroup
from podsim.errors import InputError
from podsim.latency import ConstantLatency
from podsim.model import model_named
from podsim.request import Request
from podsim.scheduler import Completed
from podsim.simulation import (
    Result,
    latency_model_for,
    simulate,
    simulate_with_error_bars,
)
from podsim.workload import Trace


def run(*requests: tuple[float, int, int], seconds: float = 1.0, **options: object) -> Result:
    defaults = {"token_budget": 100, "max_num_seqs": 10, "block_size": 10, "watermark": 0.0}
    deployment = Deployment(**(defaults | options))  # type: ignore[arg-type]
    return simulate(Trace.of(*requests), deployment, latency_model=ConstantLatency(seconds))


def times(result: Result, column: str) -> list[float]:
    return result.requests[column].tolist()


class Recorder:
    """A latency model that keeps the shapes it was asked for."""

    def __init__(self) -> None:
        self.shapes: list[BatchShape] = []

    def step_time(self, shape: BatchShape) -> float:
        self.shapes.append(shape)
        return 1.0


def test_one_request_is_its_chunks_and_then_its_tokens() -> None:
    result = run((0.0, 250, 4))
    # 0-3: chunks of 100, 100, 50; the last emits. 3-6: three decodes.
    assert times(result, "first_token_time") == [3.0]
    assert times(result, "finish_time") == [6.0]
    assert result.log.gap_duration.tolist() == [1.0, 1.0, 1.0]
    assert times(result, "tpot") == [1.0]


def test_a_request_alone_takes_exactly_the_sum_of_its_steps() -> None:
    result = run((0.0, 1234, 567), seconds=0.0625)
    assert len(result.steps) == 13 + 566
    assert times(result, "e2e_latency") == [result.steps["duration"].sum()]


def test_decodes_do_not_wait_for_prompts() -> None:
    latency = Recorder()
    deployment = Deployment(token_budget=100, max_num_seqs=10, block_size=10)
    result = simulate(Trace.of((0.0, 100, 5), (0.5, 250, 2)), deployment, latency_model=latency)
    # 0-1: prompt of A. 1-4: a decode of A with 99, 99, 52 tokens of B. 4-5: both decode.
    assert [shape.num_decodes for shape in latency.shapes] == [0, 1, 1, 1, 2]
    assert [shape.prefills for shape in latency.shapes] == [
        ((100, 100),),
        ((99, 99),),
        ((99, 198),),
        ((52, 250),),
        (),
    ]
    assert [shape.decode_context_sum for shape in latency.shapes] == [0, 101, 102, 103, 104 + 251]
    assert [shape.decode_context_max for shape in latency.shapes] == [0, 101, 102, 103, 251]
    assert [shape.num_sampled for shape in latency.shapes] == [1, 1, 1, 2, 2]
    assert times(result, "first_token_time") == [1.0, 4.0]
    assert times(result, "finish_time") == [5.0, 5.0]
    assert times(result, "queue_time") == [0.0, 0.5]


def test_an_arrival_joins_the_step_that_starts_at_its_time() -> None:
    result = run((0.0, 50, 3), (1.0, 50, 1), (1.0 + 1e-9, 50, 1))
    assert times(result, "scheduled_time") == [0.0, 1.0, 2.0]


def test_partial_prompts_go_before_new_requests() -> None:
    result = run((0.0, 150, 1), (0.0, 80, 1), (0.0, 30, 1))
    # 0-1: 100 of A. 1-2: the last 50 of A and 50 of B. 2-3: 30 of B, 30 of C.
    assert times(result, "scheduled_time") == [0.0, 1.0, 2.0]
    assert times(result, "first_token_time") == [2.0, 3.0, 3.0]


def test_max_num_seqs_holds_requests_back() -> None:
    result = run((0.0, 10, 3), (0.0, 10, 3), (0.0, 10, 3), max_num_seqs=2)
    assert times(result, "scheduled_time") == [0.0, 0.0, 3.0]
    assert times(result, "finish_time") == [3.0, 3.0, 6.0]


def test_a_decode_without_a_block_preempts_the_last_request() -> None:
    # 4 blocks of 10. A and B hold two each; A needs its third at context 21.
    result = run((0.0, 19, 5), (0.0, 19, 5), num_blocks=4)
    # 0-1: both prompts. 1-2: both decode, context 20. 2-3: B is preempted, A decodes 21.
    # 3-5: A decodes 22 and 23 and is done. 5-6: B computes 19 + 2 tokens again, emits its third.
    assert times(result, "num_preemptions") == [0, 1]
    assert times(result, "finish_time") == [5.0, 8.0]
    assert times(result, "first_token_time") == [1.0, 1.0]
    gaps = np.repeat(result.log.gap_duration, result.log.gap_count)
    assert sorted(gaps) == [1.0] * 7 + [4.0]


def test_admission_leaves_the_watermark_free_while_something_runs() -> None:
    held_back = run((0.0, 30, 3), (0.0, 30, 3), num_blocks=8, watermark=0.25)
    assert times(held_back, "scheduled_time") == [0.0, 0.0]
    held_back = run((0.0, 30, 3), (0.0, 30, 3), num_blocks=7, watermark=0.3)
    assert times(held_back, "scheduled_time") == [0.0, 3.0]
    alone = run((0.0, 70, 1), num_blocks=7, watermark=0.3)
    assert times(alone, "scheduled_time") == [0.0]


def test_requests_that_can_never_fit_are_refused_and_counted() -> None:
    result = run((0.0, 50, 10), (0.0, 60, 11), (0.0, 10, 10), num_blocks=7, max_model_len=75)
    assert times(result, "refused") == ["", "", ""]
    result = run((0.0, 60, 12), (0.0, 70, 10), (0.0, 10, 10), num_blocks=7, max_model_len=75)
    assert times(result, "refused") == [
        "longer than the KV cache (70 tokens)",
        "longer than max_model_len (75)",
        "",
    ]
    assert result.summary()["failed"] == 2
    assert result.summary()["completed"] == 1


def test_replicas_share_the_requests() -> None:
    requests = [(0.0, 90, 1), (0.0, 10, 1), (0.0, 10, 1), (0.0, 10, 1)]
    in_turn = run(*requests, replicas=2)
    assert times(in_turn, "replica") == [0, 1, 0, 1]
    by_load = run(*requests, replicas=2, router="least_outstanding_tokens")
    assert times(by_load, "replica") == [0, 1, 1, 1]


def test_outstanding_tokens_return_to_zero() -> None:
    requests = [(float(i), 30 + 7 * i, 1 + i) for i in range(20)]
    first = run(*requests, replicas=3, router="least_outstanding_tokens", num_blocks=20)
    late = run(*requests, (1000.0, 10, 1), replicas=3, router="least_outstanding_tokens")
    assert first.requests["num_preemptions"].sum() > 0
    assert times(late, "replica")[-1] == 0  # all idle: a tie goes to the first


class CheckedLatency:
    """Checks the budgets of every step."""

    def __init__(self, token_budget: int, max_num_seqs: int) -> None:
        self.token_budget = token_budget
        self.max_num_seqs = max_num_seqs

    def step_time(self, shape: BatchShape) -> float:
        assert 0 < shape.num_tokens <= self.token_budget
        assert shape.num_decodes + len(shape.prefills) <= self.max_num_seqs
        return 0.01 + 1e-4 * shape.num_tokens


@pytest.mark.parametrize("num_blocks", [30, 60, 1000])
def test_every_token_once_blocks_conserved_and_no_step_over_its_budgets(num_blocks: int) -> None:
    rng = np.random.default_rng(num_blocks)
    requests = [
        (float(t), int(p), int(o))
        for t, p, o in zip(
            np.cumsum(rng.exponential(0.05, 300)),
            rng.integers(1, 200, 300),
            rng.integers(1, 80, 300),
            strict=True,
        )
    ]
    deployment = Deployment(
        token_budget=64, max_num_seqs=16, block_size=10, num_blocks=num_blocks, replicas=2
    )
    result = simulate(Trace.of(*requests), deployment, latency_model=CheckedLatency(64, 16))
    log = result.log
    assert sorted(log.requests["request_id"]) == list(range(300))
    assert sum(log.gap_count) == sum(result.requests["num_output_tokens"] - 1)
    prefilled = result.steps["num_prefill_tokens"].sum()
    assert prefilled >= result.requests["num_prompt_tokens"].sum()
    assert max(log.steps["num_used_blocks"]) <= num_blocks
    preempted = result.requests["num_preemptions"].sum()
    assert preempted == len(result.preemptions)
    assert (preempted > 0) == (num_blocks < 1000)
    lived = (result.requests["finish_time"] - result.requests["first_token_time"]).sum()
    assert np.dot(log.gap_duration, log.gap_count) == pytest.approx(lived)


def test_mean_wait_is_that_of_an_m_d_1_queue() -> None:
    rng = np.random.default_rng(7)
    load, service = 0.7, 1.0
    arrivals = np.cumsum(rng.exponential(service / load, 200_000))
    requests = [(float(t), 1, 1) for t in arrivals]
    result = run(*requests, seconds=service, max_num_seqs=1)
    expected = load * service / (2 * (1 - load))  # Pollaczek-Khinchine, constant service
    assert result.requests["queue_time"].mean() == pytest.approx(expected, rel=0.03)


def test_the_same_inputs_give_the_same_result() -> None:
    rng = np.random.default_rng(1)
    requests = [(float(t), 40, 20) for t in np.cumsum(rng.exponential(0.3, 200))]
    first, second = (run(*requests, seconds=0.1, num_blocks=40, replicas=2) for _ in range(2))
    assert first.requests.to_csv() == second.requests.to_csv()
    assert first.steps.to_csv() == second.steps.to_csv()
    assert first.summary() == second.summary()


class FirstComeAlone:
    """A scheduler of one's own: one request at a time, its whole prompt at once."""

    def __init__(self, block_size: int) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.decodes = DecodeGroup(block_size)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Batch:
        if self.running:
            _, context, _ = self.decodes.contexts()
            return Batch(num_decodes=1, decode_context_sum=context, decode_context_max=context)
        if not self.waiting:
            return Batch()
        self.running.append(self.waiting.popleft())
        return Batch([Chunk(self.running[0], self.running[0].num_prompt_tokens)])

    def complete(self, batch: Batch, num_steps: int) -> Completed:
        done = Completed()
        if batch.num_decodes:
            done.finished_decodes = self.decodes.advance(num_steps)
        for request, num_tokens in batch.prefills:
            request.num_computed_tokens = num_tokens
            request.num_emitted_tokens = 1
            done.emitted.append(request)
            if not request.is_finished:
                self.decodes.add(request)
        self.running = [r for r in self.running if not r.is_finished]
        return done

    def repeats(self, batch: Batch) -> bool:
        return False

    def lets_in(self, request: Request) -> bool:
        return False


def test_a_scheduler_of_ones_own_plugs_in() -> None:
    result = simulate(
        Trace.of((0.0, 500, 2), (0.0, 5, 3)),
        Deployment(),
        latency_model=ConstantLatency(1.0),
        scheduler=lambda kv_cache, deployment: FirstComeAlone(kv_cache.block_size),
    )
    assert times(result, "finish_time") == [2.0, 5.0]


def test_budgets_that_contradict_are_refused() -> None:
    with pytest.raises(InputError, match=r"token_budget is 64, expected at least max_num_seqs"):
        Deployment(token_budget=64, max_num_seqs=256)


def test_steps_that_are_not_kept_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "CHUNK", 7)
    trace = Trace.of(*((0.3 * i, 150, 20) for i in range(30)))
    deployment = Deployment(token_budget=100, max_num_seqs=10, block_size=10, num_blocks=70)
    kept, added = (
        simulate(trace, deployment, latency_model=ConstantLatency(0.1), keep_steps=keep)
        for keep in (True, False)
    )
    assert len(added.log.steps["start"]) < 7 < len(kept.steps)
    assert kept.log.step_totals() == added.log.step_totals()
    assert kept.log.step_totals().num_steps == len(kept.steps)
    assert kept.log.step_totals().busy == pytest.approx(kept.steps["duration"].sum())
    with pytest.raises(InputError, match="were not kept"):
        _ = added.steps


def test_requests_go_to_a_sink_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "CHUNK", 7)
    trace = Trace.of(*((0.3 * i, 150, 20) for i in range(30)), (9.0, 9000, 1))
    deployment = Deployment(token_budget=100, max_num_seqs=10)
    tables: list[pd.DataFrame] = []
    latency = ConstantLatency(0.1)
    streamed = simulate(trace, deployment, latency_model=latency, request_sink=tables.append)
    kept = simulate(trace, deployment, latency_model=latency)
    assert [len(table) for table in tables] == [7, 7, 7, 7, 3]
    together = pd.concat(tables).sort_values("request_id", ignore_index=True)
    pd.testing.assert_frame_equal(together, kept.requests)
    whole, parts = kept.summary(), streamed.summary()
    for name in ("completed", "failed", "duration", "median_ttft_ms", "p99_itl_ms"):
        assert parts[name] == whole[name]
    with pytest.raises(InputError, match="went to a sink"):
        _ = streamed.requests


def test_a_preemption_ends_when_the_request_is_worked_on_again() -> None:
    result = run((0.0, 19, 5), (0.0, 19, 5), num_blocks=4)
    assert result.preemptions.values.tolist() == [[1, 2.0, 5.0]]


def test_error_bars_span_the_runs_that_the_profiles_error_allows() -> None:
    trace = Trace.of(*((0.05 * i, 500, 20) for i in range(100)))
    deployment = Deployment(attention="pod")
    result = simulate_with_error_bars(trace, deployment)
    assert result.intervals is not None
    predicted = latency_model_for(deployment, model_named("llama-3-8b"))
    low, high = predicted.likely_scales()
    assert low < high
    slow = simulate(trace, deployment, latency_model=predicted.scaled(high))
    headline = {
        "ttft_p50": slow.requests["ttft"].median(),
        "tpot_p99": slow.requests["tpot"].quantile(0.99),
    }
    for name, value in headline.items():  # its own end, unless other batches made a run worse
        least, most = result.intervals[name]
        assert least < value <= most * (1 + 1e-9)
        assert value == pytest.approx(most, rel=0.03)
    own = result.summary()["podsim"]
    for name, (least, most) in result.intervals.items():
        if name.startswith(("ttft", "tbt", "tpot")):
            metric, _, statistic = name.rpartition("_")
            assert least <= own[metric][statistic] <= most  # type: ignore[index]


def test_a_scaled_model_scales_every_step() -> None:
    predicted = latency_model_for(Deployment(), model_named("llama-3-8b"))
    shape = BatchShape.of([(300, 900)], [100, 2000])
    assert predicted.scaled(1.5).step_time(shape) == pytest.approx(1.5 * predicted.step_time(shape))
