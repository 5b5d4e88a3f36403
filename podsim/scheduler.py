"""Schedulers: which tokens a replica computes in its next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

from podsim.batch import Batch, Chunk
from podsim.decode_group import DecodeGroup, Decodes
from podsim.kv_cache import PagedKVCache
from podsim.request import Request


@dataclass(slots=True)
class Completed:
    """What came out of a step, or of a run of steps, beside a token of each decode and step."""

    finished_decodes: list[Request] = field(default_factory=list)
    """Decodes that emitted their last token."""
    emitted: list[Request] = field(default_factory=list)
    """Requests whose prompt is now computed: each emitted one token, perhaps its last."""


class Scheduler(Protocol):
    """Builds batches and moves the requests' counters; it knows no clock."""

    @property
    def waiting(self) -> Collection[Request]: ...

    @property
    def running(self) -> Collection[Request]:
        """Requests that hold KV blocks, in order of admission."""

    @property
    def decodes(self) -> Decodes: ...

    def add(self, request: Request) -> None:
        """Queue a new request."""

    def schedule(self) -> Batch:
        """The work of the next step; an empty batch if there is none."""

    def complete(self, batch: Batch, num_steps: int) -> Completed:
        """Book the tokens of the batch's step, or of that many equal steps of decodes."""

    def repeats(self, batch: Batch) -> bool:
        """Whether the next batches are equal to this one (but for longer contexts) until a decode
        finishes, finds no block, or a new request is let in. False is always right, and slow.
        """

    def lets_in(self, request: Request) -> bool:
        """Whether a request that has just been added could be in the next batch. True is always
        right, and slow.
        """


class SarathiScheduler:
    """Stall-free batching (Sarathi-Serve, arXiv 2403.02310, Algorithm 3).

    Every running decode first, then the partly computed prompts, then new requests, in order of
    arrival, until the token budget is spent. A new request gets blocks for its whole prompt and
    is held back while it would leave fewer than `watermark` of the blocks free. A decode that
    finds no free block preempts the request admitted last, which will compute its tokens again.
    """

    def __init__(
        self,
        kv_cache: PagedKVCache,
        token_budget: int,
        max_num_seqs: int,
        watermark: float = 0.0,
        decodes: Decodes | None = None,
    ) -> None:
        self.kv_cache = kv_cache
        self.token_budget = token_budget
        self.max_num_seqs = max_num_seqs
        self.watermark_blocks = int(watermark * kv_cache.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: dict[Request, None] = {}
        self.prefilling: list[Request] = []
        self.decodes = DecodeGroup(kv_cache.block_size) if decodes is None else decodes
        self._num_admitted = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Batch:
        batch = Batch()
        preempted = self._take_decode_blocks(batch)
        if len(self.decodes):
            batch.num_decodes = len(self.decodes)
            batch.decode_context_sum = self.decodes.context_sum
            batch.decode_context_max = self.decodes.context_max
        budget = self._continue_prefills(batch, self.token_budget - batch.num_decodes)
        if not preempted:
            self._admit(batch, budget)
        return batch

    def _take_decode_blocks(self, batch: Batch) -> bool:
        """A block for each decode that needs one, oldest first; True if some were preempted."""
        if self.kv_cache.take(self.decodes.blocks_needed()):
            return False
        for request in self.decodes.needing_block():
            while request in self.running and not self.kv_cache.take(1):
                self._preempt_last(batch)
        return True

    def _preempt_last(self, batch: Batch) -> None:
        request, _ = self.running.popitem()
        decoding = request in self.decodes
        batch.preempted.append((request, decoding))
        if decoding:
            self.kv_cache.give_back(self.kv_cache.blocks_for(self.decodes.num_computed(request)))
            self.decodes.remove(request)
        else:
            self.kv_cache.give_back(request.num_blocks)
            self.prefilling.remove(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def _continue_prefills(self, batch: Batch, budget: int) -> int:
        """Continue prompts that have begun; the budget that is left."""
        for request in self.prefilling:
            if budget == 0:
                break
            budget -= self._add_chunk(batch, request, budget)
        return budget

    def _admit(self, batch: Batch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            num_blocks = self.kv_cache.blocks_for(request.num_known_tokens)
            if not self.kv_cache.take(num_blocks, self.watermark_blocks if self.running else 0):
                break
            self.waiting.popleft()
            request.num_blocks = num_blocks
            request.admission = self._num_admitted
            self._num_admitted += 1
            self.running[request] = None
            self.prefilling.append(request)
            budget -= self._add_chunk(batch, request, budget)

    def _add_chunk(self, batch: Batch, request: Request, budget: int) -> int:
        num_tokens = min(request.num_uncomputed_tokens, budget)
        batch.prefills.append(Chunk(request, num_tokens))
        return num_tokens

    def complete(self, batch: Batch, num_steps: int) -> Completed:
        done = Completed()
        if batch.num_decodes:
            done.finished_decodes = self.decodes.advance(num_steps)
            for request in done.finished_decodes:
                self._leave(request, self.kv_cache.blocks_for(request.num_computed_tokens))
        for request, num_tokens in batch.prefills:
            request.num_computed_tokens += num_tokens
            if request.num_uncomputed_tokens == 0:
                self.prefilling.remove(request)
                request.num_emitted_tokens += 1
                done.emitted.append(request)
                if request.is_finished:
                    self._leave(request, request.num_blocks)
                else:
                    self.decodes.add(request)
        return done

    def _leave(self, request: Request, num_blocks: int) -> None:
        self.kv_cache.give_back(num_blocks)
        del self.running[request]

    def repeats(self, batch: Batch) -> bool:
        return not batch.prefills and not batch.preempted

    def lets_in(self, request: Request) -> bool:
        return len(self.waiting) == 1 and len(self.running) < self.max_num_seqs
