"""The time of swapping preempted requests to host memory and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat

from podsim.batch import Batch, BatchShape
from podsim.decode_group import Decodes
from podsim.memory_costs import Line
from podsim.step_memory import MemoryLog
from podsim.swap_space import SwapSpace

SWAP_COLUMNS = ("time", "swapped_tokens", "stall")
"""Seconds, and tokens in host memory."""


class SwapCopies:
    """Charges what moved to host memory and back since it was last asked.

    A request is `num_tensors` pieces of `token_bytes` a token. With `block_size` tokens in a block,
    a piece is one copy for each block; None: it is contiguous, and one copy.
    """

    def __init__(
        self,
        swap: SwapSpace,
        load: Line,
        store: Line,
        *,
        num_tensors: int,
        token_bytes: int,
        block_size: int | None = None,
    ) -> None:
        """`load`: host to GPU, `store`: GPU to host; seconds by bytes."""
        self.swap = swap
        self.load = load
        self.store = store
        self.num_tensors = num_tensors
        self.token_bytes = token_bytes
        self.block_size = block_size
        self._totals = dict.fromkeys(("swap_time", "d2h_bytes_moved", "h2d_bytes_moved"), 0.0)

    def seconds(self) -> float:
        """Of all moves, one after the other."""
        out, back = self.swap.moves()
        seconds = sum(self._copy(n, self.store) for n in out)
        seconds += sum(self._copy(n, self.load) for n in back)
        request_bytes = self.num_tensors * self.token_bytes
        self._totals["swap_time"] += seconds
        self._totals["d2h_bytes_moved"] += sum(out) * request_bytes
        self._totals["h2d_bytes_moved"] += sum(back) * request_bytes
        return seconds

    def _copy(self, num_tokens: int, copy: Line) -> float:
        """Of moving a request."""
        if self.block_size is None:
            return self.num_tensors * copy.at(num_tokens * self.token_bytes)
        blocks = -(-num_tokens // self.block_size)
        return self.num_tensors * blocks * copy.at(self.block_size * self.token_bytes)

    def notes(self) -> list[str]:
        if not self.swap.num_refused:
            return []
        return [
            f"{self.swap.num_refused} preempted requests found no host memory and were computed "
            "again"
        ]

    def summary(self) -> Mapping[str, float]:
        return {**self._totals, "swapped_requests": float(self.swap.num_swaps)}


class SwapTime:
    """Steps wait for the requests that are swapped out and in before them (as vLLM's first engine);
    see `podsim.step_memory.StepMemory`.
    """

    def __init__(self, copies: SwapCopies) -> None:
        self.copies = copies
        self.log = MemoryLog(SWAP_COLUMNS)
        self._stall = 0.0
        self._totals = dict.fromkeys(("stalled_steps", "stall_time"), 0.0)

    def begin(self, batch: Batch, shape: BatchShape, decodes: Decodes, start: float) -> None:
        self._stall = self.copies.seconds()
        self._totals["stall_time"] += self._stall
        self._totals["stalled_steps"] += self._stall > 0
        self.log.append(start, self.copies.swap.num_tokens, self._stall)

    def most_steps(self, decodes: Decodes, num_steps: int) -> int:
        return num_steps

    def step_times(self, times: Sequence[float]) -> list[float]:
        return [self._stall + times[0], *times[1:]]

    def end(self, num_steps: int) -> None:
        self.log.hold_up([self._stall, *repeat(0.0, num_steps - 1)])

    def notes(self) -> list[str]:
        return self.copies.notes()

    def summary(self) -> Mapping[str, float]:
        return {**self._totals, **self.copies.summary()}
