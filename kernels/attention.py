"""Attention of a batch of prefill chunks and decodes, by one of four strategies.

serial    the prefill launch, then the decode launch
streams   the two launches on two CUDA streams
unified   one variable-length launch in which a decode is a chunk of one token
pod       one launch that runs both operations on each SM

q, out            [num_tokens, num_q_heads, head_dim]: the chunks' tokens, then the decodes'
k_cache, v_cache  [num_slots, max_len, num_kv_heads, head_dim]: one slot a request; keys lie at
                  equal distances, so a layer's slice of one tensor over all layers will do
"""

from collections.abc import Callable, Sequence

import torch

from .config import STRATEGIES
from .decode import decode_attention
from .plan import Decode, Plan, PrefillChunk
from .pod import pod_attention
from .prefill import prefill_attention
from .streams import concurrently
from .unified import unified_attention


def attention(
    strategy: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
) -> None:
    """Write the attention of the plan's batch to out; the plan's config must suit the strategy."""
    if plan.config.kernels == "hopper":
        from . import hopper  # Gluon neither imports with TRITON_INTERPRET=1 nor before Triton 3.6

        hopper.attention(strategy, q, k_cache, v_cache, out, plan)
        return
    if strategy == "serial":
        prefill_attention(q, k_cache, v_cache, out, plan)
        decode_attention(q, k_cache, v_cache, out, plan)
    elif strategy == "streams":
        concurrently(
            q.device,
            lambda: prefill_attention(q, k_cache, v_cache, out, plan),
            lambda: decode_attention(q, k_cache, v_cache, out, plan),
        )
    elif strategy == "unified":
        unified_attention(q, k_cache, v_cache, out, plan)
    elif strategy == "pod":
        pod_attention(q, k_cache, v_cache, out, plan)
    else:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")


def prepared(
    strategy: str,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
) -> Callable[[], None]:
    """Capture the launches in a CUDA graph, which a call replays: it costs the host some 2 us.

    A call reads the tensors and the plan's lists as they are then. Interpreted, it launches anew.
    """
    if q.device.type != "cuda":
        return lambda: attention(strategy, q, k_cache, v_cache, out, plan)
    stream = torch.cuda.Stream(q.device)
    stream.wait_stream(torch.cuda.current_stream(q.device))
    with torch.cuda.stream(stream):
        attention(strategy, q, k_cache, v_cache, out, plan)  # compiles, which a capture must not
    torch.cuda.current_stream(q.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention(strategy, q, k_cache, v_cache, out, plan)
    return graph.replay


def attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    chunks: Sequence[PrefillChunk],
    decodes: Sequence[Decode],
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the attention of a batch in float64, request by request."""
    out = torch.empty_like(q, dtype=torch.float64)
    num_q_heads, head_dim = q.shape[1:]
    group = num_q_heads // k_cache.shape[2]
    start = 0
    for request in (*chunks, *decodes):
        num_tokens = request.num_tokens if isinstance(request, PrefillChunk) else 1
        queries = q[start : start + num_tokens].double()  # [tokens, q heads, head_dim]
        pages = request.slot if block_table is None else block_table[request.slot].long()
        keys, values = (  # [context, kv heads, head_dim]
            cache[pages].flatten(0, -3)[: request.context_len].double()
            for cache in (k_cache, v_cache)
        )
        keys = keys.repeat_interleave(group, dim=1)  # [context, q heads, head_dim]
        values = values.repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,chd->htc", queries, keys) / head_dim**0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device)
        future = future.triu(request.context_len - num_tokens + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        out[start : start + num_tokens] = torch.einsum("htc,chd->thd", weights, values)
        start += num_tokens
    return out
