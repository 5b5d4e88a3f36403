"""Schedulers: which tokens a replica computes in its next step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Protocol

from podsim.batch import Batch, BatchShape, Chunk, PrefillShape
from podsim.config import Deployment
from podsim.decode_group import Decodes
from podsim.kv_cache import PagedKVCache
from podsim.request import Request
from podsim.waiting import Waiting

StepTime = Callable[[BatchShape], float]


@dataclass(slots=True)
class Completed:
    """What came out of a step, or of a run of steps, beside a token of each decode and step."""

    finished_decodes: list[Request] = field(default_factory=list)
    """Decodes that emitted their last token."""
    emitted: list[Request] = field(default_factory=list)
    """Requests whose prompt is now computed: each emitted one token, perhaps its last."""


class Scheduler(Protocol):
    """Builds batches and moves the requests' counters; it knows no clock."""

    token_budget: int
    """Most tokens of a step."""

    @property
    def waiting(self) -> Collection[Request]:
        """Requests that hold no KV blocks, in the order in which they are let in."""

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


class _Scheduler(ABC):
    """What all schedulers here share: the state, preemption, and the booking of a step.

    A decode that finds no free block preempts the request admitted last, which gives back its
    blocks, waits at the head of the queue, and will compute its tokens again: only the latest one
    if the others were swapped out.
    """

    whole_prompts = False
    """Whether prompts are computed in one step; then the token budget must hold the longest."""
    keeps_watermark = True

    def __init__(
        self,
        kv_cache: PagedKVCache,
        deployment: Deployment,
        decodes: Decodes,
        step_time: StepTime,
    ) -> None:
        self.kv_cache = kv_cache
        self.deployment = deployment
        self.step_time = step_time
        self.token_budget = deployment.token_budget
        self.max_num_seqs = deployment.max_num_seqs
        self.max_prefills = deployment.max_prefills or deployment.max_num_seqs
        self.chunk_size = deployment.chunk_size or deployment.token_budget
        watermark = deployment.watermark if self.keeps_watermark else 0.0
        self.watermark_blocks = int(watermark * kv_cache.num_blocks)
        self.waiting = Waiting(deployment.order)
        self.running: dict[Request, None] = {}
        self.prefilling: list[Request] = []
        self.decodes = decodes
        self._num_admitted = 0

    @abstractmethod
    def schedule(self) -> Batch:
        """The policy."""

    def add(self, request: Request) -> None:
        self.waiting.add(request)

    def repeats(self, batch: Batch) -> bool:
        return not batch.prefills and not batch.preempted

    def lets_in(self, request: Request) -> bool:
        return self.waiting.first() is request and len(self.running) < self.max_num_seqs

    # ---- parts of a batch

    def _add_decodes(self, batch: Batch) -> None:
        """Every decode, with a block for each that needs one."""
        decodes = self.decodes
        if not self.kv_cache.take(decodes.blocks_needed()):
            for request in decodes.needing_block():
                while request in self.running and not self.kv_cache.take(1):
                    self._preempt(next(reversed(self.running)), batch)
        num_decodes, context_sum, context_max = decodes.contexts()
        if num_decodes:
            batch.num_decodes = num_decodes
            batch.decode_context_sum = context_sum
            batch.decode_context_max = context_max

    def _preempt(self, request: Request, batch: Batch) -> None:
        del self.running[request]
        decoding = request in self.decodes
        batch.preempted.append((request, decoding))
        if decoding:
            computed = self.decodes.num_computed(request)
            held = self.kv_cache.blocks_for(computed)
            self.decodes.remove(request)
        else:
            computed, held = request.num_computed_tokens, request.num_blocks
            self.prefilling.remove(request)
        self.kv_cache.swap_out(request, computed)
        self.kv_cache.release(request, held)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.waiting.add_preempted(request)

    def _can_admit(self, batch: Batch) -> bool:
        return (
            len(self.waiting) > 0
            and len(self.running) < self.max_num_seqs
            and len(batch.prefills) < self.max_prefills
        )

    def _admit_first(self, batch: Batch, num_tokens: int, num_blocks_for: int) -> bool:
        """Let the first in line begin with a chunk, if there are blocks for so many tokens."""
        request = self.waiting.first()
        keep_free = self.watermark_blocks if self.running else 0
        cached = self.kv_cache.cached_tokens(request)
        if not self.kv_cache.start(request, num_blocks_for, keep_free):
            return False
        self.waiting.pop_first()
        request.num_computed_tokens = cached
        if request.scheduled_time < 0:
            request.num_cached_tokens = cached
        request.admission = self._num_admitted
        self._num_admitted += 1
        self.running[request] = None
        self.prefilling.append(request)
        batch.prefills.append(Chunk(request, num_tokens))
        return True

    # ---- booking

    def complete(self, batch: Batch, num_steps: int) -> Completed:
        finished = self.decodes.advance(num_steps) if batch.num_decodes else []
        for request in finished:
            self._leave(request, self.kv_cache.blocks_for(request.num_computed_tokens))
        emitted = []
        for request, num_tokens in batch.prefills:
            request.num_computed_tokens += num_tokens
            if request.num_uncomputed_tokens == 0:
                self._emit(request)
                emitted.append(request)
        return Completed(finished, emitted)

    def _emit(self, request: Request) -> None:
        """The first token after a computed prompt."""
        self.prefilling.remove(request)
        self.kv_cache.keep_prompt(request)
        request.num_emitted_tokens += 1
        if request.is_finished:
            self._leave(request, request.num_blocks)
        else:
            self.decodes.add(request)

    def _leave(self, request: Request, num_blocks: int) -> None:
        self.kv_cache.release(request, num_blocks)
        del self.running[request]


class SarathiScheduler(_Scheduler):
    """Stall-free batching (Sarathi-Serve, arXiv 2403.02310, Algorithm 3).

    Every running decode first, then the partly computed prompts, then new requests, until the
    token budget is spent. A new request gets blocks for its whole prompt and is held back while it
    would leave fewer than `watermark` of the blocks free.

    Options: `chunk_size` (most tokens of one prompt in a step), `max_prefills` (1 is the own
    integration of POD-Attention), `tbt_target`: spend the largest budget, in steps of 64 tokens,
    with which the next prompt in line is predicted to keep the step below the target.
    """

    def schedule(self) -> Batch:
        batch = Batch()
        self._add_decodes(batch)
        budget = self._budget(batch) - batch.num_decodes
        for request in self.prefilling[: self.max_prefills]:
            if budget <= 0:
                break
            num_tokens = min(request.num_uncomputed_tokens, self.chunk_size, budget)
            batch.prefills.append(Chunk(request, num_tokens))
            budget -= num_tokens
        while budget > 0 and not batch.preempted and self._can_admit(batch):
            request = self.waiting.first()
            uncomputed = request.num_known_tokens - self.kv_cache.cached_tokens(request)
            num_tokens = min(uncomputed, self.chunk_size, budget)
            if not self._admit_first(batch, num_tokens, request.num_known_tokens):
                break
            budget -= num_tokens
        return batch

    def _budget(self, batch: Batch) -> int:
        target = self.deployment.tbt_target
        if target is None:
            return self.token_budget
        if self.prefilling:
            request, computed = self.prefilling[0], self.prefilling[0].num_computed_tokens
        elif len(self.waiting):
            request = self.waiting.first()
            computed = self.kv_cache.cached_tokens(request)
        else:
            return self.token_budget
        low, high = 1, self.token_budget // BUDGET_STEP
        while low < high:
            middle = (low + high + 1) // 2
            num_tokens = max(middle * BUDGET_STEP - batch.num_decodes, 1)
            if self.step_time(_with_chunk(batch, num_tokens, computed + num_tokens)) <= target:
                low = middle
            else:
                high = middle - 1
        return low * BUDGET_STEP


BUDGET_STEP = 64


def _with_chunk(batch: Batch, num_tokens: int, context_len: int) -> BatchShape:
    return BatchShape(
        (PrefillShape(num_tokens, context_len),),
        num_tokens,
        batch.num_decodes,
        batch.decode_context_sum,
        batch.decode_context_max,
        batch.num_decodes + 1,
    )


class VllmV1Scheduler(_Scheduler):
    """One budget without phases (vLLM's V1 engine): a request takes what it needs, in order.

    As Sarathi, but a prompt takes KV blocks chunk by chunk and there is no watermark; a chunk that
    finds no block preempts the prompt begun last. `chunk_size` is vLLM's
    long_prefill_token_threshold. Decodes are taken before prompts that have begun, which differs
    from vLLM only where that threshold lets later requests overtake a long prompt.
    """

    keeps_watermark = False

    def schedule(self) -> Batch:
        batch = Batch()
        self._add_decodes(batch)
        budget = self.token_budget - batch.num_decodes
        for request in list(self.prefilling):
            if budget <= 0 or len(batch.prefills) == self.max_prefills:
                break
            num_tokens = min(request.num_uncomputed_tokens, self.chunk_size, budget)
            if request in self.running and self._grow(request, num_tokens, batch):
                batch.prefills.append(Chunk(request, num_tokens))
                budget -= num_tokens
        while budget > 0 and not batch.preempted and self._can_admit(batch):
            request = self.waiting.first()
            cached = self.kv_cache.cached_tokens(request)
            num_tokens = min(request.num_known_tokens - cached, self.chunk_size, budget)
            if not self._admit_first(batch, num_tokens, cached + num_tokens):
                break
            budget -= num_tokens
        return batch

    def _grow(self, request: Request, num_tokens: int, batch: Batch) -> bool:
        """Blocks for the next chunk of a prompt; False if the request itself was preempted."""
        wanted = self.kv_cache.blocks_for(request.num_computed_tokens + num_tokens)
        while request in self.running:
            if self.kv_cache.take(wanted - request.num_blocks):
                request.num_blocks = wanted
                return True
            self._preempt(self.prefilling[-1], batch)
        return False


class VllmV0Scheduler(_Scheduler):
    """Prefill first (vLLM's first engine): while prompts can be let in, whole, decodes wait."""

    whole_prompts = True

    def schedule(self) -> Batch:
        batch = Batch()
        budget = self.token_budget
        while self._can_admit(batch):
            request = self.waiting.first()
            num_tokens = request.num_known_tokens - self.kv_cache.cached_tokens(request)
            if num_tokens > budget:
                break
            if not self._admit_first(batch, num_tokens, request.num_known_tokens):
                break
            budget -= num_tokens
        if not batch.prefills:
            self._add_decodes(batch)
        return batch


class OrcaScheduler(_Scheduler):
    """Iteration-level batching without chunks (Orca, OSDI'22): all decodes, and whole prompts.

    Over paged KV blocks, as Sarathi-Serve's evaluation has it.
    """

    whole_prompts = True

    def schedule(self) -> Batch:
        batch = Batch()
        self._add_decodes(batch)
        budget = self.token_budget - batch.num_decodes
        while not batch.preempted and self._can_admit(batch):
            request = self.waiting.first()
            num_tokens = request.num_known_tokens - self.kv_cache.cached_tokens(request)
            if num_tokens > budget:
                break
            if not self._admit_first(batch, num_tokens, request.num_known_tokens):
                break
            budget -= num_tokens
        return batch


class StaticScheduler(_Scheduler):
    """Request-level batching (FasterTransformer): a batch is served until its last token is out.

    Requests are taken while their prompts and outputs fit into the KV cache together; the prompts
    are computed whole, as many a step as the budget holds, before any decode.
    """

    whole_prompts = True

    def schedule(self) -> Batch:
        if not self.running:
            self._fill()
        batch = Batch()
        budget = self.token_budget
        for request in self.prefilling[: self.max_prefills]:
            if request.num_uncomputed_tokens > budget:
                break
            batch.prefills.append(Chunk(request, request.num_uncomputed_tokens))
            budget -= request.num_uncomputed_tokens
        if not batch.prefills:
            self._add_decodes(batch)
        return batch

    def _fill(self) -> None:
        left = self.kv_cache.num_blocks
        admitted = Batch()
        while len(self.waiting) and len(self.running) < self.max_num_seqs:
            request = self.waiting.first()
            left -= self.kv_cache.blocks_for(request.num_prompt_tokens + request.num_output_tokens)
            if left < 0 and self.running:
                break
            if not self._admit_first(admitted, 0, request.num_known_tokens):
                break

    def lets_in(self, request: Request) -> bool:
        return False


SCHEDULERS: dict[str, type[_Scheduler]] = {
    "sarathi": SarathiScheduler,
    "vllm-v1": VllmV1Scheduler,
    "vllm-v0": VllmV0Scheduler,
    "orca": OrcaScheduler,
    "static": StaticScheduler,
}
