"""Checks offloaded layers: every split has to give what one layer after the other gives.

Chains that are timed find the right K and V in both of their buffers, so that a copy which is left
out, or comes too late, does not change what comes out. Here layers take turns with caches of their
own, and what a layer has read is wiped with NaN: a layer reads NaN where a copy was not in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from podsim.offloaded_layers import HostBuffers, OffloadedLayers, Weights
from podsim.offloaded_shapes import LayerShape

NUM_CACHES = 3
"""One more than buffers: what the layer before left in one is never right."""
MOST_ERROR = 0.02
"""Of the largest value: recomputed K and V are rounded like those transferred, but not always
summed up in the same order."""


class CheckedLayers(OffloadedLayers):
    """Layers that leave NaN in whatever copies have to fill again."""

    def _layer(
        self, hidden: torch.Tensor, weights: Weights, kv: torch.Tensor, new_x: torch.Tensor
    ) -> torch.Tensor:
        hidden = super()._layer(hidden, weights, kv, new_x)
        kv[: self.context].fill_(math.nan)
        if any(weights is loaded for loaded in self._loaded):
            weights.flat.fill_(math.nan)
        return hidden

    def _recompute(self, weights: Weights, x: torch.Tensor, kv: torch.Tensor) -> None:
        super()._recompute(weights, x, kv)
        x.fill_(math.nan)

    def one_by_one(self) -> list[torch.Tensor]:
        """As `offloaded_results`: each layer's whole cache is copied, and waited for, before it."""
        hidden = self.token
        for layer in range(self.num_layers):
            index, buffer = layer % len(self.weights), layer % len(self.kv)
            self.kv[buffer][: self.context].copy_(self.kv_host[index])
            hidden = self._layer(hidden, self.weights[index], self.kv[buffer], self.new_x[buffer])
        newest = [*self.new_x, *(kv[self.context] for kv in self.kv)]
        return [hidden, *(part.clone() for part in newest)]

    def offloaded_results(self, split: int, schedule: str) -> list[torch.Tensor]:
        """What comes out of the last layer, [batch, hidden]; X, and K and V, of the new token as
        the last two layers store them on the host.
        """
        filled_by_copies = [*self.kv, *self.x, *(weights.flat for weights in self._loaded)]
        for tensor in (*filled_by_copies, *self.new_host):
            tensor.fill_(math.nan)
        hidden = self.offloaded(split, schedule)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return [hidden, *(new.to(hidden.device) for new in self.new_host)]


def split_errors(
    shape: LayerShape,
    batch: int,
    context: int,
    schedule: str,
    splits: Sequence[int],
    *,
    num_layers: int,
    host: HostBuffers | None = None,
    device: str = "cuda",
) -> dict[int, float]:
    """Of each split, the largest difference over the largest value.

    RuntimeError if one exceeds MOST_ERROR. `host` has room for NUM_CACHES caches.
    """
    layers = CheckedLayers(
        shape,
        batch=batch,
        context=context,
        num_layers=num_layers,
        num_distinct=NUM_CACHES,
        device=device,
        host=host,
        weights_on_host=schedule == "column",
    )
    expected = layers.one_by_one()
    errors = {}
    for split in splits:
        errors[split] = _error(layers.offloaded_results(split, schedule), expected)
        if not errors[split] <= MOST_ERROR:  # nor if it is NaN
            raise RuntimeError(
                f"{shape.name}, {batch} x {context}, {schedule}, split {split}: off by "
                f"{errors[split]:.1%} of the largest value"
            )
    return errors


def _error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest of any part; NaN if there is one in any."""
    errors = [
        (a.float() - b.float()).abs().max() / b.float().abs().max()
        for a, b in zip(found, expected, strict=True)
    ]
    return float(torch.stack(errors).max())
