"""Costs on a GPU that nobody has measured: those of another one, scaled by the published peaks.

Every kernel is taken to reach the same share of the roofline on both GPUs: of the time that its
FLOPs and its bytes take at least. So what waits for the memory is scaled by bandwidth, what waits
for the tensor cores by FLOP/s, and which of the two it is may differ between the GPUs. The part of
a kernel without weights that does not depend on the number of tokens, its launch and latency, is
not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from podsim.batch import BatchShape
from podsim.hardware import Gpu
from podsim.model import Model
from podsim.roofline import Ceilings, attention_traffic, op_traffic, values_per_token

SAME_CHIP = 1.25
"""Of a GPU with the same SMs as the measured one. The kernels are then those that were tuned, but
memory, power limit and clocks differ: under its power limit an H200 runs matrix work at 1.3 to 1.7
GHz instead of 1.98, and one kernel moves by 10 to 15 % between two states of the card."""
OTHER_CHIP = 1.7
"""Of any other. The share of the roofline that a kernel reaches is another one: podsim's prefill
attention reaches 424 of 989 TFLOP/s on an H200 (43 %), FlashAttention-2 up to 230 of 312 on an A100
(arXiv 2307.08691: 73 %), which is 1.7 times as much."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """From the GPU whose costs were measured to another one, for one model."""

    source: str
    """The profile that is scaled."""
    measured: Gpu
    wanted: Gpu
    model: Model

    @property
    def width(self) -> float:
        """A step may take this many times as long as predicted, or as short."""
        same = (self.measured.architecture, self.measured.num_sms) == (
            self.wanted.architecture,
            self.wanted.num_sms,
        )
        return SAME_CHIP if same else OTHER_CHIP

    @property
    def flops_ratio(self) -> float:
        """Of the time of what waits for the tensor cores."""
        return self.measured.peak_flops / self.wanted.peak_flops

    @property
    def note(self) -> str:
        """What must be said of every result."""
        return (
            f"uncalibrated: nobody measured {self.wanted.name}; costs of {self.source} scaled by "
            f"the published peaks, so steps may be {self.width:g} times as long, or as short"
        )

    def ops(
        self, tables: Mapping[str, Mapping[str, list[float]]]
    ) -> dict[str, dict[str, list[float]]]:
        """A profile's tables of operations, as they would be on the wanted GPU."""
        scaled = {}
        for op, table in tables.items():
            fixed = table["seconds"][0] if op in values_per_token(self.model) else 0.0
            seconds = [
                fixed + max(0.0, second - fixed) * self._op_ratio(op, int(num_tokens))
                for num_tokens, second in zip(table["num_tokens"], table["seconds"], strict=True)
            ]
            scaled[op] = {"num_tokens": list(table["num_tokens"]), "seconds": seconds}
        return scaled

    def _op_ratio(self, op: str, num_tokens: int) -> float:
        work = op_traffic(self.model, op, num_tokens)
        wanted, measured = (Ceilings.published(gpu) for gpu in (self.wanted, self.measured))
        return wanted.least_seconds(work) / measured.least_seconds(work)

    def attention_ratio(self, shape: BatchShape) -> float:
        """Of a batch: its two sides one after the other, each by its own roofline."""
        seconds = []
        for gpu in (self.wanted, self.measured):
            ceilings = Ceilings.published(gpu)
            prefill = attention_traffic(self.model, shape.prefills, 0)
            decode = attention_traffic(self.model, (), shape.decode_context_sum)
            seconds.append(ceilings.least_seconds(prefill) + ceilings.least_seconds(decode))
        return seconds[0] / seconds[1]


class AttentionTime(NamedTuple):
    """Of a batch's attention in a layer, in seconds."""

    seconds: float
    drawing: float = 0.0
    """Seconds for which tiles would keep all SMs busy: that draws power as matrix products do.
    Decodes as tiles (unified), whose rows are mostly padding, do so too."""
    reading: float = 0.0
    """Seconds that decodes beside prefill would take alone: the memory draws power too."""
    beside: float = 0.0
    """Seconds by which kernels of both sides are shorter for running at once;"""
    balanced: float = 0.0
    """in its place, those of POD's tiles for batches that are not decode-heavy."""


class Attention(Protocol):
    """What `podsim.attention_model.AttentionModel` tells."""

    def seconds(self, strategy: str, shape: BatchShape) -> float: ...

    def time(self, strategy: str, shape: BatchShape) -> AttentionTime: ...

    def decode_seconds(self, num_decodes: int, context_sum: int, context_max: int) -> float: ...

    def decode_seconds_of_run(
        self,
        num_decodes: int,
        context_sums: NDArray[np.int64],
        context_maxima: NDArray[np.int64],
    ) -> NDArray[np.float64]: ...


class ScaledAttention:
    """An attention model's times on another GPU."""

    def __init__(self, attention: Attention, scaling: Scaling) -> None:
        self._attention = attention
        self._scaling = scaling
        # FLOPs and bytes of decodes both grow with their contexts alone: their ratio is constant.
        self._decode_ratio = scaling.attention_ratio(BatchShape.of((), (1024,)))

    def seconds(self, strategy: str, shape: BatchShape) -> float:
        return self.time(strategy, shape).seconds

    def time(self, strategy: str, shape: BatchShape) -> AttentionTime:
        time = self._attention.time(strategy, shape)
        if not shape.prefills:
            return AttentionTime(time.seconds * self._decode_ratio)
        ratio = self._scaling.attention_ratio(shape)
        return AttentionTime(*(seconds * ratio for seconds in time))

    def decode_seconds(self, num_decodes: int, context_sum: int, context_max: int) -> float:
        seconds = self._attention.decode_seconds(num_decodes, context_sum, context_max)
        return seconds * self._decode_ratio

    def decode_seconds_of_run(
        self,
        num_decodes: int,
        context_sums: NDArray[np.int64],
        context_maxima: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        seconds = self._attention.decode_seconds_of_run(num_decodes, context_sums, context_maxima)
        return seconds * self._decode_ratio
