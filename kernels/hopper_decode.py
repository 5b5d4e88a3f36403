"""Decode on Hopper (Gluon): one loader warp and one warpgroup, persistent on every SM.

A work item is a split of a request's keys and a KV head, as in decode.py. The products are
transposed, K Q^T [keys, heads] and V^T P^T [head_dim, heads], so that the few query heads of a
KV head, padded to HEADS, are the narrow side of wgmma, and K and V are its 64-row side.

Keys and values that follow a context in its last block are read and masked: the cache must hold
finite numbers everywhere.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_api import tma_load, warps_barrier
from .hopper_pages import block_rows, load_block
from .hopper_rings import DECODE, NUM_FIELDS, first_ticket, next_ticket, reset_when_last, tile_order


@gluon.jit
def load_decode(
    q,  # descriptors: [num_tokens * num_q_heads, head_dim], blocks of HEADS rows
    k,  # [all rows of the cache, num_kv_heads * head_dim]
    v,
    q_tile,  # [HEADS, HEAD_DIM] in shared memory
    q_full,
    q_empty,
    ring,
    mailbox,
    counts,
    splits,
    counters,
    block_table,
    slot_rows,
    num_ctas,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Take work items until none is left, tell the consumer, and load what it needs."""
    num_items = gl.load(counts + 1) * KV_HEADS
    loaded = 0
    sent = 0
    ticket, num_ctas = first_ticket(num_ctas, num_items)
    # The next item's entry is on its way while the current item's keys are loaded.
    query_row, context_len, slot, low, high, partial = _entry(splits, ticket, num_items, KV_HEADS)
    while ticket < num_items:
        # The KV heads of a split are neighbours: the keys of a token lie side by side in the cache.
        kv_head = ticket % KV_HEADS
        head = (query_row * KV_HEADS + kv_head) * GROUP
        this_slot = slot
        end = context_len
        first_key = low
        num_blocks = gl.cdiv(high - low, BLOCK_N)
        mailbox.send(sent, query_row, kv_head, high - low, partial, 0)
        mbarrier.wait(q_empty.index(0), (sent & 1) ^ 1)
        mbarrier.expect(q_full.index(0), HEADS * HEAD_DIM * 2)
        tma_load(q, [head, 0], q_full.index(0), q_tile)
        sent += 1
        ticket = next_ticket(counters, DECODE, num_ctas)
        query_row, context_len, slot, low, high, partial = _entry(
            splits, ticket, num_items, KV_HEADS
        )
        for i in range(2 * num_blocks):
            is_key, order = tile_order(i, num_blocks)
            rows = block_rows(
                block_table, this_slot, slot_rows, first_key + order * BLOCK_N, end, BLOCK_N, PAGE
            )
            block, full = ring.claim(loaded)
            mbarrier.expect(full, BLOCK_N * HEAD_DIM * 2)
            load_block(k, v, is_key, rows, kv_head * HEAD_DIM, full, block)
            loaded += 1
    mailbox.send(sent, 0, 0, 0, 0, 0)
    reset_when_last(counters, DECODE)


@gluon.jit
def _entry(splits, ticket, num_items, KV_HEADS: gl.constexpr):
    """Return query_start, context_len, slot, first key, end of keys and partial of the split."""
    item = gl.minimum(ticket, gl.maximum(num_items - 1, 0))
    split = splits + item // KV_HEADS * NUM_FIELDS
    return (
        gl.load(split),
        gl.load(split + 1),
        gl.load(split + 2),
        gl.load(split + 3),
        gl.load(split + 4),
        gl.load(split + 5),
    )


@gluon.jit
def compute_decode(
    out,
    partial_out,
    partial_lse,
    q_tile,
    q_full,
    q_empty,
    p_tile,  # [HEADS, BLOCK_N] in shared memory
    ring,
    mailbox,
    scale,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """Compute every work item that the loader sends."""
    T: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16])
    dtype: gl.constexpr = ring.tiles.dtype
    q = q_tile.permute((1, 0))
    p = p_tile.permute((1, 0))
    zeros = gl.zeros([BLOCK_N, HEADS], gl.float32, T)
    rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, T))
    read = 0
    received = 0
    query_row, kv_head, num_keys, partial, _unused = mailbox.receive(received)
    while num_keys > 0:
        mbarrier.wait(q_full.index(0), received & 1)
        received += 1
        scores = warpgroup_mma(ring.read(read), q, zeros, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        ring.release(read)
        scores = gl.where((rows < num_keys)[:, None], scores * scale, -1.0e30)
        top = gl.max(scores, 0)
        total = gl.exp2(scores - top[None, :])  # summed over the rows at the end
        p.store(total.to(dtype))
        acc = gl.zeros([HEAD_DIM, HEADS], gl.float32, T)
        num_blocks = gl.cdiv(num_keys, BLOCK_N)
        for j in range(1, num_blocks):
            fence_async_shared()
            warps_barrier()
            count = read + 2 * j - 1
            scores = warpgroup_mma(ring.read(count), q, zeros, use_acc=False, is_async=True)
            values = ring.read(count + 1).permute((1, 0))
            acc = warpgroup_mma(values, p, acc, is_async=True)
            scores = warpgroup_mma_wait(1, deps=[scores])
            ring.release(count)
            scores = gl.where((j * BLOCK_N + rows < num_keys)[:, None], scores * scale, -1.0e30)
            new_top = gl.maximum(top, gl.max(scores, 0))
            weights = gl.exp2(scores - new_top[None, :])
            shrink = gl.exp2(top - new_top)
            total = total * shrink[None, :] + weights
            top = new_top
            acc = warpgroup_mma_wait(0, deps=[acc])
            ring.release(count + 1)
            acc = acc * shrink[None, :]
            p.store(weights.to(dtype))
        fence_async_shared()
        warps_barrier()
        read += 2 * num_blocks
        acc = warpgroup_mma(ring.read(read - 1).permute((1, 0)), p, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        ring.release(read - 1)
        mbarrier.arrive(q_empty.index(0), count=1)

        sums = gl.sum(total, 0)
        acc = acc / sums[None, :]
        dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(1, T))
        heads = gl.arange(0, HEADS, gl.SliceLayout(0, T))
        owner = gl.where(partial < 0, query_row, partial)
        row = (owner.to(gl.int64) * KV_HEADS + kv_head) * GROUP + heads
        at = row[None, :] * HEAD_DIM + dims[:, None]
        if partial < 0:
            gl.store(out + at, acc.to(dtype), mask=(heads < GROUP)[None, :])
        else:
            gl.store(partial_out + at, acc, mask=(heads < GROUP)[None, :])
            gl.store(partial_lse + row, top + gl.log2(sums), mask=heads < GROUP)
        query_row, kv_head, num_keys, partial, _unused = mailbox.receive(received)
