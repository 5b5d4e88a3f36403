"""The time of steps whose KV cache lies partly in host memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from podsim.batch import Batch, BatchShape
from podsim.decode_group import Decodes
from podsim.kvpr import OffloadedLayer
from podsim.memory_costs import Curve, Line
from podsim.model import Model
from podsim.step_memory import MemoryLog

OFFLOAD_COLUMNS = ("time", "gpu_tokens", "host_tokens", "split", "step_time")
"""Seconds and tokens; split: tokens of a step whose K and V are computed again in each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadCosts:
    """Of one GPU's share of a model."""

    load: Line
    """Host to GPU beside computing, by bytes."""
    store: Line
    """GPU to host, by bytes."""
    recompute: Line | Curve | None
    """K and V of a layer from activations, by tokens; None: all K and V are transferred."""
    handoff: float = 0.0
    """Between a copy and a kernel that waits for it, in seconds."""
    relay: float | None = None
    """Between copies that wait for each other by way of another stream; None: two handoffs."""
    never_pays: bool = False
    """Recomputing was asked for, and activations are no smaller than K and V."""


class _Step(NamedTuple):
    """A step as it will be reported."""

    gpu_tokens: int
    host_tokens: int
    seconds: float
    added: float
    loaded_tokens: int = 0
    split: int = 0
    stored_tokens: int = 0


class OffloadTime:
    """Steps with an offloaded KV cache; see `podsim.step_memory.StepMemory`.

    Tokens are kept on the GPU first. A token in host memory crosses in every step that attends to
    it, and stays on the GPU if there is room by then: so only what exceeds the GPU's room is in
    host memory. All requests have the same share of it. New tokens of that share are stored to the
    host, with their activations where these are recomputed from. The transfers of a step begin with
    it: nothing of the next step is loaded before.
    """

    def __init__(
        self,
        share: Model,
        gpu_tokens: int,
        costs: OffloadCosts,
        schedule: str,
        seconds_once: Callable[[BatchShape], float],
    ) -> None:
        """`seconds_once`: the part of a step that is not in its layers."""
        self.share = share
        self.gpu_tokens = gpu_tokens
        self.costs = costs
        self.schedule = schedule
        self.seconds_once = seconds_once
        self.kv_bytes = share.kv_bytes_per_token // share.num_layers
        self.x_bytes = share.activation_bytes_per_token
        self.recomputes = costs.recompute is not None
        self.weight_bytes = share.layer_weight_bytes if schedule == "column" else 0
        self.log = MemoryLog(OFFLOAD_COLUMNS)
        self._shape = BatchShape.of()
        self._waiting_tokens = 0
        self._start = 0.0
        self._steps: list[_Step] = []
        self._totals = dict.fromkeys(
            ("offloaded_steps", "added_time", "h2d_bytes_moved", "d2h_bytes_moved"), 0.0
        )
        self._split_tokens = self._loaded_tokens = 0

    def begin(self, batch: Batch, shape: BatchShape, decodes: Decodes, start: float) -> None:
        self._shape = shape
        self._start = start
        num_decodes, tokens, _ = decodes.contexts()
        self._waiting_tokens = 0 if batch.num_decodes else tokens - num_decodes

    def most_steps(self, decodes: Decodes, num_steps: int) -> int:
        return num_steps

    def step_times(self, times: Sequence[float]) -> list[float]:
        shape = self._shape
        once = self.seconds_once(shape)
        attended = shape.decode_context_sum + sum(chunk.context_len for chunk in shape.prefills)
        self._steps = [
            self._step(attended + shape.num_decodes * step, shape.num_tokens, once, seconds)
            for step, seconds in enumerate(times)
        ]
        return [step.seconds for step in self._steps]

    def _step(self, attended: int, new_tokens: int, once: float, seconds: float) -> _Step:
        """A step that attends to so many tokens, and takes so many seconds without offloading."""
        tokens = attended + self._waiting_tokens
        on_host = max(0, tokens - self.gpu_tokens)
        if not on_host and not self.weight_bytes:
            return _Step(tokens, 0, seconds, 0.0)
        num_layers, once = self.share.num_layers, min(once, seconds)
        loaded, stored = (round(n * on_host / tokens) for n in (attended - new_tokens, new_tokens))
        layer = OffloadedLayer(
            loaded,
            self.kv_bytes,
            self.x_bytes,
            self.costs.load,
            self.costs.recompute or Line(0.0, 0.0),
            compute=(seconds - once) / num_layers,
            weights=self.costs.load.at(self.weight_bytes),
            store=self.costs.store.at(stored * self._stored_bytes),
            handoff=self.costs.handoff,
            relay=self.costs.relay,
        )
        split = layer.best_split(num_layers, self.schedule) if self.recomputes else 0
        taken = once + layer.seconds(num_layers, split, self.schedule)
        return _Step(tokens - on_host, on_host, taken, taken - seconds, loaded, split, stored)

    @property
    def _stored_bytes(self) -> int:
        """Of a new token, in a layer."""
        return self.kv_bytes + (self.x_bytes if self.recomputes else 0)

    def end(self, num_steps: int) -> None:
        for step in self._steps[:num_steps]:
            self.log.append(
                self._start, step.gpu_tokens, step.host_tokens, step.split, step.seconds
            )
            self._start += step.seconds
            self.log.hold_up([step.added])
            self._count(step)

    def _count(self, step: _Step) -> None:
        rest = step.loaded_tokens - step.split
        loaded = self.weight_bytes + step.split * self.x_bytes + rest * self.kv_bytes
        stored = step.stored_tokens * self._stored_bytes
        self._totals["offloaded_steps"] += step.added > 0
        self._totals["added_time"] += step.added
        self._totals["h2d_bytes_moved"] += self.share.num_layers * loaded
        self._totals["d2h_bytes_moved"] += self.share.num_layers * stored
        self._split_tokens += step.split
        self._loaded_tokens += step.loaded_tokens

    def notes(self) -> list[str]:
        if not self.costs.never_pays:
            return []
        return [
            f"KVPR recomputes nothing (l = 0): a token's activations of {self.x_bytes:,} bytes are "
            f"no smaller than its K and V of {self.kv_bytes:,} bytes in a layer"
        ]

    def summary(self) -> Mapping[str, float]:
        tokens = {"recomputed_tokens": self._split_tokens, "loaded_tokens": self._loaded_tokens}
        return {**self._totals, **tokens}
