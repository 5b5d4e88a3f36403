"""Schedulers: which tokens a replica computes in its next step."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from podsim.batch import Batch, Chunk
from podsim.kv_cache import PagedKVCache
from podsim.request import Request


class Scheduler(Protocol):
    """Builds batches and moves the requests' counters; it knows no clock."""

    waiting: deque[Request]
    running: list[Request]

    def add(self, request: Request) -> None:
        """Queue a new request."""

    def schedule(self) -> Batch:
        """The work of the next step; an empty batch if there is none."""

    def complete(self, batch: Batch) -> list[Request]:
        """Book the step's tokens; the requests that emitted one, the finished ones among them."""


class SarathiScheduler:
    """Stall-free batching (Sarathi-Serve, arXiv 2403.02310, Algorithm 3).

    Every running decode first, then the partly computed prompts, then new requests, in order of
    arrival, until the token budget is spent. A new request gets blocks for its whole prompt and
    is held back while it would leave fewer than `watermark` of the blocks free. A decode that
    finds no free block preempts the request admitted last, which will compute its tokens again.
    """

    def __init__(
        self, kv_cache: PagedKVCache, token_budget: int, max_num_seqs: int, watermark: float = 0.0
    ) -> None:
        self.kv_cache = kv_cache
        self.token_budget = token_budget
        self.max_num_seqs = max_num_seqs
        self.watermark_blocks = int(watermark * kv_cache.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self) -> Batch:
        batch = Batch()
        preempted = self._schedule_decodes(batch)
        budget = self.token_budget - len(batch.decodes)
        budget -= self._schedule_partial_prefills(batch, budget)
        if not preempted:
            self._admit(batch, budget)
        return batch

    def _schedule_decodes(self, batch: Batch) -> bool:
        """Take every decode, oldest first; True if a request had to be preempted."""
        preempted = False
        index = 0
        while index < len(self.running):
            request = self.running[index]
            if request.is_decoding:
                while not self.kv_cache.grow(request, request.num_computed_tokens + 1):
                    preempted = True
                    if self._preempt_last() is request:
                        return True
                batch.decodes.append(request)
            index += 1
        return preempted

    def _preempt_last(self) -> Request:
        request = self.running.pop()
        self.kv_cache.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.appendleft(request)
        return request

    def _schedule_partial_prefills(self, batch: Batch, budget: int) -> int:
        """Continue started prompts; the tokens taken."""
        left = budget
        for request in self.running:
            if left == 0:
                break
            if not request.is_decoding:
                num_tokens = min(request.num_uncomputed_tokens, left)
                batch.prefills.append(Chunk(request, num_tokens))
                left -= num_tokens
        return budget - left

    def _admit(self, batch: Batch, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            keep_free = self.watermark_blocks if self.running else 0
            if not self.kv_cache.grow(request, request.num_known_tokens, keep_free):
                break
            self.running.append(self.waiting.popleft())
            num_tokens = min(request.num_uncomputed_tokens, budget)
            batch.prefills.append(Chunk(request, num_tokens))
            budget -= num_tokens

    def complete(self, batch: Batch) -> list[Request]:
        emitting = list(batch.decodes)
        for request in emitting:
            request.num_computed_tokens += 1
            request.num_emitted_tokens += 1
        for request, num_tokens in batch.prefills:
            request.num_computed_tokens += num_tokens
            if request.num_uncomputed_tokens == 0:
                request.num_emitted_tokens += 1
                emitting.append(request)
        finished = [request for request in emitting if request.is_finished]
        if finished:
            for request in finished:
                self.kv_cache.free(request)
            self.running = [request for request in self.running if not request.is_finished]
        return emitting
