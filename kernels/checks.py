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
    _require_like(name, tensor, shape, like)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous: strides {tensor.stride()}")


def require_caches(
    k_cache: torch.Tensor, v_cache: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor
) -> int:
    """Return the elements from a key to the next, which may have gaps between them: other layers'.

    shape: [slots or pages, keys of each, num_kv_heads, head_dim]. Refuses caches of another shape,
    dtype or device, and those whose keys do not follow one another at equal distances.
    """
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        _require_like(name, cache, shape, like)
    _, num_keys, num_heads, head_dim = shape
    stride = int(k_cache.stride(1 if num_keys > 1 else 0))
    strides = (num_keys * stride, stride, head_dim, 1)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        sizes = zip(cache.stride(), strides, shape, strict=True)
        if any(size > 1 and got != want for got, want, size in sizes):
            raise ValueError(
                f"{name} has strides {cache.stride()}, expected {strides}: keys at equal "
                "distances through all slots, of k_cache and v_cache the same"
            )
    if stride < num_heads * head_dim:
        raise ValueError(f"keys of {num_heads * head_dim} values overlap: they are {stride} apart")
    return stride


def _require_like(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor | None
) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected bfloat16 or float16")
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
