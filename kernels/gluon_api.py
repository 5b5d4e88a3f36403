"""Gluon's names that differ between Triton 3.6 and later versions, and which GPUs have them."""

from typing import Any

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate

aggregate: Any = _aggregate
"""Decorator: a class whose annotated fields a kernel passes as one value."""

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
warps_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
"""Of the warps that run the calling function: in a specialised region not the whole CTA."""

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


def require_hopper(device: torch.device) -> None:
    """Refuse a device without wgmma and setmaxnreg, which compute capability 9.0 alone has."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability != (9, 0):
        raise ValueError(
            f"the Hopper kernels need compute capability 9.0, {device} has {capability}: "
            "take config_for(..., kernels='triton')"
        )


def descriptor(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor:
    """A TMA descriptor that reads blocks of a tensor, swizzled as wgmma reads them."""
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[tensor.dtype])
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block, layout)
