"""Attention of decodes: one query a request, its context split over CTAs (FlashDecoding).

A work item is a split of a request's keys and a KV head: the GROUP query heads of that KV head,
padded to block_m rows, over the keys [low, high). A request with one split writes its result. The
others write

    partial_out  [num_partials, num_q_heads, head_dim] float32   the split's own attention o_s
    partial_lse  [num_partials, num_q_heads] float32             w_s = m_s + log2(total_s)

and a second launch joins them: out = sum_s 2**w_s o_s / sum_s 2**w_s.

    q, out            [num_tokens, num_q_heads, head_dim]
    k_cache, v_cache  [num_slots, max_len, num_kv_heads, head_dim]
"""

import torch
import triton
import triton.language as tl

from .plan import Plan
from .tile import attention_tile, row_offsets, softmax_scale

COMBINE_BLOCK = 16  # partials read in one iteration


@triton.jit
def decode_item(
    item,
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_lse,
    splits,
    block_table,
    slot_rows,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Compute one work item, 0 <= item < num_splits * KV_HEADS."""
    # The KV heads of a split are neighbours: the keys of one token lie side by side in the cache.
    kv_head = item % KV_HEADS
    split = splits + item // KV_HEADS * 8
    query_start = tl.load(split)
    context_len = tl.load(split + 1)
    slot = tl.load(split + 2)
    low = tl.load(split + 3)
    high = tl.load(split + 4)
    partial = tl.load(split + 5)

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    valid = rows < GROUP
    offsets = row_offsets(query_start, rows, kv_head, KV_HEADS, GROUP, HEAD_DIM)
    offsets = offsets[:, None] + dims[None, :]
    q_tile = tl.load(q + offsets, mask=valid[:, None], other=0.0)  # [BLOCK_M, HEAD_DIM]

    slot_start = slot * (slot_rows // PAGE if PAGE else slot_rows)
    acc, m, total = attention_tile(
        q_tile,
        tl.zeros([BLOCK_M], tl.int32) + context_len - 1,
        context_len - 1,
        k_cache + kv_head * HEAD_DIM,
        v_cache + kv_head * HEAD_DIM,
        slot_start,
        block_table,
        low,
        high,
        scale,
        KV_STRIDE,
        BLOCK_N,
        PAGE,
    )
    result = acc / total[:, None]
    if partial < 0:
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=valid[:, None])
    else:
        heads = partial.to(tl.int64) * (KV_HEADS * GROUP) + kv_head * GROUP + rows
        to = heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(partial_out + to, result, mask=valid[:, None])
        tl.store(partial_lse + heads, m + tl.log2(total), mask=valid)


@triton.jit
def _decode_kernel(
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_lse,
    counts,
    splits,
    block_table,
    slot_rows,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    item = tl.program_id(0)
    if item < tl.load(counts + 1) * KV_HEADS:
        decode_item(
            item,
            q,
            k_cache,
            v_cache,
            out,
            partial_out,
            partial_lse,
            splits,
            block_table,
            slot_rows,
            scale,
            KV_HEADS,
            GROUP,
            HEAD_DIM,
            KV_STRIDE,
            BLOCK_M,
            BLOCK_N,
            PAGE,
        )


@triton.jit
def _combine_kernel(
    partial_out,
    partial_lse,
    out,
    counts,
    combines,
    Q_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Join the partials of one request and query head."""
    combine = combines + tl.program_id(0) // Q_HEADS * 4
    head = tl.program_id(0) % Q_HEADS
    if tl.program_id(0) < tl.load(counts + 2) * Q_HEADS:
        query_start = tl.load(combine)
        first_partial = tl.load(combine + 1)
        num_partials = tl.load(combine + 2)
        parts = tl.arange(0, BLOCK)
        dims = tl.arange(0, HEAD_DIM)
        acc = tl.zeros([HEAD_DIM], tl.float32)
        top = tl.full([], float("-inf"), tl.float32)
        total = tl.zeros([], tl.float32)
        for start in range(0, num_partials, BLOCK):
            inside = start + parts < num_partials
            rows = (first_partial + start + parts).to(tl.int64) * Q_HEADS + head
            lse = tl.load(partial_lse + rows, mask=inside, other=float("-inf"))  # [BLOCK]
            offsets = rows[:, None] * HEAD_DIM + dims[None, :]
            part = tl.load(partial_out + offsets, mask=inside[:, None], other=0.0)  # [BLOCK, D]
            new_top = tl.maximum(top, tl.max(lse, 0))
            weights = tl.exp2(lse - new_top)
            shrink = tl.exp2(top - new_top)
            acc = acc * shrink + tl.sum(weights[:, None] * part, 0)
            total = total * shrink + tl.sum(weights, 0)
            top = new_top
        to = (query_start.to(tl.int64) * Q_HEADS + head) * HEAD_DIM + dims
        tl.store(out + to, (acc / total).to(out.dtype.element_ty))


def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
) -> None:
    """Write the attention of the plan's decodes to their rows of out; the chunks' rows stay."""
    if plan.config.decode is None:
        raise ValueError("the plan lists decodes as chunks: it is one for unified_attention")
    kv_stride = plan.require_tensors(q, k_cache, v_cache, out)
    if not plan.num_decode_items:
        return
    tile = plan.config.decode
    _decode_kernel[(plan.num_decode_items,)](
        q,
        k_cache,
        v_cache,
        out,
        plan.partial_out,
        plan.partial_lse,
        plan.counts,
        plan.splits,
        plan.block_table,
        plan.max_len,
        softmax_scale(plan.head_dim),
        KV_HEADS=plan.num_kv_heads,
        GROUP=plan.num_q_heads // plan.num_kv_heads,
        HEAD_DIM=plan.head_dim,
        KV_STRIDE=kv_stride,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        PAGE=plan.page_size,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    combine_splits(out, plan)


def combine_splits(out: torch.Tensor, plan: Plan) -> None:
    """Join the partial results of the decodes that have several; launch nothing if none has."""
    if not plan.num_combines:
        return
    _combine_kernel[(plan.num_combines * plan.num_q_heads,)](
        plan.partial_out,
        plan.partial_lse,
        out,
        plan.counts,
        plan.combines,
        Q_HEADS=plan.num_q_heads,
        HEAD_DIM=plan.head_dim,
        BLOCK=COMBINE_BLOCK,
        num_warps=4,
    )
