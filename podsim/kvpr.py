"""KVPR: recompute a part of an offloaded KV cache while the rest crosses to the GPU.

arXiv 2411.17089, equations 6 to 9. Of the tokens that a layer attends to, `split` are sent as
activations X, from which the GPU computes their K and V again; of the others K and V are sent.
Under multi-head attention X has half the bytes. All quantities are those of one layer of one step,
over all requests of the batch: with linear costs only the sum of their tokens matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from podsim.memory_costs import Curve, Line


class OffloadedLayer(NamedTuple):
    """One layer of a step; bytes, seconds and tokens."""

    num_tokens: int
    """Tokens attended to whose KV is in host memory."""
    kv_bytes: float
    """Of a token's keys and values."""
    x_bytes: float
    """Of a token's activations."""
    transfer: Line
    """Host to GPU, by bytes."""
    recompute: Line | Curve
    """Of K and V from activations, by tokens."""
    compute: float = 0.0
    """Seconds of everything else in the layer."""
    weights: float = 0.0
    """Seconds in which its weights are transferred, if they are in host memory too."""
    store: float = 0.0
    """Seconds in which its new K and V go to the host, beside all else, on a link of their own."""
    handoff: float = 0.0
    """Seconds from the end of a copy to the kernel that waits for it, or the other way round."""
    relay: float | None = None
    """Seconds from the end of the last copy of a layer to the first of the next, where no kernel is
    between them that they wait for; None: two handoffs."""

    def x_seconds(self, split: float) -> float:
        return self.transfer.at(self.x_bytes * split)

    def kv_seconds(self, split: float) -> float:
        return self.transfer.at(self.kv_bytes * (self.num_tokens - split))

    # ---- schedules

    def row_period(self, split: float) -> float:
        """Seconds from layer to layer, weights on the GPU.

        The transfers of a layer begin when K and V of the layer before are complete, and so run
        beside its attention and MLP. X comes first; K and V are recomputed while the rest comes.
        Where copies and kernels take nearly the same, they wait for each other in turn: that takes
        up to half of what a relay is shorter than two handoffs, which is left out.
        """
        x, kv, again = self.x_seconds(split), self.kv_seconds(split), self.recompute.at(split)
        there = 2 * self.handoff + x
        return max(self._relay + x + kv, max(self.compute, there) + again)

    @property
    def _relay(self) -> float:
        twice = 2 * self.handoff
        return twice if self.relay is None else min(self.relay, twice)

    def column_period(self, split: float) -> float:
        """Seconds from layer to layer, weights in host memory.

        The copies of the next layer run freely beside all computing of this one (two buffers).
        """
        copies = self.weights + self.x_seconds(split) + self.kv_seconds(split)
        return max(copies, self.recompute.at(split) + self.compute)

    def first(self, split: float) -> float:
        """Seconds until K and V of the first layer are complete: nothing runs beside it."""
        x, kv = self.x_seconds(split), self.kv_seconds(split)
        return self.handoff + self.weights + x + max(self.recompute.at(split), kv)

    def seconds(self, num_layers: int, split: float, schedule: str) -> float:
        """Of so many layers, one after the other."""
        period = self.row_period if schedule == "row" else self.column_period
        chain = self.first(split) + (num_layers - 1) * period(split) + self.compute
        return max(chain, num_layers * self.store)

    # ---- the split

    def pays(self) -> bool:
        """Whether activations are smaller than the K and V they replace (not under most GQA)."""
        return self.x_bytes < self.kv_bytes

    def best_split(self, num_layers: int, schedule: str) -> int:
        """The integer split with the least seconds; of equals the smallest.

        The seconds are linear in the split between corners, but for what a first byte costs at
        the ends: their minimum is at an end or beside a corner.
        """
        if not self.pays():
            return 0
        splits = {0, 1, self.num_tokens - 1, self.num_tokens}
        for crossing in self._corners():
            splits |= {math.floor(crossing), math.ceil(crossing)}
        inside = sorted(split for split in splits if 0 <= split <= self.num_tokens)
        return min(inside, key=lambda split: self.seconds(num_layers, split, schedule))

    def _corners(self) -> Iterator[float]:
        """Where recomputing has another line, and where two of the times that the schedules compare
        are equal.
        """
        at, rate = self.transfer.fixed, self.transfer.per_unit
        x = (at, self.x_bytes * rate)
        kv = (at + self.kv_bytes * rate * self.num_tokens, -self.kv_bytes * rate)
        compute, weights = (self.compute, 0.0), (self.weights, 0.0)
        there = (at + 2 * self.handoff, self.x_bytes * rate)
        yield from _crossing(there, compute, 0.0, math.inf)
        row, column = _sum((self._relay, 0.0), x, kv), _sum(weights, x, kv)
        begin = 0.0
        for end, line in self.recompute.pieces():
            again = (line.fixed, line.per_unit)
            yield from _crossing(kv, again, begin, end)
            for first in (row, column):
                yield from _crossing(first, _sum(compute, again), begin, end)
            yield from _crossing(row, _sum(there, again), begin, end)
            if end < self.num_tokens:
                yield end
            begin = end


def _crossing(
    first: tuple[float, float], second: tuple[float, float], begin: float, end: float
) -> Iterator[float]:
    """Where two lines are equal, if that is between `begin` and `end`."""
    slope = first[1] - second[1]
    if slope and begin <= (crossing := (second[0] - first[0]) / slope) <= end:
        yield crossing


def _sum(*lines: tuple[float, float]) -> tuple[float, float]:
    return sum(line[0] for line in lines), sum(line[1] for line in lines)


def closed_form_split(
    num_tokens: int, hidden_size: int, value_bytes: int, gpu_rate: float, link_rate: float
) -> int:
    """The paper's balance point under multi-head attention: recomputing takes as long as the
    transfer of the rest.

    `gpu_rate` in FLOP/s, `link_rate` in bytes/s: l = s p v_gpu / (2 h v_com + p v_gpu).
    """
    gpu = value_bytes * gpu_rate
    return round(num_tokens * gpu / (2 * hidden_size * link_rate + gpu))


def layer_of(
    num_tokens: int, hidden_size: int, value_bytes: int, gpu_rate: float, link_rate: float
) -> OffloadedLayer:
    """A layer of the paper's model: multi-head attention, nothing but transfer and recompute."""
    return OffloadedLayer(
        num_tokens,
        2 * value_bytes * hidden_size,
        value_bytes * hidden_size,
        Line(0.0, 1 / link_rate),
        Line(0.0, 4 * hidden_size**2 / gpu_rate),
    )
