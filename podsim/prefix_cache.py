"""Prompt prefixes that stay in the KV cache for later requests: least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from podsim.errors import InputError


class PrefixCache:
    """Whole blocks of prompts, by the trace's hash ids; an id implies all blocks before it.

    A block of the trace is a whole number of KV blocks. A block that requests use is pinned; one
    that none uses stays until its room is needed.
    """

    def __init__(self, hash_block_size: int, block_size: int) -> None:
        if hash_block_size % block_size:
            raise InputError(
                f"block_size is {block_size}, expected a divisor of {hash_block_size}: "
                "the tokens of a hash id in this trace"
            )
        self.hash_block_size = hash_block_size
        self.blocks_per_id = hash_block_size // block_size
        self._users: dict[int, int] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def num_unused_blocks(self) -> int:
        """KV blocks that could be evicted."""
        return len(self._unused) * self.blocks_per_id

    def match(self, hash_ids: Sequence[int], num_tokens: int) -> int:
        """How many ids at the start of a prompt of `num_tokens` are here.

        At least one token is left to compute: the one whose logits give the first output.
        """
        most = min(len(hash_ids), (num_tokens - 1) // self.hash_block_size)
        for index in range(most):
            if hash_ids[index] not in self._users:
                return index
        return most

    def num_unused(self, hash_ids: Sequence[int]) -> int:
        """KV blocks of these ids that nobody uses."""
        return sum(hash_id in self._unused for hash_id in hash_ids) * self.blocks_per_id

    def pin(self, hash_ids: Sequence[int]) -> None:
        """Use blocks that are here."""
        for hash_id in hash_ids:
            self._users[hash_id] += 1
            self._unused.pop(hash_id, None)

    def insert(self, hash_ids: Sequence[int]) -> list[int]:
        """Keep new blocks, used by the caller; the ids that were not here before."""
        new = [hash_id for hash_id in hash_ids if hash_id not in self._users]
        for hash_id in new:
            self._users[hash_id] = 1
        return new

    def unpin(self, hash_ids: Sequence[int]) -> None:
        """Stop using blocks; the end of a prompt is evicted before its beginning."""
        for hash_id in reversed(hash_ids):
            self._users[hash_id] -= 1
            if self._users[hash_id] == 0:
                self._unused[hash_id] = None

    def evict(self, num_blocks: int) -> int:
        """Drop the blocks unused for longest until `num_blocks` are free; how many became free."""
        freed = 0
        while freed < num_blocks:
            hash_id, _ = self._unused.popitem(last=False)
            del self._users[hash_id]
            freed += self.blocks_per_id
        return freed
