"""Features of a batch's attention that have a physical meaning, computed from its lengths.

The prefill kernel's CTAs each walk the keys of a tile of queries and are handed to the SMs in
order, so its time is that of the busiest SM, which is simulated. The decode kernel reads every key
once: its time is bytes, unless its items are too short or too few to keep the memory busy.
`unified` runs decodes as prefill tiles of one token: see `podsim.unified_features`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from math import ceil, sqrt

import numpy as np
from numpy.typing import NDArray

from podsim.batch import BatchShape, PrefillShape
from podsim.model import Model

PREFILL_FEATURES = (
    *("launch", "makespan", "first_blocks", "tiles"),
    *("paired_makespan", "loaded_blocks"),
)
DECODE_FEATURES = (
    *("launch", "keys", "items", "turns", "item_keys", "bottleneck"),
    *("has_combine", "combine_rounds", "combines"),
)
UNIFIED_FEATURES = ("launch", "makespan", "tiles", "crowded_decode_keys", "drawn_makespan")
MIXED_FEATURES = ("launch", "decode_items", "prefill_tiles", "pairs", "prefill_keys")
"""Items and tiles an SM, and the pairs that these make. Beside them, a mixed batch takes a share of
the times of its sides: see `podsim.overlap`."""

FEATURES = {
    "prefill": PREFILL_FEATURES,
    "decode": DECODE_FEATURES,
    "serial": MIXED_FEATURES,
    "streams": MIXED_FEATURES,
    "unified": UNIFIED_FEATURES,
    "pod": MIXED_FEATURES,
}
"""Names of the features of each kernel model, in the order of its coefficients: seconds each."""

FIRST_BLOCKS = 4.0
"""Blocks of the longest tile that it waits for, until the loads run ahead of their use."""
BLOCKS_PER_ITEM = 1.0
"""What an item of decode costs an SM beside its keys, in blocks, where items bound the time."""
LONE_BLOCK = 0.4
"""Time of a block that an SM waits for alone, in blocks of a memory that is busy. This and the one
before by cross-validation on rows to fit on."""
BEYOND_WHOLE_SPLITS = 0.75
"""Lengths vary: those of a mean of m splits have m * m / (m + this) cuts."""
CUT_EVEN, CUT_UNEVEN = 0.5, 0.7
"""And of them m^3 / (m^3 + first + second * (s - 1) * m^2) are cut, s^2 being the longest over the
mean. These three fit how the plan cuts the batches to fit on, not their times."""
COMBINED_TOGETHER = 16
"""Partials that a combine reads at a time: COMBINE_BLOCK of kernels/decode.py."""
FULL_TURN = 1e-9
"""Items an SM beyond a whole number that are none: they come from rounding."""
MASKED_BLOCKS = 0.5
"""Blocks that a decode takes beyond its keys as a tile of its own; its start and end hide behind
the keys of its neighbours."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """How the kernels cut their work, on which machine, for which heads."""

    num_sms: int
    num_kv_heads: int
    group: int
    """Query heads a KV head."""
    pack: int
    """Query heads of a group whose rows share a prefill tile."""
    block_m: int
    """Rows (tokens times pack) of a prefill tile."""
    block_n: int
    """Keys of a block of prefill."""
    decode_block_n: int
    """Keys of a block of decode."""
    decode_items_per_sm: int
    min_split_len: int
    resident_keys: int = 0
    """Keys, times KV heads, that the L2 holds: then the longest tiles of all heads come first. 0:
    the tiles of a head always follow those of another."""
    tile_overhead: float = 0.0
    """What a prefill tile costs beside its blocks, in blocks; fitted."""
    linear_token_seconds: float = 0.0
    """What a token adds to the matrix products of a layer once these fill the GPU; measured."""
    quiet_layer_seconds: float = 0.0
    """What a layer takes beside that: its other operations, and weights that few tokens wait for;
    measured."""

    blocks_per_key: float = field(init=False)
    """Blocks an SM for each key of a decode."""
    splitting_blocks_per_key: float = field(init=False)
    """Blocks of a split for each key of all decodes, so that all SMs get their items."""
    min_split_blocks: float = field(init=False)
    items_per_split: float = field(init=False)
    """Items an SM for each split of a decode."""
    unit_keys: int = field(init=False)
    """To how many keys those before a chunk may be rounded up: its tiles walk the same blocks."""

    def __post_init__(self) -> None:
        per_sm = self.num_kv_heads / self.num_sms
        for name, value in (
            ("blocks_per_key", per_sm / self.decode_block_n),
            ("splitting_blocks_per_key", per_sm / self.decode_items_per_sm / self.decode_block_n),
            ("min_split_blocks", self.min_split_len / self.decode_block_n),
            ("items_per_split", per_sm),
            ("unit_keys", min(self.block_m // self.pack, self.block_n)),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, model: Model, kernels: Mapping[str, float]) -> Geometry:
        """For a model's heads; `kernels` holds the numbers that a profile records.

        Profiles of before the Hopper kernels have one size of blocks and pack whole groups.
        """
        group = model.num_q_heads // model.num_kv_heads
        cut = {"pack": group, "decode_block_n": kernels["block_n"], **kernels}
        return cls(num_kv_heads=model.num_kv_heads, group=group, **cut)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class TileWork:
    """Row tiles of a prefill launch over all KV heads, in blocks of keys to walk."""

    makespan: float
    """Blocks, and what tiles cost beside them, of the SM that has the most, when tiles go to
    whichever SM is free."""
    blocks: float
    """The same of all tiles."""
    longest: float
    """Blocks of the longest tile."""
    tiles: int
    num_sms: int
    """That they are handed to."""
    decode_share: float
    """Of the blocks, those of decodes that are tiles of their own."""

    @property
    def busy(self) -> float:
        """Share of the SMs' time that they work."""
        return self.blocks / (self.makespan * self.num_sms)


Tiles = tuple[tuple[tuple[int, int, int], ...], bool]
"""What of the chunks' lengths the kernel's work depends on. Of each: its row tiles for one KV head,
the keys before them in units of `unit_keys`, and the blocks of keys of its last tile. Of all:
whether the L2 holds the keys of all heads (see num_long in kernels/plan.py)."""


def row_tiles(prefills: Sequence[PrefillShape], geometry: Geometry, decode_keys: int = 0) -> Tiles:
    """Of chunks, and of decodes that run with them as tiles of their own (unified)."""
    pack, block_m, block_n = geometry.pack, geometry.block_m, geometry.block_n
    unit = geometry.unit_keys
    chunks = []
    keys = decode_keys
    for num_tokens, n in prefills:
        before = -((num_tokens - n) // unit)
        chunks.append((-(-num_tokens * pack // block_m), before, -(-n // block_n)))
        keys += n
    return tuple(chunks), keys * geometry.num_kv_heads <= geometry.resident_keys


def tile_work(
    tiles: Tiles,
    geometry: Geometry,
    decode_blocks: Sequence[float] = (),
    beside: int = 0,
) -> TileWork:
    """Hand out the tiles as the kernels do (see num_long in kernels/plan.py), the longest first.

    `decode_blocks` are the blocks of decodes that are tiles of their own (unified), `beside` the
    SMs that prefill takes beside a decode kernel; 0: it runs alone.
    """
    chunks, resident = tiles
    block_n, tokens = geometry.block_n, geometry.block_m // geometry.pack
    blocks: list[float] = []
    for num_tiles, before, last_blocks in chunks:
        # Causal: each tile sees its own tokens more than the one before it.
        keys = before * geometry.unit_keys
        blocks += [
            -(-n // block_n) for n in range(keys + tokens, keys + num_tiles * tokens, tokens)
        ]
        blocks.append(last_blocks)
    num_sms = beside or geometry.num_sms
    # Queries and outputs pass the memory, of which each of fewer SMs has more.
    overhead = geometry.tile_overhead * num_sms / geometry.num_sms
    if decode_blocks:
        pairs = [(size, size + overhead) for size in blocks]
        pairs += [(size, size + MASKED_BLOCKS) for size in decode_blocks]
        pairs.sort(reverse=True)
        blocks, taken = ([pair[i] for pair in pairs] for i in (0, 1))
    else:
        blocks.sort(reverse=True)
        taken = [size + overhead for size in blocks]
    packs = geometry.group // geometry.pack
    heads = geometry.num_kv_heads * packs
    num_long = 0
    if geometry.resident_keys and len(blocks) * heads > geometry.num_sms:
        share = sum(blocks) * heads / geometry.num_sms
        if resident and not beside:
            num_long = len(blocks)
        elif blocks[0] > share:
            num_long = sum(size > share for size in blocks)
    order = [size for size in taken[:num_long] for _ in range(heads)]
    order += [size for size in taken[num_long:] for _ in range(packs)] * geometry.num_kv_heads
    busy_until = order[:num_sms]
    heapify(busy_until)
    for size in order[num_sms:]:
        heapreplace(busy_until, busy_until[0] + size)
    total = sum(order)
    decode_share = (sum(decode_blocks) + MASKED_BLOCKS * len(decode_blocks)) * heads / total
    return TileWork(max(busy_until), total, blocks[0], len(order), num_sms, decode_share)


def prefill_features(
    work: TileWork, geometry: Geometry, load: float, beside_decode: bool = False
) -> tuple[float, ...]:
    """`load` is what the layer's matrix products slow a busy GPU down by: see `matrix_load`.

    SMs come in pairs that share a way to the memory: beyond half as many tiles as SMs, tiles have a
    neighbour (`paired_makespan`); beside decodes, which take every other SM, all have one. And the
    more SMs work, the more the products before them have lowered the clock (`loaded_blocks`). The
    forms of both by cross-validation on rows to fit on.
    """
    paired = 1.0 if beside_decode else max(0.0, min(2 * work.tiles / work.num_sms, 2.0) - 1.0)
    return (
        1.0,
        work.makespan,
        min(work.longest, FIRST_BLOCKS),
        work.tiles / geometry.num_sms,
        paired * paired * work.makespan,
        work.busy * work.blocks / work.num_sms * load,
    )


def matrix_load(num_tokens: int, geometry: Geometry) -> float:
    """How much the layer's matrix products lower the clock of its attention, from 0 to 1.

    They draw the power that the GPU's limit allows, the more, the larger their share of what the
    layer does beside attention: in proportion to the square of that share, which cross-validation
    prefers to the share itself.
    """
    linear = geometry.linear_token_seconds * num_tokens
    if not linear:
        return 0.0
    share = linear / (linear + geometry.quiet_layer_seconds)
    return share * share


def decode_seconds(
    coefficients: Sequence[float], n: int, keys: int, longest: int, geometry: Geometry
) -> tuple[float, float]:
    """Seconds of n decodes with so many keys together, and the items that an SM gets of them.

    Keys are split so that every SM gets several items, none shorter than min_split_len. An SM takes
    them in turns, and waits for the first keys in each. SMs end a part of an item apart. Of the
    decodes beside the longest only the mean is known. In one piece and not as features, because a
    simulated step costs little more than this.
    """
    launch, key, item, turn, item_key, bound, has_combine, a_round, combine = coefficients
    block_n, heads = geometry.decode_block_n, geometry.items_per_split
    blocks = keys * geometry.blocks_per_key
    filling = keys * geometry.splitting_blocks_per_key
    least = geometry.min_split_blocks
    split = ceil(filling if filling > least else least) * block_n
    is_cut = longest > split
    splits = float(n)
    if is_cut:
        most, others = ceil(longest / split), n - 1
        rest = keys - longest
        mean = (rest if rest > others else others) / (max(others, 1) * split)
        splits = splits + (most - 1) + others * (mean * mean / (mean + BEYOND_WHOLE_SPLITS))
    items = splits * heads
    turns = ceil(items - FULL_TURN)
    whole = blocks + 0.5 * n * heads  # a half-empty block at the end of each
    an_item = whole / items
    lone = LONE_BLOCK * turns * (an_item + BLOCKS_PER_ITEM)
    seconds = launch + key * whole + item * items + turn * turns + item_key * an_item
    seconds = seconds + bound * (blocks if blocks > lone else lone)
    if not is_cut:
        return seconds, items
    uneven = CUT_UNEVEN * (sqrt(longest / (mean * split)) - 1.0) if others else 0.0
    square = mean * mean
    cut = 1.0 + others * (square * mean / (square * mean + CUT_EVEN + uneven * square))
    rounds = ceil(most / COMBINED_TOGETHER)
    return seconds + has_combine + a_round * rounds + combine * (
        cut * geometry.group * heads
    ), items


def decode_seconds_of_run(
    coefficients: Sequence[float],
    n: int,
    keys: NDArray[np.int64],
    longest: NDArray[np.int64],
    geometry: Geometry,
) -> NDArray[np.float64]:
    """Of many batches of as many decodes: the operations of `decode_seconds` in NumPy."""
    launch, key, item, turn, item_key, bound, has_combine, a_round, combine = coefficients
    block_n, heads = geometry.decode_block_n, geometry.items_per_split
    blocks = keys * geometry.blocks_per_key
    filling = keys * geometry.splitting_blocks_per_key
    least = geometry.min_split_blocks
    split = np.ceil(np.maximum(filling, least)) * block_n
    is_cut = longest > split
    most, others = np.ceil(longest / split), n - 1
    mean = np.maximum(keys - longest, others) / (max(others, 1) * split)
    more = float(n) + (most - 1) + others * (mean * mean / (mean + BEYOND_WHOLE_SPLITS))
    items = np.where(is_cut, more, float(n)) * heads
    turns = np.ceil(items - FULL_TURN)
    whole = blocks + 0.5 * n * heads
    an_item = whole / items
    lone = LONE_BLOCK * turns * (an_item + BLOCKS_PER_ITEM)
    seconds = launch + key * whole + item * items + turn * turns + item_key * an_item
    seconds = seconds + bound * np.maximum(blocks, lone)
    uneven = CUT_UNEVEN * (np.sqrt(longest / (mean * split)) - 1.0) if others else 0.0
    square = mean * mean
    cut = 1.0 + others * (square * mean / (square * mean + CUT_EVEN + uneven * square))
    rounds = np.ceil(most / COMBINED_TOGETHER)
    combined = seconds + has_combine + a_round * rounds + combine * (cut * geometry.group * heads)
    return np.where(is_cut, combined, seconds)


def decode_features(shape: BatchShape, geometry: Geometry) -> tuple[float, ...]:
    """What the seconds of decodes are linear in."""
    units = np.eye(len(DECODE_FEATURES)).tolist()
    work = (shape.num_decodes, shape.decode_context_sum, shape.decode_context_max)
    return tuple(decode_seconds(unit, *work, geometry)[0] for unit in units)
