"""A small serving engine: the simulator's scheduler and KV cache, real steps, a real clock.

One replica in one process. Requests arrive at their trace's times, wait for the step under way, and
are batched by the same scheduler object as in the simulator; a step is a forward pass on the GPU,
and its tokens are stamped when they are on the host. Prompts are random tokens, sampling is greedy,
and a request ends after the number of tokens that its trace says.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from podsim.batch import Batch, BatchShape
from podsim.block_tables import NewBlocks, PagedBlocks
from podsim.cluster import reason_to_refuse
from podsim.decode_group import Decodes
from podsim.event_log import EventLog, TokenGaps
from podsim.kv_cache import PagedKVCache
from podsim.request import Request
from podsim.scheduler import Scheduler
from podsim.step_inputs import Foresee, Lengths, StepInputs
from podsim.vattention import VAttentionCache

SLOTTED = (VAttentionCache, PagedBlocks)
"""KV caches that choose the slot of a request themselves."""

PROMPT_STARTS = 1 << 16
"""Prompts are pieces of one random text, drawn before serving: the GPU would wait for the drawing.
So many tokens of it begin one,"""
PROMPT_STRIDE = 40503
"""and two requests in a row begin so far apart: odd, so that no two of that many begin alike."""


class Clock(Protocol):
    """Seconds since serving began."""

    def now(self) -> float: ...

    def wait_until(self, time: float) -> None: ...


class WallClock:
    """The machine's own clock."""

    SPIN = 0.002
    """Seconds before a moment from which on it is waited for awake: sleep is not that exact."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Now is 0."""
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def wait_until(self, time_: float) -> None:
        if (ahead := time_ - self.now() - self.SPIN) > 0:
            time.sleep(ahead)
        while self.now() < time_:
            pass


class Forward(Protocol):
    """Computes steps."""

    gpu_seconds: float
    """Of the latest step: from its first to its last operation on the GPU."""
    table_seconds: float
    """Of the latest step: in which the host entered new KV blocks and looked up where tokens go."""

    def run(self, inputs: StepInputs, foresee: Foresee) -> NDArray[np.int64]:
        """The token that follows each sample row, once it is on the host.

        While it computes, `foresee` may be asked again and again.
        """


@dataclass(slots=True)
class Recording:
    """What happened: the simulator's log, and more of each step and token."""

    log: EventLog = field(default_factory=EventLog)
    shapes: list[BatchShape] = field(default_factory=list)
    """Of each step of the log."""
    gpu_seconds: array[float] = field(default_factory=lambda: array("d"))
    """Of each step: what the GPU took; the rest of its duration it waited for the host."""
    sm_clock_mhz: array[float] = field(default_factory=lambda: array("d"))
    """Of each step, if the GPU told: the mean clock of the SMs."""
    table_seconds: array[float] = field(default_factory=lambda: array("d"))
    """Of each step: in which the host prepared the block table; 0 if there is none."""
    mapping_seconds: array[float] = field(default_factory=lambda: array("d"))
    """Of each step: what it waited for memory to be mapped; 0 if none is."""
    mapped_page_groups: array[int] = field(default_factory=lambda: array("q"))
    """Of each step: how many it mapped itself before it was launched."""
    token_request: array[int] = field(default_factory=lambda: array("q"))
    token_step: array[int] = field(default_factory=lambda: array("q"))
    """Of each token that came out: whose it is, and at the end of which step."""
    priorities: dict[int, int] = field(default_factory=dict)
    """Of each request, by its id."""


class Mapping(Protocol):
    """Memory that is mapped as requests grow."""

    seconds: float
    """Of the latest step: what it waited for mapping."""
    page_groups: int
    """Of the latest step: how many it had mapped while it waited."""

    def begin(self, batch: Batch, decodes: Decodes) -> None:
        """Called before each batch is computed: what it reads and writes is mapped on return."""


class _Computed(NamedTuple):
    """A step whose tokens are there, and which is still to be recorded."""

    inputs: StepInputs
    requests: Sequence[Request]
    """Whose tokens came out, and"""
    tokens: Sequence[int]
    start: float
    end: float
    num_waiting: int
    num_running: int
    num_used_blocks: int
    gpu_seconds: float
    table_seconds: float
    mapping_seconds: float
    mapped_page_groups: int


class Engine:
    """Serves requests; see the module docstring.

    `num_slots` is how many requests the forward pass has KV slots for, `vocab_size` where prompts
    are drawn from, with `seed`.
    """

    def __init__(
        self,
        forward: Forward,
        scheduler: Scheduler,
        kv_cache: PagedKVCache,
        *,
        num_slots: int,
        max_model_len: int,
        vocab_size: int,
        seed: int,
        clock: Clock,
        mapping: Mapping | None = None,
    ) -> None:
        self.forward = forward
        self.mapping = mapping
        self.scheduler = scheduler
        self.kv_cache = kv_cache
        self.max_model_len = max_model_len
        self.clock = clock
        self.recording = Recording()
        self.gaps = TokenGaps(self.recording.log)
        self._free_slots = list(range(num_slots))
        self._slot: dict[Request, int] = {}
        self._tokens: dict[Request, NDArray[np.int32]] = {}
        """Prompt and emitted tokens of the requests that are not finished, but of `_unrecorded`."""
        self._latest: dict[Request, int] = {}
        """The latest token of each."""
        self._unrecorded: _Computed | None = None
        """The latest step, until the next one is under way: the GPU is not to wait for this."""
        rng = np.random.default_rng(seed)
        length = PROMPT_STARTS + max_model_len
        self._text = rng.integers(vocab_size, size=length, dtype=np.int32)
        self._coming: deque[Request] = deque()

    def serve(self, requests: Iterable[Request]) -> Recording:
        """Serve requests, in order of arrival, to their last token."""
        self._coming = deque(requests)
        self.recording.priorities = {r.request_id: r.priority for r in self._coming}
        now = self.clock.now()
        while True:
            self._receive_until(now)
            batch = self.scheduler.schedule()
            self._preempt(batch, now)
            if batch:
                now = self._take(batch, now)
            elif self._coming:
                self.clock.wait_until(self._coming[0].arrival_time)
                now = self.clock.now()
            else:
                self._record_latest()
                return self.recording

    def _receive_until(self, time: float) -> int:
        """How many requests came."""
        num_coming = len(self._coming)
        while self._coming and self._coming[0].arrival_time <= time:
            self._receive(self._coming.popleft())
        return num_coming - len(self._coming)

    def _receive(self, request: Request) -> None:
        reason = reason_to_refuse(request, self.max_model_len, self.kv_cache.capacity)
        if reason:
            self.recording.log.record_request(request, refused=reason)
            return
        request.replica = 0
        num_prompt = request.num_prompt_tokens
        tokens = np.zeros(num_prompt + request.num_output_tokens, np.int32)
        first = request.request_id * PROMPT_STRIDE % PROMPT_STARTS
        tokens[:num_prompt] = self._text[first : first + num_prompt]
        self._tokens[request] = tokens
        self.scheduler.add(request)

    def _preempt(self, batch: Batch, now: float) -> None:
        for request, was_decoding in batch.preempted:
            self.recording.log.record_preemption(request, now)
            if was_decoding:
                self.gaps.preempted(request)
            self._give_back_slot(request)

    def _take_slot(self, request: Request) -> int:
        """A free KV slot; where slots are the cache's own, the one that it chose."""
        if isinstance(self.kv_cache, SLOTTED):
            return self.kv_cache.slot_of(request)
        return self._free_slots.pop()

    def _give_back_slot(self, request: Request) -> None:
        slot = self._slot.pop(request)
        if not isinstance(self.kv_cache, SLOTTED):
            self._free_slots.append(slot)

    # ---- a step

    def _take(self, batch: Batch, start: float) -> float:
        """Compute a batch that became due at `start`; when its tokens were there."""
        for request, _ in batch.prefills:
            if request not in self._slot:
                self._slot[request] = self._take_slot(request)
            if request.scheduled_time < 0:
                request.scheduled_time = start
            elif request.num_preemptions:
                self.recording.log.record_resumption(request, start)
                self._record_latest()  # it computes the tokens that it emitted again
        decodes = self.scheduler.decodes.requests() if batch.num_decodes else []
        new_blocks, allotting = self._allot(batch, decodes)
        inputs = StepInputs.of(
            batch.prefills, decodes, self._tokens, self._latest, self._slot, new_blocks
        )
        sampled_for = [r for r, n in batch.prefills if n == r.num_uncomputed_tokens] + decodes
        if self.mapping is not None:
            self.mapping.begin(batch, self.scheduler.decodes)
        sampled = self.forward.run(inputs, self._foreseer(batch, decodes))
        end = self.clock.now()
        self._receive_until(end)
        tokens = sampled.tolist()
        self._latest.update(zip(sampled_for, tokens, strict=True))
        is_paged, mapping = isinstance(self.kv_cache, PagedBlocks), self.mapping
        self._record_latest()
        self._unrecorded = _Computed(
            inputs,
            sampled_for,
            tokens,
            start,
            end,
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_used_blocks=self.kv_cache.num_used_blocks,
            gpu_seconds=self.forward.gpu_seconds,
            table_seconds=allotting + self.forward.table_seconds if is_paged else 0.0,
            mapping_seconds=0.0 if mapping is None else mapping.seconds,
            mapped_page_groups=0 if mapping is None else mapping.page_groups,
        )
        self._book(batch, end)
        return end

    def _foreseer(self, batch: Batch, decodes: Sequence[Request]) -> Foresee:
        """Says what follows a step that is being computed, and again whenever a request comes.

        The GPU being busy, the step before is recorded too.
        """
        asked = False

        def foresee() -> Lengths | None:
            nonlocal asked
            self._record_latest()
            if not self._receive_until(self.clock.now()) and asked:
                return None
            asked = True
            waiting = self._next_in_line(batch, decodes)
            return Lengths.after(
                batch.prefills, decodes, self._slot, waiting, self.scheduler.token_budget
            )

        return foresee

    def _next_in_line(
        self, batch: Batch, decodes: Sequence[Request]
    ) -> Iterator[tuple[Request, int]]:
        """Who waits and has a slot and KV blocks after a step: not known where slots are the
        cache's own to choose.
        """
        if isinstance(self.kv_cache, SLOTTED):
            return
        done = [r for r in decodes if r.num_tokens_to_emit == 1]
        done += [
            request
            for request, n in batch.prefills
            if n == request.num_uncomputed_tokens and request.num_tokens_to_emit == 1
        ]
        slots = [*self._free_slots, *(self._slot[request] for request in done)]
        blocks_for = self.kv_cache.blocks_for
        free = self.kv_cache.num_free_blocks
        free += sum(blocks_for(request.num_known_tokens) for request in done)
        for request in self.scheduler.waiting:
            free -= blocks_for(request.num_known_tokens)
            if not slots or free < 0:
                return
            yield request, slots.pop()

    def _allot(self, batch: Batch, decodes: Sequence[Request]) -> tuple[Sequence[NewBlocks], float]:
        """The KV blocks that are new with this step, and the seconds of choosing them."""
        if not isinstance(self.kv_cache, PagedBlocks):
            return (), 0.0
        started = time.perf_counter()
        return self.kv_cache.allot(batch.prefills, decodes), time.perf_counter() - started

    def _record_latest(self) -> None:
        """Record the latest step, if it is not, and put its tokens behind those they follow."""
        if self._unrecorded is None:
            return
        step, self._unrecorded = self._unrecorded, None
        recording, shape = self.recording, step.inputs.shape
        recording.shapes.append(shape)
        recording.gpu_seconds.append(step.gpu_seconds)
        recording.table_seconds.append(step.table_seconds)
        recording.mapping_seconds.append(step.mapping_seconds)
        recording.mapped_page_groups.append(step.mapped_page_groups)
        recording.token_request.extend([request.request_id for request in step.requests])
        recording.token_step.extend([len(recording.shapes) - 1] * len(step.requests))
        prefills, num_prefill_tokens, num_decodes, context_sum, _, _ = shape
        same = 0, len(prefills), num_prefill_tokens, num_decodes, context_sum, step.num_running
        recording.log.record_steps(
            step.start, [step.end], [step.num_waiting], [step.num_used_blocks], same
        )
        positions = step.inputs.lengths.positions[step.inputs.sample_rows].tolist()
        for request, position, token in zip(step.requests, positions, step.tokens, strict=True):
            if request in self._tokens:  # and not finished
                self._tokens[request][position + 1] = token

    def _book(self, batch: Batch, end: float) -> None:
        completed = self.scheduler.complete(batch, 1)
        if batch.num_decodes:
            self.gaps.decoded([end], len(completed.finished_decodes))
        for request in completed.finished_decodes:
            self._finish(request, end)
        for request in completed.emitted:
            self.gaps.emitted(request, end, joins=not request.is_finished)
            if request.is_finished:
                self._finish(request, end)

    def _finish(self, request: Request, end: float) -> None:
        request.finish_time = end
        self.recording.log.record_request(request)
        self._give_back_slot(request)
        del self._tokens[request], self._latest[request]
