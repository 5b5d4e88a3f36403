"""A replica: one copy of the model, running step after step while there is work.

Steps that differ in nothing but the lengths of the contexts are taken together, as a run. A request
that arrives during a run, and could be let in, ends it with the step that is under way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Generator, Sequence
from itertools import accumulate

import simpy

from podsim.batch import Batch, BatchShape
from podsim.clock import At
from podsim.event_log import EventLog, TokenGaps
from podsim.kv_cache import PagedKVCache
from podsim.latency import LatencyModel
from podsim.replica_heat import Heat
from podsim.request import Request
from podsim.scheduler import Completed, Scheduler
from podsim.step_memory import StepMemory

FIRST_RUN = 16
LONGEST_RUN = 1024
"""Steps computed at once: first, and at most, when no arrival cuts the runs short."""


class Replica:
    """Asks its scheduler for a batch, lets the steps' time pass, and books what came out."""

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        scheduler: Scheduler,
        kv_cache: PagedKVCache,
        latency_model: LatencyModel,
        log: EventLog,
        longest_run: int = LONGEST_RUN,
        memory: StepMemory | None = None,
    ) -> None:
        self.env = env
        self.index = index
        self.scheduler = scheduler
        self.kv_cache = kv_cache
        self.latency_model = latency_model
        self.log = log
        self.longest_run = longest_run
        self.memory = memory
        self._run_limit = min(FIRST_RUN, longest_run)
        self.gaps = TokenGaps(log)
        self.on_finish: Callable[[Request], None] = lambda request: None
        self._heat = Heat(latency_model)
        self._outstanding_tokens = 0
        self._work_arrived = env.event()
        self._now = env.now
        """This replica's time: ahead of the clock while nothing else happens in between."""
        self._run: _Run | None = None
        env.process(self._serve())

    @property
    def num_requests(self) -> int:
        """Waiting and running."""
        return len(self.scheduler.waiting) + len(self.scheduler.running)

    def cached_tokens(self, request: Request) -> int:
        """Tokens of a prompt that the prefix cache holds at this moment."""
        if self._run is not None:
            steps_begun = bisect_left(self._run.ends, self.env.now) + 1
            self._take_blocks(self._run, min(steps_begun, len(self._run.ends)))
        return self.kv_cache.cached_tokens(request)

    @property
    def outstanding_tokens(self) -> int:
        """Prompt tokens and emitted tokens of the requests here that are not finished."""
        if self._run is None:
            return self._outstanding_tokens
        steps_done = bisect_left(self._run.ends, self.env.now)
        return self._outstanding_tokens + steps_done * self._run.num_decodes

    def submit(self, request: Request) -> None:
        request.replica = self.index
        self._outstanding_tokens += request.num_prompt_tokens
        self.scheduler.add(request)
        if self._run is not None:
            self._run.arrivals.append(self.env.now)
            if len(self._run.ends) > 1 and not self._run.cut and self.scheduler.lets_in(request):
                self._cut(self._run)
        elif not self._work_arrived.triggered:
            self._work_arrived.succeed()

    def _cut(self, run: _Run) -> None:
        """End a run with the step that is under way."""
        run.cut = True
        del run.ends[bisect_left(run.ends, self.env.now) + 1 :]
        sooner = At(self.env, run.ends[-1])
        sooner.callbacks, run.over.callbacks = run.over.callbacks, []

    def _serve(self) -> Generator[simpy.Event, None, None]:
        while True:
            batch = self.scheduler.schedule()
            for request, was_decoding in batch.preempted:
                self.log.record_preemption(request, self._now)
                if was_decoding:
                    self.gaps.preempted(request)
            if batch.prefills or batch.num_decodes:
                run, shape = self._begin(batch)
                if self.longest_run == 1 or self.env.peek() <= run.ends[-1]:
                    self._run = run
                    run.over = At(self.env, run.ends[-1])
                    yield run.over
                    self._run = None
                self._book(batch, shape, run)
                continue
            if self.scheduler.waiting:
                raise RuntimeError("the scheduler left its replica idle with requests waiting")
            self._work_arrived = self.env.event()
            yield self._work_arrived
            self._now = self.env.now

    def _begin(self, batch: Batch) -> tuple[_Run, BatchShape]:
        """The steps of a batch, or of a run of batches like it, and the shape of the first."""
        start = self._now
        for request, _ in batch.prefills:
            if request.scheduled_time < 0:
                request.scheduled_time = start
            elif request.num_preemptions:
                self.log.record_resumption(request, start)
        shape = batch.shape()
        if self.memory is not None:
            self.memory.begin(batch, shape, self.scheduler.decodes, start)
        times = self._step_times(batch, shape)
        if self.memory is not None:
            times = self.memory.step_times(times)
        ends = list(accumulate(times, initial=start))
        del ends[0]
        return _Run(ends, batch.num_decodes, self.kv_cache.num_used_blocks), shape

    def _adapt_run_limit(self, run: _Run) -> None:
        """Compute about as many steps at once as arrivals let happen."""
        if run.cut:
            self._run_limit = min(len(run.ends) + 2, self.longest_run)
        elif len(run.ends) == self._run_limit:
            self._run_limit = min(2 * self._run_limit, self.longest_run)

    def _step_times(self, batch: Batch, shape: BatchShape) -> Sequence[float]:
        """Seconds of this step, and of the steps after it that are sure to be like it."""
        if self.longest_run == 1 or batch.prefills or not self.scheduler.repeats(batch):
            return [self._heat.step_time(shape, self._now)]
        decodes = self.scheduler.decodes
        num_steps = min(self._run_limit, decodes.steps_to_finish())
        num_steps = self._steps_with_blocks(num_steps, batch.num_decodes)
        if self.memory is not None and not self._heat.is_cold(self._now):
            num_steps = 1  # how hot later steps are depends on when memory lets them start
        elif num_steps > 1 and self.memory is not None:
            num_steps = self.memory.most_steps(decodes, num_steps)
        return self._heat.decode_run_times(shape, num_steps, self._now)

    def _steps_with_blocks(self, num_steps: int, num_decodes: int) -> int:
        """How many of these steps find KV blocks; the first has them already."""
        decodes, free = self.scheduler.decodes, self.kv_cache.num_free_blocks
        if free >= num_decodes * (num_steps // self.kv_cache.block_size + 1):
            return num_steps
        for step in range(1, num_steps):
            free -= decodes.blocks_needed(step)
            if free < 0:
                return step
        return num_steps

    def _book(self, batch: Batch, shape: BatchShape, run: _Run) -> None:
        start, self._now = self._now, run.ends[-1]
        if self.memory is not None:
            self.memory.end(len(run.ends))
        self._adapt_run_limit(run)
        if len(run.ends) > 1:
            self._take_blocks(run, len(run.ends))
        num_running = len(self.scheduler.running)
        completed = self.scheduler.complete(batch, len(run.ends))
        self._record_steps(shape, start, run, num_running)
        self._record_tokens(batch, completed, run.ends)

    def _take_blocks(self, run: _Run, num_steps: int) -> None:
        """The KV blocks of the run's first steps; the very first has its own."""
        blocks_needed = self.scheduler.decodes.blocks_needed
        needed = [blocks_needed(step) for step in range(len(run.used), num_steps)]
        taken = self.kv_cache.take(sum(needed))
        assert taken, "a run is no longer than the free blocks allow"
        for num_blocks in needed:
            run.used.append(run.used[-1] + num_blocks)

    def _record_steps(self, shape: BatchShape, start: float, run: _Run, num_running: int) -> None:
        num_steps, num_waiting = len(run.ends), len(self.scheduler.waiting)
        waiting = [num_waiting] * num_steps
        if num_steps > 1 and run.arrivals:
            at_start = num_waiting - len(run.arrivals)
            waiting = [at_start + bisect_right(run.arrivals, end) for end in run.ends]
        prefills, num_prefill_tokens, num_decodes, context_sum, _, _ = shape
        same = self.index, len(prefills), num_prefill_tokens, num_decodes, context_sum, num_running
        self.log.record_steps(start, run.ends, waiting, run.used, same)

    def _record_tokens(self, batch: Batch, completed: Completed, ends: list[float]) -> None:
        end = ends[-1]
        if batch.num_decodes:
            self.gaps.decoded(ends, len(completed.finished_decodes))
            self._outstanding_tokens += batch.num_decodes * len(ends)
        for request in completed.finished_decodes:
            self._finish(request, end)
        for request in completed.emitted:
            self.gaps.emitted(request, end, joins=not request.is_finished)
            self._outstanding_tokens += 1
            if request.is_finished:
                self._finish(request, end)

    def _finish(self, request: Request, end: float) -> None:
        request.finish_time = end
        self._outstanding_tokens -= request.num_known_tokens
        self.log.record_request(request)
        self.on_finish(request)


class _Run:
    """Steps under way: when each ends, its used KV blocks, and what arrived meanwhile."""

    __slots__ = ("arrivals", "cut", "ends", "num_decodes", "over", "used")

    over: At
    """Comes at the end of the last step, if the run is waited for."""

    def __init__(self, ends: list[float], num_decodes: int, used: int) -> None:
        self.ends = ends
        self.num_decodes = num_decodes
        self.used = [used]
        self.arrivals: list[float] = []
        self.cut = False
