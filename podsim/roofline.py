"""The least time an operation can take: its FLOPs and bytes, over what the machine can do.

FLOPs are those of the mathematics (two a multiply-add; of causal attention only what lies below the
diagonal). Bytes are those that cannot come from the L2 cache: operations are timed inside a layer
that runs again and again, so that between two runs of one operation the whole layer's weights pass
through the cache. At best the cache saves its own size of each such cycle; every stream of weights
and of keys and values is taken to profit by its share of that, and activations, which the operation
before has just written, by the whole cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from podsim.batch import PrefillShape
from podsim.hardware import Gpu
from podsim.model import BYTES_PER_VALUE, Model

N = TypeVar("N", int, NDArray[np.int64])


class Work(NamedTuple):
    """What an operation does at least."""

    flops: float
    bytes: float
    """Between device memory and the SMs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What a machine can do at most: measured, or published."""

    flops: float
    """bf16 matrix FLOP/s."""
    bandwidth: float
    """Device memory, bytes/s."""
    launch: float
    """Seconds of the shortest launch."""
    measured: bool

    @classmethod
    def published(cls, gpu: Gpu) -> Ceilings:
        return cls(flops=gpu.peak_flops, bandwidth=gpu.peak_bandwidth, launch=0.0, measured=False)

    def least_seconds(self, work: Work) -> float:
        """Of one operation: its FLOPs and its bytes may overlap perfectly."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth, self.launch)


def linear_shapes(model: Model) -> dict[str, tuple[int, int]]:
    """Of each linear layer: (output features, input features)."""
    heads = model.num_q_heads * model.head_dim
    return {
        "qkv": (model.qkv_size, model.hidden_size),
        "output": (model.hidden_size, heads),
        "gate_up": (2 * model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
        "lm_head": (model.vocab_size, model.hidden_size),
    }


def values_per_token(model: Model) -> dict[str, int]:
    """Of each element-wise operation: values that it reads and writes for one token or row."""
    return {
        "rmsnorm": 4 * model.hidden_size,  # input and residual, both read and written
        "rope_and_cache": 2 * model.qkv_size,
        "silu_mul": 3 * model.intermediate_size,
        "embedding": model.hidden_size,  # what it reads may be one row again and again
        "sampling": model.num_logits,
    }


def layer_weight_bytes(model: Model) -> int:
    shapes = linear_shapes(model)
    return BYTES_PER_VALUE * sum(n * k for op, (n, k) in shapes.items() if op != "lm_head")


def op_traffic(model: Model, op: str, num_tokens: int) -> Work:
    """FLOPs and all bytes that a linear layer or an element-wise operation reads and writes."""
    elementwise = values_per_token(model).get(op)
    if elementwise is not None:
        return Work(0.0, float(BYTES_PER_VALUE * elementwise * num_tokens))
    flops, touched = product_traffic(model, op, num_tokens)
    return Work(float(flops), float(touched))


def product_traffic(model: Model, op: str, num_tokens: N) -> tuple[N, N]:
    """FLOPs and bytes of a linear layer, over one or many numbers of tokens."""
    n, k = linear_shapes(model)[op]
    return 2 * n * k * num_tokens, BYTES_PER_VALUE * (n * k + num_tokens * (n + k))


def op_work(model: Model, gpu: Gpu, op: str, num_tokens: int) -> Work:
    """Of a linear layer or an element-wise operation; KeyError for any other."""
    flops, touched = op_traffic(model, op, num_tokens)
    if op in values_per_token(model):
        return Work(flops, max(0.0, touched - gpu.l2_bytes))
    n, k = linear_shapes(model)[op]
    weights = BYTES_PER_VALUE * n * k
    cycle = weights if op == "lm_head" else layer_weight_bytes(model)
    activations = max(0.0, touched - weights - gpu.l2_bytes)
    return Work(flops, _not_cached(weights, cycle, gpu) + activations)


def attention_traffic(model: Model, prefills: Sequence[tuple[int, int]], decode_keys: int) -> Work:
    """FLOPs and bytes of keys and values of one layer's attention, the same under every strategy.

    `decode_keys` are the contexts of all decodes together.
    """
    pairs = sum(n * context - n * (n - 1) / 2 for n, context in prefills) + decode_keys
    keys = sum(context for _, context in prefills) + decode_keys
    per_key = 2 * BYTES_PER_VALUE * model.num_kv_heads * model.head_dim
    return Work(4.0 * model.num_q_heads * model.head_dim * pairs, float(per_key * keys))


def attention_work(
    model: Model, gpu: Gpu, prefills: Sequence[tuple[int, int]], decode_contexts: Sequence[int]
) -> Work:
    """Of one layer's attention.

    Each key and value is read once; those that the layer has just written may be in the cache.
    """
    flops, read = attention_traffic(model, prefills, sum(decode_contexts))
    per_key = 2 * BYTES_PER_VALUE * model.num_kv_heads * model.head_dim
    written = per_key * (sum(n for n, _ in prefills) + len(decode_contexts))
    cycle = layer_weight_bytes(model) + read
    missing = max(0.0, read - min(written, gpu.l2_bytes))
    return Work(flops, _not_cached(missing, cycle, gpu))


def step_seconds(
    model: Model,
    gpu: Gpu,
    ceilings: Ceilings,
    prefills: Sequence[PrefillShape | tuple[int, int]],
    decode_contexts: Sequence[int],
    layer_ops: Mapping[str, int],
) -> float:
    """The least time of a forward pass: its operations run one after another.

    Within one graph a launch hides behind the kernel before it, so none counts.
    """
    ceilings = replace(ceilings, launch=0.0)
    num_tokens = sum(n for n, _ in prefills) + len(decode_contexts)
    num_sampled = len(prefills) + len(decode_contexts)
    layer = ceilings.least_seconds(attention_work(model, gpu, prefills, decode_contexts))
    for op, count in layer_ops.items():
        layer += count * ceilings.least_seconds(op_work(model, gpu, op, num_tokens))
    head = ceilings.least_seconds(op_work(model, gpu, "lm_head", num_sampled))
    return model.num_layers * layer + head


def _not_cached(stream: float, cycle: float, gpu: Gpu) -> float:
    """Of a stream within a cycle of so many bytes: what the L2 cannot keep for the next time."""
    return stream * max(0.0, 1.0 - gpu.l2_bytes / cycle)
