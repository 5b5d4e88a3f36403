"""Physical KV blocks: handed out as counted, none twice, none lost, whatever scheduler decides."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from podsim.batch import Chunk
from podsim.block_tables import BlockTable, NewBlocks, PagedBlocks
from podsim.config import Deployment
from podsim.decode_group import ListedDecodes
from podsim.engine import Engine, Recording
from podsim.kv_cache import PagedKVCache
from podsim.memory_system import kv_cache_for
from podsim.model import model_named
from podsim.request import Request
from podsim.scheduler import SCHEDULERS
from podsim.workload import Trace
from tests.test_engine import LengthLatency, ManualClock, random_trace

BLOCK = 16


class PhysicalForward:
    """Writes tokens into physical blocks as the kernels do, and reads them back by the table.

    The next token is a function of all that the request has there.
    """

    def __init__(self, clock: ManualClock, cache: PagedKVCache, num_slots: int) -> None:
        self.clock, self.cache = clock, cache
        self.table = BlockTable(np.zeros((num_slots, 400 // BLOCK), np.int32), BLOCK)
        self.memory = np.full(cache.num_blocks * BLOCK, -1)
        self.slots = np.full((num_slots, 400), -1)
        self.handed_out: list[int] = []

    def run(self, inputs, foresee):
        self.gpu_seconds = LengthLatency().step_time(inputs.shape)
        self.table_seconds = 1e-4
        self.clock.time += self.gpu_seconds
        if isinstance(self.cache, PagedBlocks):
            self._check(inputs.new_blocks)
            self.table.enter(inputs.new_blocks)
            rows = self.table.rows(inputs.lengths.slots, inputs.lengths.positions)
            assert len(set(rows.tolist())) == len(rows), "two tokens in one place"
            self.memory[rows] = inputs.token_ids
        else:
            self.slots[inputs.lengths.slots, inputs.lengths.positions] = inputs.token_ids
        lengths = [
            *inputs.lengths.chunks,
            *((1, context, slot) for context, slot in inputs.lengths.decodes),
        ]
        ends = np.cumsum([n for n, _, _ in lengths]) - 1
        sampled = set(inputs.sample_rows.tolist())
        found = [
            int(self.read(context, slot).sum() * 31 + context) % 1000
            for (_, context, slot), end in zip(lengths, ends.tolist(), strict=True)
            if end in sampled
        ]
        return np.array(found, np.int64)

    def read(self, context: int, slot: int):
        if not isinstance(self.cache, PagedBlocks):
            return self.slots[slot, :context]
        return self.memory[self.table.rows(np.full(context, slot), np.arange(context))]

    def _check(self, new_blocks) -> None:
        held = [self.cache.blocks_of(request) for request in self.cache._slot]
        blocks = [block for one in held for block in one]
        assert len(set(blocks)) == len(blocks), "a block is used twice"
        assert set(blocks) | set(self._free()) == set(range(self.cache.num_blocks)), "one is lost"
        for slot, first, new in new_blocks:
            assert any(list(one[first:]) == new for one in held)
            assert 0 <= slot < len(self.table.entries)
            self.handed_out += new

    def _free(self) -> list[int]:
        cache = self.cache
        return [*cache._freed, *range(cache._num_used_once, cache.num_blocks)]


def serve(
    trace: Trace, deployment: Deployment, cache: PagedKVCache
) -> tuple[Recording, PhysicalForward, dict[int, list[int]]]:
    clock = ManualClock()
    forward = PhysicalForward(clock, cache, deployment.max_num_seqs)
    scheduler = SCHEDULERS[deployment.scheduler](
        cache, deployment, ListedDecodes(BLOCK), LengthLatency().step_time
    )
    tokens: dict[int, list[int]] = {}

    class Kept(Engine):
        def _finish(self, request, end):
            tokens[request.request_id] = self._tokens[request].tolist()
            super()._finish(request, end)

    engine = Kept(
        forward,
        scheduler,
        cache,
        num_slots=deployment.max_num_seqs,
        max_model_len=400,
        vocab_size=1000,
        seed=0,
        clock=clock,
    )
    columns = (trace.arrival_time, trace.num_prompt_tokens, trace.num_output_tokens)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return engine.serve([Request(i, *row) for i, row in enumerate(rows)]), forward, tokens


@pytest.mark.parametrize("num_blocks", [40, 400], ids=["preempting", "roomy"])
@pytest.mark.parametrize("scheduler", ["sarathi", "vllm-v1", "vllm-v0", "orca", "static"])
@pytest.mark.parametrize("seed", range(2))
def test_blocks_serve_as_slots_do(seed, scheduler, num_blocks):
    """The same steps and tokens, with every block in one place at a time."""
    deployment = Deployment(
        kv="paged",
        scheduler=scheduler,
        token_budget=400,
        max_num_seqs=16,
        max_model_len=400,
        num_blocks=num_blocks,
        block_size=BLOCK,
    )
    trace = random_trace(seed)
    cache = kv_cache_for(deployment, model_named("llama-3-8b"), num_blocks)
    assert isinstance(cache, PagedBlocks)
    paged, forward, tokens = serve(trace, deployment, cache)
    plain, _, expected = serve(trace, deployment, PagedKVCache(num_blocks, BLOCK))
    for name in ("requests", "steps"):
        tables = [pd.DataFrame(getattr(recording.log, name)) for recording in (paged, plain)]
        pd.testing.assert_frame_equal(*tables)
    assert tokens == expected
    assert len(tokens) == len(trace)
    assert min(paged.table_seconds) >= 1e-4
    assert max(plain.table_seconds) == 0
    assert sorted(forward._free()) == list(range(num_blocks)), "all are given back"
    if num_blocks == 40:
        assert len(forward.handed_out) > len(set(forward.handed_out)), "freed ones go out again"
        if scheduler != "static":
            assert len(paged.log.preempted_id)


def test_blocks_go_out_in_the_order_of_vllms_queue():
    cache = PagedBlocks(6, BLOCK, 3)
    first, second, third = (Request(i, 0.0, n, 40) for i, n in enumerate((33, 20, 30)))
    assert cache.start(first, 33, 0)
    assert cache.start(second, 20, 0)
    assert cache.allot([Chunk(first, 33), Chunk(second, 20)], []) == [
        NewBlocks(0, 0, [0, 1, 2]),
        NewBlocks(1, 0, [3, 4]),
    ]
    assert not cache.start(third, 30, 0)
    cache.release(first, 3)
    assert cache.start(third, 30, 0)
    assert cache.slot_of(third) == 0
    # The one block that nobody had yet, then the last one of the request that left.
    assert cache.allot([Chunk(third, 30)], []) == [NewBlocks(0, 0, [5, 2])]
    second.num_computed_tokens = 32
    assert cache.take(1)
    assert cache.allot([], [second]) == [NewBlocks(1, 2, [1])]
    assert cache.allot([], [second]) == []
    assert cache.blocks_of(second) == [3, 4, 1]


def test_a_chunk_gets_the_blocks_that_it_was_counted():
    """Sarathi counts a whole prompt at its first chunk, vLLM's V1 chunk by chunk."""
    cache = PagedBlocks(8, BLOCK, 2)
    request = Request(0, 0.0, 60, 4)
    assert cache.start(request, 20, 0)
    assert cache.allot([Chunk(request, 20)], []) == [NewBlocks(0, 0, [0, 1])]
    assert cache.take(2)
    request.num_computed_tokens, request.num_blocks = 20, 4
    assert cache.allot([Chunk(request, 40)], []) == [NewBlocks(0, 2, [2, 3])]
    cache.release(request, 4)
    assert cache.num_used_blocks == 0


def test_the_rows_of_tokens():
    table = BlockTable(np.zeros((2, 4), np.int32), 16)
    table.enter([NewBlocks(1, 0, [7, 2]), NewBlocks(1, 2, [5])])
    rows = table.rows(np.array([1, 1, 1, 1], np.int32), np.array([0, 15, 16, 33], np.int32))
    assert rows.tolist() == [112, 127, 32, 81]
    assert rows.dtype == np.int32
