"""Where the keys and values of a request lie: in a slot of consecutive rows, or in pages.

The cache is read as [rows, num_kv_heads * head_dim]. Contiguous: slot s owns rows
s * slot_rows ... (s + 1) * slot_rows - 1. Paged: row s of the block table [num_slots, slot_rows /
PAGE] names the pages of PAGE rows in the order of the keys. PAGE is 0 or a power of two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_api import tma_load


@gluon.jit
def load_block(
    k,
    v,
    is_key,
    slot,
    first_key,  # a multiple of BLOCK_N
    end,  # of the keys that may be read
    column,
    full,
    block,
    block_table,
    slot_rows,
    BLOCK_N: gl.constexpr,
    PAGE: gl.constexpr,
):
    """Load BLOCK_N keys, or their values, into shared memory."""
    if PAGE == 0:
        row = slot * slot_rows + first_key
        tma_load(k, [row, column], full, block, pred=is_key)
        tma_load(v, [row, column], full, block, pred=is_key == 0)
    else:
        PART: gl.constexpr = min(PAGE, BLOCK_N)
        pages = block_table + slot * (slot_rows // PAGE)
        last_page = (end - 1) // PAGE
        for i in gl.static_range(BLOCK_N // PART):
            # What follows the end in the last block is masked: any page of the request will do.
            page = gl.load(pages + gl.minimum((first_key + i * PART) // PAGE, last_page))
            row = page * PAGE + (first_key + i * PART) % PAGE
            part = block.slice(i * PART, PART)
            tma_load(k, [row, column], full, part, pred=is_key)
            tma_load(v, [row, column], full, part, pred=is_key == 0)
