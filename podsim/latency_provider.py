"""Step times for engines that simulate their forward pass: a batch in, seconds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from podsim.batch import BatchShape
from podsim.config import Deployment
from podsim.errors import InputError
from podsim.latency import Breakdown
from podsim.model import model_named
from podsim.simulation import latency_model_for


@dataclass(frozen=True, slots=True)
class StepTime:
    """What is predicted of one forward pass."""

    seconds: float
    breakdown: Breakdown
    """Seconds of its parts; they add up to `seconds`."""
    interval: tuple[float, float]
    """Seconds: P10 and P90 of the true time, by the profile's error on held-out forward passes."""
    is_measured: bool
    """Whether every number of the batch lies within what was measured, on this GPU."""


class LatencyProvider:
    """Times of forward passes on one GPU, from its measured profile.

    Options are those of `Deployment`. Raises InputError for an unknown model or GPU, or where
    there is no profile. Use one provider for many steps: it keeps what it has worked out.
    """

    def __init__(
        self,
        *,
        gpu: str = "h200",
        model: str = "llama-3-8b",
        attention: str = "serial",
        profile: str | Path | None = None,
        host_overhead: float = 0.0,
    ) -> None:
        deployment = Deployment(
            gpu=gpu,
            model=model,
            attention=attention,
            profile=None if profile is None else str(profile),
            host_overhead=host_overhead,
        )
        self._latency = latency_model_for(deployment, model_named(model))
        self._is_scaled = self._latency.profile.scaling is not None

    def step_time(self, batch: BatchShape) -> StepTime:
        """One forward pass over `BatchShape.of(prefills, decode_contexts)`.

        Raises InputError for a batch that is empty or impossible.
        """
        _require_possible(batch)
        parts = self._latency.breakdown(batch)
        low, high = self._latency.likely_scales()
        return StepTime(
            seconds=parts.total,
            breakdown=parts,
            interval=(parts.total * low, parts.total * high),
            is_measured=not self._is_scaled and self._latency.is_inside(batch),
        )

    def step_times(self, batches: Sequence[BatchShape]) -> pd.DataFrame:
        """Many forward passes at once: a row each, with columns seconds, low, high, is_measured.

        `low` and `high` are the interval of `StepTime`. InputError as by `step_time`.
        """
        for batch in batches:
            _require_possible(batch)
        seconds = self._latency.step_times(batches)
        low, high = self._latency.likely_scales()
        inside = [not self._is_scaled and self._latency.is_inside(batch) for batch in batches]
        columns = {"seconds": seconds, "low": seconds * low, "high": seconds * high}
        return pd.DataFrame({**columns, "is_measured": np.array(inside, dtype=bool)})

    def notes(self) -> list[str]:
        """What a reader of the times should know."""
        return list(self._latency.notes())


def _require_possible(batch: BatchShape) -> None:
    for num_tokens, context in batch.prefills:
        if not 1 <= num_tokens <= context:
            raise InputError(
                f"a chunk of {num_tokens} tokens at a context of {context}: expected at least 1 "
                "token, and the context includes the chunk"
            )
    least = batch.decode_context_max + batch.num_decodes - 1
    if batch.num_decodes and not (
        batch.decode_context_max >= 1
        and least <= batch.decode_context_sum <= batch.num_decodes * batch.decode_context_max
    ):
        raise InputError(
            f"{batch.num_decodes} decodes with contexts of {batch.decode_context_sum} tokens in "
            f"all and {batch.decode_context_max} at most: expected at least 1 token each"
        )
    rows = len(batch.prefills) + batch.num_decodes
    if not 0 <= batch.num_sampled <= rows:
        raise InputError(
            f"num_sampled is {batch.num_sampled}: expected 0 to {rows}, at most one of each chunk "
            "and decode"
        )
    if not batch.num_tokens:
        raise InputError("the batch is empty: no chunks and no decodes")
