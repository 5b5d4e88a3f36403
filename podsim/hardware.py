"""GPUs: the memory that holds weights and KV cache, and the peaks no measurement may pass."""

from __future__ import annotations

from dataclasses import dataclass

from podsim.errors import InputError

PCIE_BANDWIDTHS = {4: 32e9, 5: 64e9, 6: 128e9}
"""Of each generation, 16 lanes, bytes/s each way: half of what data sheets add up of both ways."""


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
    num_sms: int
    l2_bytes: int
    architecture: str
    pcie_generation: int
    """Of its 16 lanes to the host."""
    link_bandwidth: float | None = None
    """To the other GPUs of its host, bytes/s in; None: not known."""

    @property
    def flops_per_byte(self) -> float:
        return self.peak_flops / self.peak_bandwidth

    @property
    def host_bandwidth(self) -> float:
        """Of the link to its host, bytes/s each way."""
        return PCIE_BANDWIDTHS[self.pcie_generation]


# Memory and L2 as the driver reports them; the other numbers are the vendor's for dense bf16, in
# the form that is named: data sheets "NVIDIA H200", "NVIDIA H100" (SXM5 and PCIe), "NVIDIA A100
# 80GB" (SXM4), "NVIDIA L40S", "NVIDIA HGX B200"; SMs from the architecture white papers.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            name="h200",
            device_name="NVIDIA H200",
            memory=143771 * 2**20,
            peak_flops=989e12,
            peak_bandwidth=4.8e12,
            num_sms=132,
            l2_bytes=60 * 10**6,
            architecture="hopper",
            pcie_generation=5,
            link_bandwidth=450e9,
        ),
        Gpu(
            name="h100",
            device_name="NVIDIA H100 80GB HBM3",
            memory=81559 * 2**20,
            peak_flops=989e12,
            peak_bandwidth=3.35e12,
            num_sms=132,
            l2_bytes=50 * 2**20,
            architecture="hopper",
            pcie_generation=5,
        ),
        Gpu(
            name="h100-pcie",
            device_name="NVIDIA H100 PCIe",
            memory=81559 * 2**20,
            peak_flops=756e12,
            peak_bandwidth=2.0e12,
            num_sms=114,
            l2_bytes=50 * 2**20,
            architecture="hopper",
            pcie_generation=5,
        ),
        Gpu(
            name="a100",
            device_name="NVIDIA A100-SXM4-80GB",
            memory=81920 * 2**20,
            peak_flops=312e12,
            peak_bandwidth=2.039e12,
            num_sms=108,
            l2_bytes=40 * 2**20,
            architecture="ampere",
            pcie_generation=4,
        ),
        Gpu(
            name="l40s",
            device_name="NVIDIA L40S",
            memory=46068 * 2**20,
            peak_flops=362e12,
            peak_bandwidth=864e9,
            num_sms=142,
            l2_bytes=96 * 2**20,
            architecture="ada",
            pcie_generation=4,
        ),
        Gpu(
            name="b200",
            device_name="NVIDIA B200",
            memory=183359 * 2**20,
            peak_flops=2250e12,
            peak_bandwidth=8e12,
            num_sms=148,
            l2_bytes=126 * 2**20,
            architecture="blackwell",
            pcie_generation=6,
        ),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU of this name; InputError if there is none."""
    if name not in GPUS:
        raise InputError(f"unknown GPU '{name}'; known GPUs: {', '.join(sorted(GPUS))}")
    return GPUS[name]
