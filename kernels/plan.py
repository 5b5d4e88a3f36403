"""The work of one batch as lists in device memory.

A batch is a sequence of prefill chunks and a sequence of decodes. The tokens of the chunks come
first in q and out, in order, then one token a decode; query_start is a request's first token.
With G query heads to a KV head, the queries of a request that share a KV head are packed into
num_tokens * G rows: row r is token r // G, head r % G of the group. Work is listed once and holds
for each KV head (entries are padded with zeros):

    tiles     [T, 8]  query_start, num_tokens, context_len, slot, row tile: block_m packed rows of
                      a chunk, the longest first
    splits    [S, 8]  query_start, context_len, slot, first key, end of keys, partial (-1: the
                      only split, which writes its result), the longest first
    combines  [C, 4]  query_start, first partial, number of partials: the decodes with several
                      splits
    counts    [8]     T, S, C, CTAs that take prefill and decode in POD on Hopper (0: all), long
                      tiles, which come first of all heads, beside decode and alone, 0

The kernels read everything that depends on the batch from these lists, the counts included, and
CTAs past a count leave: a captured launch of a large enough grid stays valid when the lists are
refilled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from .checks import require_caches, require_heads, require_runnable, require_tensor
from .config import RESIDENT_KEYS, AttentionConfig, balance, packed_heads, sm_shares

PAGE_SIZES = (16, 32, 64, 128, 256)

NUM_COUNTERS = 260  # POD tickets: 256 SMs, prefill, decode, done, unused; see pod.py


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Causal queries at the end of a context; their keys and values are in the cache."""

    num_tokens: int
    context_len: int
    slot: int


@dataclass(frozen=True, slots=True)
class Decode:
    """One query at the end of a context; its key and value are in the cache."""

    context_len: int
    slot: int


@dataclass(frozen=True, slots=True)
class WorkLists:
    """The lists of the module docstring on the host, int32."""

    tiles: np.ndarray
    splits: np.ndarray
    combines: np.ndarray
    num_tokens: int
    sm_shares: tuple[int, int]
    num_long: tuple[int, int]

    @property
    def counts(self) -> np.ndarray:
        sizes = [len(self.tiles), len(self.splits), len(self.combines)]
        return np.array([*sizes, *self.sm_shares, *self.num_long, 0], np.int32)

    @property
    def sections(self) -> tuple[np.ndarray, ...]:
        """In their order in device memory."""
        return self.counts, self.tiles, self.splits, self.combines

    @property
    def num_partials(self) -> int:
        return int(self.combines[:, 2].sum())


def work_lists(
    chunks: Sequence[PrefillChunk],
    decodes: Sequence[Decode],
    *,
    group: int,
    pack: int,
    num_kv_heads: int,
    num_sms: int,
    config: AttentionConfig,
) -> WorkLists:
    """Cut a batch into work items; `pack` query heads of the `group` share a row tile."""
    num_tokens = np.array([chunk.num_tokens for chunk in chunks] + [1] * len(decodes), np.int64)
    context = np.array([request.context_len for request in (*chunks, *decodes)], np.int64)
    slot = np.array([request.slot for request in (*chunks, *decodes)], np.int64)
    requests = np.stack([np.cumsum(num_tokens) - num_tokens, num_tokens, context, slot], axis=1)

    tiled, split = np.split(requests, [len(chunks) if config.decode else len(requests)])
    splits, combines = _kv_splits(split, num_kv_heads, num_sms, config)
    tiles, num_keys = _row_tiles(tiled, pack, config.prefill.block_m)
    ratio = balance(
        [(chunk.num_tokens, chunk.context_len) for chunk in chunks],
        [decode.context_len for decode in decodes],
        group,
    )
    return WorkLists(
        *map(_padded, (tiles, splits, combines)),
        num_tokens=int(num_tokens.sum()),
        sm_shares=sm_shares(config, ratio, num_sms),
        num_long=_num_long(
            num_keys,
            num_heads=group // pack * num_kv_heads,
            num_sms=num_sms,
            resident=int(tiled[:, 2].sum()) * num_kv_heads <= RESIDENT_KEYS,
        ),
    )


def _row_tiles(requests: np.ndarray, pack: int, block_m: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row tiles of all packed rows and their keys; those with the most come first."""
    num_rows = requests[:, 1] * pack
    request, tile = _enumerate_parts(-(-num_rows // block_m))
    last_row = np.minimum((tile + 1) * block_m, num_rows[request]) - 1
    num_keys = (requests[:, 2] - requests[:, 1])[request] + last_row // pack + 1
    tiles = np.column_stack([requests[request], tile])
    longest_first = np.argsort(-num_keys, kind="stable")
    return tiles[longest_first], num_keys[longest_first]


def _num_long(
    num_keys: np.ndarray, *, num_heads: int, num_sms: int, resident: bool
) -> tuple[int, int]:
    """How many tiles come first of all heads, so that no SM is left with a long one at the end.

    Those longer than an SM's share of all keys, or, of a prefill that runs alone and whose keys of
    all heads the L2 holds, all.
    """
    if len(num_keys) * num_heads <= num_sms:
        return 0, 0
    longer = int((num_keys > num_keys.sum() * num_heads / num_sms).sum())
    return longer, len(num_keys) if resident else longer


def _kv_splits(
    requests: np.ndarray, num_kv_heads: int, num_sms: int, config: AttentionConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Return the splits and the combines of decodes.

    One length of split is chosen for the batch: the longest that still makes decode_items_per_sm
    items for each SM, but at least min_split_len. Each request is then cut evenly, at whole blocks.
    """
    if config.decode is None or not len(requests):
        return np.empty((0, 6), np.int64), np.empty((0, 3), np.int64)
    query_start, context, slot = requests[:, 0], requests[:, 2], requests[:, 3]
    block_n = config.decode.block_n
    filling = -(-context.sum() * num_kv_heads // (num_sms * config.decode_items_per_sm))
    longest = _round_up(max(filling, config.min_split_len), block_n)
    length = _round_up(-(-context // -(-context // longest)), block_n)
    num_splits = -(-context // length)

    decode, split = _enumerate_parts(num_splits)
    low = split * length[decode]
    high = np.minimum(low + length[decode], context[decode])
    num_partials = np.where(num_splits > 1, num_splits, 0)
    first_partial = np.cumsum(num_partials) - num_partials
    partial = np.where(num_partials[decode] > 0, first_partial[decode] + split, -1)
    splits = [query_start[decode], context[decode], slot[decode], low, high, partial]
    longest_first = np.argsort(low - high, kind="stable")

    (cut,) = np.nonzero(num_partials)
    combines = [query_start[cut], first_partial[cut], num_partials[cut]]
    return np.column_stack(splits)[longest_first], np.column_stack(combines)


def _padded(entries: np.ndarray) -> np.ndarray:
    """Entries of 4 or 8 int32: a kernel reads one with a single load."""
    width = 4 if entries.shape[1] <= 4 else 8
    return np.pad(entries, ((0, 0), (0, width - entries.shape[1]))).astype(np.int32)


def _enumerate_parts(num_parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return owner and index of each part: [2, 3] gives [0, 0, 1, 1, 1] and [0, 1, 0, 1, 2]."""
    owner = np.repeat(np.arange(len(num_parts)), num_parts)
    first = np.cumsum(num_parts) - num_parts
    return owner, np.arange(len(owner)) - first[owner]


def _round_up(value: np.ndarray | int, multiple: int) -> np.ndarray | int:
    return -(-value // multiple) * multiple


class Plan:
    """What a launch reads: a batch's lists and workspaces on a device, and the sizes of its grids.

    A plan serves one call at a time, as it owns the workspaces: calls that may overlap need a plan
    each.
    """

    block_table: torch.Tensor
    counts: torch.Tensor
    tiles: torch.Tensor
    splits: torch.Tensor
    combines: torch.Tensor
    counters: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    num_tiles: int
    num_splits: int
    num_combines: int
    """Sizes of the grids: at least as many as the lists hold."""

    def __init__(
        self,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        num_slots: int,
        max_len: int,
        num_sms: int,
        config: AttentionConfig,
        page_size: int = 0,
        block_table: torch.Tensor | None = None,
    ) -> None:
        """Contiguous KV, or pages of page_size keys that block_table [num_slots, max_len //
        page_size] int32 names for each slot in the order of its keys."""
        require_heads(num_q_heads, num_kv_heads, head_dim)
        if num_sms < 1:
            raise ValueError(f"num_sms must be at least 1, got {num_sms}")
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.num_slots = num_slots
        self.max_len = max_len
        self.num_sms = num_sms
        self.config = config
        self.num_tokens = 0
        self.page_size = page_size
        if page_size:
            self.block_table = _require_block_table(block_table, page_size, num_slots, max_len)
        if config.decode and config.decode.block_m < self.group:
            raise ValueError(
                f"the decode tile has {config.decode.block_m} rows for {self.group} heads"
            )

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def pack(self) -> int:
        """Query heads whose rows share a tile: all of the group, or as many as divide a tile."""
        return packed_heads(self.group, self.config.kernels)

    @property
    def num_prefill_items(self) -> int:
        return self.num_tiles * (self.num_q_heads // self.pack)

    @property
    def num_decode_items(self) -> int:
        return self.num_splits * self.num_kv_heads

    def cut(self, chunks: Sequence[PrefillChunk], decodes: Sequence[Decode]) -> WorkLists:
        """The lists of a batch, which is refused if the kernels would read out of bounds."""
        _require_batch(chunks, decodes, self.num_slots, self.max_len)
        return work_lists(
            chunks,
            decodes,
            group=self.group,
            pack=self.pack,
            num_kv_heads=self.num_kv_heads,
            num_sms=self.num_sms,
            config=self.config,
        )

    def require_tensors(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor
    ) -> int:
        """Refuse tensors that are not those the plan was made for.

        Return the elements from a key to the next in both caches.
        """
        queries = (self.num_tokens, self.num_q_heads, self.head_dim)
        heads = (self.num_kv_heads, self.head_dim)
        cache = (self.num_slots, self.max_len, *heads)
        if self.page_size:
            cache = (len(k_cache), self.page_size, *heads)
        require_tensor("q", q, queries)
        kv_stride = require_caches(k_cache, v_cache, cache, like=q)
        require_tensor("out", out, queries, like=q)
        if self.counts.device != q.device:
            raise ValueError(f"the plan is on {self.counts.device}, q on {q.device}")
        return kv_stride


class AttentionPlan(Plan):
    """The plan of one batch.

    The lists are copied on the stream that is current when the plan is made.
    """

    def __init__(
        self,
        chunks: Sequence[PrefillChunk],
        decodes: Sequence[Decode],
        *,
        device: torch.device | str,
        **sizes: Any,
    ) -> None:
        super().__init__(**sizes)
        self.num_tokens = sum(chunk.num_tokens for chunk in chunks) + len(decodes)
        self.work = self.cut(chunks, decodes)
        self.num_tiles = len(self.work.tiles)
        self.num_splits = len(self.work.splits)
        self.num_combines = len(self.work.combines)
        self._to_device(torch.device(device))

    def _to_device(self, device: torch.device) -> None:
        require_runnable(device)
        sections = self.work.sections
        sizes = [_section_size(section.size) for section in sections]
        host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
        _write_sections(host.numpy(), sections, sizes)
        lists = host.to(device, non_blocking=True).split(sizes)
        if not self.page_size:
            self.block_table = lists[0]  # not read
        self.counts, self.tiles, self.splits, self.combines = lists
        self.counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        self.partial_out, self.partial_lse = _workspaces(self, self.work.num_partials, device)


@dataclass(frozen=True, slots=True)
class Room:
    """The longest lists that a batch can have."""

    tiles: int
    splits: int
    combines: int

    @classmethod
    def of(cls, plan: Plan, num_tokens: int, max_chunks: int, max_decodes: int) -> Room:
        """Of the batches of at most that many tokens, prefill chunks and decodes.

        Each tiled request ends with a tile that may be partly filled; beside the splits that fill
        the SMs, each decode may have a shorter one.
        """
        tiled = max_chunks if plan.config.decode else max_chunks + max_decodes
        full_tiles = -(-num_tokens * plan.pack // plan.config.prefill.block_m)
        num_split = max_decodes if plan.config.decode else 0
        filling = plan.num_sms * plan.config.decode_items_per_sm // plan.num_kv_heads
        return cls(
            tiles=full_tiles + tiled if tiled else 0,
            splits=filling + num_split if num_split else 0,
            combines=num_split,
        )

    def union(self, other: Room) -> Room:
        return Room(*map(max, astuple(self), astuple(other)))

    @property
    def section_sizes(self) -> list[int]:
        """Of counts, tiles, splits and combines, in int32."""
        entries = (8, 8 * self.tiles, 8 * self.splits, 4 * self.combines)
        return [_section_size(size) for size in entries]

    @property
    def num_ints(self) -> int:
        return sum(self.section_sizes)


class CapturedPlan(Plan):
    """A plan whose lists change under a captured launch.

    `lists` [room.num_ints] int32 is device memory that several plans may share, one at a time; who
    owns it copies there what `write` has put on the host. The grids hold every batch of at most
    `num_tokens` tokens, `max_chunks` prefill chunks and `max_decodes` decodes; q and out have
    `num_tokens` rows, those after the batch's own being padding.
    """

    def __init__(
        self,
        lists: torch.Tensor,
        room: Room,
        *,
        num_tokens: int,
        max_chunks: int,
        max_decodes: int,
        **sizes: Any,
    ) -> None:
        super().__init__(**sizes)
        require_runnable(lists.device)
        self.num_tokens = num_tokens
        self.own = Room.of(self, num_tokens, max_chunks, max_decodes)
        if self.own.union(room) != room:
            raise ValueError(f"the lists are {room}, the plan needs {self.own}")
        self.num_tiles = self.own.tiles
        self.num_splits = self.own.splits
        self.num_combines = self.own.combines
        self.room = room
        parts = lists.split(room.section_sizes)
        if not self.page_size:
            self.block_table = parts[0]  # not read
        self.counts, self.tiles, self.splits, self.combines = parts

    def use(
        self, counters: torch.Tensor, partial_out: torch.Tensor, partial_lse: torch.Tensor
    ) -> None:
        """Take workspaces that plans on the same lists share: see `workspaces`."""
        self.counters, self.partial_out, self.partial_lse = counters, partial_out, partial_lse

    def workspaces(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """New workspaces for any batch that the room holds: counters, partial_out, partial_lse."""
        device = self.counts.device
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        return counters, *_workspaces(self, self.room.splits, device)

    def write(
        self, host: np.ndarray, chunks: Sequence[PrefillChunk], decodes: Sequence[Decode]
    ) -> None:
        """Put a batch's lists into host memory, laid out as `lists`; refuse one that is too big."""
        work = self.cut(chunks, decodes)
        own = Room(*map(len, work.sections[1:]))
        if work.num_tokens > self.num_tokens or own.union(self.own) != self.own:
            raise ValueError(
                f"{work.num_tokens} tokens with {own} exceed the plan's {self.num_tokens} "
                f"with {self.own}"
            )
        _write_sections(host, work.sections, self.room.section_sizes)


def _section_size(num_ints: int) -> int:
    """Whole entries of 32 bytes, at least one: Triton compiles anew for each alignment."""
    return max(8, int(_round_up(num_ints, 8)))


def _write_sections(host: np.ndarray, sections: Sequence[np.ndarray], sizes: Sequence[int]) -> None:
    start = 0
    for section, size in zip(sections, sizes, strict=True):
        host[start : start + section.size] = section.reshape(-1)
        start += size


def _workspaces(
    plan: Plan, num_partials: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (max(1, num_partials), plan.num_q_heads, plan.head_dim)
    partial_out = torch.empty(shape, dtype=torch.float32, device=device)
    return partial_out, torch.empty(shape[:2], dtype=torch.float32, device=device)


def _require_block_table(
    block_table: torch.Tensor | None, page_size: int, num_slots: int, max_len: int
) -> torch.Tensor:
    if page_size not in PAGE_SIZES:
        raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {page_size}")
    if max_len % page_size:
        raise ValueError(f"max_len must be a multiple of page_size {page_size}, got {max_len}")
    shape = (num_slots, max_len // page_size)
    if block_table is None or tuple(block_table.shape) != shape:
        got = None if block_table is None else tuple(block_table.shape)
        raise ValueError(f"block_table must have shape {shape}, got {got}")
    if block_table.dtype != torch.int32 or not block_table.is_contiguous():
        raise ValueError(f"block_table must be contiguous int32, got {block_table.dtype}")
    return block_table


def _require_batch(
    chunks: Sequence[PrefillChunk], decodes: Sequence[Decode], num_slots: int, max_len: int
) -> None:
    """Refuse a batch that the kernels would read out of bounds."""
    if not chunks and not decodes:
        raise ValueError("the batch is empty: no chunks and no decodes")
    for chunk in chunks:
        if chunk.num_tokens < 1:
            raise ValueError(f"num_tokens must be at least 1, got {chunk}")
        if chunk.context_len < chunk.num_tokens:
            raise ValueError(f"context_len includes the chunk's own tokens, got {chunk}")
    slots = set()
    for request in (*chunks, *decodes):
        if not 1 <= request.context_len <= max_len:
            raise ValueError(f"context_len must be in 1..{max_len}, got {request}")
        if not 0 <= request.slot < num_slots:
            raise ValueError(f"slot must be in 0..{num_slots - 1}, got {request}")
        if request.slot in slots:
            raise ValueError(f"slot {request.slot} is used twice, the second time by {request}")
        slots.add(request.slot)
