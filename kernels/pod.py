"""POD-Attention: prefill and decode in one launch that share each SM (arXiv 2410.18038).

The launch has a CTA for each work item of either operation. What a CTA does is decided when it
runs, by the tickets of the SM that it runs on:

    ticket = sm_tickets[sm]++
    50:50          prefill if ticket % 2 == 0
    proportional   P <= D:  prefill if ticket % (D // P + 1) == 0            (P, D: items of each)
                   P > D:   prefill if ticket % (P // D + 1) < P // D
    item   = op_tickets[op]++;  when the operation has no items left, the other one's

so that both operations are on every SM at all times, the tensor cores and the memory both busy,
until one of them runs out. The last CTA to take its tickets sets all of them back to zero for the
next launch.

    q, out            [num_tokens, num_q_heads, head_dim]
    k_cache, v_cache  [num_slots, max_len, num_kv_heads, head_dim]
    counters          [260] int32: tickets of 256 SMs, of prefill, of decode, CTAs done, unused
"""

import torch
import triton
import triton.language as tl

from .checks import INTERPRETED
from .decode import combine_splits, decode_item
from .plan import Plan
from .prefill import prefill_item
from .tile import softmax_scale

PREFILL = tl.constexpr(0)
DECODE = tl.constexpr(1)
NOTHING = tl.constexpr(2)

# Layout of the counters. %smid may exceed the number of SMs: there is room for more than it has.
SM_SLOTS = tl.constexpr(256)
OP_TICKETS = tl.constexpr(256)
DONE = tl.constexpr(258)


@triton.jit
def take_ticket(
    counters, num_prefill, num_decode, PROPORTIONAL: tl.constexpr, NUM_SMS: tl.constexpr
):
    """Return the operation of this CTA and its work item; NOTHING if no item is left."""
    sm = _sm_id(NUM_SMS)
    # The tickets need no order among themselves: each is one atomic number.
    ticket = tl.atomic_add(counters + sm, 1, sem="relaxed")
    op = _preferred_op(ticket, num_prefill, num_decode, PROPORTIONAL)
    item = tl.atomic_add(counters + OP_TICKETS + op, 1, sem="relaxed")
    num_items = tl.where(op == PREFILL, num_prefill, num_decode)
    if item >= num_items:
        op = 1 - op
        item = tl.atomic_add(counters + OP_TICKETS + op, 1, sem="relaxed")
        num_items = tl.where(op == PREFILL, num_prefill, num_decode)
    _reset_when_last(counters, num_prefill + num_decode)
    return tl.where(item < num_items, op, NOTHING), item


@triton.jit
def _sm_id(NUM_SMS: tl.constexpr):
    """Return the SM this CTA runs on; interpreted, where there is none, the SMs in turn."""
    if INTERPRETED:
        sm = tl.program_id(0) % NUM_SMS
    else:
        sm = tl.inline_asm_elementwise(
            "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
    return sm % SM_SLOTS


@triton.jit
def _preferred_op(ticket, num_prefill, num_decode, PROPORTIONAL: tl.constexpr):
    if PROPORTIONAL:
        # The larger operation has `share` tickets for each ticket of the smaller one.
        smaller = tl.maximum(tl.minimum(num_prefill, num_decode), 1)
        share = tl.maximum(num_prefill, num_decode) // smaller
        turn = ticket % (share + 1)
        prefill = tl.where(num_prefill <= num_decode, turn == 0, turn < share)
    else:
        prefill = ticket % 2 == 0
    return tl.where(prefill, PREFILL, DECODE)


@triton.jit
def _reset_when_last(counters, num_ctas):
    """Count this CTA as done with the tickets; the last one sets all counters back to zero."""
    # Release: this CTA's tickets come before its count. Acquire: the last CTA has all the others'
    # counts, and so their tickets, behind it when it overwrites them.
    done = tl.atomic_add(counters + DONE, 1, sem="acq_rel", scope="gpu")
    if done == num_ctas - 1:
        tl.store(counters + tl.arange(0, SM_SLOTS), 0)
        tl.store(counters + OP_TICKETS + tl.arange(0, 4), 0)


@triton.jit
def _pod_kernel(
    q,
    k_cache,
    v_cache,
    out,
    partial_out,
    partial_lse,
    counts,
    tiles,
    splits,
    counters,
    block_table,
    slot_rows,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_STRIDE: tl.constexpr,
    PREFILL_BLOCK_M: tl.constexpr,
    PREFILL_BLOCK_N: tl.constexpr,
    DECODE_BLOCK_M: tl.constexpr,
    DECODE_BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
    PROPORTIONAL: tl.constexpr,
    NUM_SMS: tl.constexpr,
):
    num_tiles = tl.load(counts)
    num_splits = tl.load(counts + 1)
    # A captured grid may be larger than the batch: the CTAs past it take no tickets.
    if tl.program_id(0) < (num_tiles + num_splits) * KV_HEADS:
        op, item = take_ticket(
            counters, num_tiles * KV_HEADS, num_splits * KV_HEADS, PROPORTIONAL, NUM_SMS
        )
        if op == PREFILL:
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
                PREFILL_BLOCK_M,
                PREFILL_BLOCK_N,
                PAGE,
            )
        elif op == DECODE:
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
                DECODE_BLOCK_M,
                DECODE_BLOCK_N,
                PAGE,
            )


def pod_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
) -> None:
    """Write the attention of all of the plan's tokens to out."""
    if plan.config.policy not in ("proportional", "50:50"):
        raise ValueError(f"this POD has no policy {plan.config.policy!r}: see POLICIES")
    prefill, decode = plan.config.prefill, plan.config.decode
    if decode is None:
        raise ValueError("the plan lists decodes as chunks: make it with config_for('pod', ...)")
    if (prefill.num_warps, prefill.num_stages) != (decode.num_warps, decode.num_stages):
        raise ValueError(f"one launch needs one num_warps and num_stages, got {plan.config}")
    kv_stride = plan.require_tensors(q, k_cache, v_cache, out)
    _pod_kernel[(plan.num_prefill_items + plan.num_decode_items,)](
        q,
        k_cache,
        v_cache,
        out,
        plan.partial_out,
        plan.partial_lse,
        plan.counts,
        plan.tiles,
        plan.splits,
        plan.counters,
        plan.block_table,
        plan.max_len,
        softmax_scale(plan.head_dim),
        KV_HEADS=plan.num_kv_heads,
        GROUP=plan.num_q_heads // plan.num_kv_heads,
        HEAD_DIM=plan.head_dim,
        KV_STRIDE=kv_stride,
        PREFILL_BLOCK_M=prefill.block_m,
        PREFILL_BLOCK_N=prefill.block_n,
        DECODE_BLOCK_M=decode.block_m,
        DECODE_BLOCK_N=decode.block_n,
        PAGE=plan.page_size,
        PROPORTIONAL=plan.config.policy == "proportional",
        NUM_SMS=plan.num_sms,
        num_warps=prefill.num_warps,
        num_stages=prefill.num_stages,
    )
    combine_splits(out, plan)
