"""The gated activation of a Llama feed-forward layer.

out = silu(gate) * up = gate / (1 + exp(-gate)) * up

gate_up  [num_tokens, 2 * intermediate]: gate, then up        out  [num_tokens, intermediate]
"""

import torch
import triton
import triton.language as tl

from .checks import require_tensor

BLOCK = 1024


@triton.jit
def _silu_mul_kernel(gate_up, out, intermediate, BLOCK: tl.constexpr):
    """Compute BLOCK columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < intermediate
    source = gate_up + token * 2 * intermediate + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(source + intermediate, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    result = gate * tl.sigmoid(gate) * up
    to = out + token * intermediate + columns
    tl.store(to, result.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """Write silu(gate) * up to out."""
    num_tokens, intermediate = out.shape
    require_tensor("gate_up", gate_up, (num_tokens, 2 * intermediate))
    require_tensor("out", out, (num_tokens, intermediate), like=gate_up)
    _silu_mul_kernel[(num_tokens, triton.cdiv(intermediate, BLOCK))](
        gate_up, out, intermediate, BLOCK=BLOCK, num_warps=4
    )


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up in float64."""
    gate, up = gate_up.double().chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up
