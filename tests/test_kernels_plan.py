"""Invariants of the work lists and of the configurations, in NumPy alone."""

from dataclasses import astuple

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the kernels need torch")
pytest.importorskip("triton", reason="the kernels need triton")

from podsim.kernels.config import STRATEGIES, TileConfig, config_for  # noqa: E402
from podsim.kernels.plan import AttentionPlan, Decode, PrefillChunk, work_lists  # noqa: E402

HEADS = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}


def lists_for(chunks, decodes, strategy="serial"):
    config = config_for(strategy, **HEADS)
    return work_lists(
        chunks, decodes, group=4, pack=4, num_kv_heads=8, num_sms=132, config=config
    ), config


def random_batch(seed):
    generator = np.random.default_rng(seed)
    num_tokens = generator.integers(1, 900, size=generator.integers(0, 6))
    before = generator.integers(0, 5000, size=len(num_tokens))
    lengths = 2 ** generator.uniform(0, 16, size=generator.integers(1, 40))
    chunks = [
        PrefillChunk(new, new + old, slot)
        for slot, (new, old) in enumerate(zip(num_tokens.tolist(), before.tolist(), strict=True))
    ]
    decodes = [Decode(int(length), len(chunks) + slot) for slot, length in enumerate(lengths)]
    return chunks, decodes


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("seed", range(10))
def test_tiles_cover_every_row_once(seed, strategy):
    chunks, decodes = random_batch(seed)
    work, config = lists_for(chunks, decodes, strategy)
    tiled = [*chunks, *(PrefillChunk(1, d.context_len, d.slot) for d in decodes)]
    tiled = tiled[: len(chunks)] if config.decode else tiled
    block_m = config.prefill.block_m
    rows = [np.zeros(-(-chunk.num_tokens * 4 // block_m) * block_m) for chunk in tiled]
    starts = np.cumsum([0, *(chunk.num_tokens for chunk in tiled)]).tolist()
    for query_start, num_tokens, context_len, slot, tile in work.tiles[:, :5]:
        request = starts.index(query_start)
        assert (num_tokens, context_len, slot) == astuple(tiled[request])
        rows[request][tile * block_m : (tile + 1) * block_m] += 1
    assert all((row == 1).all() for row in rows)
    assert len(work.tiles) == sum(len(row) // block_m for row in rows)


@pytest.mark.parametrize("seed", range(10))
def test_splits_cover_every_key_once(seed):
    chunks, decodes = random_batch(seed)
    work, config = lists_for(chunks, decodes)
    keys = [np.zeros(decode.context_len) for decode in decodes]
    first = sum(chunk.num_tokens for chunk in chunks)
    for query_start, context_len, slot, low, high in work.splits[:, :5]:
        assert low < high
        assert low % config.decode.block_n == 0
        assert (context_len, slot) == astuple(decodes[query_start - first])
        keys[query_start - first][low:high] += 1
    assert all((key == 1).all() for key in keys)


@pytest.mark.parametrize("seed", range(10))
def test_combines_own_the_partials_of_the_split_requests(seed):
    work, _ = lists_for(*random_batch(seed))
    owners = {}
    for request, first, count in work.combines[:, :3]:
        assert count > 1
        owners |= dict.fromkeys(range(first, first + count), request)
    assert sorted(owners) == list(range(work.num_partials))
    owner, partials = work.splits[:, 0], work.splits[:, 5]
    written = dict(zip(partials[partials >= 0].tolist(), owner[partials >= 0], strict=True))
    assert written == owners
    direct = owner[partials < 0].tolist()
    assert len(set(direct)) == len(direct)
    assert not set(direct) & set(owners.values())


def test_longest_work_comes_first():
    chunks = [PrefillChunk(64, 64, 0), PrefillChunk(33, 8192, 1)]
    work, _ = lists_for(chunks, [Decode(100, 2), Decode(30000, 3)])
    assert work.tiles[:, [0, 4]].tolist() == [[64, 1], [64, 0], [0, 1], [0, 0]]
    lengths = work.splits[:, 4] - work.splits[:, 3]
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)


def test_queries_lie_in_the_order_of_the_requests():
    work, _ = lists_for([PrefillChunk(5, 9, 7), PrefillChunk(2, 2, 0)], [Decode(3, 4)])
    assert work.tiles[:, :4].tolist() == [[0, 5, 9, 7], [5, 2, 2, 0]]
    assert work.splits[:, :6].tolist() == [[7, 3, 4, 0, 3, -1]]
    assert work.num_tokens == 8


@pytest.mark.parametrize(
    ("decodes", "splits_each"),
    [
        ([8192] * 64, 2),  # two waves of three CTAs for each of 132 SMs, and no more
        ([1024] * 256, 1),  # enough requests to fill the GPU
        ([8192], 32),  # one request: splits of the least length
        ([256], 1),
    ],
)
def test_splits_fill_the_gpu_with_few_long_parts(decodes, splits_each):
    work, _ = lists_for([], [Decode(length, slot) for slot, length in enumerate(decodes)])
    assert np.bincount(work.splits[:, 0]).tolist() == [splits_each] * len(decodes)


def test_unified_has_no_splits_and_one_tile_a_decode():
    work, _ = lists_for([], [Decode(9000, 0), Decode(12000, 1)], "unified")
    assert work.tiles[:, [0, 4]].tolist() == [[1, 0], [0, 0]]
    assert work.counts[:3].tolist() == [2, 0, 0]


def plan_of(chunks=(), decodes=(), **changes):
    arguments = {**HEADS, "num_slots": 4, "max_len": 100, "num_sms": 132, "device": "cpu"}
    arguments |= {"config": config_for("serial", **HEADS), **changes}
    return AttentionPlan(chunks, decodes, **arguments)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (PrefillChunk(0, 5, 0), "num_tokens must be at least 1, got .*num_tokens=0"),
        (PrefillChunk(9, 8, 0), r"context_len includes the chunk's own tokens, got .*=9, .*=8"),
        (PrefillChunk(9, 101, 0), r"context_len must be in 1..100, got .*=101"),
        (PrefillChunk(9, 9, 4), r"slot must be in 0..3, got .*slot=4"),
        (PrefillChunk(9, 9, -1), "slot must be in 0..3, got .*slot=-1"),
        (PrefillChunk(9, 9, 3), "slot 3 is used twice"),
    ],
)
def test_refuses_impossible_chunks(chunk, message):
    with pytest.raises(ValueError, match=message):
        plan_of([chunk], [Decode(1, 3)])


def test_refuses_impossible_decodes_heads_and_sizes():
    with pytest.raises(ValueError, match=r"the batch is empty"):
        plan_of()
    with pytest.raises(ValueError, match=r"context_len must be in 1..100, got .*=0"):
        plan_of(decodes=[Decode(0, 0)])
    with pytest.raises(ValueError, match=r"multiple of num_kv_heads, got 30 and 8"):
        plan_of(decodes=[Decode(1, 0)], num_q_heads=30)
    with pytest.raises(ValueError, match=r"head_dim must be one of .*, got 96"):
        plan_of(decodes=[Decode(1, 0)], head_dim=96)
    with pytest.raises(ValueError, match=r"num_sms must be at least 1, got 0"):
        plan_of(decodes=[Decode(1, 0)], num_sms=0)
    with pytest.raises(ValueError, match=r"16 rows for 32 heads"):
        plan_of(decodes=[Decode(1, 0)], num_kv_heads=1)
    with pytest.raises(ValueError, match=r"strategy must be one of .*'fast'"):
        config_for("fast", **HEADS)
    with pytest.raises(ValueError, match=r"block_m must be a power of two, 8 or more, got 48"):
        TileConfig(block_m=48, block_n=64, num_warps=4, num_stages=3)
