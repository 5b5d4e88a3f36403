"""Decode layers whose KV cache is in host memory: transferred, or partly recomputed (KVPR).

The runtime of arXiv 2411.17089: while a layer is computed, the next one's cache comes from pinned
host memory on a stream of its own, for the first `split` tokens as the activations X that K and V
are projected from, for the others as K and V. The token-major layout keeps both in one piece:

    x_host    [context, batch, hidden]          after the layer's first norm
    kv_host   [context, batch, 2 * hidden]      K, rotated if the model rotates, then V
    kv        [context + 1, batch, 2 * hidden]  on the GPU, twice: one buffer is filled while the
                                                other is read

Layers have the shapes of OPT and Llama-2, multi-head attention and no biases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from podsim.offloaded_shapes import LayerShape, matrix_sizes

NUM_BUFFERS = 2
ROPE_BASE = 10000.0


def rope_angles(num_positions: int, head_dim: int, device: Any, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines, [2, num_positions, 1, 1, head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * ROPE_BASE**-exponents
    table = torch.stack([angles.cos(), angles.sin()])
    return table[:, :, None, None].to(device=device, dtype=dtype)


def rotate_(x: torch.Tensor, angles: torch.Tensor) -> None:
    """In place, x [positions, batch, heads, head_dim] at the positions of `angles`."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    rotated = first * cos - second * sin
    second.mul_(cos).addcmul_(first, sin)
    first.copy_(rotated)


class Recompute:
    """K and V of the first tokens of a context from their activations."""

    def __init__(self, shape: LayerShape, weight: torch.Tensor, angles: torch.Tensor) -> None:
        """`weight` [2 * hidden, hidden]; `angles` as of `rope_angles`."""
        self.shape = shape
        self.weight = weight
        self.angles = angles

    @classmethod
    def random(
        cls, shape: LayerShape, device: Any, dtype: torch.dtype, max_tokens: int
    ) -> Recompute:
        size = shape.hidden_size
        weight = torch.randn(2 * size, size, device=device, dtype=dtype) * size**-0.5
        return cls(shape, weight, rope_angles(max_tokens, shape.head_dim, device, dtype))

    def __call__(self, x: torch.Tensor, kv: torch.Tensor) -> None:
        """From x [tokens, batch, hidden] into kv [tokens, batch, 2 * hidden], both in one piece."""
        tokens, _, size = x.shape
        torch.mm(x.view(-1, size), self.weight.t(), out=kv.view(-1, 2 * size))
        if self.shape.rotary:
            k = kv[:, :, :size].unflatten(2, (self.shape.num_heads, self.shape.head_dim))
            rotate_(k, self.angles[:, :tokens])


@dataclass(slots=True)
class Weights:
    """Of one layer, as views of one piece of memory; matrices as [out, in]."""

    flat: torch.Tensor
    shape: LayerShape
    parts: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        sizes = matrix_sizes(self.shape)
        pieces = self.flat.split([rows * columns for rows, columns in sizes.values()])
        self.parts = {
            name: piece.view(size)
            for (name, size), piece in zip(sizes.items(), pieces, strict=True)
        }

    @classmethod
    def random(cls, shape: LayerShape, device: Any, dtype: torch.dtype, seed: int) -> Weights:
        generator = torch.Generator(device).manual_seed(seed)
        pieces = [
            torch.randn(rows * columns, device=device, dtype=dtype, generator=generator)
            * columns**-0.5
            for rows, columns in matrix_sizes(shape).values()
        ]
        return cls(torch.cat(pieces), shape)


class OffloadedLayers:
    """A chain of layers that decode one token of each request of a batch.

    `num_layers` layers take turns with `num_distinct` sets of weights and host caches, so that a
    chain for timing need not fill the host's memory. On a CPU all runs in order, which tests the
    arithmetic; on a GPU the copies run on streams of their own.
    """

    def __init__(
        self,
        shape: LayerShape,
        *,
        batch: int,
        context: int,
        num_layers: int,
        num_distinct: int = 1,
        device: str = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        host: HostBuffers | None = None,
        weights_on_host: bool = False,
    ) -> None:
        """`weights_on_host`: the column schedule transfers the weights of each layer too."""
        self.shape = shape
        self.batch = batch
        self.context = context
        self.num_layers = num_layers
        self.device = torch.device(device)
        self.dtype = dtype
        size = shape.hidden_size
        host = host or HostBuffers(num_distinct * context * batch * 3 * size, dtype, self.device)
        self.x_host = host.take(num_distinct, context, batch, size)
        self.kv_host = host.take(num_distinct, context, batch, 2 * size)
        self.new_host = [host.new(batch, n * size) for n in (1, 1, 2, 2)]
        self.new_x = [self._empty(batch, size) for _ in range(NUM_BUFFERS)]
        self.weights = [
            Weights.random(shape, self.device, dtype, seed) for seed in range(num_distinct)
        ]
        self._angles = rope_angles(context + 1, shape.head_dim, self.device, dtype)
        self._loaded: list[Weights] = []
        self._weights_host: list[torch.Tensor] = []
        if weights_on_host:
            self._loaded = [Weights(w.flat.clone(), shape) for w in (self.weights * 2)[:2]]
            self._weights_host = [host.new(len(w.flat)).copy_(w.flat) for w in self.weights]
        self.kv = [self._empty(context + 1, batch, 2 * size) for _ in range(NUM_BUFFERS)]
        self.x = [self._empty(context, batch, size) for _ in range(NUM_BUFFERS)]
        self._streams = _Streams(self.device)
        self._fill()

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, device=self.device, dtype=self.dtype)

    def _fill(self) -> None:
        """Random activations, and the K and V that belong to them."""
        generator = torch.Generator(self.device).manual_seed(7)
        for index in range(len(self.weights)):
            x = self.x[0].normal_(generator=generator)
            self.x_host[index].copy_(x)
            kv = self.kv[0][: self.context]
            self._recompute(self.weights[index], x, kv)
            self.kv_host[index].copy_(kv)
        self.token = torch.randn(
            self.batch,
            self.shape.hidden_size,
            device=self.device,
            dtype=self.dtype,
            generator=generator,
        )
        for kv in self.kv:
            kv[: self.context].copy_(self.kv_host[0])

    # ---- one step

    def resident(self) -> torch.Tensor:
        """With the cache on the GPU, of one distinct layer: what comes out, [batch, hidden]."""
        hidden = self.token
        for layer in range(self.num_layers):
            buffer = layer % NUM_BUFFERS
            weights = self.weights[layer % len(self.weights)]
            hidden = self._layer(hidden, weights, self.kv[buffer], self.new_x[buffer])
        return hidden

    def offloaded(self, split: int, schedule: str = "row") -> torch.Tensor:
        """With the cache in host memory, K and V of the first `split` tokens recomputed.

        row: a layer's copies begin when K and V of the layer before are complete. column: they run
        ahead freely, as far as there are buffers.
        """
        streams, hidden = self._streams, self.token
        streams.begin()
        complete: list[Any] = []
        computed: list[Any] = []
        stored: list[Any] = []
        for layer in range(self.num_layers):
            index, buffer = layer % len(self.weights), layer % NUM_BUFFERS
            kv, x = self.kv[buffer], self.x[buffer]
            before = complete[-1:] if schedule == "row" else computed[:-1][-1:]
            weights = self.weights[index]
            with streams.copying(after=before):
                if self._loaded and schedule == "column":
                    weights = self._loaded[buffer]
                    weights.flat.copy_(self._weights_host[index], non_blocking=True)
                x[:split].copy_(self.x_host[index, :split], non_blocking=True)
                x_there = streams.mark()
                kv[split : self.context].copy_(self.kv_host[index, split:], non_blocking=True)
                kv_there = streams.mark()
            streams.wait(x_there)
            if split:
                self._recompute(weights, x[:split], kv[:split])
            streams.wait(kv_there)
            complete.append(streams.mark())
            for mark in stored[:-1][-1:]:  # of the layer that had these buffers before
                streams.wait(mark)
            hidden = self._layer(hidden, weights, kv, self.new_x[buffer])
            computed.append(streams.mark())
            with streams.storing(after=computed[-1]):
                self.new_host[buffer].copy_(self.new_x[buffer], non_blocking=True)
                self.new_host[2 + buffer].copy_(kv[self.context], non_blocking=True)
                stored.append(streams.mark())
        streams.end()
        return hidden

    def _recompute(self, weights: Weights, x: torch.Tensor, kv: torch.Tensor) -> None:
        projection = weights.parts["qkv"][self.shape.hidden_size :]
        Recompute(self.shape, projection, self._angles)(x, kv)

    def _layer(
        self, hidden: torch.Tensor, weights: Weights, kv: torch.Tensor, new_x: torch.Tensor
    ) -> torch.Tensor:
        """One layer over kv, whose last row gets the new token's K and V, and new_x its X."""
        shape, matrices, size = self.shape, weights.parts, self.shape.hidden_size
        heads = (shape.num_heads, shape.head_dim)
        new_x.copy_(self._norm(hidden))
        qkv = torch.mm(new_x, matrices["qkv"].t())
        q = qkv[:, :size].unflatten(1, heads)
        if shape.rotary:
            angles = self._angles[:, self.context : self.context + 1]
            rotate_(q[None], angles)
            rotate_(qkv[None, :, size : 2 * size].unflatten(2, heads), angles)
        kv[self.context].copy_(qkv[:, size:])
        k, v = (part.unflatten(2, heads).permute(1, 2, 0, 3) for part in kv.split(size, dim=2))
        attended = functional.scaled_dot_product_attention(q[:, :, None], k, v)
        hidden = hidden + torch.mm(attended.reshape(-1, size), matrices["output"].t())
        up = torch.mm(self._norm(hidden), matrices["up"].t())
        if shape.gated:
            gate, up = up.chunk(2, dim=1)
            up = functional.silu(gate) * up
        else:
            up = functional.relu(up)
        return hidden + torch.mm(up, matrices["down"].t())

    def _norm(self, hidden: torch.Tensor) -> torch.Tensor:
        size = (self.shape.hidden_size,)
        if self.shape.gated:
            return functional.rms_norm(hidden, size)
        return functional.layer_norm(hidden, size)


class HostBuffers:
    """One pinned piece of host memory, to be taken from by one chain after another."""

    def __init__(self, num_values: int, dtype: torch.dtype, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._all = torch.empty(num_values, dtype=dtype, pin_memory=self._on_gpu)
        self._taken = 0

    def take(self, *shape: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        assert self._taken + size <= len(self._all), "the piece is too small"
        part = self._all[self._taken : self._taken + size]
        self._taken += size
        return part.view(shape)

    def reset(self) -> None:
        """All of it may be taken again: nobody uses the former parts any more."""
        self._taken = 0

    def new(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=self._all.dtype, pin_memory=self._on_gpu)


class _Streams:
    """The streams of a chain; on a CPU all of it is one order of work."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._copy, self._store = torch.cuda.Stream(), torch.cuda.Stream()

    def begin(self) -> None:
        if self._on_gpu:
            for stream in (self._copy, self._store):
                stream.wait_stream(torch.cuda.current_stream())

    def end(self) -> None:
        if self._on_gpu:
            for stream in (self._copy, self._store):
                torch.cuda.current_stream().wait_stream(stream)

    def mark(self) -> Any:
        """A moment of the current stream."""
        return torch.cuda.current_stream().record_event() if self._on_gpu else None

    def wait(self, mark: Any) -> None:
        if self._on_gpu:
            torch.cuda.current_stream().wait_event(mark)

    def copying(self, after: Sequence[Any]) -> Any:
        """The copy stream, from the moment of these marks on."""
        return self._stream(self._copy, after) if self._on_gpu else torch.no_grad()

    def storing(self, after: Any) -> Any:
        return self._stream(self._store, [after]) if self._on_gpu else torch.no_grad()

    def _stream(self, stream: torch.cuda.Stream, after: Sequence[Any]) -> Any:
        for mark in after:
            stream.wait_event(mark)
        return torch.cuda.stream(stream)
