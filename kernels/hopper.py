"""Launchers of the Hopper kernels: the same plan, tensors and results as the portable ones.

The kernels are persistent, one CTA an SM, and read all that depends on the batch from the plan's
lists: a captured launch stays valid when the lists are refilled. The cache must hold finite
numbers everywhere, also past the contexts (see hopper_prefill.py).
"""

from typing import Any

import torch

from .config import STRATEGIES
from .decode import combine_splits
from .gluon_api import descriptor, require_hopper
from .hopper_kernels import decode_kernel, pod_kernel, prefill_kernel
from .plan import Plan
from .streams import concurrently
from .tile import softmax_scale

ROWS = 64  # query rows of a warpgroup
MIN_DECODE_HEADS = 8  # the narrow side of wgmma


def attention(
    strategy: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
) -> None:
    """Write the attention of the plan's batch to out, as attention.attention does."""
    tensors = q, k_cache, v_cache, out, plan
    if strategy == "serial":
        prefill_attention(*tensors)
        decode_attention(*tensors)
    elif strategy == "streams":
        concurrently(
            q.device,
            lambda: prefill_attention(*tensors, shared=True),
            lambda: decode_attention(*tensors),
        )
    elif strategy == "unified":
        prefill_attention(*tensors)
    elif strategy == "pod":
        pod_attention(*tensors)
    else:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")


def prefill_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
    shared: bool = False,
) -> None:
    """Write the attention of the plan's tiles to their rows of out.

    Shared: on as many SMs as the plan leaves to prefill, beside another kernel.
    """
    require_hopper(q.device)
    kv_stride = plan.require_tensors(q, k_cache, v_cache, out)
    if not plan.num_tiles:
        return
    tile = plan.config.prefill
    prefill_kernel[(min(plan.num_sms, plan.num_prefill_items),)](
        _prefill_queries(q, plan),
        *_caches(k_cache, v_cache, kv_stride, plan, tile.block_n),
        out,
        plan.counts,
        plan.tiles,
        plan.counters,
        plan.block_table,
        plan.max_len,
        softmax_scale(plan.head_dim),
        **_heads(plan),
        PACK=plan.pack,
        BLOCK_N=tile.block_n,
        STAGES=tile.num_stages,
        SHARED=shared,
        Q_BUFFERS=plan.config.query_buffers,
        num_warps=4,
    )


def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, plan: Plan
) -> None:
    """Write the attention of the plan's decodes to their rows of out; the chunks' rows stay."""
    require_hopper(q.device)
    kv_stride = plan.require_tensors(q, k_cache, v_cache, out)
    if not plan.num_splits:
        return
    tile = plan.config.decode
    assert tile is not None
    decode_kernel[(min(plan.num_sms, plan.num_decode_items),)](
        _decode_queries(q, plan),
        *_caches(k_cache, v_cache, kv_stride, plan, tile.block_n),
        out,
        plan.partial_out,
        plan.partial_lse,
        plan.counts,
        plan.splits,
        plan.counters,
        plan.block_table,
        plan.max_len,
        softmax_scale(plan.head_dim),
        **_heads(plan),
        HEADS=tile.block_m,
        BLOCK_N=tile.block_n,
        STAGES=tile.num_stages,
        num_warps=4,
    )
    combine_splits(out, plan)


def pod_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor, plan: Plan
) -> None:
    """Write the attention of all of the plan's tokens to out."""
    require_hopper(q.device)
    kv_stride = plan.require_tensors(q, k_cache, v_cache, out)
    prefill, decode = plan.config.prefill, plan.config.decode
    assert decode is not None
    prefill_registers, decode_registers, loader_registers = plan.config.registers
    if 0 < plan.page_size < 64:  # the loaders hold the rows of several pages
        prefill_registers -= 8
        loader_registers += 16
    pod_kernel[(plan.num_sms,)](
        _prefill_queries(q, plan),
        *_caches(k_cache, v_cache, kv_stride, plan, prefill.block_n),
        _decode_queries(q, plan),
        *_caches(k_cache, v_cache, kv_stride, plan, decode.block_n),
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
        **_heads(plan),
        PACK=plan.pack,
        HEADS=decode.block_m,
        PREFILL_BLOCK_N=prefill.block_n,
        PREFILL_STAGES=prefill.num_stages,
        DECODE_BLOCK_N=decode.block_n,
        DECODE_STAGES=decode.num_stages,
        PREFILL_REGISTERS=prefill_registers,
        DECODE_REGISTERS=decode_registers,
        LOADER_REGISTERS=loader_registers,
        num_warps=4,
    )
    combine_splits(out, plan)


def _heads(plan: Plan) -> dict[str, Any]:
    return {
        "KV_HEADS": plan.num_kv_heads,
        "GROUP": plan.group,
        "HEAD_DIM": plan.head_dim,
        "PAGE": plan.page_size,
    }


def _prefill_queries(q: torch.Tensor, plan: Plan) -> Any:
    return descriptor(q, [ROWS // plan.pack, plan.pack, plan.head_dim])


def _decode_queries(q: torch.Tensor, plan: Plan) -> Any:
    assert plan.config.decode is not None
    return descriptor(q.view(-1, plan.head_dim), [plan.config.decode.block_m, plan.head_dim])


def _caches(
    k_cache: torch.Tensor, v_cache: torch.Tensor, kv_stride: int, plan: Plan, block_n: int
) -> list[Any]:
    """K and V as rows of all heads, read in blocks of keys of one head, at most a page each."""
    block = [min(block_n, plan.page_size or block_n), plan.head_dim]
    num_keys = k_cache.shape[0] * k_cache.shape[1]
    rows = (num_keys, plan.num_kv_heads * plan.head_dim), (kv_stride, 1)
    return [descriptor(cache.as_strided(*rows), block) for cache in (k_cache, v_cache)]
