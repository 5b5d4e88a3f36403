"""Each scheduler, router and the prefix cache on timelines made by hand, with steps of a second."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from podsim.batch import BatchShape
from podsim.config import Deployment
from podsim.errors import InputError
from podsim.simulation import Result, simulate
from podsim.workload import Trace, load_trace


class Recorder:
    """Steps of one second, kept by their shape."""

    def __init__(self) -> None:
        self.shapes: list[BatchShape] = []

    def step_time(self, shape: BatchShape) -> float:
        self.shapes.append(shape)
        return 1.0

    @property
    def batches(self) -> list[tuple[list[int], int]]:
        """Of each step: the tokens of its chunks, and how many decodes."""
        return [([n for n, _ in s.prefills], s.num_decodes) for s in self.shapes]


def run(trace: Trace, **options: object) -> tuple[Result, list[tuple[list[int], int]]]:
    defaults = {
        "token_budget": 100,
        "max_num_seqs": 10,
        "max_model_len": 100,
        "block_size": 10,
        "watermark": 0.0,
    }
    recorder = Recorder()
    deployment = Deployment(**(defaults | options))  # type: ignore[arg-type]
    return simulate(trace, deployment, latency_model=recorder), recorder.batches


def first_tokens(result: Result) -> list[float]:
    return result.requests["first_token_time"].tolist()


def test_vllm_v0_lets_decodes_wait_for_whole_prompts() -> None:
    result, batches = run(Trace.of((0, 60, 4), (1, 70, 2), (1, 60, 2)), scheduler="vllm-v0")
    # 70 and 60 do not fit one budget of 100: two steps of prefill while the first request waits.
    assert batches == [([60], 0), ([70], 0), ([60], 0), ([], 3), ([], 1), ([], 1)]
    assert first_tokens(result) == [1, 2, 3]
    assert max(result.log.gap_duration) == 3.0  # a generation stall


def test_orca_mixes_decodes_with_whole_prompts() -> None:
    result, batches = run(Trace.of((0, 60, 4), (1, 70, 2), (1, 60, 2)), scheduler="orca")
    assert batches == [([60], 0), ([70], 1), ([60], 2), ([], 2)]
    assert first_tokens(result) == [1, 2, 3]
    assert max(result.log.gap_duration) == 1.0


def test_static_batches_end_before_the_next_begins() -> None:
    result, batches = run(
        Trace.of((0, 60, 2), (0, 30, 4), (1, 10, 1)), scheduler="static", max_num_seqs=2
    )
    assert batches == [([60, 30], 0), ([], 2), ([], 1), ([], 1), ([10], 0)]
    assert first_tokens(result) == [1, 1, 5]


def test_vllm_v1_takes_blocks_chunk_by_chunk() -> None:
    trace = Trace.of((0, 30, 3), (0, 60, 1))
    options = {"token_budget": 40, "num_blocks": 7}
    # Sarathi reserves 6 blocks for the second prompt, which are free once the first is done.
    whole, _ = run(trace, scheduler="sarathi", **options)
    assert whole.requests["scheduled_time"].tolist() == [0, 3]
    # V1 begins it with the 10 tokens that are left of the first budget.
    by_chunk, batches = run(trace, scheduler="vllm-v1", **options)
    assert by_chunk.requests["scheduled_time"].tolist() == [0, 0]
    assert batches[0] == ([30, 10], 0)


def test_vllm_v1_preempts_the_prompt_that_began_last() -> None:
    result, batches = run(
        Trace.of((0, 30, 12), (0, 60, 1)), scheduler="vllm-v1", token_budget=40, num_blocks=6
    )
    # 4 blocks for the first at its second token, 1 + 3 for a prompt of which 20 tokens fit.
    assert result.requests["num_preemptions"].tolist() == [0, 1]
    assert result.requests["finish_time"].tolist()[0] == 12.0
    assert sum(n for chunks, _ in batches for n in chunks) > 90


def test_a_chunk_is_no_longer_than_chunk_size() -> None:
    for scheduler in ("sarathi", "vllm-v1"):
        _, batches = run(Trace.of((0, 70, 1), (0, 20, 1)), scheduler=scheduler, chunk_size=30)
        assert batches == [([30, 20], 0), ([30], 0), ([10], 0)]


def test_max_prefills_is_the_most_prompts_in_a_step() -> None:
    _, batches = run(Trace.of((0, 20, 1), (0, 20, 1), (0, 20, 1)), max_prefills=1)
    assert batches == [([20], 0), ([20], 0), ([20], 0)]
    _, batches = run(Trace.of((0, 20, 1), (0, 20, 1), (0, 20, 1)), max_prefills=2)
    assert batches == [([20, 20], 0), ([20], 0)]


def test_shortest_first_lets_short_prompts_overtake() -> None:
    trace = Trace.of((0, 90, 1), (0.5, 80, 1), (0.6, 20, 1), (0.7, 50, 1))
    in_order, _ = run(trace)
    assert first_tokens(in_order) == [1, 2, 2.0, 3]
    by_length, _ = run(trace, order="shortest_first", max_num_seqs=1)
    assert first_tokens(by_length) == [1, 4, 2, 3]


def test_the_lowest_priority_is_let_in_first() -> None:
    trace = Trace.of((0, 90, 1), (0.5, 80, 1), (0.6, 20, 1), (0.7, 50, 1))
    with pytest.raises(InputError, match="needs a column 'priority'"):
        run(trace, order="priority")
    urgent = replace(trace, priority=np.array([5, 2, 2, 0]))
    result, _ = run(urgent, order="priority", max_num_seqs=1)
    assert first_tokens(result) == [1, 3, 4, 2]


def test_priorities_are_read_from_podsims_own_csv(tmp_path: Path) -> None:
    path = tmp_path / "urgent.csv"
    path.write_text(
        "arrival_time,num_prompt_tokens,num_output_tokens,priority\n0,5,1,3\n1,5,1,\n2,5,1,1\n"
    )
    trace = load_trace(path)
    assert trace.priority is not None
    assert trace.priority.tolist() == [3, 0, 1]
    assert trace.head(2).priority.tolist() == [3, 0]  # type: ignore[union-attr]


class LinearLatency:
    """A step of 10 ms, and 0.1 ms a token."""

    def step_time(self, shape: BatchShape) -> float:
        return 0.01 + 1e-4 * shape.num_tokens


def test_a_tbt_target_shrinks_the_budget() -> None:
    trace = Trace.of((0, 1000, 50), (0.05, 4000, 1))
    options = {"token_budget": 2048, "max_num_seqs": 8}
    free = simulate(trace, Deployment(**options), latency_model=LinearLatency())  # type: ignore[arg-type]
    held = simulate(
        trace,
        Deployment(**options, tbt_target=0.05),  # type: ignore[arg-type]
        latency_model=LinearLatency(),
    )
    assert max(free.log.gap_duration) > 0.2
    # 0.01 + 1e-4 n <= 0.05 up to 400 tokens, of which 384 is a multiple of 64.
    assert held.steps["num_prefill_tokens"].max() == 384
    assert max(held.log.gap_duration) <= 0.05


def test_whole_prompts_need_a_budget_that_holds_them() -> None:
    with pytest.raises(InputError, match="computes prompts whole: give at least max_model_len"):
        run(Trace.of((0, 10, 1)), scheduler="vllm-v0", max_model_len=101)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"scheduler": "orca", "chunk_size": 10}, "it has no chunk_size"),
        ({"scheduler": "vllm-v1", "tbt_target": 0.1}, "tbt_target is an option of sarathi"),
        ({"router": "prefix_affinity"}, "needs prefix_caching"),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    options: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        Deployment(**options)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- routers


def replicas_of(trace: Trace, **options: object) -> list[int]:
    return run(trace, **options)[0].requests["replica"].tolist()


def test_join_shortest_queue_counts_requests_not_tokens() -> None:
    trace = Trace.of((0, 90, 1), (0, 5, 1), (0, 5, 1), (0, 5, 1))
    assert replicas_of(trace, replicas=2, router="join_shortest_queue") == [0, 1, 0, 1]
    assert replicas_of(trace, replicas=2, router="least_outstanding_tokens") == [0, 1, 1, 1]


def test_random_and_power_of_two_are_seeded_and_spread() -> None:
    trace = Trace.of(*((i / 10, 10, 5) for i in range(400)))
    for router in ("random", "power_of_two"):
        first, again, other = (
            replicas_of(trace, replicas=4, router=router, router_seed=seed) for seed in (0, 0, 1)
        )
        assert first == again != other
        assert min(Counter(first).values()) > 60
    # Two choices even the load out better than one.
    one, two = (
        np.std(list(Counter(replicas_of(trace, replicas=4, router=router)).values()))
        for router in ("random", "power_of_two")
    )
    assert two < one


def test_a_session_stays_on_its_replica() -> None:
    trace = Trace.of(*((float(i), 10, 3) for i in range(6)))
    sessions = replace(trace, session_id=np.array([7, 8, 7, 8, -1, 7]))
    replicas = replicas_of(sessions, replicas=3, router="session_affinity")
    assert replicas[0] == replicas[2] == replicas[5]
    assert replicas[1] == replicas[3]


# -------------------------------------------------------------------------------- closed loop


def test_in_a_closed_loop_a_turn_waits_for_the_turn_before() -> None:
    trace = replace(
        Trace.of((0, 30, 5), (1, 30, 3), (1.5, 10, 2), (2, 20, 1)),
        session_id=np.array([3, 8, 3, 3]),
        think_time=np.array([np.nan, np.nan, 2.5, np.nan]),
    )
    deployment = Deployment(token_budget=100, max_num_seqs=10)
    result = simulate(trace, deployment, latency_model=Recorder(), closed_loop=True)
    # 0-5: the first turn of session 3. 7.5-9.5: its second, 2.5 later. At once: its third.
    assert result.requests["arrival_time"].tolist() == [0, 1, 7.5, 9.5]
    assert result.requests["finish_time"].tolist() == [5, 4, 9.5, 10.5]
    opened = simulate(trace, deployment, latency_model=Recorder())
    assert opened.requests["arrival_time"].tolist() == [0, 1, 1.5, 2]


def test_in_a_closed_loop_a_turn_waits_for_the_sessions_that_work_for_it() -> None:
    """Session 0 has two subagents at a time, 1 and 2; then 3, which nothing waits for."""
    trace = replace(
        Trace.of((0, 9, 2), (1, 9, 2), (1, 9, 8), (2, 9, 2), (30, 9, 1), (31, 9, 4)),
        session_id=np.array([0, 1, 2, 1, 0, 3]),
        parent_session=np.array([-1, 0, 0, 0, -1, 0]),
        think_time=np.array([np.nan, 0.5, np.nan, 1.0, 3.0, np.nan]),
    )
    assert trace.parent_turns == [(1, 3, 0, 4), (2, 2, 0, 4), (5, 5, 4, -1)]
    deployment = Deployment(token_budget=100, max_num_seqs=10, replicas=3)
    result = simulate(trace, deployment, latency_model=Recorder(), closed_loop=True)
    # 0-2: the turn that starts both. 2.5-4.5 and 5.5-7.5: the turns of 1. 2-10: that of 2.
    # 13-14: the turn that waits for both, 3 after the later one. 14-18: subagent 3.
    assert result.requests["arrival_time"].tolist() == [0, 2.5, 2, 5.5, 13, 14]
    assert result.requests["finish_time"].tolist() == [2, 4.5, 10, 7.5, 14, 18]


def test_sessions_that_name_each_other_wait_for_none_that_waits_for_them() -> None:
    trace = replace(
        Trace.of(*((i, 9, 2) for i in range(4))),
        session_id=np.array([0, 1, 0, 2]),
        parent_session=np.array([1, 0, 1, 2]),
        think_time=np.zeros(4),
    )
    assert trace.parent_turns == [(1, 1, 0, 2)]
    result = simulate(trace, Deployment(), latency_model=Recorder(), closed_loop=True)
    assert (result.requests["finish_time"] > 0).all()


def test_a_refused_turn_does_not_end_its_session() -> None:
    trace = replace(
        Trace.of((0, 5000, 1), (1, 30, 1), name="too long"),
        session_id=np.array([1, 1]),
        think_time=np.array([np.nan, 4.0]),
    )
    deployment = Deployment(max_model_len=100)
    result = simulate(trace, deployment, latency_model=Recorder(), closed_loop=True)
    assert result.requests["finish_time"].tolist()[1] == 5.0
    with pytest.raises(InputError, match="needs sessions"):
        simulate(Trace.of((0, 1, 1)), deployment, latency_model=Recorder(), closed_loop=True)


# ----------------------------------------------------------------------------- prefix caching


def with_ids(trace: Trace, *hash_ids: list[int]) -> Trace:
    """Hash ids of blocks of 10 tokens."""
    return replace(
        trace,
        hash_ids=tuple(np.array(ids, dtype=np.int64) for ids in hash_ids),
        hash_block_size=10,
    )


def test_a_prompt_computes_only_what_the_cache_does_not_hold() -> None:
    trace = with_ids(Trace.of((0, 45, 2), (5, 45, 2)), [1, 2, 3, 4, 5], [1, 2, 3, 9, 10])
    result, batches = run(trace, prefix_caching=True)
    assert [chunks for chunks, _ in batches if chunks] == [[45], [15]]
    assert result.requests["num_cached_tokens"].tolist() == [0, 30]
    own = result.summary()["podsim"]
    assert own["prefix_hit_rate"] == 30 / 90  # type: ignore[index]


def test_the_last_token_is_computed_in_any_case() -> None:
    trace = with_ids(Trace.of((0, 40, 1), (5, 40, 1)), [1, 2, 3, 4], [1, 2, 3, 4])
    _, batches = run(trace, prefix_caching=True)
    assert batches == [([40], 0), ([10], 0)]


def test_the_prefix_used_longest_ago_is_lost_first() -> None:
    first, second, third = [1, 2, 3], [4, 5, 6], [7, 8, 9]
    prompts = [first, second, first, third, second, third]
    trace = with_ids(Trace.of(*((5.0 * i, 30, 1) for i in range(6))), *prompts)
    result, _ = run(trace, prefix_caching=True, num_blocks=6)
    # Two prompts fit. The third request keeps `first` fresh, so the fourth evicts `second`, and
    # the fifth evicts `first`.
    assert result.requests["num_cached_tokens"].tolist() == [0, 0, 20, 0, 0, 20]


def test_running_requests_share_blocks() -> None:
    trace = with_ids(Trace.of((0, 40, 9), (2, 41, 9)), [1, 2, 3, 4], [1, 2, 3, 4, 5])
    result, _ = run(trace, prefix_caching=True)
    assert max(result.log.steps["num_used_blocks"]) == 6  # 4 shared, and one each of its own
    alone, _ = run(trace)
    assert max(alone.log.steps["num_used_blocks"]) == 10


def test_prefix_affinity_goes_where_the_prompt_is() -> None:
    trace = with_ids(
        Trace.of((0, 30, 1), (0, 30, 1), (5, 30, 1), (10, 30, 1)),
        *([1, 2, 3], [4, 5, 6], [4, 5, 6], [1, 2, 7]),
    )
    options = {"replicas": 2, "router": "prefix_affinity", "prefix_caching": True}
    assert replicas_of(trace, **options) == [0, 1, 1, 0]


def test_prefix_caching_needs_hash_ids_that_divide() -> None:
    with pytest.raises(InputError, match="this trace has none"):
        run(Trace.of((0, 10, 1)), prefix_caching=True)
    with pytest.raises(InputError, match="expected a divisor of 10"):
        run(with_ids(Trace.of((0, 10, 1)), [1]), prefix_caching=True, block_size=3)
