"""Tensors over memory that somebody else owns, through DLPack: no copy, and no look at the memory.

The memory may be address space with nothing mapped yet, which other ways of wrapping a pointer ask
the driver about.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

_CODES = {torch.int8: 0, torch.int32: 0, torch.float16: 2, torch.float32: 2, torch.bfloat16: 4}
_CPU, _CUDA = 1, 2


class _Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _Type(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p)]


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def tensor_at(
    address: int,
    shape: Sequence[int],
    strides: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str,
) -> torch.Tensor:
    """A tensor over memory at `address`, which must outlive it; strides in elements.

    Its description, some hundred bytes, is never freed: torch reads it when the tensor goes, which
    may be when the interpreter ends.
    """
    device = torch.device(device)
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    steps = (ctypes.c_int64 * len(strides))(*strides)
    managed = _Managed()
    managed.tensor.data = address
    managed.tensor.device.type = _CUDA if device.type == "cuda" else _CPU
    managed.tensor.device.id = device.index or 0
    managed.tensor.ndim = len(shape)
    managed.tensor.dtype.code = _CODES[dtype]
    managed.tensor.dtype.bits = 8 * dtype.itemsize
    managed.tensor.dtype.lanes = 1
    managed.tensor.shape = sizes
    managed.tensor.strides = steps
    managed.deleter = None
    for part in (managed, sizes, steps):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(part))
    capsule = _new_capsule(ctypes.addressof(managed), b"dltensor", None)
    view: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
    return view
