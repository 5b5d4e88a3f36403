"""How soon the kernels of a CUDA graph start one after another, and whether that changes.

From the moment that another process begins or ends on a GPU of the machine, the graphs that an
engine has captured may run their kernels closer together, and its steps are some per cent shorter
(docs/accuracy.md). A graph that is as old as the engine's own tells it.
"""

from __future__ import annotations

import statistics

import torch

from podsim.measure import launches
from podsim.measure_sequences import Timed

KERNELS = 300
REPLAYS = 21
WARM_UP = 200


class KernelStarts:
    """A graph of kernels that do nothing, captured beside the engine's own."""

    def __init__(self) -> None:
        self._row = Timed("", launches(KERNELS))

    def seconds(self) -> float:
        """From the start of one kernel to that of the next: the median of some replays."""
        for _ in range(WARM_UP):  # a GPU that rested has a low clock
            self._row.graph.replay()
        timed = []
        for _ in range(REPLAYS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._row.graph.replay()
            end.record()
            end.synchronize()
            timed.append(start.elapsed_time(end) / 1000)
        seconds: float = statistics.median(timed)
        return seconds / KERNELS
