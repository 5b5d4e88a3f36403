"""How long attention takes: features of a batch with a physical meaning, times fitted coefficients.

Each side alone is described by its features. A mixed batch under `serial`, `streams` and `pod` is
described by the two times that its sides would take alone, of which a share is paid: the rest hides
where the prefill leaves SMs free or waits for the busiest (`podsim.overlap`). Under `streams` the
prefill is that on the SMs that it gets beside the decode, and `pod` has a table for each of its two
sets of tiles. `unified` runs decodes as prefill tiles of one token. The matrix products of the
layer slow its prefill down, as they draw the power of the GPU (`attention_features.matrix_load`).

All coefficients are seconds a unit of their feature, and none is negative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from podsim.attention_features import (
    FEATURES,
    Geometry,
    Tiles,
    TileWork,
    decode_seconds,
    decode_seconds_of_run,
    matrix_load,
    prefill_features,
    row_tiles,
    tile_work,
)
from podsim.batch import BatchShape
from podsim.kernels.config import balance, config_for, is_decode_heavy, sm_shares
from podsim.model import Model
from podsim.overlap import BUSY, WAVES, Overlap, Place, place
from podsim.scaling import AttentionTime
from podsim.unified_features import (
    DecodeTiles,
    decode_tile_blocks,
    decode_tiles,
    drawn,
    unified_features,
)

Coefficients = dict[str, list[float]]

LOADED = FEATURES["prefill"].index("loaded_blocks")
DRAWN = FEATURES["unified"].index("drawn_makespan")

STREAMS = config_for("streams", num_q_heads=1, num_kv_heads=1, head_dim=128, kernels="hopper")
"""Of which only the policy by which Hopper's kernels share the SMs matters."""

DECODE_HEAVY = "pod, decode-heavy"
"""Name of POD's tables for the batches that it runs with tiles for much decode."""

_kept_tile_work = lru_cache(maxsize=100_000)(tile_work)
"""The simulations of a sweep or a search have most of their chunks in common."""


class PrefillSide(NamedTuple):
    """The prefill of a batch, whatever the rest of it."""

    work: TileWork
    waves: float
    """Tiles an SM."""
    busy: float
    """Share of the SMs' time that it works."""
    keys: float
    """Blocks of decode an SM that the keys of the chunks make."""
    seconds: float
    """Alone, while the clock is high."""
    loaded_seconds: float
    """What comes on top under a load of one."""
    busy_place: Place
    waves_place: Place


class Sides(NamedTuple):
    """A mixed batch by what its two sides would take alone, in seconds."""

    prefill: float
    decode: float
    decode_items: float
    """Items an SM."""
    load: float
    side: PrefillSide


def dot(coefficients: Sequence[float], features: Sequence[float]) -> float:
    return sum(map(float.__mul__, coefficients, features))


class AttentionModel:
    """Seconds of one layer's attention, from the coefficients and tables of a profile."""

    def __init__(
        self, geometry: Geometry, coefficients: Coefficients, overlaps: dict[str, Overlap]
    ) -> None:
        self.geometry = geometry
        self.coefficients = coefficients
        self.overlaps = overlaps
        self._prefill_side = lru_cache(maxsize=100_000)(self._compute_prefill_side)
        self._unified_work = lru_cache(maxsize=100_000)(self._compute_unified_work)

    def __reduce__(self) -> tuple[type[AttentionModel], tuple[object, ...]]:
        """To another process: what is remembered stays behind."""
        return type(self), (self.geometry, self.coefficients, self.overlaps)

    @classmethod
    def of(cls, model: Model, attention: Mapping[str, Mapping[str, Any]]) -> AttentionModel:
        """From what a profile holds of attention."""
        return cls(
            Geometry.of(model, attention["geometry"]),
            dict(attention["coefficients"]),
            {name: Overlap.of(values) for name, values in attention["overlap"].items()},
        )

    def seconds(self, strategy: str, shape: BatchShape) -> float:
        """Of a batch under a strategy; a batch of one side runs that side's own kernel."""
        return self.time(strategy, shape).seconds

    def time(self, strategy: str, shape: BatchShape) -> AttentionTime:
        """Of a batch under a strategy."""
        prefills, num_prefill_tokens, n, keys, longest, _ = shape
        if not prefills:
            return AttentionTime(self.decode_seconds(n, keys, longest))
        if strategy == "unified" and n:
            return self._unified_time(shape)
        sms = self._sms_beside_decode(strategy, shape) if n else 0
        tiles = row_tiles(prefills, self.geometry)
        side = self._prefill_side(tiles, sms)
        _, waves, _, prefill_keys, alone, loaded, busy_place, waves_place = side
        if not n:
            prefill = alone + matrix_load(num_prefill_tokens, self.geometry) * loaded
            return AttentionTime(prefill, side.busy * prefill)
        coefficients = self.coefficients["decode"]
        decode, items = decode_seconds(coefficients, n, keys, longest, self.geometry)
        load = matrix_load(num_prefill_tokens + n, self.geometry)
        prefill = alone + load * loaded
        both = prefill + decode
        name = DECODE_HEAVY if self.is_decode_heavy(strategy, shape) else strategy
        paid = self.overlaps[name].at(prefill / both, busy_place, waves_place)
        launch, item, wave, pair, key = self.coefficients[strategy]
        seconds = launch + item * items + wave * waves + paid * both
        seconds += pair * min(items, waves) + key * prefill_keys
        if strategy == "streams":  # whose prefill is that on a part of the SMs
            side = self._prefill_side(tiles, 0)
            prefill = side.seconds + load * side.loaded_seconds
        drawing = side.busy * prefill
        saved = max(0.0, drawing + decode - seconds)
        if name == "pod":  # and not DECODE_HEAVY
            return AttentionTime(seconds, drawing, decode, balanced=saved)
        return AttentionTime(seconds, drawing, decode, beside=saved)

    def sides(self, strategy: str, shape: BatchShape) -> Sides:
        """Of a mixed batch."""
        side = self._prefill(strategy, shape)
        decode, items = self._decode(shape)
        load = matrix_load(shape.num_tokens, self.geometry)
        return Sides(side.seconds + load * side.loaded_seconds, decode, items, load, side)

    def _decode(self, shape: BatchShape) -> tuple[float, float]:
        """Seconds of the decodes alone, and their items an SM."""
        _, _, n, keys, longest, _ = shape
        return decode_seconds(self.coefficients["decode"], n, keys, longest, self.geometry)

    def _unified_time(self, shape: BatchShape) -> AttentionTime:
        """Of a mixed batch: at the high clock, and what the load adds."""
        geometry, coefficients = self.geometry, self.coefficients["unified"]
        work = self._unified_work(
            row_tiles(shape.prefills, geometry, shape.decode_context_sum),
            decode_tiles(shape, geometry),
        )
        high = dot(coefficients, unified_features(shape, work, geometry, 0.0))
        load = drawn(shape.num_tokens, high, work, geometry)
        seconds = high + coefficients[DRAWN] * work.makespan * load
        reading = self.decode_seconds(
            shape.num_decodes, shape.decode_context_sum, shape.decode_context_max
        )
        return AttentionTime(seconds, work.busy * seconds, reading)

    def _compute_unified_work(self, chunks: Tiles, decodes: DecodeTiles) -> TileWork:
        return tile_work(chunks, self.geometry, decode_tile_blocks(decodes))

    def _prefill(self, strategy: str, shape: BatchShape) -> PrefillSide:
        sms = self._sms_beside_decode(strategy, shape)
        return self._prefill_side(row_tiles(shape.prefills, self.geometry), sms)

    def _sms_beside_decode(self, strategy: str, shape: BatchShape) -> int:
        """How many SMs the prefill of a mixed batch takes while decode runs; 0: it runs alone."""
        geometry = self.geometry
        if strategy == "pod":
            return geometry.num_sms
        if strategy != "streams" or not geometry.resident_keys:
            return 0
        ratio = balance(shape.prefills, (shape.decode_context_sum,), geometry.group)
        sms, _ = sm_shares(STREAMS, ratio, geometry.num_sms)
        return int(sms)

    def is_decode_heavy(self, strategy: str, shape: BatchShape) -> bool:
        """Whether POD runs a mixed batch with the tiles that it has for much decode."""
        geometry = self.geometry
        if strategy != "pod" or not geometry.resident_keys:
            return False
        decodes = (shape.decode_context_sum,)
        return bool(is_decode_heavy(shape.prefills, decodes, geometry.group))

    def _compute_prefill_side(self, chunks: Tiles, sms_beside_decode: int) -> PrefillSide:
        geometry = self.geometry
        work = _kept_tile_work(chunks, geometry, (), sms_beside_decode)
        keys = geometry.block_n * sum(blocks for _, _, blocks in chunks[0])
        waves, busy = work.tiles / work.num_sms, work.busy
        coefficients = self.coefficients["prefill"]
        beside = sms_beside_decode > 0
        loaded = prefill_features(work, geometry, 1.0)[LOADED]
        return PrefillSide(
            work,
            waves,
            busy,
            keys * geometry.blocks_per_key,
            dot(coefficients, prefill_features(work, geometry, 0.0, beside)),
            coefficients[LOADED] * loaded,
            place(BUSY, busy),
            place(WAVES, waves),
        )

    def decode_seconds(self, num_decodes: int, context_sum: int, context_max: int) -> float:
        """Of a batch of decodes and nothing else, given by its contexts."""
        coefficients = self.coefficients["decode"]
        return decode_seconds(coefficients, num_decodes, context_sum, context_max, self.geometry)[0]

    def decode_seconds_of_run(
        self,
        num_decodes: int,
        context_sums: NDArray[np.int64],
        context_maxima: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """The same of many batches of as many decodes."""
        coefficients = self.coefficients["decode"]
        return decode_seconds_of_run(
            coefficients, num_decodes, context_sums, context_maxima, self.geometry
        )
