"""Which batches a profile times: a grid to fit on, and random batches to judge the fit by."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from podsim.batch import BatchShape
from podsim.hardware import Gpu
from podsim.model import BYTES_PER_VALUE, Model

MAX_CONTEXT = 131072
POOL_BYTES = 37_000_000_000
"""Of the keys, and of the values, of one layer in the KV pool of a measurement."""


@dataclass(frozen=True, slots=True)
class AttentionPoint:
    """A batch to time: chunks as (num_tokens, context_len), decodes as context lengths."""

    prefills: tuple[tuple[int, int], ...]
    decode_contexts: tuple[int, ...]
    split: str
    """"grid" to fit on, "held_out" to judge by."""

    @property
    def num_tokens(self) -> int:
        return sum(n for n, _ in self.prefills) + len(self.decode_contexts)

    @property
    def num_sampled(self) -> int:
        return len(self.prefills) + len(self.decode_contexts)

    @property
    def num_slots(self) -> int:
        return len(self.prefills) + len(self.decode_contexts)

    @property
    def max_context(self) -> int:
        return max([context for _, context in self.prefills] + list(self.decode_contexts))

    @property
    def is_mixed(self) -> bool:
        return bool(self.prefills and self.decode_contexts)

    @property
    def shape(self) -> BatchShape:
        return BatchShape.of(self.prefills, self.decode_contexts)

    @property
    def prefills_text(self) -> str:
        """Such as "1024@8192 100@100": tokens at context."""
        return " ".join(f"{n}@{context}" for n, context in self.prefills)

    @property
    def decodes_text(self) -> str:
        """Such as "64x8192 1x77": how many at which context."""
        runs = itertools.groupby(self.decode_contexts)
        return " ".join(f"{len(list(run))}x{context}" for context, run in runs)

    @classmethod
    def from_text(cls, prefills: str, decodes: str, split: str) -> AttentionPoint:
        """The inverse of `prefills_text` and `decodes_text`."""
        chunks = tuple(_pair(part, "@") for part in prefills.split())
        contexts = [[context] * n for n, context in (_pair(p, "x") for p in decodes.split())]
        return cls(chunks, tuple(itertools.chain.from_iterable(contexts)), split)


def _pair(text: str, separator: str) -> tuple[int, int]:
    first, second = text.split(separator)
    return int(first), int(second)


def pool_tokens(model: Model) -> int:
    """Slots times longest context: what the KV pool of a measurement holds."""
    return POOL_BYTES // (model.num_kv_heads * model.head_dim * BYTES_PER_VALUE)


def attention_points(
    rng: Generator, model: Model, gpu: Gpu, num_held_out: int = 120
) -> list[AttentionPoint]:
    """Grid points of each kind of batch, then random batches as serving makes them.

    Decodes together hold no more tokens than the GPU's KV cache beside the model's weights.
    """
    points = [
        *_prefill_grid(),
        *_several_chunks(rng),
        *_decode_grid(),
        *_uneven_decodes(rng),
        *_mixed_grid(),
        *_mixed_uneven(rng),
    ]
    held_out = [_random_batch(rng, "held_out") for _ in range(num_held_out)]
    most = int(gpu.memory - model.weight_bytes) // model.kv_bytes_per_token
    return [
        point
        for point in points + held_out
        if sum(point.decode_contexts) <= most
        and point.num_slots * point.max_context <= pool_tokens(model)
    ]


def _prefill_grid() -> list[AttentionPoint]:
    chunks = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    contexts = (0, 1024, 4096, 8192, 16384, 32768, 65536, MAX_CONTEXT)
    shapes = {(n, max(n, context)) for n in chunks for context in contexts}
    return [AttentionPoint((shape,), (), "grid") for shape in sorted(shapes)]


def _several_chunks(rng: Generator) -> list[AttentionPoint]:
    return [AttentionPoint(_random_chunks(rng, int(n)), (), "grid") for n in (2, 2, 3, 3, 4, 4, 8)]


def _decode_grid() -> list[AttentionPoint]:
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256)
    contexts = (16, 128, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, MAX_CONTEXT)
    return [AttentionPoint((), (context,) * n, "grid") for n in sizes for context in contexts]


def _uneven_decodes(rng: Generator) -> list[AttentionPoint]:
    sizes = (4, 16, 48, 96, 160, 256) * 3
    return [AttentionPoint((), _random_contexts(rng, n), "grid") for n in sizes]


def _mixed_grid() -> list[AttentionPoint]:
    prefills = [
        (n, max(n, context)) for n in (128, 256, 512, 1024, 2048) for context in (0, 4096, 16384)
    ]
    decodes = [(n, context) for n in (1, 8, 32, 64, 128, 256) for context in (256, 2048, 8192)]
    return [
        AttentionPoint((prefill,), (context,) * n, "grid")
        for prefill in prefills
        for n, context in decodes
    ]


def _mixed_uneven(rng: Generator) -> list[AttentionPoint]:
    return [_random_batch(rng, "grid") for _ in range(160)]


def _random_batch(rng: Generator, split: str) -> AttentionPoint:
    """A budget of tokens filled with decodes and one to four chunks; some have one side only."""
    kind = rng.choice(["mixed", "decode", "prefill"], p=[0.6, 0.2, 0.2])
    size = int(np.exp(rng.uniform(0, np.log(256))))
    contexts = () if kind == "prefill" else _random_contexts(rng, size)
    chunks = () if kind == "decode" else _random_chunks(rng, int(rng.choice([1, 1, 1, 2, 3, 4])))
    return AttentionPoint(chunks, contexts, split)


def _random_chunks(rng: Generator, count: int) -> tuple[tuple[int, int], ...]:
    """Prompts cut by a token budget: all but the first start at their beginning."""
    budget = int(rng.choice([256, 512, 1024, 2048, 4096]))
    cuts = np.sort(rng.choice(np.arange(1, budget), size=count - 1, replace=False))
    sizes = np.diff([0, *cuts.tolist(), budget])
    before = int(rng.choice([0, 1, 1, 1]) * np.exp(rng.uniform(np.log(64), np.log(24576))))
    return tuple((int(n), int(n) + (before if i == 0 else 0)) for i, n in enumerate(sizes))


def _random_contexts(rng: Generator, size: int) -> tuple[int, ...]:
    """Lognormal context lengths, from nearly even to heavy-tailed (P99 / P50 over 8)."""
    middle = np.exp(rng.uniform(np.log(256), np.log(8192)))
    sigma = rng.choice([0.2, 0.5, 1.0])
    lengths = np.clip(middle * np.exp(sigma * rng.standard_normal(size)), 16, 32768)
    return tuple(sorted((int(n) for n in lengths), reverse=True))


def linear_points(rng: Generator, num_held_out: int = 48) -> list[tuple[int, str]]:
    """Numbers of tokens for the linear layers: both sides of the edges where tiles quantize.

    Multiples of 8 and others run different kernels, so each edge has both on both sides.
    """
    small = [*range(1, 17), *(n for m in range(24, 65, 8) for n in (m - 3, m))]
    edges = [
        *range(64, 1024, 64),
        *range(1024, 2048, 128),
        *range(2048, 4096, 256),
        *range(4096, 8193, 512),
    ]
    around = [n for edge in edges for n in (edge - 1, edge, edge + 1, edge + 8) if n <= 8192]
    grid = sorted({*small, *around})
    free = np.setdiff1d(np.arange(1, 8192), grid)
    drawn = np.unique(np.exp(rng.uniform(0, np.log(8192), size=8 * num_held_out)).astype(int))
    held_out = rng.choice(np.intersect1d(drawn, free), size=num_held_out, replace=False)
    return [(n, "grid") for n in grid] + [(int(n), "held_out") for n in sorted(held_out)]
