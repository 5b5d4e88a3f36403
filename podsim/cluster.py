"""A cluster: requests arrive at their times, are refused or routed, and are served by replicas."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence

import simpy
from simpy.events import URGENT

from podsim.event_log import EventLog
from podsim.replica import Replica
from podsim.request import Request
from podsim.router import Router


class _Arrival(simpy.Event):
    """A moment at which requests arrive; a step that starts at that moment sees them."""

    def __init__(self, env: simpy.Environment, time: float) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        delay = time - env.now
        while env.now + delay < time:  # rounding must not let a request arrive before its time
            delay = math.nextafter(delay, math.inf)
        env.schedule(self, priority=URGENT, delay=delay)


class Cluster:
    """Replicas behind one router."""

    def __init__(
        self,
        env: simpy.Environment,
        replicas: Sequence[Replica],
        router: Router,
        max_model_len: int,
        log: EventLog,
    ) -> None:
        self.env = env
        self.replicas = replicas
        self.router = router
        self.max_model_len = max_model_len
        self.log = log

    def serve(self, requests: Iterable[Request]) -> None:
        """Let these requests, in order of arrival, come in while the simulation runs."""
        self.env.process(self._arrive(requests))

    def _arrive(self, requests: Iterable[Request]) -> Generator[simpy.Event, None, None]:
        for request in requests:
            if request.arrival_time > self.env.now:
                yield _Arrival(self.env, request.arrival_time)
            self.log.requests.append(request)
            request.refused = self._reason_to_refuse(request)
            if not request.refused:
                self.router(request, self.replicas).submit(request)

    def _reason_to_refuse(self, request: Request) -> str:
        num_tokens = request.num_prompt_tokens + request.num_output_tokens
        if num_tokens > self.max_model_len:
            return f"longer than max_model_len ({self.max_model_len})"
        # The last token is emitted, and its keys and values are never stored.
        capacity = self.replicas[0].kv_cache.capacity
        if num_tokens - 1 > capacity:
            return f"longer than the KV cache ({capacity} tokens)"
        return ""
