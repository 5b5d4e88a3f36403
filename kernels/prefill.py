"""Causal attention of prefill chunks: several chunks of several requests in one launch.

A work item is a row tile of a chunk and a KV head: block_m packed query rows (see tile.py) over
the keys from 0 to the last row's own position.

    q, out            [num_tokens, num_q_heads, head_dim]
    k_cache, v_cache  [num_slots, max_len, num_kv_heads, head_dim]
"""

import torch
import triton
import triton.language as tl

from .plan import Plan
from .tile import attention_tile, row_offsets, softmax_scale


@triton.jit
def prefill_item(
    item,
    num_tiles,
    q,
    k_cache,
    v_cache,
    out,
    tiles,
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
    """Compute one work item, 0 <= item < num_tiles * KV_HEADS."""
    # All tiles of one KV head are neighbours: they read the same keys while these are in the L2.
    kv_head = item // num_tiles
    tile = tiles + item % num_tiles * 8
    query_start = tl.load(tile)
    num_tokens = tl.load(tile + 1)
    context_len = tl.load(tile + 2)
    slot = tl.load(tile + 3)
    first_row = tl.load(tile + 4) * BLOCK_M

    num_rows = num_tokens * GROUP
    rows = first_row + tl.arange(0, BLOCK_M)
    valid = (rows < num_rows)[:, None]
    offsets = row_offsets(query_start, rows, kv_head, KV_HEADS, GROUP, HEAD_DIM)
    offsets = offsets[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    q_tile = tl.load(q + offsets, mask=valid, other=0.0)  # [BLOCK_M, HEAD_DIM]

    chunk_start = context_len - num_tokens
    last_row = tl.minimum(first_row + BLOCK_M, num_rows) - 1
    slot_start = slot * (slot_rows // PAGE if PAGE else slot_rows)
    acc, _, total = attention_tile(
        q_tile,
        chunk_start + rows // GROUP,
        chunk_start + first_row // GROUP,
        k_cache + kv_head * HEAD_DIM,
        v_cache + kv_head * HEAD_DIM,
        slot_start,
        block_table,
        tl.zeros([], tl.int32),
        chunk_start + last_row // GROUP + 1,
        scale,
        KV_STRIDE,
        BLOCK_N,
        PAGE,
    )
    tl.store(out + offsets, (acc / total[:, None]).to(out.dtype.element_ty), mask=valid)


@triton.jit
def _prefill_kernel(
    q,
    k_cache,
    v_cache,
    out,
    counts,
    tiles,
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
    num_tiles = tl.load(counts)
    if item < num_tiles * KV_HEADS:
        prefill_item(
            item,
            num_tiles,
            q,
            k_cache,
            v_cache,
            out,
            tiles,
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


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
) -> None:
    """Write the attention of the plan's chunks to their rows of out; the decodes' rows stay."""
    if plan.config.decode is None:
        raise ValueError("the plan lists decodes as chunks: it is one for unified_attention")
    launch_tiles(q, k_cache, v_cache, out, plan)


def launch_tiles(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
) -> None:
    """Launch the kernel over all row tiles of the plan."""
    kv_stride = plan.require_tensors(q, k_cache, v_cache, out)
    if not plan.num_prefill_items:
        return
    tile = plan.config.prefill
    _prefill_kernel[(plan.num_prefill_items,)](
        q,
        k_cache,
        v_cache,
        out,
        plan.counts,
        plan.tiles,
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
