"""RMSNorm of token rows, with the residual addition before it fused in.

s   = x + residual                                  residual <- s
out = s / sqrt(mean(s**2) + eps) * weight

x, residual, out  [num_tokens, hidden]              weight  [hidden]
"""

import torch
import triton
import triton.language as tl

from .checks import require_tensor


@triton.jit
def _rmsnorm_kernel(
    x,
    residual,
    weight,
    out,
    hidden,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalise one token."""
    columns = tl.arange(0, BLOCK)
    inside = columns < hidden
    row = tl.program_id(0).to(tl.int64) * hidden
    values = tl.load(x + row + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    if HAS_RESIDUAL:
        carried = tl.load(residual + row + columns, mask=inside, other=0.0)  # [BLOCK]
        values += carried.to(tl.float32)
        tl.store(residual + row + columns, values.to(residual.dtype.element_ty), mask=inside)
    scale = tl.rsqrt(tl.sum(values * values, 0) / hidden + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(out + row + columns, (values * scale * gain).to(out.dtype.element_ty), mask=inside)


def rmsnorm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    residual: torch.Tensor | None = None,
) -> None:
    """Write the norm of x (plus residual) to out; residual, where given, becomes the sum."""
    num_tokens, hidden = x.shape
    require_tensor("x", x, (num_tokens, hidden))
    require_tensor("weight", weight, (hidden,), like=x)
    require_tensor("out", out, (num_tokens, hidden), like=x)
    if residual is not None:
        require_tensor("residual", residual, (num_tokens, hidden), like=x)
    block = triton.next_power_of_2(hidden)
    _rmsnorm_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        out,
        hidden,
        eps,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
        num_warps=min(16, max(1, block // 512)),
    )


def rmsnorm_reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and the sum of x and residual in float64."""
    total = x.double() if residual is None else x.double() + residual.double()
    scale = torch.rsqrt(total.square().mean(dim=-1, keepdim=True) + eps)
    return total * scale * weight.double(), total
