"""Decode layers with an offloaded cache, in float64, against a plain reference on the CPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from podsim import measure_kvpr
from podsim.check_offload import split_errors
from podsim.offloaded_layers import OffloadedLayers
from podsim.offloaded_shapes import SHAPES, LayerShape

OPT = LayerShape("tiny-opt", 32, 4, 64, gated=False, rotary=False)
LLAMA = LayerShape("tiny-llama", 32, 4, 48, gated=True, rotary=True)
BATCH, CONTEXT = 3, 11
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def chain(
    shape: LayerShape, num_layers: int, num_distinct: int, device: str = "cpu", **options: bool
) -> OffloadedLayers:
    return OffloadedLayers(
        shape,
        batch=BATCH,
        context=CONTEXT,
        num_layers=num_layers,
        num_distinct=num_distinct,
        device=device,
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
        hidden = layers.token[request].cpu()
        for number in range(layers.num_layers):
            index = number % len(layers.weights)
            weights = {name: part.cpu() for name, part in layers.weights[index].parts.items()}
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
@pytest.mark.parametrize("device", DEVICES)
def test_every_split_gives_what_the_reference_gives(
    shape: LayerShape, schedule: str, split: int, device: str
) -> None:
    on_host = schedule == "column"
    layers = chain(shape, num_layers=5, num_distinct=3, device=device, weights_on_host=on_host)
    torch.testing.assert_close(layers.offloaded(split, schedule).cpu(), reference(layers))


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


# ----------------------------------------------------------------------- the check before timing


class Copies(TorchFunctionMode):
    """Copies that do not wait: some left out, by their numbers, or all late, by so many copies."""

    def __init__(self, left_out: Collection[int] = (), late: int = 0) -> None:
        super().__init__()
        self.left_out = left_out
        self.late = late
        self.count = 0
        self.waiting: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.Tensor.copy_ or not kwargs.get("non_blocking"):
            return func(*args, **kwargs)
        self.count += 1
        self.waiting += [args] if self.count - 1 not in self.left_out else []
        while len(self.waiting) > self.late:
            target, source = self.waiting.pop(0)
            func(target, source)
        return args[0]


def checked(schedule: str, splits: list[int], shape: LayerShape = LLAMA) -> dict[int, float]:
    return split_errors(shape, BATCH, CONTEXT, schedule, splits, num_layers=6, device="cpu")


@pytest.mark.parametrize("shape", [OPT, LLAMA], ids=lambda shape: shape.name)
@pytest.mark.parametrize(("schedule", "copies"), [("row", 4), ("column", 5)])
def test_layers_that_are_right_pass_the_check(
    shape: LayerShape, schedule: str, copies: int
) -> None:
    splits = [0, 1, 6, CONTEXT]
    with Copies() as seen:
        errors = checked(schedule, splits, shape)
    assert seen.count == len(splits) * 6 * copies
    assert list(errors) == splits
    assert errors[0] == 0
    assert max(errors.values()) < 0.01


OF_A_LAYER = {"row": ["x", "kv", "new x", "new kv"]}
OF_A_LAYER["column"] = ["weights", *OF_A_LAYER["row"]]


@pytest.mark.parametrize("shape", [OPT, LLAMA], ids=lambda shape: shape.name)
@pytest.mark.parametrize("schedule", ["row", "column"])
def test_every_copy_that_is_left_out_is_found(shape: LayerShape, schedule: str) -> None:
    """What one of the first four layers stores for its new token, later ones write over."""
    copies = OF_A_LAYER[schedule]
    for number in range(6 * len(copies)):
        layer, name = number // len(copies), copies[number % len(copies)]
        stores = name.startswith("new")
        if stores and layer < 4:
            continue
        fault = r"split 6: off by \d" if stores else "split 6: off by nan"
        with Copies(left_out=[number]), pytest.raises(RuntimeError, match=fault):
            checked(schedule, [6], shape)


@pytest.mark.parametrize("shape", [OPT, LLAMA], ids=lambda shape: shape.name)
@pytest.mark.parametrize("schedule", ["row", "column"])
@pytest.mark.parametrize("split", [0, 6, CONTEXT])
def test_no_copies_and_late_ones_are_found(shape: LayerShape, schedule: str, split: int) -> None:
    for fault in (Copies(left_out=range(99)), Copies(late=2)):
        with fault, pytest.raises(RuntimeError, match=f"{schedule}, split {split}: off by nan"):
            checked(schedule, [split], shape)


def test_values_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another layer's cache in the place of its own."""
    plain = OffloadedLayers.offloaded

    def shifted(layers: OffloadedLayers, split: int, schedule: str) -> torch.Tensor:
        layers.kv_host, layers.x_host = (t.roll(1, 0) for t in (layers.kv_host, layers.x_host))
        return plain(layers, split, schedule)

    monkeypatch.setattr(OffloadedLayers, "offloaded", shifted)
    with pytest.raises(RuntimeError, match=r"split 6: off by \d+\.\d% of the largest value"):
        checked("row", [6])
