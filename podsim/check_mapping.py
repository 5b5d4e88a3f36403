"""Checks mapped memory on a GPU: data where it was put, and a cache that outlives what it lacks.

Sizes are bytes of a page-group.
"""

from __future__ import annotations

import torch

from podsim.errors import InputError
from podsim.memory_view import tensor_at
from podsim.page_groups import PageGroups
from podsim.vattention import Change
from podsim.virtual_memory import CudaDriver, OutOfDeviceMemory, VirtualMemory


class SmallCache:
    """Two tensors with two slots of three page-groups, and four blocks to map into them."""

    def __init__(self, driver: CudaDriver, size: int) -> None:
        self.words = size // 4
        groups = PageGroups(size, 2, 4)
        self.memory = VirtualMemory(driver, groups, num_slots=2, blocks_per_slot=3, num_blocks=4)
        shape, strides = (2, 3, self.words), (3 * self.words, self.words, 1)
        self.tensors = [
            tensor_at(address, shape, strides, torch.int32, "cuda:0")
            for address in self.memory.tensors
        ]
        self.written: list[tuple[int, int]] = []

    def grow(self, slot: int, *blocks: int) -> None:
        """Map blocks, and write into them what no other has."""
        self.memory.apply([Change(slot, blocks[0], blocks[-1] + 1, maps=True)])
        for block in blocks:
            for number, tensor in enumerate(self.tensors):
                tensor[slot, block] = self._content(number, slot, block)
            self.written.append((slot, block))

    def shrink(self, slot: int, block: int) -> None:
        """Unmap the last block of a slot."""
        self.memory.apply([Change(slot, block, block + 1, maps=False)])
        self.written.remove((slot, block))

    def check(self) -> None:
        for slot, block in self.written:
            for number, tensor in enumerate(self.tensors):
                if not torch.equal(tensor[slot, block], self._content(number, slot, block)):
                    raise RuntimeError("data in mapped memory is not what was written")

    def _content(self, number: int, slot: int, block: int) -> torch.Tensor:
        values = torch.arange(self.words, device="cuda", dtype=torch.int32)
        return values + (number + 2 * (block + 3 * slot))

    def close(self) -> None:
        torch.cuda.synchronize()
        self.memory.close()


def check_data(driver: CudaDriver, size: int) -> None:
    """What is written through a tensor over mapped memory is read back, after growth too."""
    cache = SmallCache(driver, size)
    cache.grow(1, 0)
    cache.grow(1, 1, 2)
    cache.check()
    cache.close()


def check_out_of_memory(driver: CudaDriver, size: int) -> None:
    """More than the GPU has is refused, and more than a cache has; nothing stays behind, and a
    cache that was there holds its data and grows again.
    """
    free, total = free_and_total()
    cache = SmallCache(driver, size)
    cache.grow(0, 0, 1)
    too_many = total // size + 1
    try:
        VirtualMemory(driver, PageGroups(size, 1, size), 1, too_many, too_many)
    except InputError:
        pass
    else:
        raise RuntimeError(f"{too_many} page-groups were created in {total} bytes")
    cache.check()
    cache.grow(1, 0, 1)
    try:
        cache.grow(0, 2)
    except OutOfDeviceMemory:
        pass
    else:
        raise RuntimeError("a cache grew beyond its page-groups")
    cache.check()
    cache.shrink(1, 1)
    cache.grow(0, 2)
    cache.check()
    cache.close()
    lost = free - free_and_total()[0]
    if lost > 0:
        raise RuntimeError(f"{lost} bytes of the GPU were lost when it was full")


def free_and_total() -> tuple[int, int]:
    """Bytes of the GPU; memory that torch keeps for later is free."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return free, total
