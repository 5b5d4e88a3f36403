"""Attention of one tile of packed query rows over a range of keys: the inner part of every kernel.

For each row i of the tile, over the keys j of [low, high) with j <= position_i:

    s_ij = q_i . k_j / sqrt(head_dim) * log2(e)        m_i = max_j s_ij
    total_i = sum_j 2**(s_ij - m_i)                    acc_i = sum_j 2**(s_ij - m_i) v_j

computed online, block_n keys at a time, in float32. The result is acc_i / total_i; the parts of a
row whose keys are split over several CTAs are joined through m_i + log2(total_i), the base-2 log
of their weight.

Rows are packed as in plan.py: row r of a request and a KV head is token r // GROUP, head r %
GROUP, so K and V are read once for the GROUP query heads that share them, whatever GROUP is.
"""

import math

import triton
import triton.language as tl

from .checks import INTERPRETED

LOG2E = math.log2(math.e)


def softmax_scale(head_dim: int) -> float:
    """Return the factor from a dot product to a base-2 exponent."""
    return LOG2E / math.sqrt(head_dim)


@triton.jit
def attention_tile(
    q,  # [BLOCK_M, HEAD_DIM]
    positions,  # [BLOCK_M], the last key that each row sees
    first_position,  # the smallest of positions
    k,  # of the KV head: row r of the cache at k + r * KV_STRIDE
    v,
    slot_start,  # contiguous: the row of key 0; paged: where the slot's row of the block table is
    block_table,
    low,
    high,
    scale,
    KV_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Return acc [BLOCK_M, HEAD_DIM], m and total [BLOCK_M]; every row must see the key `low`."""
    acc = tl.zeros([q.shape[0], q.shape[1]], tl.float32)
    m = tl.full([q.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([q.shape[0]], tl.float32)
    # Blocks that every row sees whole need no mask; they are nearly all of a long context.
    num_seen = tl.minimum(first_position + 1, high) - low
    middle = low + num_seen // BLOCK_N * BLOCK_N
    for start in range(low, middle, BLOCK_N):
        acc, m, total = _attend_block(
            acc, m, total, q, positions, k, v, slot_start, block_table, start, high, scale,
            KV_STRIDE, BLOCK_N, PAGE, False,
        )  # fmt: skip
    for start in range(middle, high, BLOCK_N):
        acc, m, total = _attend_block(
            acc, m, total, q, positions, k, v, slot_start, block_table, start, high, scale,
            KV_STRIDE, BLOCK_N, PAGE, True,
        )  # fmt: skip
    return acc, m, total


@triton.jit
def _attend_block(
    acc,  # [BLOCK_M, HEAD_DIM]
    m,  # [BLOCK_M]
    total,  # [BLOCK_M]
    q,
    positions,
    k,
    v,
    slot_start,
    block_table,
    start,
    high,
    scale,
    KV_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add the keys [start, start + BLOCK_N) to the running softmax."""
    keys = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, q.shape[1])
    if PAGE:
        at = tl.minimum(start + keys, high - 1)
        page = tl.load(block_table + slot_start + at // PAGE)
        offsets = (page.to(tl.int64) * PAGE + at % PAGE)[:, None] * KV_STRIDE + dims[None, :]
    else:
        # The 64-bit part of the address is one number; the offsets within a block fit 32 bits.
        first = (slot_start + start).to(tl.int64) * KV_STRIDE
        k += first
        v += first
        offsets = keys[:, None] * KV_STRIDE + dims[None, :]
    k_at = k + offsets
    v_at = v + offsets
    if MASKED:
        # Zeros past the end, not what lies there: 0 * NaN would reach the result through V.
        inside = (start + keys < high)[:, None]
        k_block = tl.load(k_at, mask=inside, other=0.0)  # [BLOCK_N, HEAD_DIM]
        v_block = tl.load(v_at, mask=inside, other=0.0)  # [BLOCK_N, HEAD_DIM]
    else:
        k_block = tl.load(k_at)  # [BLOCK_N, HEAD_DIM]
        v_block = tl.load(v_at)  # [BLOCK_N, HEAD_DIM]

    scores = _dot(q, tl.trans(k_block))  # [BLOCK_M, BLOCK_N]
    if MASKED:
        last = tl.minimum(positions, high - 1)
        scores = tl.where((start + keys)[None, :] <= last[:, None], scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_m[:, None])
    shrink = tl.exp2(m - new_m)
    total = total * shrink + tl.sum(weights, 1)
    acc = _dot(weights.to(v_block.dtype), v_block, acc * shrink[:, None])
    return acc, new_m, total


@triton.jit
def _dot(a, b, acc=None):
    """Return a @ b, plus acc where given, in float32."""
    if INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def row_offsets(
    query_start, rows, kv_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Return where packed rows [BLOCK_M] of a request and KV head lie in q and out, in elements."""
    token = query_start.to(tl.int64) + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    return (token * (KV_HEADS * GROUP) + head) * HEAD_DIM
