"""The engine's loop with a clock and a forward pass that are made up: it serves as is simulated."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from podsim.batch import BatchShape
from podsim.config import Deployment
from podsim.decode_group import ListedDecodes
from podsim.engine import Engine, WallClock
from podsim.graph_sizes import graph_size, graph_sizes
from podsim.kv_cache import PagedKVCache
from podsim.page_groups import PageGroups
from podsim.scheduler import SCHEDULERS
from podsim.simulation import requests_of, simulate
from podsim.vattention import VAttentionCache
from podsim.workload import Trace


class LengthLatency:
    """A step's time depends on every length of its batch."""

    def step_time(self, shape: BatchShape) -> float:
        chunks = sum(chunk.num_tokens * chunk.context_len for chunk in shape.prefills)
        return (
            0.005
            + 1e-5 * shape.num_tokens
            + 1e-8 * (chunks + shape.decode_context_sum)
            + 1e-6 * shape.decode_context_max
            + 1e-4 * shape.num_sampled
        )


class ManualClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait_until(self, time: float) -> None:
        self.time = time


class MadeUpForward:
    """Lets the step's time pass; the next token is a function of the latest and its position."""

    def __init__(self, clock: ManualClock, num_slots: int) -> None:
        self.clock = clock
        self.cache = np.full((num_slots, 4096), -1)
        self.served: dict[int, list[int]] = {}

    def run(self, inputs, foresee):
        self.gpu_seconds = LengthLatency().step_time(inputs.shape)
        self.clock.time += self.gpu_seconds
        self.cache[inputs.lengths.slots, inputs.lengths.positions] = inputs.token_ids
        lengths = [(n, context, slot) for n, context, slot in inputs.lengths.chunks]
        lengths += [(1, context, slot) for context, slot in inputs.lengths.decodes]
        starts = np.cumsum([0, *(n for n, _, _ in lengths)])
        out = []
        for start, (n, context, slot) in zip(starts, lengths, strict=False):
            if start + n - 1 in inputs.sample_rows:
                known = self.cache[slot, :context]
                assert (known >= 0).all(), "every token before this one has been computed"
                out.append(int(known.sum() * 31 + context) % 1000)
            self.cache[slot, context:] = -1  # nothing of an earlier request is left to be read
        return np.array(out, np.int64)


def random_trace(seed: int, num_requests: int = 60) -> Trace:
    rng = np.random.default_rng(seed)
    return Trace.of(
        *zip(
            np.cumsum(rng.exponential(0.05, num_requests)).tolist(),
            rng.integers(1, 300, num_requests).tolist(),
            rng.integers(1, 60, num_requests).tolist(),
            strict=True,
        )
    )


class WatchedMapping:
    """Follows what vAttention's cache asks to map; the forward pass asks it what is mapped."""

    seconds, page_groups = 0.0, 0

    def __init__(self, cache: VAttentionCache, forward: MadeUpForward) -> None:
        self.cache = cache
        self.mapped = np.zeros_like(forward.cache, dtype=bool)
        self.num_ahead = 0
        compute = forward.run

        def run(inputs, foresee):
            assert self.mapped[inputs.lengths.slots, inputs.lengths.positions].all(), (
                "written where nothing is"
            )
            return compute(inputs, foresee)

        forward.run = run

    def begin(self, batch, decodes) -> None:
        ahead = self.cache.map_ahead(decodes, 2)
        self.num_ahead += len(ahead)
        size = self.cache.block_size
        for change in (*ahead, *self.cache.map_for(batch, decodes)):
            self.mapped[change.slot, change.first * size : change.last * size] = change.maps


def serve(trace: Trace, deployment: Deployment, num_blocks: int, kv_cache=None, kind=MadeUpForward):
    clock = ManualClock()
    kv_cache = kv_cache or PagedKVCache(num_blocks, deployment.block_size)
    latency = LengthLatency()
    scheduler = SCHEDULERS[deployment.scheduler](
        kv_cache, deployment, ListedDecodes(kv_cache.block_size), latency.step_time
    )
    forward = kind(clock, deployment.max_num_seqs)
    is_virtual = isinstance(kv_cache, VAttentionCache)
    mapping = WatchedMapping(kv_cache, forward) if is_virtual else None
    engine = Engine(
        forward,
        scheduler,
        kv_cache,
        num_slots=deployment.max_num_seqs,
        max_model_len=deployment.max_model_len,
        vocab_size=1000,
        seed=0,
        clock=clock,
        mapping=mapping,
    )
    return engine.serve(requests_of(trace))


@pytest.mark.parametrize("num_blocks", [40, 400], ids=["preempting", "roomy"])
@pytest.mark.parametrize("scheduler", ["sarathi", "vllm-v1", "vllm-v0"])
@pytest.mark.parametrize("seed", range(3))
def test_the_engine_serves_as_the_simulator_does(seed, scheduler, num_blocks):
    deployment = Deployment(
        scheduler=scheduler,
        token_budget=400,
        max_num_seqs=16,
        max_model_len=400,
        num_blocks=num_blocks,
        block_size=16,
    )
    trace = random_trace(seed)
    recording = serve(trace, deployment, num_blocks)
    result = simulate(trace, deployment, latency_model=LengthLatency(), step_by_step=True)
    for name in ("requests", "steps"):
        engine, simulated = getattr(recording.log, name), getattr(result.log, name)
        pd.testing.assert_frame_equal(pd.DataFrame(engine), pd.DataFrame(simulated))
    assert sorted(recording.log.gap_duration) == sorted(result.log.gap_duration)
    if num_blocks == 40:
        assert len(recording.log.preempted_id)
    ends = np.add(recording.log.steps["start"], recording.log.steps["duration"])
    times = pd.Series(ends[list(recording.token_step)])
    tokens = times.groupby(list(recording.token_request)).agg(["size", "first", "last"])
    assert tokens["size"].tolist() == trace.num_output_tokens.tolist()
    requests = result.requests
    assert tokens["first"].tolist() == pytest.approx(requests["first_token_time"].tolist())
    assert tokens["last"].tolist() == pytest.approx(requests["finish_time"].tolist())


def test_the_engine_lets_requests_in_by_priority_as_the_simulator_does():
    deployment = Deployment(token_budget=64, max_num_seqs=1, max_model_len=400, order="priority")
    trace = replace(
        Trace.of((0.0, 60, 9), (0.01, 60, 2), (0.02, 60, 2), (0.03, 60, 2)),
        priority=np.array([3, 2, 0, 1]),
    )
    recording = serve(trace, deployment, 100)
    result = simulate(trace, deployment, latency_model=LengthLatency(), step_by_step=True)
    assert recording.log.requests["request_id"].tolist() == [0, 2, 3, 1]
    for name in ("requests", "steps"):
        engine, simulated = getattr(recording.log, name), getattr(result.log, name)
        pd.testing.assert_frame_equal(pd.DataFrame(engine), pd.DataFrame(simulated))


@pytest.mark.parametrize("num_blocks", [40, 400], ids=["preempting", "roomy"])
def test_mapped_slots_serve_as_blocks_of_the_same_size_do(num_blocks):
    """Every token is written where memory is mapped, and the steps are the same."""
    deployment = Deployment(
        token_budget=400, max_num_seqs=16, max_model_len=400, num_blocks=num_blocks, block_size=16
    )
    trace = random_trace(3)
    cache = VAttentionCache(num_blocks, PageGroups(16, 4, 1), 16)
    virtual, plain = (serve(trace, deployment, num_blocks, kv) for kv in (cache, None))
    for name in ("requests", "steps"):
        tables = [pd.DataFrame(getattr(recording.log, name)) for recording in (virtual, plain)]
        pd.testing.assert_frame_equal(*tables)
    assert virtual.token_request == plain.token_request
    assert cache.num_used_blocks == 0


class Asking(MadeUpForward):
    """Asks what the next step will be at the beginning of each, and at its end."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.foreseen, self.followed = [], []

    def run(self, inputs, foresee):
        self.followed.append(inputs.lengths)
        first = foresee()
        found = super().run(inputs, foresee)
        self.foreseen.append(foresee() or first)
        return found


@pytest.mark.parametrize("num_blocks", [40, 400], ids=["preempting", "roomy"])
def test_the_next_step_is_foreseen(num_blocks):
    """Prompts of several chunks, last tokens, requests that come meanwhile; as Sarathi does."""
    made = []

    def kind(*args):
        made.append(Asking(*args))
        return made[0]

    deployment = Deployment(
        token_budget=96, max_num_seqs=8, max_model_len=400, num_blocks=num_blocks, watermark=0.0
    )
    serve(random_trace(4, num_requests=100), deployment, num_blocks, kind=kind)
    steps = list(zip(made[0].foreseen, made[0].followed[1:], strict=False))
    steps = [(ahead, step) for ahead, step in steps if ahead.num_tokens]  # not before a rest
    right = sum(ahead == step for ahead, step in steps)
    assert len(steps) > 300
    assert sum(bool(step.chunks and step.decodes) for _, step in steps) > 100
    if num_blocks == 400:
        assert right == len(steps)
    else:  # where blocks are missing, the scheduler does otherwise
        assert 0.5 * len(steps) < right < len(steps)


class Remembering(MadeUpForward):
    """Knows all tokens of each request that there were when one came out."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.known: set[tuple[int, ...]] = set()

    def run(self, inputs, foresee):
        found = super().run(inputs, foresee)
        lengths = [chunk[1:] for chunk in inputs.lengths.chunks] + list(inputs.lengths.decodes)
        ends = np.cumsum(
            [n for n, _, _ in inputs.lengths.chunks] + [1] * len(inputs.lengths.decodes)
        )
        for end, (context, slot) in zip(ends, lengths, strict=True):
            if end - 1 in inputs.sample_rows:
                self.known.add(tuple(self.cache[slot, :context].tolist()))
        return found


def test_what_is_computed_again_are_the_tokens_that_came_out():
    known = []
    for num_blocks in (40, 400):
        made = []

        def kind(*args, made=made):
            made.append(Remembering(*args))
            return made[0]

        deployment = Deployment(
            token_budget=400, max_num_seqs=16, max_model_len=400, num_blocks=num_blocks
        )
        recording = serve(random_trace(1), deployment, num_blocks, kind=kind)
        assert len(recording.log.preempted_id) > 0 or num_blocks == 400
        known.append(made[0].known)
    assert known[0] == known[1]
    assert len(known[0]) > 1000


def test_a_step_is_recorded_while_the_next_one_is_computed(monkeypatch):
    seen = []

    class Looking(MadeUpForward):
        def run(self, inputs, foresee):
            before = len(recorded)
            foresee()
            seen.append((before, len(recorded)))
            return super().run(inputs, foresee)

    recorded: list[object] = []
    record = Engine._record_latest

    def watched(engine):
        record(engine)
        recorded[:] = engine.recording.shapes

    monkeypatch.setattr(Engine, "_record_latest", watched)
    deployment = Deployment(token_budget=400, max_num_seqs=16, max_model_len=400)
    recording = serve(random_trace(2, num_requests=5), deployment, 400, kind=Looking)
    assert seen == [(max(step - 1, 0), step) for step in range(len(recording.shapes))]


def test_a_request_that_cannot_be_served_is_refused():
    trace = Trace.of((0.0, 10, 2), (0.0, 300, 200))
    deployment = Deployment(token_budget=64, max_num_seqs=4, max_model_len=400)
    recording = serve(trace, deployment, 100)
    assert recording.log.refused == {1: "longer than max_model_len (400)"}
    assert list(recording.token_request) == [0, 0]


def test_graph_sizes_cover_every_number_of_tokens():
    sizes = graph_sizes(1500)
    assert sizes[:4] == [8, 16, 24, 32]
    assert sizes[-1] == graph_size(1500) == 1536
    for n in range(1, 1501):
        assert graph_size(n) == min(size for size in sizes if size >= n)
        assert graph_size(n) <= max(n + 7, n * 17 / 16 + 8)
    assert graph_size(0) == 0


def test_a_wall_clock_begins_when_it_is_started():
    clock = WallClock()
    time.sleep(0.02)
    assert clock.now() >= 0.02
    clock.start()
    assert clock.now() < 0.02
    clock.wait_until(0.005)
    assert clock.now() >= 0.005


def test_prompts_are_the_same_for_the_same_request_and_differ_between_requests():
    first, again = (prompts_of(Trace.of((0.0, 40, 2), (0.0, 40, 2))) for _ in range(2))
    assert first == again
    assert first[0] != first[1]
    assert len(set(first[0])) > 20


def prompts_of(trace):
    """What the engine computes first of each request, in the order of the trace."""
    found = []
    deployment = Deployment(token_budget=40, max_num_seqs=4, max_model_len=64)

    class Reader(MadeUpForward):
        def run(self, inputs, foresee):
            if inputs.lengths.chunks:
                found.append(inputs.token_ids[: inputs.lengths.chunks[0][0]].tolist())
            return super().run(inputs, foresee)

    serve(trace, deployment, num_blocks=40, kind=Reader)
    return [tokens for tokens in found if len(tokens) > 30]
