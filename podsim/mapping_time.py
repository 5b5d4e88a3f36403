"""The time of vAttention's mapping: what a step waits for, and what happens beside the steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat

from podsim.batch import Batch, BatchShape
from podsim.decode_group import Decodes
from podsim.memory_costs import MappingCosts
from podsim.step_memory import MemoryLog
from podsim.swap_time import SwapCopies
from podsim.vattention import Change, VAttentionCache

COLUMNS = ("time", "mapped_bytes", "held_bytes", "token_bytes", "stall")
"""Seconds; mapped: physical memory in any slot; held: of blocks that requests need; tokens: the
part of these that keys and values fill; stall: what the step waited."""
PEAKS = ("mapped_bytes_max", "unfilled_bytes_max", "fragmentation_bytes_max")
"""Of mapped, mapped less tokens, and held less tokens: each at a moment of its own."""


class MappingTime:
    """Charges the changes of a cache to the steps; see `podsim.step_memory.StepMemory`.

    What a step needs and is not mapped yet is mapped before it begins. Overlapped, a background
    thread maps in the order of need, from the moment the step is launched, what decodes will need
    within `look_ahead` steps; a step waits for those of its own blocks that are not ready, and
    before it maps itself for the thread to be through (so does the paper's code). A second of
    mapping beside steps makes them `interference` seconds longer. Without overlap nothing is mapped
    ahead. With `swap`, a step waits for its copies first, and then for its mapping.
    """

    def __init__(
        self,
        cache: VAttentionCache,
        waiting: MappingCosts,
        beside: MappingCosts | None = None,
        look_ahead: int = 1,
        interference: float = 0.0,
        swap: SwapCopies | None = None,
    ) -> None:
        """`waiting`: costs while a step waits. `beside`: in the background; None: no overlap."""
        self.cache = cache
        self.waiting = waiting
        self.beside = beside
        self.look_ahead = look_ahead
        self.interference = interference
        self.swap = swap
        self.log = MemoryLog(COLUMNS)
        self._ready = [0.0] * len(cache.mapped)
        """When the latest block of each slot is, or was, mapped."""
        self._idle_from = 0.0
        """When the background thread has nothing more to do."""
        self._stall = self._slower = 0.0
        self._outstanding = False
        self._in_prefill: dict[int, int] = {}
        self._totals = dict.fromkeys(
            ("stalled_steps", "stall_time", "background_time", "mapped_blocks", "unmapped_blocks"),
            0.0,
        )
        self._peaks = dict.fromkeys(PEAKS, 0.0)

    def begin(self, batch: Batch, shape: BatchShape, decodes: Decodes, start: float) -> None:
        needing = self.cache.slots_growing(batch, decodes)
        changes = self.cache.map_for(batch, decodes)
        if self.beside is None:
            changes += self.cache.unmap_idle()
        foreground = self._seconds(changes, self.waiting)
        copied = start if self.swap is None else start + self.swap.seconds()
        launch = max([copied, *(self._ready[slot] for slot in needing)])
        if foreground:
            launch = max(launch, self._idle_from) + foreground
        self._stall = launch - start
        self._slower = 0.0
        if self.beside is not None:
            self._map_ahead(decodes, self.beside, launch)
        self._outstanding = self._idle_from > launch
        self._count(batch, decodes, start)

    def _map_ahead(self, decodes: Decodes, costs: MappingCosts, launch: float) -> None:
        before = max(launch, self._idle_from)
        self._idle_from = before
        ahead = self.cache.map_ahead(decodes, self.look_ahead)
        for change in (*ahead, *self.cache.unmap_idle()):
            self._idle_from += self._seconds([change], costs)
            if change.maps:
                self._ready[change.slot] = self._idle_from
        seconds = self._idle_from - before
        self._totals["background_time"] += seconds
        self._slower = self.interference * seconds

    def most_steps(self, decodes: Decodes, num_steps: int) -> int:
        """Runs end where a block is needed or comes into sight, or while the thread is at work."""
        if self._outstanding:
            return 1
        ahead = 0 if self.beside is None else self.look_ahead
        for step in range(1, num_steps):
            if decodes.blocks_needed(step) or decodes.blocks_needed(step + ahead):
                return step
        return num_steps

    def step_times(self, times: Sequence[float]) -> list[float]:
        return [self._stall + times[0] + self._slower, *times[1:]]

    def _seconds(self, changes: Iterable[Change], costs: MappingCosts) -> float:
        seconds = 0.0
        tensors = self.cache.page_groups.num_tensors
        for change in changes:
            of = costs.map_seconds if change.maps else costs.unmap_seconds
            seconds += of(tensors, change.num_blocks)
            self._totals["mapped_blocks" if change.maps else "unmapped_blocks"] += change.num_blocks
        return seconds

    def _count(self, batch: Batch, decodes: Decodes, time: float) -> None:
        """Totals, and a row of the log."""
        cache, groups = self.cache, self.cache.page_groups
        token_bytes = groups.token_bytes * groups.num_tensors
        num_decodes, num_tokens, _ = decodes.contexts()
        num_tokens += self._prefill_tokens(batch)
        if not batch.num_decodes:  # they wait: their next tokens are not in the cache yet
            num_tokens -= num_decodes
        held = sum(cache.needed) * groups.block_bytes
        mapped = cache.num_mapped * groups.block_bytes
        filled = num_tokens * token_bytes
        self.log.append(time, mapped, held, filled, self._stall)
        self._totals["stall_time"] += self._stall
        self._totals["stalled_steps"] += self._stall > 0
        for name, value in zip(PEAKS, (mapped, mapped - filled, held - filled), strict=True):
            self._peaks[name] = max(self._peaks[name], float(value))

    def _prefill_tokens(self, batch: Batch) -> int:
        """Tokens in the cache, after this step, of prompts that are not complete before it."""
        tokens = {}
        for request, num_tokens in batch.prefills:
            tokens[self.cache.slot_of(request)] = request.num_computed_tokens + num_tokens
        begun = {slot: n for slot, n in self._in_prefill.items() if self.cache.needed[slot]}
        computed = {
            self.cache.slot_of(request)
            for request, num_tokens in batch.prefills
            if num_tokens == request.num_uncomputed_tokens
        }
        tokens = {**begun, **tokens}
        self._in_prefill = {slot: n for slot, n in tokens.items() if slot not in computed}
        return sum(tokens.values())

    def end(self, num_steps: int) -> None:
        self.log.hold_up([self._stall + self._slower, *repeat(0.0, num_steps - 1)])

    def notes(self) -> Sequence[str]:
        return () if self.swap is None else self.swap.notes()

    def summary(self) -> Mapping[str, float]:
        groups = self.cache.page_groups
        return {
            "page_group_bytes": groups.page_group,
            "tokens_per_page_group": groups.tokens_per_block,
            "block_bytes": groups.block_bytes,
            **self._totals,
            **self._peaks,
            **({} if self.swap is None else self.swap.summary()),
        }
