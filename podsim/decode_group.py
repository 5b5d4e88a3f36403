"""The requests of a replica that decode: each emits one token in every step the group takes.

What a step changes for all of them alike (one more token, a context longer by one) is counted once
for the group, so that a step costs the same for one request and for a thousand.
"""

from __future__ import annotations

import heapq
from operator import attrgetter
from typing import Protocol

from podsim.request import Request


class Decodes(Protocol):
    """A group of decoding requests. A context of length c + 1 is attended in the next step,
    where c is the number of computed tokens; its token takes a new KV block if c fills its blocks.
    """

    def __len__(self) -> int: ...

    def __contains__(self, request: Request) -> bool: ...

    def requests(self) -> list[Request]:
        """The members, their counters brought up to date, in order of admission."""

    def contexts(self) -> tuple[int, int, int]:
        """Of the next step: how many, their sum, and the longest; 0 if there is none."""

    def add(self, request: Request) -> None:
        """Join, with all known tokens but the last one computed."""

    def remove(self, request: Request) -> None:
        """Leave, with counters up to date."""

    def num_computed(self, request: Request) -> int:
        """Tokens of a member whose keys and values are in the cache."""

    def blocks_needed(self, step: int = 0) -> int:
        """New KV blocks that the step `step` steps ahead takes, if nobody leaves before."""

    def needing_block(self, step: int = 0) -> list[Request]:
        """The members that take a new block in that step, in order of admission."""

    def steps_to_finish(self) -> int:
        """Steps until the next member emits its last token."""

    def advance(self, num_steps: int) -> list[Request]:
        """Every member emits a token a step; those that emitted their last one have left.

        They come back up to date, in order of admission. At most `steps_to_finish` steps.
        """


class DecodeGroup:
    """Members by what stays true of them while the group steps.

    After k steps of the group a member's computed tokens are its offset + k. Its last token comes
    at a fixed k, and it takes a block whenever offset + k is a multiple of the block size.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._num_steps = 0
        self._offset_sum = 0
        self._offset: dict[Request, int] = {}
        self._by_finish: list[tuple[int, int, Request]] = []
        self._by_length: list[tuple[int, int, Request]] = []
        self._by_residue: list[dict[Request, None]] = [{} for _ in range(block_size)]

    def __len__(self) -> int:
        return len(self._offset)

    def __contains__(self, request: Request) -> bool:
        return request in self._offset

    def requests(self) -> list[Request]:
        members = sorted(self._offset, key=_admission)
        for request in members:
            self._update(request)
        return members

    def contexts(self) -> tuple[int, int, int]:
        n, next_step, by_length = len(self._offset), self._num_steps + 1, self._by_length
        if not n:
            return 0, 0, 0
        while self._is_stale(by_length[0]):
            heapq.heappop(by_length)
        return n, self._offset_sum + n * next_step, next_step - by_length[0][0]

    def add(self, request: Request) -> None:
        offset = request.num_computed_tokens - self._num_steps
        finish = self._num_steps + request.num_output_tokens - request.num_emitted_tokens
        self._offset[request] = offset
        self._offset_sum += offset
        self._by_residue[offset % self.block_size][request] = None
        heapq.heappush(self._by_finish, (finish, request.admission, request))
        heapq.heappush(self._by_length, (-offset, request.admission, request))

    def remove(self, request: Request) -> None:
        self._update(request)
        offset = self._offset.pop(request)
        self._offset_sum -= offset
        del self._by_residue[offset % self.block_size][request]

    def num_computed(self, request: Request) -> int:
        return self._offset[request] + self._num_steps

    def blocks_needed(self, step: int = 0) -> int:
        return len(self._by_residue[-(self._num_steps + step) % self.block_size])

    def needing_block(self, step: int = 0) -> list[Request]:
        return sorted(self._by_residue[-(self._num_steps + step) % self.block_size], key=_admission)

    def steps_to_finish(self) -> int:
        first = self._by_finish
        while self._is_stale(first[0]):
            heapq.heappop(first)
        return first[0][0] - self._num_steps

    def advance(self, num_steps: int) -> list[Request]:
        self._num_steps += num_steps
        finished = []
        while self._by_finish and self._by_finish[0][0] <= self._num_steps:
            entry = heapq.heappop(self._by_finish)
            if not self._is_stale(entry):
                finished.append(entry[2])
                self.remove(entry[2])
        return finished

    def _update(self, request: Request) -> None:
        computed = self._offset[request] + self._num_steps
        request.num_emitted_tokens += computed - request.num_computed_tokens
        request.num_computed_tokens = computed

    def _is_stale(self, entry: tuple[int, int, Request]) -> bool:
        """Whether a heap's entry is of a request that has left (and perhaps joined again)."""
        _, admission, request = entry
        return request not in self._offset or request.admission != admission


class ListedDecodes:
    """The same group as a plain list whose counters all move in every step: the reference."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._members: list[Request] = []

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request: Request) -> bool:
        return request in self._members

    def requests(self) -> list[Request]:
        return sorted(self._members, key=_admission)

    def contexts(self) -> tuple[int, int, int]:
        contexts = [request.num_computed_tokens + 1 for request in self._members]
        return len(contexts), sum(contexts), max(contexts, default=0)

    def add(self, request: Request) -> None:
        self._members.append(request)

    def remove(self, request: Request) -> None:
        self._members.remove(request)

    def num_computed(self, request: Request) -> int:
        return request.num_computed_tokens

    def blocks_needed(self, step: int = 0) -> int:
        return sum(
            (request.num_computed_tokens + step) % self.block_size == 0 for request in self._members
        )

    def needing_block(self, step: int = 0) -> list[Request]:
        return [r for r in self.requests() if (r.num_computed_tokens + step) % self.block_size == 0]

    def steps_to_finish(self) -> int:
        return min(r.num_output_tokens - r.num_emitted_tokens for r in self._members)

    def advance(self, num_steps: int) -> list[Request]:
        finished = []
        for request in self._members:
            request.num_computed_tokens += num_steps
            request.num_emitted_tokens += num_steps
            if request.num_emitted_tokens == request.num_output_tokens:
                finished.append(request)
        if finished:
            self._members = [request for request in self._members if not request.is_finished]
        return sorted(finished, key=_admission)


_admission = attrgetter("admission")
