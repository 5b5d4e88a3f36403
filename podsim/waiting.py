"""The requests that wait for a replica, in the order in which they are let in."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from podsim.request import Request


class Waiting:
    """Preempted requests first, the oldest of them at the head; then by the chosen order.

    fcfs: first come, first served. shortest_first: the shortest prompt, then first come. priority:
    the lowest priority, then first come.
    """

    def __init__(self, order: str = "fcfs") -> None:
        self.order = order
        self._heap: list[tuple[bool, int, int, Request]] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def __contains__(self, request: object) -> bool:
        return any(entry[3] is request for entry in self._heap)

    def __iter__(self) -> Iterator[Request]:
        return (entry[3] for entry in sorted(self._heap))

    def first(self) -> Request:
        return self._heap[0][3]

    def pop_first(self) -> Request:
        return heapq.heappop(self._heap)[3]

    def add(self, request: Request) -> None:
        keys = {"shortest_first": request.num_prompt_tokens, "priority": request.priority}
        self._push(True, keys.get(self.order, 0), request)

    def add_preempted(self, request: Request) -> None:
        """Requests are preempted from the last one admitted on: each goes before the former."""
        self._push(False, -self._count, request)

    def _push(self, is_new: bool, key: int, request: Request) -> None:
        heapq.heappush(self._heap, (is_new, key, self._count, request))
        self._count += 1
