"""The KV manager of `--kv paged`: which physical blocks hold the tokens of a request, in order."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from podsim.batch import Chunk
from podsim.kv_cache import PagedKVCache
from podsim.prefix_cache import PrefixCache
from podsim.request import Request
from podsim.swap_space import SwapSpace


class NewBlocks(NamedTuple):
    """Physical blocks that a slot has from its block number `first` on."""

    slot: int
    first: int
    blocks: Sequence[int]


class PagedBlocks(PagedKVCache):
    """Beside counting blocks, knows which they are, and in which slot (row of the table) a request
    has them.

    The counts decide who gets how many. Who computes steps for real asks `allot` before each which
    ones they are; the simulator does without. Blocks go out as vLLM's queue has them: those never
    used first, then those freed longest ago, the last of a request before its first. The lowest
    free slot is taken, so that few rows of a table are in use.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        prefixes: PrefixCache | None = None,
        swap: SwapSpace | None = None,
    ) -> None:
        super().__init__(num_blocks, block_size, prefixes, swap)
        self._num_used_once = 0
        self._freed: deque[int] = deque()
        self._free_slots = list(range(num_slots))
        self._slot: dict[Request, int] = {}
        self._blocks: dict[Request, list[int]] = {}

    def slot_of(self, request: Request) -> int:
        return self._slot[request]

    def blocks_of(self, request: Request) -> Sequence[int]:
        """Its physical blocks, in the order of its tokens."""
        return self._blocks.get(request, ())

    def start(self, request: Request, num_tokens: int, keep_free: int) -> bool:
        if not super().start(request, num_tokens, keep_free):
            return False
        self._slot[request] = heapq.heappop(self._free_slots)
        return True

    def release(self, request: Request, num_blocks: int) -> None:
        super().release(request, num_blocks)
        heapq.heappush(self._free_slots, self._slot.pop(request))
        blocks = self._blocks.pop(request, [])
        assert len(blocks) in (0, num_blocks), "counted otherwise than given out"
        self._freed.extend(reversed(blocks))

    def allot(self, chunks: Iterable[Chunk], decodes: Iterable[Request]) -> list[NewBlocks]:
        """Physical blocks for all that the requests of a step were counted and have not got yet."""
        found: list[NewBlocks] = []
        for request, _ in chunks:
            self._extend(request, request.num_blocks, found)
        for request in decodes:
            full, within = divmod(request.num_computed_tokens, self.block_size)
            if not within:
                self._extend(request, full + 1, found)
        return found

    def _extend(self, request: Request, num_blocks: int, found: list[NewBlocks]) -> None:
        blocks = self._blocks.setdefault(request, [])
        first = len(blocks)
        if num_blocks > first:
            blocks += [self._next_block() for _ in range(num_blocks - first)]
            found.append(NewBlocks(self._slot[request], first, blocks[first:]))

    def _next_block(self) -> int:
        if self._num_used_once < self.num_blocks:
            self._num_used_once += 1
            return self._num_used_once - 1
        return self._freed.popleft()


class BlockTable:
    """What kernels read of it: [num_slots, blocks_per_slot] int32, here on the host.

    Entries after a request's last block are of an earlier one, or 0: blocks that exist.
    """

    def __init__(self, entries: NDArray[np.int32], block_size: int) -> None:
        self.entries = entries
        self.block_size = block_size

    def enter(self, new_blocks: Iterable[NewBlocks]) -> None:
        for slot, first, blocks in new_blocks:
            self.entries[slot, first : first + len(blocks)] = blocks

    def rows(self, slots: NDArray[np.int32], positions: NDArray[np.int32]) -> NDArray[np.int32]:
        """Of each token, its row in the cache as [num_blocks * block_size] rows."""
        block, within = np.divmod(positions, np.int32(self.block_size))
        rows: NDArray[np.int32] = self.entries[slots, block] * np.int32(self.block_size) + within
        return rows
