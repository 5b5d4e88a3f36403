"""Rotary position embedding of q and k, and the write of k and v into the KV cache, in one launch.

With (a, b) the two halves of a head's vector (Llama's convention) and, for i < head_dim / 2,
angle_i = position * base**(-2 i / head_dim):

    a' = a cos - b sin        b' = b cos + a sin

    qkv               [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
    positions, slots  [num_tokens] int32: where each token's k and v go
    cos_sin           [max_len, head_dim] float32: the cosines, then the sines, of each position
    q_out             [num_tokens, num_q_heads, head_dim]
    k_cache, v_cache  [num_slots, max_len, num_kv_heads, head_dim]
"""

import torch
import triton
import triton.language as tl

from .checks import require_caches, require_heads, require_tensor

BLOCK_HEADS = 8


def rope_table(
    max_len: int, head_dim: int, base: float, device: torch.device | str
) -> torch.Tensor:
    """Return cos_sin for positions 0..max_len-1; the angles are computed in float64."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    angles = torch.arange(max_len, dtype=torch.float64)[:, None] * base**-exponents
    return torch.cat([angles.cos(), angles.sin()], dim=1).float().to(device)


@triton.jit
def _rope_kernel(
    qkv,
    positions,
    slots,
    cos_sin,
    q_out,
    k_cache,
    v_cache,
    slot_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KV_STRIDE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """Rotate and store BLOCK_HEADS of the q, k and v heads of one token."""
    HALF: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + token).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dims = tl.arange(0, HALF)[None, :]
    is_q = (heads < Q_HEADS)[:, None]
    is_k = ((heads >= Q_HEADS) & (heads < Q_HEADS + KV_HEADS))[:, None]
    is_v = ((heads >= Q_HEADS + KV_HEADS) & (heads < Q_HEADS + 2 * KV_HEADS))[:, None]

    source = qkv + token * ((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims
    inside = is_q | is_k | is_v
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_HEADS, HALF]
    b = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_HEADS, HALF]
    cos = tl.load(cos_sin + position * HEAD_DIM + dims)  # [1, HALF]
    sin = tl.load(cos_sin + position * HEAD_DIM + HALF + dims)  # [1, HALF]
    first = tl.where(is_v, a, a * cos - b * sin).to(q_out.dtype.element_ty)
    second = tl.where(is_v, b, b * cos + a * sin).to(q_out.dtype.element_ty)

    q_to = q_out + token * (Q_HEADS * HEAD_DIM) + heads[:, None] * HEAD_DIM + dims
    tl.store(q_to, first, mask=is_q)
    tl.store(q_to + HALF, second, mask=is_q)
    cached = slot * slot_stride + position * KV_STRIDE
    k_to = k_cache + cached + (heads - Q_HEADS)[:, None] * HEAD_DIM + dims
    tl.store(k_to, first, mask=is_k)
    tl.store(k_to + HALF, second, mask=is_k)
    v_to = v_cache + cached + (heads - Q_HEADS - KV_HEADS)[:, None] * HEAD_DIM + dims
    tl.store(v_to, first, mask=is_v)
    tl.store(v_to + HALF, second, mask=is_v)


def rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    cos_sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_out: torch.Tensor,
) -> None:
    """Write the rotated q to q_out, the rotated k and the v to the caches at [slot, position].

    positions and slots are not checked: reading them would wait for the GPU.
    """
    num_tokens, num_q_heads, head_dim = q_out.shape
    num_slots, max_len, num_kv_heads, _ = k_cache.shape
    require_heads(num_q_heads, num_kv_heads, head_dim)
    num_heads = num_q_heads + 2 * num_kv_heads
    cache = (num_slots, max_len, num_kv_heads, head_dim)
    require_tensor("qkv", qkv, (num_tokens, num_heads * head_dim))
    require_tensor("q_out", q_out, (num_tokens, num_q_heads, head_dim), like=qkv)
    kv_stride = require_caches(k_cache, v_cache, cache, like=qkv)
    _require_table("cos_sin", cos_sin, (max_len, head_dim), torch.float32, qkv)
    _require_table("positions", positions, (num_tokens,), torch.int32, qkv)
    _require_table("slots", slots, (num_tokens,), torch.int32, qkv)
    _rope_kernel[(num_tokens, triton.cdiv(num_heads, BLOCK_HEADS))](
        qkv,
        positions,
        slots,
        cos_sin,
        q_out,
        k_cache,
        v_cache,
        max_len * kv_stride,
        Q_HEADS=num_q_heads,
        KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        KV_STRIDE=kv_stride,
        BLOCK_HEADS=BLOCK_HEADS,
        num_warps=2,
    )


def _require_table(
    name: str, table: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor
) -> None:
    """Refuse a table of another shape, dtype or device."""
    given = (tuple(table.shape), table.dtype, table.device)
    expected = (shape, dtype, like.device)
    if given != expected or not table.is_contiguous():
        raise ValueError(f"{name} must be contiguous with {expected}, got {given}")


def rope_reference(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    base: float,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rotated q, the rotated k and v in float64, [num_tokens, heads, head_dim] each."""
    heads = qkv.double().view(len(qkv), -1, head_dim)
    q, k, v = heads.split([num_q_heads, num_kv_heads, num_kv_heads], dim=1)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=qkv.device) / head_dim
    angles = positions.double()[:, None, None] * base**-exponents
    cos, sin = angles.cos(), angles.sin()

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    return rotate(q), rotate(k), v
