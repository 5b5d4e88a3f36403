"""Steps over a block table: what the paged kernels and the table's preparation add."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from podsim.batch import BatchShape
from podsim.latency import Parts, ProfiledLatency, decode_steps
from podsim.memory_costs import PagedCosts
from podsim.model import Model
from podsim.profile import Profile


class PagedLatency(ProfiledLatency):
    """Attention takes longer by the measured ratios; the host prepares a table for each step.

    The two sides of a mixed batch count by the time that each takes alone.
    """

    def __init__(
        self,
        profile: Profile,
        model: Model,
        strategy: str,
        *,
        paged: PagedCosts,
        block_size: int,
        **options: Any,
    ) -> None:
        super().__init__(profile, model, strategy, **options)
        self.paged = paged
        self.block_size = block_size
        self.heads = f"{model.num_q_heads}/{model.num_kv_heads}"

    def parts(self, shape: BatchShape) -> Parts:
        parts = super().parts(shape)
        ratio = self._attention_ratio(shape)
        return parts._replace(
            attention=parts.attention * ratio,
            once=parts.once + self.table_seconds(shape),
            clocked_attention=parts.clocked_attention * ratio,
            drawing=parts.drawing * ratio,
            reading=parts.reading * ratio,
            beside=parts.beside * ratio,
        )

    def table_seconds(self, shape: BatchShape) -> float:
        """In which the host prepares the table of a step; a context fills half its last block."""
        requests = len(shape.prefills) + shape.num_decodes
        tokens = shape.decode_context_sum + sum(chunk.context_len for chunk in shape.prefills)
        blocks = tokens / self.block_size + requests / 2
        paged = self.paged
        return paged.table_step + paged.table_request * requests + paged.table_block * blocks

    def _attention_ratio(self, shape: BatchShape) -> float:
        if not shape.prefills:
            return self.paged.decode
        if not shape.num_decodes:
            return self.paged.prefill
        chunks = BatchShape.of(shape.prefills)
        decodes = BatchShape.of_decodes(
            shape.num_decodes, shape.decode_context_sum, shape.decode_context_max
        )
        prefill = self.attention.seconds(self.strategy, chunks)
        decode = self.attention.seconds(self.strategy, decodes)
        return (prefill * self.paged.prefill + decode * self.paged.decode) / (prefill + decode)

    def notes(self) -> Sequence[str]:
        measured = self.paged.heads
        if not measured or self.heads in measured.split(", "):
            return super().notes()
        return [
            *super().notes(),
            f"what attention takes longer from blocks was measured with {measured} query and KV "
            f"heads, and is taken for {self.heads}",
        ]

    def step_times(self, shapes: Sequence[BatchShape]) -> NDArray[np.float64]:
        return np.array([self.step_time(shape) for shape in shapes])

    def decode_run_times(self, shape: BatchShape, num_steps: int) -> list[float]:
        return [self.step_time(step) for step in decode_steps(shape, num_steps)]
