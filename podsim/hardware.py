"""GPUs: the memory that holds weights and KV cache, and the peaks no measurement may pass."""

from __future__ import annotations

from dataclasses import dataclass

from podsim.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU, by its published numbers."""

    name: str
    device_name: str
    """As the driver reports it."""
    memory: int
    """Bytes the driver reports."""
    peak_flops: float
    """Dense bf16 FLOP/s."""
    peak_bandwidth: float
    """Device memory, bytes/s."""
    link_bandwidth: float | None = None
    """To the other GPUs of its host, bytes/s in; None: not known."""


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h200",
            device_name="NVIDIA H200",
            memory=143771 * 2**20,
            peak_flops=989e12,
            peak_bandwidth=4.8e12,
            link_bandwidth=450e9,
        ),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU of this name; InputError if there is none."""
    if name not in GPUS:
        raise InputError(f"unknown GPU '{name}'; known GPUs: {', '.join(sorted(GPUS))}")
    return GPUS[name]
