"""What the launchers refuse on the host, before a kernel can read out of bounds."""

import torch
import triton
import triton.language as tl

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)

# Whether kernels run interpreted: fixed when they are decorated, that is when they are imported.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def require_runnable(device: torch.device) -> None:
    """Refuse a device on which the kernels, compiled or interpreted, cannot run."""
    if device.type != "cuda" and not INTERPRETED.value:
        raise ValueError(
            f"kernels run on CUDA tensors, got {device.type}; "
            "set TRITON_INTERPRET=1 before the import to interpret them on the CPU"
        )
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"got {device}, but Triton launches on the current cuda:{torch.cuda.current_device()}"
        )


def require_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor | None = None
) -> None:
    """Refuse a tensor of another shape, dtype or device, or one with gaps between its elements."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected bfloat16 or float16")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {tensor.stride()}")
    if like is not None and (tensor.dtype, tensor.device) != (like.dtype, like.device):
        raise ValueError(
            f"{name} is {tensor.dtype} on {tensor.device}, expected {like.dtype} on {like.device}"
        )
    require_runnable(tensor.device)


def require_heads(num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
    """Refuse head counts that do not form whole groups, and head sizes without a kernel."""
    if num_kv_heads < 1 or num_q_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads, got {num_q_heads} and {num_kv_heads}"
        )
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}, got {head_dim}")
