"""Runs of steps and counted groups give what the step-by-step simulation gives, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podsim.batch import BatchShape
from podsim.config import Deployment
from podsim.latency import ProfiledLatency, decode_run_times
from podsim.model import model_named
from podsim.profile import find_profile
from podsim.simulation import Result, simulate
from podsim.workload import Trace

LLAMA = model_named("llama-3-8b")
PROFILE = find_profile("h200", LLAMA)

requests = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.001, 0.01, 0.05, 0.3, 2.0]),  # gap before it; often none
        st.integers(1, 300),
        st.integers(1, 120),
    ),
    min_size=1,
    max_size=40,
)
deployments = st.fixed_dictionaries(
    {
        "token_budget": st.sampled_from([16, 50, 256]),
        "max_num_seqs": st.sampled_from([1, 3, 16]),
        "num_blocks": st.sampled_from([30, 34, 60, 500]),
        "block_size": st.sampled_from([1, 7, 16]),
        "watermark": st.sampled_from([0.0, 0.1]),
        "replicas": st.sampled_from([1, 1, 2, 3]),
        "router": st.sampled_from(["round_robin", "least_outstanding_tokens"]),
        "attention": st.sampled_from(["serial", "pod"]),
        "order": st.sampled_from(["fcfs", "fcfs", "shortest_first"]),
        "max_prefills": st.sampled_from([None, None, 1]),
    }
)
schedulers = st.one_of(
    deployments,
    deployments.map(lambda d: d | {"chunk_size": 13}),
    deployments.map(lambda d: d | {"tbt_target": 0.02, "token_budget": 256}),
    deployments.map(lambda d: d | {"scheduler": "vllm-v1"}),
    deployments.map(lambda d: d | {"scheduler": "vllm-v1", "chunk_size": 13}),
    *(
        deployments.map(
            lambda d, name=name: d | {"scheduler": name, "token_budget": 450, "max_model_len": 450}
        )
        for name in ("vllm-v0", "orca", "static")
    ),
)


def with_prefixes(trace: Trace, shared: int) -> Trace:
    """Hash ids of 16 tokens; each request shares a prompt beginning with every `shared`-th."""
    ids = tuple(
        np.array([i % shared * 1000 + block for block in range(-(-prompt // 16))], dtype=np.int64)
        for i, prompt in enumerate(trace.num_prompt_tokens.tolist())
    )
    return replace(trace, hash_ids=ids, hash_block_size=16)


class ContextLatency:
    """Steps of a length that depends on all that a batch is, in round and in odd numbers."""

    def __init__(self, unit: float) -> None:
        self.unit = unit

    def step_time(self, shape: BatchShape) -> float:
        work = shape.num_tokens + shape.decode_context_sum / 64 + shape.decode_context_max / 32
        return self.unit * (1 + work / 16)


def trace_of(rows: list[tuple[float, int, int]]) -> Trace:
    """Requests as (gap before it, num_prompt_tokens, num_output_tokens)."""
    arrivals = np.cumsum([gap for gap, _, _ in rows]) - rows[0][0]
    return Trace.of(*((float(t), p, o) for t, (_, p, o) in zip(arrivals, rows, strict=True)))


def gaps(result: Result) -> list[tuple[float, int]]:
    """How often each gap occurred."""
    table = pd.DataFrame({"d": result.log.gap_duration, "n": result.log.gap_count})
    return sorted(table.groupby("d")["n"].sum().items())


def assert_equal(fast: Result, plain: Result) -> None:
    pd.testing.assert_frame_equal(fast.requests, plain.requests, check_exact=True)
    order = ["start", "replica"]
    pd.testing.assert_frame_equal(
        fast.steps.sort_values(order, ignore_index=True),
        plain.steps.sort_values(order, ignore_index=True),
        check_exact=True,
    )
    assert gaps(fast) == gaps(plain)
    assert sorted(fast.preemptions.to_numpy().tolist()) == sorted(
        plain.preemptions.to_numpy().tolist()
    )


@settings(max_examples=300, deadline=None)
@given(requests, schedulers, st.sampled_from([0.001, 0.0625, 0.01]))
def test_runs_equal_single_steps(
    rows: list[tuple[float, int, int]], options: dict[str, object], unit: float
) -> None:
    deployment = Deployment(**options)  # type: ignore[arg-type]
    trace = trace_of(rows)
    fast, plain = (
        simulate(trace, deployment, latency_model=ContextLatency(unit), step_by_step=step_by_step)
        for step_by_step in (False, True)
    )
    assert_equal(fast, plain)


@settings(max_examples=100, deadline=None)
@given(requests, schedulers, st.integers(1, 5))
def test_runs_equal_single_steps_with_a_prefix_cache(
    rows: list[tuple[float, int, int]], options: dict[str, object], shared: int
) -> None:
    router = "prefix_affinity" if options["router"] == "round_robin" else options["router"]
    sizes = {"block_size": 16 if options["block_size"] == 16 else 4}
    deployment = Deployment(**(options | sizes | {"router": router}), prefix_caching=True)
    fast, plain = (
        simulate(
            with_prefixes(trace_of(rows), shared),
            deployment,
            latency_model=ContextLatency(0.01),
            step_by_step=step_by_step,
        )
        for step_by_step in (False, True)
    )
    assert_equal(fast, plain)


thinks = st.sampled_from([0.0, 0.03, 1.0])


@settings(max_examples=100, deadline=None)
@given(requests, schedulers, st.lists(st.integers(-1, 4), min_size=1, max_size=5), thinks)
def test_runs_equal_single_steps_in_a_closed_loop(
    rows: list[tuple[float, int, int]], options: dict[str, object], parents: list[int], think: float
) -> None:
    """As many sessions as there are parents of them; any may work for any."""
    trace = trace_of(rows)
    session_id = np.arange(len(trace)) % len(parents)
    trace = replace(
        trace,
        session_id=session_id,
        parent_session=np.array(parents)[session_id],
        think_time=np.full(len(trace), think),
    )
    fast, plain = (
        simulate(
            trace,
            Deployment(**options),  # type: ignore[arg-type]
            latency_model=ContextLatency(0.01),
            closed_loop=True,
            step_by_step=step_by_step,
        )
        for step_by_step in (False, True)
    )
    assert_equal(fast, plain)


@settings(max_examples=40, deadline=None)
@given(requests, schedulers)
def test_runs_equal_single_steps_with_measured_costs(
    rows: list[tuple[float, int, int]], options: dict[str, object]
) -> None:
    deployment = Deployment(**options)  # type: ignore[arg-type]
    fast, plain = (
        simulate(trace_of(rows), deployment, step_by_step=step_by_step)
        for step_by_step in (False, True)
    )
    assert_equal(fast, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"kv": "vattention"},
        {"kv_offload": "full", "model": "llama-2-7b", "num_blocks": 100, "host_memory": 100.0},
    ],
    ids=["vattention", "offload"],
)
def test_runs_equal_single_steps_where_memory_holds_steps_up(options: dict[str, object]) -> None:
    """What a card has left of its heat depends on when memory lets a step start."""
    rng = np.random.default_rng(1)
    lengths = rng.integers((200, 20), (3000, 300), (150, 2)).tolist()
    rows = [(rng.exponential(1 / 6), prompt, output) for prompt, output in lengths]
    deployment = Deployment(attention="pod", **options)  # type: ignore[arg-type]
    fast, plain = (
        simulate(trace_of(rows), deployment, step_by_step=step_by_step)
        for step_by_step in (False, True)
    )
    assert sum(sum(memory.log.held_up) for memory in fast.memory) > 0
    assert_equal(fast, plain)


def test_a_busy_hour_is_equal_too() -> None:
    """Thousands of requests, many runs cut by arrivals, memory short enough to preempt."""
    rng = np.random.default_rng(5)
    count = 3000
    rows = list(
        zip(
            rng.exponential(0.03, count).tolist(),
            rng.integers(1, 2000, count).tolist(),
            rng.integers(1, 500, count).tolist(),
            strict=True,
        )
    )
    deployment = Deployment(num_blocks=2000, max_num_seqs=64, replicas=2, attention="pod")
    fast, plain = (
        simulate(trace_of(rows), deployment, step_by_step=step_by_step)
        for step_by_step in (False, True)
    )
    assert fast.requests["num_preemptions"].sum() > 0
    assert_equal(fast, plain)


@given(st.integers(1, 256), st.integers(1, 20_000), st.integers(1, 300))
def test_a_run_costs_its_steps_one_by_one(n: int, context: int, num_steps: int) -> None:
    shape = BatchShape.of((), [context] * (n - 1) + [context + 77])
    at_once = decode_run_times(ProfiledLatency(PROFILE, LLAMA, "pod"))(shape, num_steps)
    by_one = ProfiledLatency(PROFILE, LLAMA, "pod")
    steps = [
        BatchShape.of((), [context + i] * (n - 1) + [context + 77 + i]) for i in range(num_steps)
    ]
    assert at_once == [by_one.step_time(step) for step in steps]
