"""A replica: one copy of the model, running step after step while there is work."""

from __future__ import annotations

from collections.abc import Generator

import simpy

from podsim.event_log import EventLog
from podsim.kv_cache import PagedKVCache
from podsim.latency import LatencyModel
from podsim.request import Request
from podsim.scheduler import Scheduler


class Replica:
    """Asks its scheduler for a batch, lets the step's time pass, and books what came out."""

    def __init__(
        self,
        env: simpy.Environment,
        index: int,
        scheduler: Scheduler,
        kv_cache: PagedKVCache,
        latency_model: LatencyModel,
        log: EventLog,
    ) -> None:
        self.env = env
        self.index = index
        self.scheduler = scheduler
        self.kv_cache = kv_cache
        self.latency_model = latency_model
        self.log = log
        self.outstanding_tokens = 0
        """Prompt tokens and emitted tokens of the requests here that are not finished."""
        self._work_arrived = env.event()
        env.process(self._run())

    def submit(self, request: Request) -> None:
        request.replica = self.index
        self.outstanding_tokens += request.num_prompt_tokens
        self.scheduler.add(request)
        if not self._work_arrived.triggered:
            self._work_arrived.succeed()

    def _run(self) -> Generator[simpy.Event, None, None]:
        while True:
            batch = self.scheduler.schedule()
            if not batch:
                if self.scheduler.waiting:
                    raise RuntimeError("the scheduler left its replica idle with requests waiting")
                self._work_arrived = self.env.event()
                yield self._work_arrived
                continue
            start = self.env.now
            for request, _ in batch.prefills:
                if request.scheduled_time < 0:
                    request.scheduled_time = start
            shape = batch.shape()
            num_running = len(self.scheduler.running)
            num_used_blocks = self.kv_cache.num_used_blocks
            yield self.env.timeout(self.latency_model.step_time(shape))
            end = self.env.now
            emitting = self.scheduler.complete(batch)
            self.log.record_tokens(emitting, start, end)
            self.log.record_step(
                self.index,
                start,
                end,
                shape,
                len(self.scheduler.waiting),
                num_running,
                num_used_blocks,
            )
            self._count_outstanding(emitting)

    def _count_outstanding(self, emitting: list[Request]) -> None:
        self.outstanding_tokens += len(emitting)
        for request in emitting:
            if request.is_finished:
                self.outstanding_tokens -= request.num_known_tokens
