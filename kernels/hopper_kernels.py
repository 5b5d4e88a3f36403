"""The three launches on Hopper: prefill, decode, and POD, which runs both on every SM at once.

POD (arXiv 2410.18038) shares each SM between the operations by CTAs. Here one persistent CTA an SM
has warps for both: two warpgroups compute prefill, one computes decode, and a loader warp each
keeps them supplied from a ring of its own. Neither operation waits for the other; each takes work
items by tickets until its own are gone.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from .gluon_api import warps_barrier
from .hopper_decode import compute_decode, load_decode
from .hopper_prefill import ROWS, compute_prefill, load_prefill
from .hopper_rings import make_mailbox, make_ring


@gluon.jit
def _barriers(NUM: gl.constexpr, CONSUMERS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=CONSUMERS)
    return barriers


@gluon.jit
def _blocks(k, DEPTH: gl.constexpr, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr):
    return gl.allocate_shared_memory(k.dtype, [DEPTH, BLOCK_N, HEAD_DIM], k.layout)


@gluon.jit
def prefill_kernel(
    q, k, v, out, counts, tiles, counters, block_table, slot_rows, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr, SHARED: gl.constexpr,
    Q_BUFFERS: gl.constexpr,
):  # fmt: skip
    """All tiles of the plan; a CTA for each SM, or fewer.

    SHARED: counts[3] of the CTAs take part, the others leave their SMs to another kernel.
    """
    q_tiles = gl.allocate_shared_memory(
        q.dtype, [2 * Q_BUFFERS, ROWS // PACK, PACK, HEAD_DIM], q.layout
    )
    ring = make_ring(_blocks(k, STAGES, BLOCK_N, HEAD_DIM), STAGES, 2)
    mailbox = make_mailbox(2)
    q_full = _barriers(Q_BUFFERS, 1)
    q_empty = _barriers(Q_BUFFERS, 2)
    turns = _barriers(2, 1)
    fence_async_shared()
    warps_barrier()
    num_ctas = gl.load(counts + 3) if SHARED else 0
    Q_HEADS: gl.constexpr = KV_HEADS * GROUP
    gl.warp_specialize(
        [
            (compute_prefill, (0, out, q_tiles, q_full, q_empty, turns, ring, mailbox, scale,
                               Q_BUFFERS, Q_HEADS, PACK, HEAD_DIM, BLOCK_N, True)),
            (compute_prefill, (1, out, q_tiles, q_full, q_empty, turns, ring, mailbox, scale,
                               Q_BUFFERS, Q_HEADS, PACK, HEAD_DIM, BLOCK_N, True)),
            (load_prefill, (q, k, v, q_tiles, q_full, q_empty, ring, mailbox, counts, tiles,
                            counters, block_table, slot_rows, num_ctas, Q_BUFFERS, KV_HEADS, GROUP,
                            PACK, HEAD_DIM, BLOCK_N, PAGE, not SHARED)),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip


@gluon.jit
def decode_kernel(
    q, k, v, out, partial_out, partial_lse, counts, splits, counters, block_table, slot_rows,
    scale, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """All splits of the plan; a CTA for each SM, or fewer."""
    dtype: gl.constexpr = q.dtype
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, BLOCK_N], dtype)
    q_tile = gl.allocate_shared_memory(dtype, [HEADS, HEAD_DIM], q.layout)
    p_tile = gl.allocate_shared_memory(dtype, [HEADS, BLOCK_N], p_layout)
    ring = make_ring(_blocks(k, STAGES, BLOCK_N, HEAD_DIM), STAGES, 1)
    mailbox = make_mailbox(1)
    q_full = _barriers(1, 1)
    q_empty = _barriers(1, 1)
    fence_async_shared()
    warps_barrier()
    gl.warp_specialize(
        [
            (compute_decode, (out, partial_out, partial_lse, q_tile, q_full, q_empty, p_tile, ring,
                              mailbox, scale, KV_HEADS, GROUP, HEADS, HEAD_DIM, BLOCK_N)),
            (load_decode, (q, k, v, q_tile, q_full, q_empty, ring, mailbox, counts, splits,
                           counters, block_table, slot_rows, 0, KV_HEADS, GROUP, HEADS, HEAD_DIM,
                           BLOCK_N, PAGE)),
        ],
        [1],
        [56],
    )  # fmt: skip


@gluon.jit
def pod_kernel(
    qp, kp, vp, qd, kd, vd, out, partial_out, partial_lse, counts, tiles, splits, counters,
    block_table, slot_rows, scale,
    KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PACK: gl.constexpr, HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, PREFILL_BLOCK_N: gl.constexpr, PREFILL_STAGES: gl.constexpr,
    DECODE_BLOCK_N: gl.constexpr, DECODE_STAGES: gl.constexpr, PAGE: gl.constexpr,
    PREFILL_REGISTERS: gl.constexpr, DECODE_REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """All tiles and all splits of the plan; a CTA for each SM.

    Of the CTAs, counts[3] take prefill and counts[4] decode; 0 means all.
    """
    dtype: gl.constexpr = qp.dtype
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HEADS, DECODE_BLOCK_N], dtype)
    qp_tiles = gl.allocate_shared_memory(dtype, [2, ROWS // PACK, PACK, HEAD_DIM], qp.layout)
    qd_tile = gl.allocate_shared_memory(dtype, [HEADS, HEAD_DIM], qd.layout)
    p_tile = gl.allocate_shared_memory(dtype, [HEADS, DECODE_BLOCK_N], p_layout)
    blocks = _blocks(kp, PREFILL_STAGES, PREFILL_BLOCK_N, HEAD_DIM)
    prefill_ring = make_ring(blocks, PREFILL_STAGES, 2)
    blocks = _blocks(kd, DECODE_STAGES, DECODE_BLOCK_N, HEAD_DIM)
    decode_ring = make_ring(blocks, DECODE_STAGES, 1)
    prefill_mail = make_mailbox(2)
    decode_mail = make_mailbox(1)
    qp_full = _barriers(1, 1)
    qp_empty = _barriers(1, 2)
    qd_full = _barriers(1, 1)
    qd_empty = _barriers(1, 1)
    fence_async_shared()
    warps_barrier()
    no_turns = qp_empty  # not waited for: a barrier of its own would be dead, and its memory reused
    prefill_ctas = gl.load(counts + 3)
    decode_ctas = gl.load(counts + 4)
    Q_HEADS: gl.constexpr = KV_HEADS * GROUP
    gl.warp_specialize(
        [
            (compute_prefill, (0, out, qp_tiles, qp_full, qp_empty, no_turns, prefill_ring,
                               prefill_mail, scale, 1, Q_HEADS, PACK, HEAD_DIM, PREFILL_BLOCK_N,
                               False)),
            (compute_prefill, (1, out, qp_tiles, qp_full, qp_empty, no_turns, prefill_ring,
                               prefill_mail, scale, 1, Q_HEADS, PACK, HEAD_DIM, PREFILL_BLOCK_N,
                               False)),
            (compute_decode, (out, partial_out, partial_lse, qd_tile, qd_full, qd_empty, p_tile,
                              decode_ring, decode_mail, scale, KV_HEADS, GROUP, HEADS, HEAD_DIM,
                              DECODE_BLOCK_N)),
            (load_prefill, (qp, kp, vp, qp_tiles, qp_full, qp_empty, prefill_ring, prefill_mail,
                            counts, tiles, counters, block_table, slot_rows, prefill_ctas, 1,
                            KV_HEADS, GROUP, PACK, HEAD_DIM, PREFILL_BLOCK_N, PAGE, False)),
            (load_decode, (qd, kd, vd, qd_tile, qd_full, qd_empty, decode_ring, decode_mail,
                           counts, splits, counters, block_table, slot_rows, decode_ctas, KV_HEADS,
                           GROUP, HEADS, HEAD_DIM, DECODE_BLOCK_N, PAGE)),
        ],
        [4, 4, 1, 1],
        [PREFILL_REGISTERS, DECODE_REGISTERS, LOADER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
