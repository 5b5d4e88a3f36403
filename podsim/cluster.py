"""A cluster: requests arrive at their times, are refused or routed, and are served by replicas."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence

import simpy

from podsim.clock import URGENT, At
from podsim.event_log import EventLog
from podsim.replica import Replica
from podsim.request import Request
from podsim.router import Router


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
                yield At(self.env, request.arrival_time, URGENT)
            reason = self._reason_to_refuse(request)
            if reason:
                self.log.record_request(request, refused=reason)
            else:
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
