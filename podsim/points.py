"""Which batches a profile times: a grid to fit on, and random batches to judge the fit by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.random import Generator

from podsim.batch import BatchShape
from podsim.graph_sizes import graph_sizes
from podsim.hardware import Gpu
from podsim.model import BYTES_PER_VALUE, Model

MAX_CONTEXT = 131072
MOST_LINEAR_TOKENS = 8192
NUM_STEPS = 24
"""Batches that are timed as whole forward passes to fit on, and as many to judge by."""
MORE_HELD_OUT = ("prefill",) * 30 + ("decode",) * 20 + ("decode, heavy",) * 20 + ("heavy",) * 30
"""Batches that a random draw has too few of to tell their error."""
NUM_SEVERAL_CHUNKS = 60
"""Batches of several chunks and no decodes that come to them, to tell the mean of their error."""
POOL_BYTES = 37_000_000_000
"""Of the keys, and of the values, of one layer in the KV pool of a measurement."""


NARROW = 2048
"""Columns of the queries, keys and values together below which their product is narrow."""


@dataclass(frozen=True, slots=True)
class AttentionPoint:
    """A batch to time: chunks as (num_tokens, context_len), decodes as context lengths."""

    prefills: tuple[tuple[int, int], ...]
    decode_contexts: tuple[int, ...]
    split: str
    """"grid" to fit on, "held_out" to judge by; of steps one after another, how they are timed."""

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
    def summary(self) -> str:
        """Such as "1024@8192 100@100 + 65 decodes at 77 to 8192"."""
        parts = [self.prefills_text] if self.prefills else []
        if self.decode_contexts:
            least, most = min(self.decode_contexts), max(self.decode_contexts)
            at = f"{least}" if least == most else f"{least} to {most}"
            count = len(self.decode_contexts)
            parts.append(f"{count} decode{'s' if count > 1 else ''} at {at}")
        return " + ".join(parts)

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
    rng: Generator,
    model: Model,
    gpu: Gpu,
    num_random: int = 240,
    num_held_out: int = 160,
) -> list[AttentionPoint]:
    """Points of a grid and random batches to fit on, then random batches to judge by.

    No two are of the same lengths, so that none is both fitted on and judged by. Decodes together
    hold no more tokens than the GPU's KV cache beside the model's weights.
    """
    points = [
        *_prefill_grid(),
        *_decode_grid(rng),
        *_mixed_grid(rng),
        *(_random_batch(rng, "grid") for _ in range(num_random)),
        *(_random_batch(rng, "held_out") for _ in range(num_held_out)),
        *(_random_batch(rng, "held_out", kind) for kind in MORE_HELD_OUT),
    ]
    most = int(gpu.memory - model.weight_bytes) // model.kv_bytes_per_token
    different = {(point.prefills, point.decode_contexts): point for point in reversed(points)}
    return [
        point
        for point in reversed(different.values())
        if sum(point.decode_contexts) <= most
        and point.num_slots * point.max_context <= pool_tokens(model)
    ]


def more_held_out(rng: Generator, points: Sequence[AttentionPoint]) -> list[AttentionPoint]:
    """Batches of several chunks to judge by, of other lengths than `points`.

    The error of one is some 4 per cent: the mean of all is told to half a per cent with so many.
    """
    known = {(point.prefills, point.decode_contexts) for point in points}
    found: list[AttentionPoint] = []
    while len(found) < NUM_SEVERAL_CHUNKS:
        chunks = _random_chunks(rng, int(rng.choice([2, 3, 4])))
        if (chunks, ()) not in known:
            known.add((chunks, ()))
            found.append(AttentionPoint(chunks, (), "held_out"))
    return found


def step_points(points: Sequence[AttentionPoint], each: int = NUM_STEPS) -> list[AttentionPoint]:
    """Of `attention_points`, those that are timed as whole forward passes too.

    As many random batches to fit on as to judge by; mixed ones first if there are only a few.
    """
    grid = [point for point in points if point.split == "grid"][-NUM_STEPS:]
    held_out = [point for point in points if point.split == "held_out"][:NUM_STEPS]
    if each < NUM_STEPS:
        grid, held_out = (
            sorted(some, key=lambda point: not point.is_mixed) for some in (grid, held_out)
        )
    return [*grid[:each], *held_out[:each]]


def sustained_points() -> list[AttentionPoint]:
    """Batches that are timed again and again for seconds, from rest: more and less matrix work."""
    chunks_of = [((512, 512),), ((1024, 1024),), ((1024, 8192),), ((2048, 2048),), ((4096, 4096),)]
    alone = [AttentionPoint(chunks, (), "sustained") for chunks in chunks_of]
    mixed = [
        AttentionPoint(((num_tokens, context),), (contexts,) * decodes, "sustained")
        for num_tokens, context, decodes, contexts in (
            *((64, 1024, 16, 2048), (128, 4096, 32, 1024), (256, 2048, 32, 2048)),
            *((512, 2048, 64, 1024), (1024, 4096, 32, 2048), (2048, 8192, 64, 4096)),
        )
    ]
    return [*alone, *mixed]


def duty_points() -> list[AttentionPoint]:
    """Batches that come one step in 1, 2, 4 and 8, the others being of their decodes alone.

    The power limit looks at a mean: how far it lets the clock fall under chunks that come now and
    then is not what it does under nothing but chunks.
    """
    batches = (((256, 1024), 32, 1024), ((512, 1024), 64, 1024), ((1024, 2048), 32, 2048))
    return [
        AttentionPoint((chunk,), (context,) * decodes, f"1 in {every}")
        for chunk, decodes, context in batches
        for every in (1, 2, 4, 8)
    ]


def burst_points() -> list[AttentionPoint]:
    """As a long prompt has it: many steps with a chunk in a row, and then none; and hardly any.

    So few decodes have hardly any matrix products. How far they feel the clock that chunks leave
    behind is seen there.
    """
    return [AttentionPoint(((1024, 4096),), (2048,) * 8, split) for split in ("8 in 16", "1 in 32")]


def long_points() -> list[AttentionPoint]:
    """A full token budget with long contexts, timed for seconds; the split is the strategy.

    The memory draws power too, and what runs beside other work draws more than behind it: how far
    both let the clock fall is seen where they are a large part of a step.
    """
    batches = (((1008, 12288), 16, 12288), ((976, 8192), 48, 16384))
    return [
        AttentionPoint((chunk,), (context,) * decodes, strategy)
        for chunk, decodes, context in batches
        for strategy in ("serial", "pod")
    ]


def _prefill_grid() -> list[AttentionPoint]:
    chunks = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
    contexts = (0, 1024, 4096, 8192, 16384, 32768, 65536, MAX_CONTEXT)
    shapes = {(n, max(n, context)) for n in chunks for context in contexts}
    return [AttentionPoint((shape,), (), "grid") for shape in sorted(shapes)]


def _decode_grid(rng: Generator) -> list[AttentionPoint]:
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    contexts = (16, 128, 512, 2048, 8192, 32768, MAX_CONTEXT)
    return [
        AttentionPoint((), _around(rng, size, context), "grid")
        for size in sizes
        for context in contexts
    ]


def _mixed_grid(rng: Generator) -> list[AttentionPoint]:
    sizes, contexts = (128, 256, 512, 1024, 2048, 4096), (0, 8192)
    prefills = [(n, max(n, context)) for n in sizes for context in contexts]
    decodes = [(1, 2048), (8, 8192), (24, 16384), (32, 512), (64, 4096), (192, 1024)]
    return [
        AttentionPoint((prefill,), _around(rng, size, context), "grid")
        for prefill in prefills
        for size, context in decodes
    ]


def _random_batch(rng: Generator, split: str, kind: str = "") -> AttentionPoint:
    """A budget of tokens filled with decodes and one to four chunks; some have one side only."""
    kind = kind or rng.choice(["mixed", "decode", "prefill"], p=[0.6, 0.2, 0.2])
    heavy = kind.endswith("heavy")
    size = int(np.exp(rng.uniform(np.log(8 if heavy else 1), np.log(256))))
    contexts = () if kind == "prefill" else _random_contexts(rng, size, heavy)
    without_chunks = kind.startswith("decode")
    chunks = () if without_chunks else _random_chunks(rng, int(rng.choice([1, 1, 2, 3, 4])))
    return AttentionPoint(chunks, contexts, split)


def _random_chunks(rng: Generator, count: int) -> tuple[tuple[int, int], ...]:
    """Prompts cut by a token budget: all but the first start at their beginning."""
    budget = int(rng.choice([256, 512, 1024, 2048, 4096]))
    cuts = np.sort(rng.choice(np.arange(1, budget), size=count - 1, replace=False))
    sizes = np.diff([0, *cuts.tolist(), budget])
    before = int(rng.choice([0, 1, 1, 1]) * np.exp(rng.uniform(np.log(64), np.log(24576))))
    return tuple((int(n), int(n) + (before if i == 0 else 0)) for i, n in enumerate(sizes))


def _random_contexts(rng: Generator, size: int, heavy: bool) -> tuple[int, ...]:
    """Lognormal context lengths, from nearly even to heavy-tailed (P99 / P50 over 8)."""
    middle = np.exp(rng.uniform(np.log(256), np.log(2048 if heavy else 8192)))
    sigma = 1.5 if heavy else rng.choice([0.2, 0.5, 1.0, 1.5])
    return _lognormal(rng, size, middle, sigma, 32768)


def _around(rng: Generator, size: int, context: int) -> tuple[int, ...]:
    """Contexts of about one length: equal ones, or whole blocks, hardly occur in serving."""
    return _lognormal(rng, size, context, 0.1, MAX_CONTEXT)


def _lognormal(
    rng: Generator, size: int, middle: float, sigma: float, most: int
) -> tuple[int, ...]:
    lengths = np.clip(middle * np.exp(sigma * rng.standard_normal(size)), 16, most)
    return tuple(sorted((int(n) for n in lengths), reverse=True))


def linear_points(rng: Generator, num_held_out: int = 48) -> list[tuple[int, str]]:
    """Numbers of tokens for the linear layers: both sides of the edges where tiles quantize.

    Whole tiles and others run different kernels, so each edge is timed with both sides of it. Few
    rows run kernels of their own, and the sampling of one row more than the SMs hold takes a turn
    more.
    """
    small = [*range(1, 19), *(n for m in range(24, 65, 8) for n in (m - 3, m, m + 1))]
    small += [*range(80, 513, 32), *(n + 1 for n in range(80, 513, 32))]
    small += [n + i for n in range(132, 529, 132) for i in (0, 1)]
    around = [
        n
        for edge in _edges()
        for n in (edge - 1, edge, edge + 1, edge + 8)
        if n <= MOST_LINEAR_TOKENS
    ]
    grid = sorted({*small, *around})
    free = np.setdiff1d(np.arange(1, MOST_LINEAR_TOKENS), grid)
    drawn = np.unique(
        np.exp(rng.uniform(0, np.log(MOST_LINEAR_TOKENS), size=8 * num_held_out)).astype(int)
    )
    held_out = rng.choice(np.intersect1d(drawn, free), size=num_held_out, replace=False)
    return [(n, "grid") for n in grid] + [(int(n), "held_out") for n in sorted(held_out)]


def _edges() -> list[int]:
    """Numbers of tokens at which a product's tiles are full."""
    return [
        *range(64, 1024, 64),
        *range(1024, 2048, 128),
        *range(2048, 4096, 256),
        *range(4096, 8193, 512),
    ]


def points_between(
    points: Sequence[tuple[int, str]], model: Model, quarters: Sequence[int]
) -> list[tuple[int, str]]:
    """Numbers between each two sizes of CUDA graphs, no multiple of 8, where products are narrow.

    So many quarters of the way from one size to the next. The fewer columns a product has, the
    oftener the library takes another kernel.
    """
    if model.qkv_size >= NARROW:
        return []
    measured = {num_tokens for num_tokens, _ in points}
    sizes = graph_sizes(MOST_LINEAR_TOKENS)
    between = [(low, high - low) for low, high in pairwise(sizes) if high - low > 8]
    places = [low + gap * quarter // 4 for low, gap in between for quarter in quarters]
    numbers = [n + 3 if n % 8 == 0 else n for n in places]
    return [(n, "grid") for n in numbers if n not in measured]


def points_behind_edges(points: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first multiples of 16 behind the edges of tiles that are 64 tokens apart or more.

    A token budget and some decodes are there, and a product takes a row of tiles more than at the
    edge: on a line from the edge to the next point whole steps come out some per cent short.
    """
    measured = {num_tokens for num_tokens, _ in points}
    edges = [edge for edge in _edges() if edge >= 512]
    return [(edge + 16, "grid") for edge in edges if edge + 16 <= MOST_LINEAR_TOKENS
            and edge + 16 not in measured]  # fmt: skip


def budget_points() -> list[tuple[int, str]]:
    """Numbers of tokens that are usual budgets of a step."""
    return [(n, "grid") for n in (256, 512, 1024, 2048, 4096)]


def graph_points(points: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """The sizes of CUDA graphs that are not among points of linear layers.

    An engine pads to these alone, and a matrix product's time jumps where the library takes
    another kernel: by up to 7 % of a step between two sizes.
    """
    measured = {num_tokens for num_tokens, _ in points}
    return [(n, "grid") for n in graph_sizes(MOST_LINEAR_TOKENS) if n not in measured]
