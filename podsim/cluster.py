"""A cluster: requests arrive at their times, are refused or routed, and are served by replicas."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import simpy

from podsim.clock import URGENT, At
from podsim.event_log import EventLog
from podsim.replica import Replica
from podsim.request import Request
from podsim.router import Router


@dataclass(slots=True)
class FollowUp:
    """A request that arrives when others are finished and its think time has passed."""

    request: Request
    think_time: float
    num_awaited: int
    """Requests that it still waits for."""
    awaited_until: float = 0.0
    """When the last of those that are finished was."""


FollowUps = Mapping[int, Sequence[FollowUp]]
"""Of a request, by its id: those that wait for it."""


class Cluster:
    """Replicas behind one router.

    A follow-up arrives when the requests it waits for are finished, or refused, and its think time
    has passed.
    """

    def __init__(
        self,
        env: simpy.Environment,
        replicas: Sequence[Replica],
        router: Router,
        max_model_len: int,
        log: EventLog,
        follow_ups: FollowUps | None = None,
    ) -> None:
        self.env = env
        self.replicas = replicas
        self.router = router
        self.max_model_len = max_model_len
        self.log = log
        self.follow_ups = follow_ups or {}
        for replica in replicas:
            replica.on_finish = self._start_follow_ups

    def serve(self, requests: Iterable[Request]) -> None:
        """Let these requests, in order of arrival, come in while the simulation runs."""
        self.env.process(self._arrive(requests))

    def _arrive(self, requests: Iterable[Request]) -> Generator[simpy.Event, None, None]:
        for request in requests:
            if request.arrival_time > self.env.now:
                yield At(self.env, request.arrival_time, URGENT)
            self._receive(request)

    def _receive(self, request: Request) -> None:
        capacity = self.replicas[0].kv_cache.capacity
        reason = reason_to_refuse(request, self.max_model_len, capacity)
        if reason:
            self.log.record_request(request, refused=reason)
            self._start_follow_ups(request)
        else:
            self.router(request, self.replicas).submit(request)

    def _start_follow_ups(self, request: Request) -> None:
        # A replica may be ahead of the clock: the time is that of the request.
        ended = request.finish_time if request.finish_time >= 0 else self.env.now
        for following in self.follow_ups.get(request.request_id, ()):
            following.num_awaited -= 1
            following.awaited_until = max(following.awaited_until, ended)
            if not following.num_awaited:
                following.request.arrival_time = following.awaited_until + following.think_time
                self.env.process(self._follow_up(following.request))

    def _follow_up(self, request: Request) -> Generator[simpy.Event, None, None]:
        yield At(self.env, request.arrival_time, URGENT)
        self._receive(request)


def reason_to_refuse(request: Request, max_model_len: int, kv_capacity: int) -> str:
    """Why a request cannot be served by replicas of so many tokens of KV cache; "" if it can."""
    num_tokens = request.num_prompt_tokens + request.num_output_tokens
    if num_tokens > max_model_len:
        return f"longer than max_model_len ({max_model_len})"
    # The last token is emitted, and its keys and values are never stored.
    if num_tokens - 1 > kv_capacity:
        return f"longer than the KV cache ({kv_capacity} tokens)"
    return ""
