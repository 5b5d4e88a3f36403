"""Attention of a mixed batch as one variable-length launch: what serving engines do today.

A decode is a chunk of one token: its tile has the prefill kernel's shape, mostly empty (GROUP
rows of block_m), and reads its whole context alone. A plan whose config has no decode tile lists
it that way.

    q, out            [num_tokens, num_q_heads, head_dim]
    k_cache, v_cache  [num_slots, max_len, num_kv_heads, head_dim]
"""

import torch

from .plan import Plan
from .prefill import launch_tiles


def unified_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    plan: Plan,
) -> None:
    """Write the attention of all of the plan's tokens to out."""
    if plan.config.decode is not None:
        raise ValueError(
            "the plan lists decodes as splits: make it with config_for('unified', ...)"
        )
    launch_tiles(q, k_cache, v_cache, out, plan)
