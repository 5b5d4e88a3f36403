"""Tile sizes and launch parameters of the attention kernels, as one deterministic function.

No autotuner: the same model always gets the same kernels, so that a timing can be repeated. The
numbers start from what was fastest on an H200 with 128-wide heads; 64-wide heads get blocks of the
same bytes. tests/test_kernels_compile.py checks that no kernel spills registers.
"""

from dataclasses import dataclass

STRATEGIES = ("serial", "streams", "unified", "pod")

MIN_DOT_ROWS = 16  # the fewest rows of a tensor-core product in Triton


@dataclass(frozen=True, slots=True)
class TileConfig:
    """How one kernel cuts its work and how it is launched."""

    block_m: int
    """Packed query rows of a tile."""
    block_n: int
    """Keys read in one iteration."""
    num_warps: int
    num_stages: int
    """Depth of the software pipeline that loads K and V ahead of their use."""

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < MIN_DOT_ROWS or size & (size - 1):
                raise ValueError(f"{name} must be a power of two, 16 or more, got {size}")


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Everything a strategy chooses: the tiles of its prefill and of its decode, and the splits."""

    prefill: TileConfig
    decode: TileConfig | None
    """None: a decode runs as a chunk of one token with the prefill tile (unified)."""
    decode_items_per_sm: int = 6
    """Aim of the KV splits: two waves of the three decode CTAs that fit on an SM."""
    min_split_len: int = 256
    """Keys below which a split costs more in its combine than it gains in parallelism."""


def config_for(
    strategy: str, *, num_q_heads: int, num_kv_heads: int, head_dim: int
) -> AttentionConfig:
    """Return the configuration of a strategy for a model's heads."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    block_n = 8192 // head_dim  # 16 KiB of K, and of V, in each pipeline stage
    large_tile = TileConfig(block_m=128, block_n=block_n, num_warps=8, num_stages=3)
    if strategy == "unified":
        return AttentionConfig(prefill=large_tile, decode=None)
    block_m = _decode_rows(num_q_heads // num_kv_heads)
    decode_tile = TileConfig(block_m=block_m, block_n=block_n, num_warps=4, num_stages=3)
    if strategy == "pod":
        # Four warps and 64 rows, so that two CTAs, one of each kind, share an SM.
        small_tile = TileConfig(block_m=64, block_n=block_n, num_warps=4, num_stages=3)
        return AttentionConfig(prefill=small_tile, decode=decode_tile)
    return AttentionConfig(prefill=large_tile, decode=decode_tile)


def _decode_rows(group: int) -> int:
    """Return the tile rows that hold the query heads of one KV head: a power of two."""
    return max(MIN_DOT_ROWS, 1 << (group - 1).bit_length())
