"""Attention kernels against float64 on random batches: `podsim kernels check`."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.random import Generator

from podsim.kernels.attention import attention, attention_reference
from podsim.kernels.config import config_for
from podsim.kernels.plan import AttentionPlan, Decode, PrefillChunk

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error, in the 2-norm, of the output of one request."""
HEADS = ((32, 8), (32, 32), (8, 1), (32, 2), (28, 4), (20, 4))
"""Groups of 4, 1, 8, 16, 7 and 5 query heads."""
PAGE_SIZES = (0, 16, 64, 256)
POISON = {torch.bfloat16: 1e30, torch.float16: 6e4}
"""What the cache holds past the contexts: no result may depend on it."""
SLICED = 0.25
"""Share of the batches whose cache is a layer's slice of a tensor over several layers."""
MAX_LEN = 4096
LONG_LEN = 131072


@dataclass(frozen=True, slots=True)
class Case:
    """Which kernel is checked."""

    strategy: str
    heads: tuple[int, int]
    head_dim: int
    dtype: torch.dtype
    page_size: int
    decode_heavy: bool


def cases(seed: int) -> list[Case]:
    """Every combination, in a random order."""
    kernels = [("pod", False), ("pod", True), ("serial", False), ("unified", False)]
    kernels.append(("streams", False))
    found = [
        Case(strategy, heads, head_dim, dtype, page_size, heavy)
        for (strategy, heavy), heads, head_dim, dtype, page_size in itertools.product(
            kernels, HEADS, (128, 64), TOLERANCE, PAGE_SIZES
        )
    ]
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order]


def check(
    kernels: str,
    chosen: Sequence[Case],
    seconds: float,
    batches_per_case: int,
    seed: int,
    on_batch: Callable[[Case, list[str]], None],
) -> None:
    """Check random batches for so many seconds; `on_batch` is told what was wrong with each."""
    rng = np.random.default_rng(seed)
    ends = time.perf_counter() + seconds
    for case in itertools.cycle(chosen):
        for number in range(batches_per_case):
            if time.perf_counter() > ends:
                return
            long = number == 0 and case.page_size in (0, 64)
            on_batch(case, faults(kernels, case, rng, LONG_LEN if long else MAX_LEN))


def faults(kernels: str, case: Case, rng: Generator, max_len: int) -> list[str]:
    """What is wrong with a case's results for a random batch: nothing, if all is well."""
    chunks, decodes = _batch(rng, max_len)
    num_slots = len(chunks) + len(decodes)
    table = _block_table(rng, num_slots, max_len, case.page_size)
    q, k_cache, v_cache = _tensors(case, rng, chunks, decodes, max_len, table)
    config = config_for(
        case.strategy,
        num_q_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim=case.head_dim,
        kernels=kernels,
        decode_heavy=case.decode_heavy,
    )
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    plan = AttentionPlan(
        chunks,
        decodes,
        num_q_heads=case.heads[0],
        num_kv_heads=case.heads[1],
        head_dim=case.head_dim,
        num_slots=num_slots,
        max_len=max_len,
        num_sms=int(rng.choice([sms, sms, int(rng.integers(1, sms + 1))])),
        config=replace(config, min_split_len=int(rng.choice([128, 256, 1024]))),
        page_size=case.page_size,
        block_table=table,
        device="cuda",
    )
    out = torch.full_like(q, float("nan"))
    attention(case.strategy, q, k_cache, v_cache, out, plan)
    expected = attention_reference(q, k_cache, v_cache, chunks, decodes, table)
    found = list(_wrong_requests(out, expected, chunks, decodes, TOLERANCE[case.dtype]))
    if bool(plan.counters.any()):
        found.append("the tickets are not back at zero")
    return found


def _batch(rng: Generator, max_len: int) -> tuple[list[PrefillChunk], list[Decode]]:
    """Up to 4 chunks and up to 512 decodes, one side empty now and then."""
    long = max_len > MAX_LEN
    num_chunks = int(rng.integers(0, 3 if long else 5))
    most = 3 if long else int(rng.choice([4, 24, 24, 512]))
    num_decodes = int(rng.integers(0 if num_chunks else 1, most + 1))
    slots = rng.permutation(num_chunks + num_decodes).tolist()
    chunks = []
    for slot in slots[:num_chunks]:
        tokens = _length(rng, 512)
        before = 0 if rng.random() < 0.3 else _length(rng, max_len - tokens)
        chunks.append(PrefillChunk(tokens, tokens + before, slot))
    return chunks, [Decode(_length(rng, max_len), slot) for slot in slots[num_chunks:]]


def _length(rng: Generator, most: int) -> int:
    return int(min(most, 2 ** rng.uniform(0, np.log2(most) + 0.1)))


def _block_table(
    rng: Generator, num_slots: int, max_len: int, page_size: int
) -> torch.Tensor | None:
    """Pages in a random order."""
    if not page_size:
        return None
    pages = rng.permutation(num_slots * (max_len // page_size)).astype(np.int32)
    return torch.from_numpy(pages.reshape(num_slots, -1)).cuda()


def _tensors(
    case: Case,
    rng: Generator,
    chunks: list[PrefillChunk],
    decodes: list[Decode],
    max_len: int,
    table: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(int(rng.integers(1 << 31)))

    def normal(*shape: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=case.dtype, device="cuda")
        return values.normal_(generator=generator)

    num_tokens = sum(chunk.num_tokens for chunk in chunks) + len(decodes)
    num_slots = len(chunks) + len(decodes)
    q = normal(num_tokens, case.heads[0], case.head_dim)
    shape = (num_slots, max_len, case.heads[1], case.head_dim)
    k_cache, v_cache = normal(*shape), normal(*shape)
    for request in (*chunks, *decodes):
        for cache in (k_cache, v_cache):
            cache[request.slot, request.context_len :] = POISON[case.dtype]
    if table is not None:
        k_cache, v_cache = (_paged(cache, table, case.page_size) for cache in (k_cache, v_cache))
    if rng.random() < SLICED:
        k_cache, v_cache = (_sliced(cache, POISON[case.dtype]) for cache in (k_cache, v_cache))
    return q, k_cache, v_cache


def _sliced(cache: torch.Tensor, poison: float) -> torch.Tensor:
    """The same as the second layer of a tensor over two, whose keys lie beside one another."""
    layers = torch.full_like(cache, poison).unsqueeze(2).repeat(1, 1, 2, 1, 1)
    layers[:, :, 1] = cache
    return layers[:, :, 1]


def _paged(cache: torch.Tensor, table: torch.Tensor, page_size: int) -> torch.Tensor:
    pages = cache.view(table.numel(), page_size, *cache.shape[2:])
    scattered = torch.empty_like(pages)
    scattered[table.flatten().long()] = pages
    return scattered


def _wrong_requests(
    out: torch.Tensor,
    expected: torch.Tensor,
    chunks: list[PrefillChunk],
    decodes: list[Decode],
    tolerance: float,
) -> Iterator[str]:
    sizes = [chunk.num_tokens for chunk in chunks] + [1] * len(decodes)
    parts = zip((*chunks, *decodes), out.double().split(sizes), expected.split(sizes), strict=True)
    for request, got, want in parts:
        error = float((got - want).norm() / want.norm())
        if not error < tolerance:
            yield f"{request}: relative error {error:.1e}"
