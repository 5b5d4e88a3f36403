"""vAttention's bookkeeping: which physical blocks are mapped into which slot, and what to map next.

It knows no clock and calls no driver. The simulator charges the changes it asks for, the engine
carries them out. Policies: arXiv 2405.04437, section 6, and the paper's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from podsim.batch import Batch
from podsim.decode_group import Decodes
from podsim.kv_cache import PagedKVCache
from podsim.page_groups import PageGroups
from podsim.request import Request
from podsim.swap_space import SwapSpace


class Change(NamedTuple):
    """Blocks `first` to `last` (excluded) of a slot are to be mapped, or unmapped."""

    slot: int
    first: int
    last: int
    maps: bool

    @property
    def num_blocks(self) -> int:
        return self.last - self.first


class VAttentionCache(PagedKVCache):
    """Blocks mapped on demand into slots; see `podsim.page_groups` for what a block is.

    As of any KV cache, `num_used_blocks` counts what the requests hold. Beyond these, blocks may be
    mapped that nobody uses: of slots whose request has left (deferred reclamation), ahead of a
    request's growth, or in a slot kept ready (`eager_blocks`). They count as free, and are unmapped
    when physical blocks run out.
    """

    def __init__(
        self,
        num_blocks: int,
        page_groups: PageGroups,
        num_slots: int,
        *,
        deferred: bool = True,
        eager_blocks: int = 0,
        swap: SwapSpace | None = None,
    ) -> None:
        super().__init__(num_blocks, page_groups.tokens_per_block, swap=swap)
        self.page_groups = page_groups
        self.deferred = deferred
        self.eager_blocks = eager_blocks
        self.num_unmapped = num_blocks
        """Physical blocks that no slot has."""
        self.mapped = [0] * num_slots
        """Blocks of each slot, from its beginning on."""
        self.needed = [0] * num_slots
        """How many of them its request has need of by now; 0 of an idle slot."""
        self._slot: dict[Request, int] = {}
        self._idle = dict.fromkeys(range(num_slots))

    @property
    def num_mapped(self) -> int:
        return self.num_blocks - self.num_unmapped

    def slot_of(self, request: Request) -> int:
        return self._slot[request]

    # ---- requests come and go

    def start(self, request: Request, num_tokens: int, keep_free: int) -> bool:
        if not super().start(request, num_tokens, keep_free):
            return False
        slot = self._best_fit(self.blocks_for(num_tokens))
        del self._idle[slot]
        self._slot[request] = slot
        return True

    def release(self, request: Request, num_blocks: int) -> None:
        super().release(request, num_blocks)
        slot = self._slot.pop(request)
        self.needed[slot] = 0
        self._idle[slot] = None

    def _best_fit(self, num_blocks: int) -> int:
        """The idle slot with the fewest blocks that suffice, or else with the most."""
        enough = [slot for slot in self._idle if self.mapped[slot] >= num_blocks]
        if enough:
            return min(enough, key=lambda slot: (self.mapped[slot], slot))
        return max(self._idle, key=lambda slot: (self.mapped[slot], -slot))

    # ---- what a step needs

    def map_for(self, batch: Batch, decodes: Decodes) -> list[Change]:
        """What must be changed before the batch can be computed, in this order."""
        changes: list[Change] = []
        for slot, needed in self._needs(batch, decodes):
            self.needed[slot] = needed
            changes += self._grow(slot, needed)
        return changes

    def slots_growing(self, batch: Batch, decodes: Decodes) -> list[int]:
        """Slots of which the batch writes into a block for the first time."""
        return [slot for slot, _ in self._needs(batch, decodes)]

    def _needs(self, batch: Batch, decodes: Decodes) -> Iterator[tuple[int, int]]:
        """Slots with a chunk, or with a decode that begins a block, and the blocks they need."""
        for request, num_tokens in batch.prefills:
            yield self._slot[request], self.blocks_for(request.num_computed_tokens + num_tokens)
        if batch.num_decodes:
            for request in decodes.needing_block():
                yield self._slot[request], self.blocks_for(decodes.num_computed(request) + 1)

    def map_ahead(self, decodes: Decodes, num_steps: int) -> list[Change]:
        """What decodes will need in the coming steps, and the slot kept ready, as far as there is
        memory that nobody holds.
        """
        changes = []
        for step in range(1, num_steps + 1):
            if not decodes.blocks_needed(step):
                continue
            for request in decodes.needing_block(step):
                slot = self._slot[request]
                stored_at_most = request.num_prompt_tokens + request.num_output_tokens - 1
                coming = decodes.num_computed(request) + step + 1
                wanted = self.blocks_for(min(coming, stored_at_most))
                if self.mapped[slot] < wanted and self._can_grow(wanted - self.mapped[slot]):
                    changes += self._grow(slot, wanted)
        if self.eager_blocks and self._idle:
            slot = max(self._idle, key=lambda slot: (self.mapped[slot], -slot))
            wanted = min(self.eager_blocks, self.mapped[slot] + self.num_unmapped)
            if wanted > self.mapped[slot]:
                changes += self._grow(slot, wanted)
        return changes

    # ---- physical blocks

    def _can_grow(self, num_blocks: int) -> bool:
        """Whether physical blocks are free, or mapped into idle slots."""
        return num_blocks <= self.num_unmapped + sum(self.mapped[slot] for slot in self._idle)

    def _grow(self, slot: int, num_blocks: int) -> list[Change]:
        """Map a slot up to so many blocks, after unmapping others' if it takes that."""
        missing = num_blocks - self.mapped[slot]
        if missing <= 0:
            return []
        changes = self._reclaim(missing - self.num_unmapped, slot)
        changes.append(Change(slot, self.mapped[slot], num_blocks, maps=True))
        self.num_unmapped -= missing
        self.mapped[slot] = num_blocks
        return changes

    def _reclaim(self, num_blocks: int, keep: int) -> list[Change]:
        """Unmap so many blocks that nobody uses: idle slots' first, then those mapped ahead."""
        changes: list[Change] = []
        idle = sorted(self._idle, reverse=True)
        held = sorted(self._slot.values(), reverse=True)
        for slot in (*idle, *held):
            if num_blocks <= 0:
                break
            surplus = self.mapped[slot] - self.needed[slot]
            if slot == keep or surplus <= 0:
                continue
            taken = min(surplus, num_blocks)
            changes.append(self._unmap(slot, self.mapped[slot] - taken))
            num_blocks -= taken
        assert num_blocks <= 0, "requests hold more blocks than there are"
        return changes

    def unmap_idle(self) -> list[Change]:
        """What slots without a request give back; nothing if reclamation is deferred."""
        if self.deferred:
            return []
        return [
            self._unmap(slot, min(self.eager_blocks, self.mapped[slot]))
            for slot in self._idle
            if self.mapped[slot] > self.eager_blocks
        ]

    def _unmap(self, slot: int, keep: int) -> Change:
        """Unmap all but the first `keep` blocks of a slot."""
        change = Change(slot, keep, self.mapped[slot], maps=False)
        self.num_unmapped += change.num_blocks
        self.mapped[slot] = keep
        return change
