"""What requests share: how much of the prompts an unlimited cache would hold already."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.workload_trace import Trace

Ints = NDArray[np.int64]


def hit_blocks(hash_ids: tuple[Ints, ...]) -> tuple[Ints, int]:
    """Of each request: how many of its first blocks an earlier request had, in order of arrival.

    Also the number of different blocks.
    """
    seen: set[int] = set()
    hits = []
    for ids in hash_ids:
        blocks = ids.tolist()
        hit = next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        seen.update(blocks[hit:])
        hits.append(hit)
    return np.array(hits, dtype=np.int64), len(seen)


def lru_hit_blocks(hash_ids: tuple[Ints, ...], capacity: int) -> float:
    """Share of all blocks that a cache of so many blocks holds, evicting the least recently used.

    In order of arrival, each prompt served at once; the blocks at its head count as used last.
    """
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for ids in hash_ids:
        blocks = ids.tolist()
        hits += next((i for i, block in enumerate(blocks) if block not in cached), len(blocks))
        for block in reversed(blocks):
            cached[block] = None
            cached.move_to_end(block)
        while len(cached) > capacity:
            cached.popitem(last=False)
    return hits / max(sum(map(len, hash_ids)), 1)


def prefix_statistics(trace: Trace) -> dict[str, float] | None:
    """The ideal prefix hits of a trace; None if it has no hash_ids.

    hit_blocks and hit_tokens are shares of all blocks and prompt tokens. A request never hits its
    last prompt token, which an engine computes in any case.
    """
    if trace.hash_ids is None or trace.hash_block_size is None:
        return None
    blocks = np.array([len(ids) for ids in trace.hash_ids], dtype=np.int64)
    hits, unique_blocks = hit_blocks(trace.hash_ids)
    tokens = np.minimum(hits * trace.hash_block_size, trace.num_prompt_tokens - 1)
    return {
        "block_size": trace.hash_block_size,
        "blocks": int(blocks.sum()),
        "unique_blocks": unique_blocks,
        "hit_blocks": float(hits.sum() / max(blocks.sum(), 1)),
        "hit_tokens": float(tokens.sum() / trace.num_prompt_tokens.sum()),
        "hit_tokens_mean_of_requests": float((tokens / trace.num_prompt_tokens).mean()),
        "requests_with_hit": float((hits > 0).mean()),
    }


def regrouped(trace: Trace, block_size: int) -> tuple[Ints, ...] | None:
    """The hash_ids of a trace for blocks of another size, one for each started block.

    Smaller blocks divide each block. Larger ones join full runs of blocks; a prompt's rest becomes
    a block that no other request has, so that no sharing is made up. None without hash_ids.
    InputError if neither size divides the other.
    """
    if trace.hash_ids is None or trace.hash_block_size is None:
        return None
    old = trace.hash_block_size
    if old % block_size and block_size % old:
        raise InputError(
            f"{trace.name}: blocks of {old} tokens cannot become blocks of {block_size}, expected "
            "a multiple or a divisor"
        )
    columns = list(trace.hash_ids)
    if old != block_size:
        columns = _dense(columns)
    if old > block_size:
        parts = np.arange(old // block_size)
        columns = [(ids[:, None] * len(parts) + parts).ravel() for ids in columns]
    elif old < block_size:
        run = block_size // old
        full = (trace.num_prompt_tokens // block_size).tolist()
        columns = [ids[run - 1 :: run][:n] for ids, n in zip(columns, full, strict=True)]
    return tuple(_completed(columns, -(-trace.num_prompt_tokens // block_size)))


def unshared(trace: Trace, block_size: int) -> tuple[Ints, ...]:
    """Blocks that no two requests share, one for each started block."""
    empty = [np.empty(0, dtype=np.int64)] * len(trace)
    return tuple(_completed(empty, -(-trace.num_prompt_tokens // block_size)))


def _dense(columns: list[Ints]) -> list[Ints]:
    """The same blocks numbered from 0, so that numbers can be multiplied."""
    _, numbers = np.unique(np.concatenate(columns), return_inverse=True)
    ends = np.cumsum([len(ids) for ids in columns])
    return np.split(numbers.astype(np.int64), ends[:-1])


def _completed(columns: list[Ints], blocks: Ints) -> list[Ints]:
    """Exactly so many numbers for each request: cut, or followed by new ones."""
    new = max((int(ids.max()) + 1 for ids in columns if len(ids)), default=0)
    completed = []
    for ids, count in zip(columns, blocks.tolist(), strict=True):
        lacking = max(count - len(ids), 0)
        completed.append(np.concatenate([ids[:count], np.arange(new, new + lacking)]))
        new += lacking
    return completed
