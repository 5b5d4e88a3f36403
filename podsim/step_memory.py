"""What a memory system adds to the steps of a replica, and what it tells of itself afterwards."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from podsim.batch import Batch, BatchShape
from podsim.decode_group import Decodes


class StepMemory(Protocol):
    """Asked by the replica around each batch, in this order."""

    def begin(self, batch: Batch, shape: BatchShape, decodes: Decodes, start: float) -> None:
        """A batch is about to be computed: do what memory work it takes."""

    def most_steps(self, decodes: Decodes, num_steps: int) -> int:
        """Of so many steps like this one: how many until there is other memory work to do."""

    def step_times(self, times: Sequence[float]) -> list[float]:
        """Seconds of these steps, from those without the memory system."""

    def end(self, num_steps: int) -> None:
        """So many of these steps took place: an arrival may have cut them short."""

    @property
    def log(self) -> MemoryLog: ...

    def summary(self) -> Mapping[str, float]:
        """Totals of the run."""

    def notes(self) -> Sequence[str]:
        """What a reader of the results should know."""


@dataclass(slots=True)
class MemoryLog:
    """Columns of what is reported over time: a row at each batch at which something changed."""

    names: tuple[str, ...]
    keep: bool = True
    """Otherwise nothing is kept, and memory does not grow with steps."""
    columns: dict[str, array[Any]] = field(init=False)
    held_up: array[float] = field(default_factory=lambda: array("d"))
    """Of each step: the seconds that it took longer for memory work."""

    def __post_init__(self) -> None:
        self.columns = {name: array("d") for name in self.names}

    def hold_up(self, seconds: Iterable[float]) -> None:
        """Of the next steps."""
        if self.keep:
            self.held_up.extend(seconds)

    def append(self, *row: float) -> None:
        """A row; none if nothing but the first column, the time, is new."""
        if not self.keep:
            return
        columns = list(self.columns.values())
        if columns[0] and all(c[-1] == v for c, v in zip(columns[1:], row[1:], strict=True)):
            return
        for column, value in zip(columns, row, strict=True):
            column.append(value)
