"""What happened in a simulation, as raw columns; the metrics are computed from it afterwards."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from podsim.batch import BatchShape
from podsim.request import Request

STEP_COLUMNS = {
    "replica": "q",
    "start": "d",
    "duration": "d",
    "num_prefills": "q",
    "num_prefill_tokens": "q",
    "num_decodes": "q",
    "decode_context_sum": "q",
    "num_waiting": "q",
    "num_running": "q",
    "num_used_blocks": "q",
}
"""Columns of a step and their array type codes. Seconds, tokens, requests, blocks."""


@dataclass(slots=True)
class EventLog:
    """Every request, every step, and every gap between two tokens of a request.

    Most requests of a step decode one token, so their gaps are one value with a count.
    """

    requests: list[Request] = field(default_factory=list)
    steps: dict[str, array[Any]] = field(
        default_factory=lambda: {name: array(code) for name, code in STEP_COLUMNS.items()}
    )
    gap_duration: array[float] = field(default_factory=lambda: array("d"))
    gap_count: array[int] = field(default_factory=lambda: array("q"))

    def record_step(
        self,
        replica: int,
        start: float,
        end: float,
        shape: BatchShape,
        num_waiting: int,
        num_running: int,
        num_used_blocks: int,
    ) -> None:
        row = (
            replica,
            start,
            end - start,
            len(shape.prefills),
            shape.num_prefill_tokens,
            shape.num_decodes,
            shape.decode_context_sum,
            num_waiting,
            num_running,
            num_used_blocks,
        )
        for column, value in zip(self.steps.values(), row, strict=True):
            column.append(value)

    def record_tokens(self, emitting: Sequence[Request], start: float, end: float) -> None:
        """Stamp the requests that got a token at `end`, from a step that began at `start`."""
        num_back_to_back = 0
        for request in emitting:
            if request.last_token_time == start:
                num_back_to_back += 1
            elif request.first_token_time < 0:
                request.first_token_time = end
            else:
                self._record_gap(end - request.last_token_time, 1)
            request.last_token_time = end
            if request.is_finished:
                request.finish_time = end
        if num_back_to_back:
            self._record_gap(end - start, num_back_to_back)

    def _record_gap(self, duration: float, count: int) -> None:
        self.gap_duration.append(duration)
        self.gap_count.append(count)
