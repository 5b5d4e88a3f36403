"""How long attention takes: features of a batch with a physical meaning, times fitted coefficients.

Serial work is the prefill kernel, then the decode kernel. The prefill kernel's CTAs each walk the
keys of a tile of queries and are handed to the SMs in order, so its time is that of the busiest
SM, which is simulated; the decode kernel reads every key once, so its time is bytes.

A mixed batch under `streams` and `pod` is described by the two times that its sides would take
alone. The longer one is paid in full; how much of the shorter one hides behind it depends on what
the prefill leaves free: the SMs it does not fill, and the time that SMs wait for the busiest.
`unified` runs decodes as prefill tiles of one token.

All coefficients are seconds a unit of their feature, and none is negative.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from podsim.batch import BatchShape, PrefillShape
from podsim.model import Model

PREFILL_FEATURES = ("launch", "makespan", "longest", "tiles")
DECODE_FEATURES = (
    *("launch", "keys", "requests", "longest_split", "waves"),
    *("has_combine", "partials", "makespan"),
)
UNIFIED_FEATURES = ("launch", "makespan", "blocks", "tiles", "prefill_makespan", "decode_keys")
MIXED_FEATURES = (
    *("launch", "longer", "shorter"),
    *("busy_prefill", "busy_decode", "busy_shorter"),
    *("once_filled_shorter", "twice_filled_prefill", "twice_filled_shorter"),
)

FEATURES = {
    "prefill": PREFILL_FEATURES,
    "decode": DECODE_FEATURES,
    "serial": MIXED_FEATURES,
    "streams": MIXED_FEATURES,
    "unified": UNIFIED_FEATURES,
    "pod": MIXED_FEATURES,
    "pod_50_50": MIXED_FEATURES,
}
"""Names of the features of each kernel model, in the order of its coefficients."""

Coefficients = Mapping[str, Sequence[float]]


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the kernels cut their work, on which machine, for which heads."""

    num_sms: int
    num_kv_heads: int
    group: int
    """Query heads a KV head."""
    block_m: int
    """Rows (tokens times group) of a prefill tile."""
    block_n: int
    """Keys of a block."""
    decode_items_per_sm: int
    min_split_len: int
    tile_overhead: float = 0.0
    """What a prefill tile costs beside its blocks, in blocks; fitted."""

    @classmethod
    def of(cls, model: Model, kernels: Mapping[str, float]) -> Geometry:
        """For a model's heads; `kernels` holds the numbers that a profile records."""
        return cls(
            num_kv_heads=model.num_kv_heads,
            group=model.num_q_heads // model.num_kv_heads,
            **kernels,  # type: ignore[arg-type]
        )


@dataclass(frozen=True, slots=True)
class TileWork:
    """Row tiles of a prefill launch over all KV heads, in blocks of keys to walk."""

    makespan: float
    """Blocks of the SM that has the most, when tiles go to whichever SM is free."""
    blocks: float
    """Of all tiles."""
    longest: float
    """Of the longest tile."""
    tiles: int


Tiles = tuple[tuple[int, int], ...]
"""Of each chunk: its row tiles for one KV head, and the blocks of keys of its last one."""


def row_tiles(prefills: Sequence[PrefillShape], geometry: Geometry) -> Tiles:
    """What of the chunks' lengths the kernel's work depends on."""
    return tuple(
        (-(-num_tokens * geometry.group // geometry.block_m), -(-context // geometry.block_n))
        for num_tokens, context in prefills
    )


def tile_work(chunks: Tiles, geometry: Geometry, decode_blocks: Sequence[int] = ()) -> TileWork:
    """Hand out the tiles as the kernel does: head after head, within a head the longest first.

    `decode_blocks` are the blocks of decodes that are tiles of their own (unified).
    """
    blocks_per_tile = geometry.block_m / geometry.group / geometry.block_n
    sizes = [float(blocks) for blocks in decode_blocks]
    for num_tiles, last_blocks in chunks:
        # Causal: each tile sees its own tokens fewer than the one after it.
        sizes += [max(last_blocks - i * blocks_per_tile, 1.0) for i in range(num_tiles)]
    sizes.sort(reverse=True)
    order = [size + geometry.tile_overhead for size in sizes] * geometry.num_kv_heads
    busy_until = order[: geometry.num_sms]
    heapq.heapify(busy_until)
    for size in order[geometry.num_sms :]:
        heapq.heapreplace(busy_until, busy_until[0] + size)
    return TileWork(max(busy_until), sum(sizes) * geometry.num_kv_heads, sizes[0], len(order))


def prefill_features(work: TileWork, geometry: Geometry) -> tuple[float, ...]:
    return (1.0, work.makespan, work.longest, work.tiles / geometry.num_sms)


def decode_features(shape: BatchShape, geometry: Geometry) -> tuple[float, ...]:
    """Keys are split so that every SM gets several items, none shorter than min_split_len."""
    heads, num_sms = geometry.num_kv_heads, geometry.num_sms
    keys = shape.decode_context_sum
    split = max(
        keys * heads / (num_sms * geometry.decode_items_per_sm), float(geometry.min_split_len)
    )
    longest_split = min(shape.decode_context_max, split) / geometry.block_n
    items = (keys / split + shape.num_decodes) * heads
    has_combine = 1.0 if shape.decode_context_max > split else 0.0
    return (
        1.0,
        float(keys),
        float(shape.num_decodes),
        longest_split,
        items / num_sms,
        has_combine,
        has_combine * keys / split,
        max(keys * heads / geometry.block_n / num_sms, longest_split),
    )


def decode_features_of_run(
    num_decodes: int,
    context_sums: NDArray[np.int64],
    context_maxima: NDArray[np.int64],
    geometry: Geometry,
) -> tuple[float | NDArray[np.float64], ...]:
    """`decode_features` of many batches of as many decodes: the same operations, in NumPy."""
    heads, num_sms = geometry.num_kv_heads, geometry.num_sms
    keys = context_sums
    split = np.maximum(
        keys * heads / (num_sms * geometry.decode_items_per_sm), float(geometry.min_split_len)
    )
    longest_split = np.minimum(context_maxima, split) / geometry.block_n
    items = (keys / split + num_decodes) * heads
    has_combine = np.where(context_maxima > split, 1.0, 0.0)
    return (
        1.0,
        keys.astype(np.float64),
        float(num_decodes),
        longest_split,
        items / num_sms,
        has_combine,
        has_combine * keys / split,
        np.maximum(keys * heads / geometry.block_n / num_sms, longest_split),
    )


def unified_features(
    shape: BatchShape, work: TileWork, prefill: TileWork, geometry: Geometry
) -> tuple[float, ...]:
    """`work` is of all tiles, the decodes' among them; `prefill` of the chunks' alone."""
    num_sms = geometry.num_sms
    return (
        1.0,
        work.makespan,
        work.blocks / num_sms,
        work.tiles / num_sms,
        prefill.makespan,
        float(shape.decode_context_sum),
    )


class PrefillSide(NamedTuple):
    """The prefill of a mixed batch: its time alone, and what it leaves free."""

    work: TileWork
    seconds: float
    busy: float
    """Share of the SMs' time that it works."""
    once: float
    """Share of the SMs that have a tile."""
    twice: float
    """Share of the SMs that could hold two tiles and do, counting one for half."""

    @classmethod
    def of(cls, work: TileWork, seconds: float, geometry: Geometry) -> PrefillSide:
        walked = work.blocks + geometry.tile_overhead * work.tiles
        return cls(
            work,
            seconds,
            busy=walked / (work.makespan * geometry.num_sms),
            once=min(1.0, work.tiles / geometry.num_sms),
            twice=min(1.0, work.tiles / (2 * geometry.num_sms)),
        )


def mixed_features(prefill: PrefillSide, decode_time: float) -> tuple[float, ...]:
    """The times of the two sides alone, whole and by what the prefill leaves free."""
    prefill_time = prefill.seconds
    shorter = min(prefill_time, decode_time)
    return (
        1.0,
        max(prefill_time, decode_time),
        shorter,
        prefill.busy * prefill_time,
        prefill.busy * decode_time,
        prefill.busy * shorter,
        prefill.once * shorter,
        prefill.twice * prefill_time,
        prefill.twice * shorter,
    )


def dot(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return sum(map(float.__mul__, coefficients, features))


class AttentionModel:
    """Seconds of one layer's attention, from the coefficients of a profile."""

    def __init__(self, geometry: Geometry, coefficients: Coefficients) -> None:
        self.geometry = geometry
        self.coefficients = coefficients
        self._prefill_side = lru_cache(maxsize=100_000)(self._compute_prefill_side)
        self._unified_work = lru_cache(maxsize=100_000)(self._compute_unified_work)

    def seconds(self, strategy: str, shape: BatchShape) -> float:
        """Of a batch under a strategy; a batch of one side runs that side's own kernel."""
        if not shape.num_decodes:
            return self._prefill(shape).seconds
        if not shape.prefills:
            return self._decode(shape)
        return dot(self.coefficients[strategy], self.features(strategy, shape))

    def features(self, strategy: str, shape: BatchShape) -> tuple[float, ...]:
        """Of a mixed batch."""
        prefill = self._prefill(shape)
        if strategy != "unified":
            return mixed_features(prefill, self._decode(shape))
        work = self._unified_work(
            row_tiles(shape.prefills, self.geometry), self._decode_tiles(shape)
        )
        return unified_features(shape, work, prefill.work, self.geometry)

    def _decode_tiles(self, shape: BatchShape) -> tuple[int, int, int]:
        """Blocks of the longest decode, how many others there are, and their mean blocks."""
        block_n, others = self.geometry.block_n, shape.num_decodes - 1
        rest = shape.decode_context_sum - shape.decode_context_max
        mean = round(rest / others / block_n + 0.5) if others else 0
        return -(-shape.decode_context_max // block_n), others, mean

    def _compute_unified_work(self, chunks: Tiles, decodes: tuple[int, int, int]) -> TileWork:
        longest, others, mean = decodes
        return tile_work(chunks, self.geometry, (longest, *[mean] * others))

    def _prefill(self, shape: BatchShape) -> PrefillSide:
        return self._prefill_side(row_tiles(shape.prefills, self.geometry))

    def _compute_prefill_side(self, chunks: Tiles) -> PrefillSide:
        work = tile_work(chunks, self.geometry)
        features = prefill_features(work, self.geometry)
        seconds = dot(self.coefficients["prefill"], features)
        return PrefillSide.of(work, seconds, self.geometry)

    def decode_seconds(
        self,
        num_decodes: int,
        context_sums: NDArray[np.int64],
        context_maxima: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Of many batches of as many decodes and nothing else, each given by its contexts."""
        features = decode_features_of_run(num_decodes, context_sums, context_maxima, self.geometry)
        seconds = np.zeros(len(context_sums))
        for coefficient, feature in zip(self.coefficients["decode"], features, strict=True):
            seconds = seconds + coefficient * feature
        return seconds

    def _decode(self, shape: BatchShape) -> float:
        return dot(self.coefficients["decode"], decode_features(shape, self.geometry))
