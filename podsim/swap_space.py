"""Host memory for the KV cache of preempted requests."""

from __future__ import annotations

from podsim.request import Request


class SwapSpace:
    """Who has how many tokens in host memory, and what moved since that was last asked."""

    def __init__(self, capacity: int) -> None:
        """`capacity`: tokens that fit."""
        self.capacity = capacity
        self.num_tokens = 0
        self.num_swaps = 0
        self.num_refused = 0
        """Preempted requests for which there was no room."""
        self._tokens: dict[Request, int] = {}
        self._out: list[int] = []
        self._back: list[int] = []

    def tokens_of(self, request: Request) -> int:
        return self._tokens.get(request, 0)

    def put(self, request: Request, num_tokens: int) -> None:
        """Keep a preempted request's tokens, if there is room."""
        if not num_tokens:
            return
        if self.num_tokens + num_tokens > self.capacity:
            self.num_refused += 1
            return
        self._tokens[request] = num_tokens
        self.num_tokens += num_tokens
        self.num_swaps += 1
        self._out.append(num_tokens)

    def take_back(self, request: Request) -> None:
        """The request has blocks on the GPU again."""
        num_tokens = self._tokens.pop(request, 0)
        if num_tokens:
            self.num_tokens -= num_tokens
            self._back.append(num_tokens)

    def moves(self) -> tuple[list[int], list[int]]:
        """Tokens of each request that moved out, and back, since this was last called."""
        moved = self._out, self._back
        self._out, self._back = [], []
        return moved
