"""Features of the unified kernel, which runs decodes as prefill tiles of one token.

A decode is a tile that walks its whole context, so the longest one bounds the launch, and most SMs
may be free long before it ends. The GPU is then at less than its power limit: a block takes an SM
the longer, the larger the share of the layer's time in which all SMs work (`drawn`).
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, log
from statistics import NormalDist

from podsim.attention_features import Geometry, TileWork, row_tiles, tile_work
from podsim.batch import BatchShape

NEARLY = 1e-3
"""Relative error of the mean of lengths that is left to their scale."""

DecodeTiles = tuple[int, int, int]
"""Blocks of the longest decode, how many others there are, and their mean blocks."""


def decode_tiles(shape: BatchShape, geometry: Geometry) -> DecodeTiles:
    """What of the decodes' lengths the unified kernel's work depends on, a little rounded."""
    others, block_n = shape.num_decodes - 1, geometry.block_n
    rest = shape.decode_context_sum - shape.decode_context_max
    return -(-shape.decode_context_max // block_n), others, round(rest / block_n / max(others, 1))


def decode_tile_blocks(decodes: DecodeTiles) -> list[float]:
    """Blocks of each decode as a tile: the quantiles of a lognormal law, the longest one first.

    Lengths of contexts spread over orders of magnitude. The law is the one whose largest quantile
    is the longest decode and whose others have their mean; equal lengths are its flat case.
    """
    longest, others, mean = decodes
    if not others:
        return [longest]
    below = _below_largest(others + 1)
    wanted = log(max(longest / max(mean, 0.5), 1.0))
    # The mean falls ever more slowly with the spread: Newton's steps come from one side.
    sigma = 0.0
    while True:
        falling = [exp(-sigma * z) for z in below]
        total = sum(falling)
        missing = wanted - log(others / total)
        if missing < NEARLY:
            break
        sigma += missing * total / sum(map(float.__mul__, falling, below))
    scale = mean * others / total
    return [longest, *(min(scale * f, longest) for f in falling)]


@lru_cache(maxsize=1024)
def _below_largest(count: int) -> list[float]:
    """How far the other normal quantiles of a sample lie below its largest (Blom's positions)."""
    normal = NormalDist()
    largest, *others = (
        normal.inv_cdf((rank - 0.375) / (count + 0.25)) for rank in range(count, 0, -1)
    )
    return [largest - z for z in others]


def unified_work(shape: BatchShape, geometry: Geometry) -> TileWork:
    """The tiles of a mixed batch, its decodes among them."""
    tiles = row_tiles(shape.prefills, geometry, shape.decode_context_sum)
    return tile_work(tiles, geometry, decode_tile_blocks(decode_tiles(shape, geometry)))


def drawn(num_tokens: int, attention: float, work: TileWork, geometry: Geometry) -> float:
    """The square of the share of the layer's time in which all SMs work, from 0 to 1.

    These are the layer's matrix products and, of the attention, as much as its SMs are busy. The
    GPU's power limit lowers the clock then; a layer's other operations and an SM that works alone
    leave it high. `attention` in seconds, at the high clock.
    """
    linear = geometry.linear_token_seconds * num_tokens
    share = (linear + work.busy * attention) / (linear + geometry.quiet_layer_seconds + attention)
    return share * share


def unified_features(
    shape: BatchShape, work: TileWork, geometry: Geometry, load: float
) -> tuple[float, ...]:
    """Of a mixed batch; `load` is what `drawn` says."""
    return (
        1.0,
        work.makespan,
        work.tiles / work.num_sms,
        # Keys of decodes wait for the memory where other SMs read such keys at the same time.
        shape.decode_context_sum * geometry.blocks_per_key * work.decode_share,
        work.makespan * load,
    )
