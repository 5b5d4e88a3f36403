"""How long attention takes: features of a batch with a physical meaning, times fitted coefficients.

Serial work is the prefill kernel, then the decode kernel. The prefill kernel's CTAs each walk the
keys of a tile of queries, so its time is that of the busiest SM; the decode kernel reads every key
once, so its time is bytes. A mixed batch under `streams` and `pod` is described by the two times p
and d that its sides would take alone: the longer one is paid in full, the shorter one as far as
the two do not overlap, which depends on how many SMs the prefill fills. `unified` runs decodes as
prefill tiles of one token. All coefficients are seconds a unit of their feature, none is negative.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from podsim.batch import BatchShape, PrefillShape
from podsim.model import Model

PREFILL_FEATURES = ("launch", "makespan", "longest", "tiles", "extra_waves")
DECODE_FEATURES = (
    *("launch", "keys", "requests", "longest_split", "waves"),
    *("has_combine", "partials", "makespan"),
)
UNIFIED_FEATURES = (
    *("launch", "makespan", "longest", "tiles"),
    *("prefill_blocks", "prefill_tiles", "decode_keys"),
)
MIXED_FEATURES = ("launch", "longer", "shorter", "filled_prefill", "filled_shorter")

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

    @classmethod
    def of(cls, model: Model, kernels: Mapping[str, int]) -> Geometry:
        """For a model's heads; `kernels` holds the numbers that a profile records."""
        return cls(
            num_kv_heads=model.num_kv_heads,
            group=model.num_q_heads // model.num_kv_heads,
            **kernels,
        )


@dataclass(frozen=True, slots=True)
class TileWork:
    """Row tiles of a launch over all KV heads: blocks of keys to walk, and by the longest tile."""

    blocks: float
    longest: float
    tiles: int

    @classmethod
    def of(cls, prefills: Sequence[PrefillShape], geometry: Geometry) -> TileWork:
        blocks, longest, tiles = 0.0, 0.0, 0
        tokens_per_tile = geometry.block_m / geometry.group
        for num_tokens, context_len in prefills:
            count = -(-num_tokens * geometry.group // geometry.block_m)
            # Causal: tile i sees the keys up to its own last token; half a block is cut off.
            keys = float(count * (context_len - num_tokens) + num_tokens)
            keys += tokens_per_tile * (count - 1) * count / 2
            blocks += keys / geometry.block_n + 0.5 * count
            longest = max(longest, context_len / geometry.block_n)
            tiles += count
        heads = geometry.num_kv_heads
        return cls(blocks * heads, longest, tiles * heads)


def prefill_features(work: TileWork, geometry: Geometry) -> tuple[float, ...]:
    """One tile occupies an SM: the busiest SM has its share of the blocks, or the longest tile."""
    per_sm = work.tiles / geometry.num_sms
    makespan = max(work.blocks / geometry.num_sms, work.longest)
    return (1.0, makespan, work.longest, per_sm, max(math.ceil(per_sm) - 1.0, 0.0))


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


def unified_features(shape: BatchShape, geometry: Geometry) -> tuple[float, ...]:
    """Every decode is a tile of its own that walks its whole context."""
    prefill = TileWork.of(shape.prefills, geometry)
    heads, num_sms = geometry.num_kv_heads, geometry.num_sms
    keys = shape.decode_context_sum
    blocks = prefill.blocks + heads * (keys / geometry.block_n + 0.5 * shape.num_decodes)
    longest = max(prefill.longest, shape.decode_context_max / geometry.block_n)
    tiles = prefill.tiles + heads * shape.num_decodes
    return (
        1.0,
        max(blocks / num_sms, longest),
        longest,
        tiles / num_sms,
        prefill.blocks / num_sms,
        prefill.tiles / num_sms,
        float(keys),
    )


def mixed_features(
    prefill_time: float, decode_time: float, work: TileWork, geometry: Geometry
) -> tuple[float, ...]:
    """The times of the two sides alone, and what a prefill that fills the SMs adds."""
    shorter = min(prefill_time, decode_time)
    filled = min(1.0, work.tiles / (2 * geometry.num_sms))
    return (1.0, max(prefill_time, decode_time), shorter, filled * prefill_time, filled * shorter)


def dot(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return sum(map(float.__mul__, coefficients, features))


class AttentionModel:
    """Seconds of one layer's attention, from the coefficients of a profile."""

    def __init__(self, geometry: Geometry, coefficients: Coefficients) -> None:
        self.geometry = geometry
        self.coefficients = coefficients

    def seconds(self, strategy: str, shape: BatchShape) -> float:
        """Of a batch under a strategy; a batch of one side runs that side's own kernel."""
        if not shape.num_decodes:
            return self._prefill(TileWork.of(shape.prefills, self.geometry))
        if not shape.prefills:
            return self._decode(shape)
        return dot(self.coefficients[strategy], self.features(strategy, shape))

    def features(self, strategy: str, shape: BatchShape) -> tuple[float, ...]:
        """Of a mixed batch."""
        if strategy == "unified":
            return unified_features(shape, self.geometry)
        work = TileWork.of(shape.prefills, self.geometry)
        return mixed_features(self._prefill(work), self._decode(shape), work, self.geometry)

    def _prefill(self, work: TileWork) -> float:
        return dot(self.coefficients["prefill"], prefill_features(work, self.geometry))

    def _decode(self, shape: BatchShape) -> float:
        return dot(self.coefficients["decode"], decode_features(shape, self.geometry))
