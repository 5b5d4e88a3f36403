"""Routers: which replica serves a new request."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from podsim.replica import Replica
from podsim.request import Request

Router = Callable[[Request, Sequence[Replica]], Replica]


def round_robin() -> Router:
    """Each replica in turn."""
    turn = -1

    def route(request: Request, replicas: Sequence[Replica]) -> Replica:
        nonlocal turn
        turn = (turn + 1) % len(replicas)
        return replicas[turn]

    return route


def least_outstanding_tokens() -> Router:
    """The replica whose unfinished requests hold the fewest known tokens; ties to the first."""

    def route(request: Request, replicas: Sequence[Replica]) -> Replica:
        return min(replicas, key=lambda replica: replica.outstanding_tokens)

    return route


ROUTERS = {"round_robin": round_robin, "least_outstanding_tokens": least_outstanding_tokens}
