"""How the warps of a CTA hand work to each other: rings of tiles, mailboxes of work items, tickets.

A loader warp fills tiles by TMA, warpgroups compute on them. Every consumer of a ring or a mailbox
waits for every phase of every slot, and each slot has a barrier of its own for either direction,
so that nobody needs a barrier of the whole CTA and the two operations of POD never wait for each
other.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .gluon_api import aggregate, warps_barrier

NUM_FIELDS = gl.constexpr(8)
"""int32 fields of a work item, in the plan's lists and in the mailbox."""

# Layout of the plan's counters, for each operation.
TICKETS = gl.constexpr(256)
DONE = gl.constexpr(258)
PREFILL = gl.constexpr(0)
DECODE = gl.constexpr(1)


@aggregate
class Ring:
    """Tiles in shared memory, filled by one warp and read by `consumers` warpgroups."""

    tiles: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    depth: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, tiles, full, empty, depth):  # type: ignore[no-untyped-def]
        self.tiles = tiles
        self.full = full
        self.empty = empty
        self.depth = gl.constexpr(depth)

    @gluon.jit
    def claim(self, count):
        """Wait until the slot of the count-th tile is free; return it and its barrier."""
        slot = count % self.depth
        mbarrier.wait(self.empty.index(slot), ((count // self.depth) & 1) ^ 1)
        return self.tiles.index(slot), self.full.index(slot)

    @gluon.jit
    def read(self, count):
        """Wait until the count-th tile is loaded and return it."""
        slot = count % self.depth
        mbarrier.wait(self.full.index(slot), (count // self.depth) & 1)
        return self.tiles.index(slot)

    @gluon.jit
    def release(self, count):
        """Say that this warpgroup has read the count-th tile."""
        mbarrier.arrive(self.empty.index(count % self.depth), count=1)


@gluon.jit
def make_ring(tiles, DEPTH: gl.constexpr, CONSUMERS: gl.constexpr):
    full = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [DEPTH, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(DEPTH):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return Ring(tiles, full, empty, DEPTH)


@aggregate
class Mailbox:
    """Work items of NUM_FIELDS numbers on their way from a loader to its consumers, two deep."""

    fields: gl.shared_memory_descriptor  # [2 * NUM_FIELDS, 1]
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, fields, full, empty):  # type: ignore[no-untyped-def]
        self.fields = fields
        self.full = full
        self.empty = empty

    @gluon.jit
    def send(self, count, first, second, third, fourth, fifth):
        """Send the count-th item, from a single warp."""
        slot = count % 2
        mbarrier.wait(self.empty.index(slot), ((count // 2) & 1) ^ 1)
        self._write(slot, 0, first)
        self._write(slot, 1, second)
        self._write(slot, 2, third)
        self._write(slot, 3, fourth)
        self._write(slot, 4, fifth)
        warps_barrier()
        mbarrier.arrive(self.full.index(slot), count=1)

    @gluon.jit
    def receive(self, count):
        """Wait for the count-th item and return its fields, in a warpgroup."""
        slot = count % 2
        mbarrier.wait(self.full.index(slot), (count // 2) & 1)
        first = self._read(slot, 0)
        second = self._read(slot, 1)
        third = self._read(slot, 2)
        fourth = self._read(slot, 3)
        fifth = self._read(slot, 4)
        warps_barrier()  # all warps have read before one thread says so
        mbarrier.arrive(self.empty.index(slot), count=1)
        return first, second, third, fourth, fifth

    @gluon.jit
    def _write(self, slot, field, value):
        one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        self.fields.index(slot * NUM_FIELDS + field).store(gl.full([1], value, gl.int32, one))

    @gluon.jit
    def _read(self, slot, field):
        one: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
        return gl.max(self.fields.index(slot * NUM_FIELDS + field).load(one), 0)


@gluon.jit
def make_mailbox(CONSUMERS: gl.constexpr):
    layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    fields = gl.allocate_shared_memory(gl.int32, [2 * NUM_FIELDS, 1], layout)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    return Mailbox(fields, full, empty)


@gluon.jit
def first_ticket(num_ctas, num_items):
    """Return the ticket this CTA begins with, and how many CTAs take tickets.

    `num_ctas` of the grid take part, spread evenly over it; 0 means all. The others get a ticket
    past the items. The first tickets need no counter, whose answer would take a while.
    """
    grid = gl.num_programs(0)
    num_ctas = gl.where(num_ctas == 0, grid, gl.minimum(num_ctas, grid))
    share = gl.program_id(0) * num_ctas
    return gl.where(share % grid < num_ctas, share // grid, num_items), num_ctas


@gluon.jit
def next_ticket(counters, OPERATION: gl.constexpr, num_ctas):
    return gl.atomic_add(counters + TICKETS + OPERATION, 1, sem="relaxed") + num_ctas


@gluon.jit
def reset_when_last(counters, OPERATION: gl.constexpr):
    """Count this loader as done; the operation's last one sets its tickets back to zero."""
    done = gl.atomic_add(counters + DONE + OPERATION, 1, sem="acq_rel", scope="gpu")
    if done == gl.num_programs(0) - 1:
        gl.store(counters + TICKETS + OPERATION, 0)
        gl.store(counters + DONE + OPERATION, 0)


@gluon.jit
def tile_order(position, num_tiles):
    """Return whether the position-th tile of a sequence holds keys, and which block of keys.

    K runs one block ahead of V, as the consumers read them: K0 K1 V0 K2 V1 ... V(n-1).
    """
    last = 2 * num_tiles - 1
    is_key = (position == 0) | (((position & 1) == 1) & (position < last))
    block = gl.where(is_key, (position + 1) // 2, (position - 1) // 2)
    return is_key, gl.where(position == last, num_tiles - 1, block)
