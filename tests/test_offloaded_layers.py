"""Decode layers with an offloaded cache, on the CPU in float64, against a plain reference."""

from __future__ import annotations

import pytest
import torch

from podsim import measure_kvpr
from podsim.offloaded_layers import OffloadedLayers
from podsim.offloaded_shapes import SHAPES, LayerShape

OPT = LayerShape("tiny-opt", 32, 4, 64, gated=False, rotary=False)
LLAMA = LayerShape("tiny-llama", 32, 4, 48, gated=True, rotary=True)
BATCH, CONTEXT = 3, 11


def chain(
    shape: LayerShape, num_layers: int, num_distinct: int, **options: bool
) -> OffloadedLayers:
    return OffloadedLayers(
        shape,
        batch=BATCH,
        context=CONTEXT,
        num_layers=num_layers,
        num_distinct=num_distinct,
        device="cpu",
        dtype=torch.float64,
        **options,
    )


def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
    """A head's vector as complex numbers, turned by its position."""
    half = x.shape[-1] // 2
    angles = position * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(half).double(), angles)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def reference(layers: OffloadedLayers) -> torch.Tensor:
    """Each request by itself, K and V of every token projected anew from its activations."""
    shape, size, d = layers.shape, layers.shape.hidden_size, layers.shape.head_dim
    out = []
    for request in range(BATCH):
        hidden = layers.token[request]
        for number in range(layers.num_layers):
            index = number % len(layers.weights)
            weights = layers.weights[index].parts
            norm = normed(hidden, shape)
            q, k_rows, v_rows = weights["qkv"].split(size)
            x = torch.cat([layers.x_host[index, :, request], norm[None]])
            heads = []
            for head in range(shape.num_heads):
                rows = slice(head * d, (head + 1) * d)
                query, keys, values = norm @ q[rows].T, x @ k_rows[rows].T, x @ v_rows[rows].T
                if shape.rotary:
                    query = rotate(query, CONTEXT)
                    keys = torch.stack([rotate(key, i) for i, key in enumerate(keys)])
                heads.append((keys @ query / d**0.5).softmax(0) @ values)
            hidden = hidden + weights["output"] @ torch.cat(heads)
            up = weights["up"] @ normed(hidden, shape)
            if shape.gated:
                gate, up = up.chunk(2)
                up = gate * gate.sigmoid() * up
            else:
                up = up.clamp(min=0)
            hidden = hidden + weights["down"] @ up
        out.append(hidden)
    return torch.stack(out)


def normed(x: torch.Tensor, shape: LayerShape) -> torch.Tensor:
    if shape.gated:
        return x / (x.pow(2).mean() + torch.finfo(torch.float64).eps).sqrt()
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("shape", [OPT, LLAMA], ids=lambda shape: shape.name)
@pytest.mark.parametrize("schedule", ["row", "column"])
@pytest.mark.parametrize("split", [0, 1, 6, CONTEXT])
def test_every_split_gives_what_the_reference_gives(
    shape: LayerShape, schedule: str, split: int
) -> None:
    layers = chain(shape, num_layers=5, num_distinct=3)
    torch.testing.assert_close(layers.offloaded(split, schedule), reference(layers))


def test_weights_from_the_host_give_the_same() -> None:
    layers = chain(LLAMA, num_layers=5, num_distinct=3, weights_on_host=True)
    for weights in layers._loaded:
        weights.flat.zero_()
    torch.testing.assert_close(layers.offloaded(4, "column"), reference(layers))


def test_the_resident_chain_gives_the_same() -> None:
    layers = chain(OPT, num_layers=4, num_distinct=1)
    torch.testing.assert_close(layers.resident(), reference(layers))
    torch.testing.assert_close(layers.offloaded(5), layers.resident())


def test_points_and_splits_that_are_timed() -> None:
    points = measure_kvpr.points()
    assert len(points) >= 20
    assert {point.model for point in points} == set(SHAPES)
    for point in points:
        assert 1 <= point.batch <= 64
        assert 128 <= point.context <= 8192
    near = [16, 40, 50, 70, 80, 90, 95, 100, 105, 110, 120, 140]
    parts = measure_kvpr.OF_CONTEXT
    assert measure_kvpr.splits_around(100, 160, parts) == [0, *near, 160]
    assert measure_kvpr.splits_around(0, 160, parts) == [0, 16, 40, 80, 120, 160]
    assert measure_kvpr.splits_around(160, 160) == [0, 80, 112, 128, 144, 152, 160]


def test_the_new_token_is_stored_on_the_host() -> None:
    layers = chain(LLAMA, num_layers=1, num_distinct=1)
    layers.offloaded(2)
    norm = torch.stack([normed(row, LLAMA) for row in layers.token])
    torch.testing.assert_close(layers.new_host[0], norm)
    torch.testing.assert_close(layers.new_host[2], layers.kv[0][CONTEXT])
