"""Tile sizes and launch parameters of the attention kernels, as deterministic functions.

No autotuner: the same batch always gets the same kernels, so that a timing can be repeated. The
numbers of the portable Triton kernels start from what was fastest on an H200 with 128-wide heads;
those of the Hopper kernels from `podsim kernels tune` (benchmarks/kernels/), but for the three
items of decode an SM, which its committed rows do not try yet. 64-wide heads get
blocks of the same bytes. tests/test_kernels_compile.py checks that no kernel spills registers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

STRATEGIES = ("serial", "streams", "unified", "pod")

KERNELS = ("triton", "hopper")
"""Portable kernels, and kernels for Hopper's wgmma and TMA (Gluon)."""

POLICIES = ("proportional", "50:50", "adaptive")
"""How POD shares the SMs: see pod.py for the portable kernels, sm_shares for Hopper's."""

MIN_DOT_ROWS = 16  # the fewest rows of a tensor-core product in Triton

SATURATING_SHARE = 0.42
"""Share of the SMs whose loads saturate an H200's memory (56 of 132; design of the streams)."""
PREFILL_PER_DECODE = 138.0
"""Operations of prefill in the time in which decode reads a byte: an H200's 600 TFLOP/s and 4.35
TB/s in these kernels."""
DECODE_HEAVY = 0.7
"""Balance below which POD gives decode the larger blocks."""

RESIDENT_KEYS = 65536
"""Keys, times KV heads, that stay in the L2: 32 MiB of K and V with 128-wide heads."""


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
            if size < 8 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two, 8 or more, got {size}")


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Everything a strategy chooses: the tiles of its prefill and of its decode, and the splits."""

    prefill: TileConfig
    decode: TileConfig | None
    """None: a decode runs as a chunk of one token with the prefill tile (unified)."""
    decode_items_per_sm: int = 6
    """Aim of the KV splits: two waves of the three decode CTAs that fit on an SM, or on Hopper,
    where half of the SMs saturate the memory, so few that most batches need no combine."""
    min_split_len: int = 256
    """Keys below which a split costs more in its combine than it gains in parallelism."""
    kernels: str = "triton"
    """One of KERNELS."""
    policy: str = "proportional"
    """One of POLICIES, for POD."""
    registers: tuple[int, int, int] = (0, 0, 0)
    """Of a thread of prefill, decode and a loader in POD on Hopper: twice the first and the others
    make 512, the share of four warpgroups in an SM's 65536."""
    query_buffers: int = 1
    """Tiles of queries that a Hopper prefill keeps in shared memory."""
    sm_caps: tuple[int, int] = (0, 0)
    """The most SMs that take prefill and decode in POD on Hopper; 0: as the policy says."""

    def __post_init__(self) -> None:
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels must be one of {KERNELS}, got {self.kernels!r}")
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}, got {self.policy!r}")
        if any(self.sm_caps) and self.kernels != "hopper":
            raise ValueError(f"only Hopper's kernels have SM caps, got {self.sm_caps}")


def config_for(
    strategy: str,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    kernels: str = "triton",
    decode_heavy: bool = False,
) -> AttentionConfig:
    """Return the configuration of a strategy for a model's heads.

    Hopper's POD has tiles of its own for batches that are decode-heavy: see is_decode_heavy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {STRATEGIES}, got {strategy!r}")
    if kernels == "hopper":
        return _hopper_config(strategy, num_q_heads // num_kv_heads, head_dim, decode_heavy)
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


def _hopper_config(strategy: str, group: int, head_dim: int, decode_heavy: bool) -> AttentionConfig:
    """Rings fill the shared memory that an SM has; one CTA runs on each."""
    wide = 128 // head_dim  # blocks of 64-wide heads have half the bytes
    heads = max(8, 1 << (group - 1).bit_length())  # the narrow side of wgmma
    prefill = TileConfig(block_m=128, block_n=128, num_warps=4, num_stages=4 * wide)
    decode = TileConfig(block_m=heads, block_n=64, num_warps=4, num_stages=6 * wide)
    config = AttentionConfig(
        prefill, decode, decode_items_per_sm=3, kernels="hopper", query_buffers=2
    )
    if strategy == "unified":
        return replace(config, decode=None)
    if strategy != "pod":
        return config
    if decode_heavy or heads > 8:
        prefill = replace(prefill, block_n=64, num_stages=5 * wide)
    else:
        prefill = replace(prefill, num_stages=3 * wide)
    if decode_heavy and heads <= 16:
        decode = replace(decode, block_n=128, num_stages=3 * wide)
        registers = (200, 80, 32) if heads == 8 else (184, 112, 32)
    elif heads == 8:
        decode = replace(decode, num_stages=5 * wide)
        registers = (208, 64, 32)
    else:
        registers = (176, 128, 32)
    return replace(
        config,
        prefill=prefill,
        decode=decode,
        policy="adaptive",
        query_buffers=1,
        registers=registers,
    )


def kernels_for(capability: tuple[int, int] | None) -> str:
    """The kernels for a GPU of that compute capability; None where kernels run interpreted."""
    return "hopper" if capability == (9, 0) else "triton"


def packed_heads(group: int, kernels: str) -> int:
    """Query heads of a group whose rows share a prefill tile: with wgmma as many as divide it."""
    return group & -group if kernels == "hopper" else group


def balance(chunks: Sequence[tuple[int, int]], contexts: Sequence[int], group: int) -> float:
    """Time of prefill alone over the time of decode alone, estimated; inf without decodes.

    `chunks` are (num_tokens, context_len), `group` the query heads of a KV head. A chunk of n
    tokens does 4 head_dim operations for each of its query heads and pairs of a token and a key
    that it sees; a decode reads 4 head_dim bytes (K and V, 16 bits) for each KV head and key.
    """
    pairs = sum(n * context - n * (n - 1) / 2 for n, context in chunks)
    keys = sum(contexts)
    return group * pairs / (PREFILL_PER_DECODE * keys) if keys else math.inf


def is_decode_heavy(chunks: Sequence[tuple[int, int]], contexts: Sequence[int], group: int) -> bool:
    """Whether config_for should be asked for the tiles of a decode-heavy batch.

    Without groups, where prefill reads as many keys as decode, prefill needs the larger blocks.
    """
    return group > 1 and balance(chunks, contexts, group) < DECODE_HEAVY


def sm_shares(config: AttentionConfig, ratio: float, num_sms: int) -> tuple[int, int]:
    """SMs that take prefill and decode where Hopper's kernels run beside each other; 0: all.

    `ratio` is the batch's balance. Proportional, which two streams need, leaves prefill as many SMs
    as let both end together, when decode does not gain from more than SATURATING_SHARE of them.
    50:50 has both on every SM to the end; so has adaptive, whose tiles follow the balance.
    """
    prefill, decode = config.sm_caps
    if config.policy == "proportional" and not prefill:
        prefill = _prefill_sms(ratio, num_sms)
    return prefill, decode


def _prefill_sms(ratio: float, num_sms: int) -> int:
    if math.isinf(ratio):
        return num_sms
    share = ratio / (ratio + SATURATING_SHARE)
    return min(max(round(num_sms * share), num_sms // 8), num_sms - num_sms // 8)


def _decode_rows(group: int) -> int:
    """Return the tile rows that hold the query heads of one KV head: a power of two."""
    return max(MIN_DOT_ROWS, 1 << (group - 1).bit_length())
