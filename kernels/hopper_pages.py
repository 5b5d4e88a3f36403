"""Where the keys and values of a request lie: in a slot of consecutive rows, or in pages.

The cache is read as [rows, num_kv_heads * head_dim]. Contiguous: slot s owns rows
s * slot_rows ... (s + 1) * slot_rows - 1. Paged: row s of the block table [num_slots, slot_rows /
PAGE] names the pages of PAGE rows in the order of the keys. PAGE is 0 or a power of two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_api import tma_load


@gluon.jit
def block_rows(
    block_table,
    slot,
    slot_rows,
    first_key,  # a multiple of BLOCK_N
    end,  # of the keys that may be read
    BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Return the rows of the cache at which each part of a block of keys begins.

    To be called before the wait for a free slot: the answer of the block table takes a while.
    """
    if PAGE == 0:
        rows = (slot * slot_rows + first_key,)
    else:
        PART: gl.constexpr = min(PAGE, BLOCK_N)
        pages = block_table + slot * (slot_rows // PAGE)
        last_page = (end - 1) // PAGE
        rows = ()
        for i in gl.static_range(BLOCK_N // PART):
            # What follows the end in the last block is masked: any page of the request will do.
            page = gl.load(pages + gl.minimum((first_key + i * PART) // PAGE, last_page))
            rows = rows + (page * PAGE + (first_key + i * PART) % PAGE,)  # noqa: RUF005
    return rows


@gluon.jit
def load_block(k, v, is_key, rows, column, full, block):
    """Load a block of keys, or of values, into shared memory."""
    if len(rows) == 1:
        tma_load(k, [rows[0], column], full, block, pred=is_key)
        tma_load(v, [rows[0], column], full, block, pred=is_key == 0)
    else:
        PART: gl.constexpr = k.block_shape[0]
        for i in gl.static_range(len(rows)):
            part = block.slice(i * PART, PART)
            tma_load(k, [rows[i], column], full, part, pred=is_key)
            tma_load(v, [rows[i], column], full, part, pred=is_key == 0)
