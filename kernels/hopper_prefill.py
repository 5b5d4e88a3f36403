"""Prefill on Hopper (Gluon): one loader warp and two warpgroups, persistent on every SM.

A work item is 128 packed rows of a chunk: 128 / PACK tokens of PACK query heads that share a KV
head, PACK the largest power of two in the group. Each warpgroup has 64 of the rows. The blocks of
keys run from the last, the masked ones, to the first; Q K^T of a block overlaps P V of the block
before it (FlashAttention-3, arXiv 2407.08608, section 3.2).

Keys and values that follow a context in its last block are read and masked: the cache must hold
finite numbers everywhere, as one allocated with zeros does.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .gluon_api import tma_load
from .hopper_pages import block_rows, load_block
from .hopper_rings import (
    NUM_FIELDS,
    PREFILL,
    first_ticket,
    next_ticket,
    reset_when_last,
    tile_order,
)

ROWS = gl.constexpr(64)
"""Rows of a warpgroup, of which a tile has two."""

LEAD = gl.constexpr(2)
"""Blocks that are still to be loaded when the next ticket is taken."""

MASKED = gl.constexpr(-(2.0**100))
"""A power of two: its product with the scale is exact, so that a row whose keys are all masked in
a block gets the weights 2**0, which the next block's top shrinks to nothing."""

MASK = gl.constexpr(
    "{ .reg .pred seen; setp.ge.s32 seen, $2, $3; selp.f32 $0, $1, 0fF1800000, seen; }"
)
"""The score where the position is not before the key, else MASKED. For where, the compiler packs
the comparisons of a whole block into bits; this takes half the code, but more registers."""


@gluon.jit
def load_prefill(
    q,  # descriptors: [num_tokens, num_q_heads, head_dim], blocks of ROWS rows
    k,  # [all rows of the cache, num_kv_heads * head_dim]
    v,
    q_tiles,  # [2 * Q_BUFFERS, ROWS / PACK, PACK, HEAD_DIM] in shared memory
    q_full,
    q_empty,
    ring,
    mailbox,
    counts,
    tiles,
    counters,
    block_table,
    slot_rows,
    num_ctas,
    Q_BUFFERS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
    ALONE: gl.constexpr,
):
    """Take work items until none is left, tell the consumers, and load what they need."""
    TOKENS: gl.constexpr = 2 * ROWS // PACK
    num_tiles = gl.maximum(gl.load(counts), 1)
    num_long = gl.load(counts + (6 if ALONE else 5))
    num_items = gl.load(counts) * (KV_HEADS * (GROUP // PACK))
    loaded = 0
    sent = 0
    ticket, num_ctas = first_ticket(num_ctas, num_items)
    kv_head, head, tile = _item(ticket, num_tiles, num_long, KV_HEADS, GROUP, PACK)
    query_start, num_tokens, context_len, slot, row_tile = _entry(tiles, tile)
    while ticket < num_items:
        column = kv_head * HEAD_DIM
        this_head = head
        this_slot = slot
        end = context_len
        first_token = row_tile * TOKENS
        query_row = query_start + first_token
        position = context_len - num_tokens + first_token
        num_blocks = gl.cdiv(gl.minimum(position + TOKENS, context_len), BLOCK_N)
        rows = block_rows(
            block_table, this_slot, slot_rows, (num_blocks - 1) * BLOCK_N, end, BLOCK_N, PAGE
        )
        block, full = ring.claim(loaded)
        mbarrier.expect(full, BLOCK_N * HEAD_DIM * 2)
        load_block(k, v, True, rows, column, full, block)
        left = num_tokens - first_token
        mailbox.send(sent, query_row, this_head, left, position, num_blocks)

        buffer = sent % Q_BUFFERS
        mbarrier.wait(q_empty.index(buffer), ((sent // Q_BUFFERS) & 1) ^ 1)
        q_ready = q_full.index(buffer)
        mbarrier.expect(q_ready, 2 * ROWS * HEAD_DIM * 2)
        tma_load(q, [query_row, this_head, 0], q_ready, q_tiles.index(2 * buffer))
        tma_load(
            q, [query_row + ROWS // PACK, this_head, 0], q_ready, q_tiles.index(2 * buffer + 1)
        )
        sent += 1
        # The next ticket is taken near the end of this item, so that no item waits for a long one.
        late = gl.maximum(2 * num_blocks - LEAD, 1)
        _load_blocks(
            k, v, ring, loaded, 1, late, num_blocks, this_slot, end, column, block_table,
            slot_rows, HEAD_DIM, BLOCK_N, PAGE,
        )  # fmt: skip
        ticket = next_ticket(counters, PREFILL, num_ctas)
        _load_blocks(
            k, v, ring, loaded, late, 2 * num_blocks, num_blocks, this_slot, end, column,
            block_table, slot_rows, HEAD_DIM, BLOCK_N, PAGE,
        )  # fmt: skip
        kv_head, head, tile = _item(ticket, num_tiles, num_long, KV_HEADS, GROUP, PACK)
        query_start, num_tokens, context_len, slot, row_tile = _entry(tiles, tile)
        loaded += 2 * num_blocks
    mailbox.send(sent, 0, 0, 0, 0, 0)
    reset_when_last(counters, PREFILL)


@gluon.jit
def _load_blocks(
    k, v, ring, loaded, first, last, num_blocks, slot, end, column, block_table, slot_rows,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Load the first-th to the last-th but one of the blocks of keys and values, in tile_order."""
    for i in range(first, last):
        is_key, order = tile_order(i, num_blocks)
        first_key = (num_blocks - 1 - order) * BLOCK_N
        rows = block_rows(block_table, slot, slot_rows, first_key, end, BLOCK_N, PAGE)
        block, full = ring.claim(loaded + i)
        mbarrier.expect(full, BLOCK_N * HEAD_DIM * 2)
        load_block(k, v, is_key, rows, column, full, block)


@gluon.jit
def _item(
    ticket, num_tiles, num_long, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr
):
    """Return the KV head, the first query head and the tile of a ticket.

    The long tiles of all heads come first, so that none is left to the end. Of the others, those
    of a KV head follow one another: neighbouring SMs then read the same keys at the same time,
    which an SM pair fetches once and the L2 holds.
    """
    PACKS: gl.constexpr = GROUP // PACK
    HEADS: gl.constexpr = KV_HEADS * PACKS
    is_long = ticket < num_long * HEADS
    short = gl.maximum((num_tiles - num_long) * PACKS, 1)
    rest = ticket - num_long * HEADS
    kv_head = gl.where(is_long, ticket % HEADS // PACKS, rest // short)
    pack = gl.where(is_long, ticket % PACKS, rest % short % PACKS)
    tile = gl.where(is_long, ticket // HEADS, num_long + rest % short // PACKS)
    return kv_head, kv_head * GROUP + pack * PACK, gl.minimum(tile, num_tiles - 1)


@gluon.jit
def _entry(tiles, tile):
    """Return the tile's query_start, num_tokens, context_len, slot and row tile."""
    entry = tiles + tile * NUM_FIELDS
    return (
        gl.load(entry),
        gl.load(entry + 1),
        gl.load(entry + 2),
        gl.load(entry + 3),
        gl.load(entry + 4),
    )


@gluon.jit
def compute_prefill(
    WARPGROUP: gl.constexpr,
    out,
    q_tiles,
    q_full,
    q_empty,
    turns,
    ring,
    mailbox,
    scale,
    Q_BUFFERS: gl.constexpr,
    Q_HEADS: gl.constexpr,
    PACK: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ALONE: gl.constexpr,
):
    """Compute this warpgroup's rows of every work item that the loader sends.

    ALONE: without decode beside it, the warpgroups take turns at the tensor cores: one computes its
    weights while the other's products run (FlashAttention-3, section 3.1).
    """
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])  # noqa: E741
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    dtype: gl.constexpr = ring.tiles.dtype
    WG_TOKENS: gl.constexpr = ROWS // PACK
    tokens = gl.arange(0, ROWS, gl.SliceLayout(1, S)) // PACK + WARPGROUP * WG_TOKENS
    keys = gl.arange(0, BLOCK_N, gl.SliceLayout(0, S))
    read = 0
    received = 0
    turn = 0
    query_row, head, num_tokens, position, num_blocks = mailbox.receive(received)
    while num_blocks > 0:
        buffer = received % Q_BUFFERS
        mbarrier.wait(q_full.index(buffer), (received // Q_BUFFERS) & 1)
        q = q_tiles.index(2 * buffer + WARPGROUP).reshape([ROWS, HEAD_DIM])
        received += 1
        positions = position + tokens

        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
        scores = warpgroup_mma(
            q, ring.read(read).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        scores = warpgroup_mma_wait(0, deps=[scores])
        ring.release(read)
        last_keys = (num_blocks - 1) * BLOCK_N + keys
        scores = _mask(scores, positions, last_keys, ALONE)
        top = gl.max(scores, 1) * scale
        weights = gl.exp2(scores * scale - top[:, None])
        total = gl.sum(weights, 1)
        p = gl.convert_layout(weights.to(dtype), P)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, O)

        # Blocks whose every key the first row sees need no mask: nearly all of a long context.
        num_seen = (position + WARPGROUP * WG_TOKENS + 1) // BLOCK_N
        num_masked = gl.minimum(gl.maximum(num_blocks - num_seen, 1), num_blocks)
        for j in range(1, num_masked):
            first_key = (num_blocks - 1 - j) * BLOCK_N
            p, acc, top, total = _attend_block(
                WARPGROUP, q, turns, turn + j - 1, ring, read + 2 * j - 1, p, acc, top, total,
                positions, first_key + keys, scale, S, O, P, BLOCK_N, True, ALONE,
            )  # fmt: skip
        for j in range(num_masked, num_blocks):
            p, acc, top, total = _attend_block(
                WARPGROUP, q, turns, turn + j - 1, ring, read + 2 * j - 1, p, acc, top, total,
                positions, keys, scale, S, O, P, BLOCK_N, False, ALONE,
            )  # fmt: skip
        mbarrier.arrive(q_empty.index(buffer), count=1)
        read += 2 * num_blocks
        turn += num_blocks - 1
        acc = warpgroup_mma(p, ring.read(read - 1), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        ring.release(read - 1)

        acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O))[:, None]
        rows = gl.arange(0, ROWS, gl.SliceLayout(1, O))
        dims = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, O))
        token = WARPGROUP * WG_TOKENS + rows // PACK
        to = (query_row + token).to(gl.int64) * Q_HEADS + head + rows % PACK
        gl.store(
            out + to[:, None] * HEAD_DIM + dims[None, :],
            acc.to(dtype),
            mask=(token < num_tokens)[:, None],
        )
        query_row, head, num_tokens, position, num_blocks = mailbox.receive(received)


@gluon.jit
def _mask(scores, positions, keys, ALONE: gl.constexpr):
    if ALONE:
        scores = gl.inline_asm_elementwise(
            MASK, "=f,f,r,r", [scores, positions[:, None], keys[None, :]], gl.float32, True, 1
        )
    else:
        scores = gl.where(positions[:, None] >= keys[None, :], scores, MASKED)
    return scores


@gluon.jit
def _attend_block(
    WARPGROUP: gl.constexpr,
    q,
    turns,
    turn,
    ring,
    count,  # of the tiles before these keys
    p,  # [ROWS, BLOCK_N] the weights of the block before
    acc,
    top,
    total,
    positions,
    keys,
    scale,
    S: gl.constexpr,
    O: gl.constexpr,  # noqa: E741
    P: gl.constexpr,
    BLOCK_N: gl.constexpr,
    DIAGONAL: gl.constexpr,
    ALONE: gl.constexpr,
):
    """Score a block of keys while the values of the block before are added to acc."""
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S)
    block = ring.read(count)
    if ALONE:
        mbarrier.wait(turns.index(WARPGROUP), (turn & 1) ^ (1 - WARPGROUP))
    scores = warpgroup_mma(q, block.permute((1, 0)), zeros, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, ring.read(count + 1), acc, is_async=True)
    if ALONE:
        mbarrier.arrive(turns.index(1 - WARPGROUP), count=1)
    scores = warpgroup_mma_wait(1, deps=[scores])
    ring.release(count)
    if DIAGONAL:
        scores = _mask(scores, positions, keys, ALONE)
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    weights = gl.exp2(scores * scale - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    total = total * shrink + gl.sum(weights, 1)
    acc = warpgroup_mma_wait(0, deps=[acc])
    ring.release(count + 1)
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
    p = gl.convert_layout(weights.to(p.dtype), P)
    return p, acc, new_top, total
