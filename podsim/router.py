"""Routers: which replica serves a new request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import numpy as np

from podsim.replica import Replica
from podsim.request import Request

Router = Callable[[Request, Sequence[Replica]], Replica]

_outstanding_tokens = attrgetter("outstanding_tokens")


def round_robin(seed: int) -> Router:
    """Each replica in turn."""
    turn = -1

    def route(request: Request, replicas: Sequence[Replica]) -> Replica:
        nonlocal turn
        turn = (turn + 1) % len(replicas)
        return replicas[turn]

    return route


def random(seed: int) -> Router:
    """Any replica, each as likely."""
    rng = np.random.default_rng(seed)
    return lambda request, replicas: replicas[int(rng.integers(len(replicas)))]


def least_outstanding_tokens(seed: int) -> Router:
    """The replica whose unfinished requests hold the fewest known tokens; ties to the first."""
    return lambda request, replicas: min(replicas, key=_outstanding_tokens)


def join_shortest_queue(seed: int) -> Router:
    """The replica with the fewest unfinished requests; ties to the first."""
    return lambda request, replicas: min(replicas, key=lambda replica: replica.num_requests)


def power_of_two(seed: int) -> Router:
    """Of two replicas drawn at random, the one with fewer unfinished requests (Mitzenmacher)."""
    rng = np.random.default_rng(seed)

    def route(request: Request, replicas: Sequence[Replica]) -> Replica:
        drawn = rng.choice(len(replicas), size=min(2, len(replicas)), replace=False)
        return min((replicas[int(i)] for i in drawn), key=lambda replica: replica.num_requests)

    return route


def session_affinity(seed: int) -> Router:
    """Every turn of a session goes where its first went, which is the least loaded replica."""
    home: dict[int, Replica] = {}

    def route(request: Request, replicas: Sequence[Replica]) -> Replica:
        if request.session_id not in home:
            least = min(replicas, key=_outstanding_tokens)
            if request.session_id < 0:
                return least
            home[request.session_id] = least
        return home[request.session_id]

    return route


def prefix_affinity(seed: int) -> Router:
    """The replica that has the most of the prompt in its prefix cache; ties to the least loaded."""

    def route(request: Request, replicas: Sequence[Replica]) -> Replica:
        return min(
            replicas,
            key=lambda replica: (-replica.cached_tokens(request), replica.outstanding_tokens),
        )

    return route


ROUTERS: dict[str, Callable[[int], Router]] = {
    "round_robin": round_robin,
    "random": random,
    "least_outstanding_tokens": least_outstanding_tokens,
    "join_shortest_queue": join_shortest_queue,
    "power_of_two": power_of_two,
    "session_affinity": session_affinity,
    "prefix_affinity": prefix_affinity,
}
