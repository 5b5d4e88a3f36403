"""FlashInfer's kernels on the same batches, where it is installed, to judge ours by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from podsim.kernels.plan import Decode, PrefillChunk

PAGE_SIZE = 16
WORKSPACE_BYTES = 256 << 20

Launch = Callable[[], Any]


def launches(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    chunks: Sequence[PrefillChunk],
    decodes: Sequence[Decode],
) -> dict[str, Launch]:
    """FA3 prefill, tensor-core decode, both in turn, its POD and its BatchPOD.

    `k_cache` and `v_cache` are [num_slots, max_len, num_kv_heads, head_dim] with max_len a multiple
    of PAGE_SIZE; FlashInfer reads them as pages in order. Raises ModuleNotFoundError without it.
    """
    import flashinfer

    num_q_heads, head_dim = q.shape[1:]
    heads = (num_q_heads, k_cache.shape[2], head_dim)
    pages = tuple(cache.view(-1, PAGE_SIZE, *cache.shape[2:]) for cache in (k_cache, v_cache))
    per_slot = k_cache.shape[1] // PAGE_SIZE
    num_prefill = sum(chunk.num_tokens for chunk in chunks)
    queries, singles = q[:num_prefill].contiguous(), q[num_prefill:].contiguous()
    starts = _int32([0, *torch.tensor([c.num_tokens for c in chunks]).cumsum(0).tolist()])
    ones = _int32(range(len(decodes) + 1))
    kinds: dict[str, Any] = {"q_data_type": q.dtype, "kv_data_type": q.dtype}

    prefill = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa3")
    chunk_pages = _page_lists(chunks, per_slot)
    prefill.plan(starts, *chunk_pages, *heads, PAGE_SIZE, causal=True, **kinds)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "NHD", use_tensor_cores=True
    )
    decode_pages = _page_lists(decodes, per_slot)
    decode.plan(*decode_pages, *heads, PAGE_SIZE, **kinds)
    batch_pod = flashinfer.BatchPODWithPagedKVCacheWrapper(_workspace(), "NHD")
    batch_pod.plan(starts, *chunk_pages, ones, *decode_pages, *heads, PAGE_SIZE, **kinds)

    def serial() -> None:
        found["fi prefill"]()
        found["fi decode"]()

    found: dict[str, Launch] = {
        "fi prefill": lambda: prefill.run(queries, pages),
        "fi decode": lambda: decode.run(singles, pages),
        "fi serial": serial,
        "fi batch pod": lambda: batch_pod.run(queries, pages, singles, pages, causal_p=True),
    }
    if len(chunks) == 1:
        chunk = chunks[0]
        keys, values = (cache[chunk.slot, : chunk.context_len] for cache in (k_cache, v_cache))
        pod = flashinfer.PODWithPagedKVCacheWrapper(_workspace(), "NHD")
        pod.plan(*decode_pages, *heads, PAGE_SIZE, **kinds)
        # A single request may also use the kernel for contiguous keys, which is faster.
        found["fi prefill"] = lambda: flashinfer.single_prefill_with_kv_cache(
            queries, keys, values, causal=True, backend="fa3"
        )
        found["fi pod"] = lambda: pod.run(queries, keys, values, singles, pages, causal_p=True)
    return found


def _page_lists(
    requests: Sequence[PrefillChunk | Decode], pages_per_slot: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each request: where its pages start, the pages, and the keys in its last one."""
    starts, indices, last = [0], list[int](), list[int]()
    for request in requests:
        count = -(-request.context_len // PAGE_SIZE)
        first = request.slot * pages_per_slot
        indices += range(first, first + count)
        starts.append(len(indices))
        last.append(request.context_len - (count - 1) * PAGE_SIZE)
    return _int32(starts), _int32(indices), _int32(last)


def _int32(values: Any) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device="cuda")


def _workspace() -> torch.Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
