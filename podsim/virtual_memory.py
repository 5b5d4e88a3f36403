"""vAttention's memory on a real GPU: address space reserved once, page-groups mapped on demand.

CUDA's virtual memory API, as the paper uses it (arXiv 2405.04437, section 5): address ranges are
reserved, physical page-groups created, and the latter mapped into the former as requests grow.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from podsim.errors import InputError
from podsim.page_groups import PageGroups
from podsim.vattention import Change


class OutOfDeviceMemory(Exception):
    """No physical memory is left; nothing was changed."""


class Driver(Protocol):
    """What is used of the virtual memory API. Sizes in bytes, multiples of `granularity`."""

    @property
    def granularity(self) -> int:
        """The smallest page-group."""

    def reserve(self, size: int) -> int:
        """An address range, aligned to the granularity; where it begins."""

    def free_address(self, address: int, size: int) -> None: ...

    def create(self, size: int) -> int:
        """Physical memory, as a handle. Raises OutOfDeviceMemory."""

    def release(self, handle: int) -> None: ...

    def map(self, address: int, size: int, handle: int) -> None:
        """Raises OutOfDeviceMemory."""

    def set_access(self, address: int, size: int) -> None:
        """Let the GPU read and write a mapped range. Raises OutOfDeviceMemory."""

    def unmap(self, address: int, size: int) -> None: ...


class VirtualMemory:
    """Virtual tensors with one slot a request, and the physical page-groups mapped into them.

    In tensor i, slot s takes `slot_bytes` from `tensors[i] + s * slot_bytes` on. All page-groups
    are created at once. What is mapped where is `podsim.vattention`'s to decide; a slot's blocks
    are mapped from its beginning on. Raises InputError if the driver has no such page-groups or the
    memory is not there; then nothing is held.
    """

    def __init__(
        self,
        driver: Driver,
        page_groups: PageGroups,
        num_slots: int,
        blocks_per_slot: int,
        num_blocks: int,
    ) -> None:
        size = page_groups.page_group
        if size % driver.granularity:
            raise InputError(
                f"page_group is {size // 1024} KB, but this driver maps multiples of "
                f"{driver.granularity // 1024} KB: smaller ones need vAttention's modified driver"
            )
        self.driver = driver
        self.page_groups = page_groups
        self.slot_bytes = blocks_per_slot * size
        self.num_slots = num_slots
        self.tensors: list[int] = []
        self._pool: list[int] = []
        self._mapped: list[list[list[int]]] = [
            [[] for _ in range(num_slots)] for _ in range(page_groups.num_tensors)
        ]
        """Handles in each tensor and slot, in order."""
        try:
            for _ in range(page_groups.num_tensors):
                self.tensors.append(driver.reserve(num_slots * self.slot_bytes))
            for _ in range(num_blocks * page_groups.num_tensors):
                self._pool.append(driver.create(size))
        except OutOfDeviceMemory:
            made = len(self._pool)
            self.close()
            raise InputError(
                f"{num_blocks} KV blocks need {num_blocks * page_groups.block_bytes / 1e9:.1f} GB "
                f"of the GPU, but only {made * size / 1e9:.1f} GB were free"
            ) from None

    @property
    def num_free_page_groups(self) -> int:
        return len(self._pool)

    def mapped_blocks(self, slot: int) -> int:
        return len(self._mapped[0][slot])

    def apply(self, changes: Iterable[Change]) -> None:
        """Map and unmap in order. Raises OutOfDeviceMemory for a change that finds too little
        memory, which then has no effect, nor have those after it.
        """
        for change in changes:
            if change.maps:
                self._map(change)
            else:
                self._unmap(change)

    def _map(self, change: Change) -> None:
        tensors = range(len(self.tensors))
        needed = change.num_blocks * len(tensors)
        if needed > len(self._pool):
            raise OutOfDeviceMemory(
                f"slot {change.slot} is to grow by {change.num_blocks} blocks, which takes "
                f"{needed} page-groups, but {len(self._pool)} are free"
            )
        assert all(len(self._mapped[i][change.slot]) == change.first for i in tensors)
        done: list[int] = []
        try:
            for i in tensors:
                done.append(i)
                self._map_range(i, change)
        except OutOfDeviceMemory:
            for i in done:
                self._unmap_range(i, change.slot, change.first)
            raise

    def _map_range(self, tensor: int, change: Change) -> None:
        """Adjacent page-groups in one tensor: each is mapped, all are made accessible by a call."""
        size, handles = self.page_groups.page_group, self._mapped[tensor][change.slot]
        start = self._address(tensor, change.slot, change.first)
        for block in range(change.num_blocks):
            handle = self._pool.pop()
            try:
                self.driver.map(start + block * size, size, handle)
            except OutOfDeviceMemory:
                self._pool.append(handle)
                raise
            handles.append(handle)
        self.driver.set_access(start, change.num_blocks * size)

    def _unmap(self, change: Change) -> None:
        assert self.mapped_blocks(change.slot) == change.last
        for tensor in range(len(self.tensors)):
            self._unmap_range(tensor, change.slot, change.first)

    def _unmap_range(self, tensor: int, slot: int, first: int) -> None:
        """All page-groups of a slot from `first` on, by one call."""
        handles = self._mapped[tensor][slot]
        if len(handles) > first:
            size = (len(handles) - first) * self.page_groups.page_group
            self.driver.unmap(self._address(tensor, slot, first), size)
            self._pool += handles[first:]
            del handles[first:]

    def _address(self, tensor: int, slot: int, block: int) -> int:
        offset = slot * self.slot_bytes + block * self.page_groups.page_group
        return self.tensors[tensor] + offset

    def unmap_all(self) -> None:
        for slot in range(self.num_slots):
            for tensor in range(len(self.tensors)):
                self._unmap_range(tensor, slot, 0)

    def close(self) -> None:
        """Give everything back. The tensors over this memory must not be used any more."""
        self.unmap_all()
        while self._pool:
            self.driver.release(self._pool.pop())
        while self.tensors:
            self.driver.free_address(self.tensors.pop(), self.num_slots * self.slot_bytes)


class CudaDriver:
    """The API through cuda-python, on the current device of this process.

    Raises InputError if the package, or a GPU with virtual memory management, is missing.
    """

    def __init__(self, device: int = 0) -> None:
        try:
            from cuda.bindings import driver
        except ModuleNotFoundError:
            raise InputError(
                "vAttention's memory needs cuda-python: pip install 'podsim[vmm]' on the machine "
                "with the GPU"
            ) from None
        self._api = driver
        try:
            self._call(driver.cuInit(0))
        except Exception as error:  # of the package, where there is no driver at all
            raise InputError(f"no CUDA driver to map memory with: {error}") from None
        (self._device,) = self._call(driver.cuDeviceGet(device))
        attribute = driver.CUdevice_attribute
        managed = attribute.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not self._call(driver.cuDeviceGetAttribute(managed, self._device))[0]:
            raise InputError(f"GPU {device} has no virtual memory management")
        (self._context,) = self._call(driver.cuDevicePrimaryCtxRetain(self._device))
        self.use_in_this_thread()
        location = driver.CUmemLocation()
        location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = device
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location = location
        self._access = driver.CUmemAccessDesc()
        self._access.location = location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        (size,) = self._call(driver.cuMemGetAllocationGranularity(self._properties, least))
        self.granularity = int(size)

    def use_in_this_thread(self) -> None:
        """A thread that calls the driver has the device's context."""
        self._call(self._api.cuCtxSetCurrent(self._context))

    def reserve(self, size: int) -> int:
        return int(self._call(self._api.cuMemAddressReserve(size, 0, 0, 0))[0])

    def free_address(self, address: int, size: int) -> None:
        self._call(self._api.cuMemAddressFree(address, size))

    def create(self, size: int) -> int:
        return int(self._call(self._api.cuMemCreate(size, self._properties, 0))[0])

    def release(self, handle: int) -> None:
        self._call(self._api.cuMemRelease(handle))

    def map(self, address: int, size: int, handle: int) -> None:
        self._call(self._api.cuMemMap(address, size, 0, handle, 0))

    def set_access(self, address: int, size: int) -> None:
        self._call(self._api.cuMemSetAccess(address, size, [self._access], 1))

    def unmap(self, address: int, size: int) -> None:
        self._call(self._api.cuMemUnmap(address, size))

    def _call(self, result: Sequence[Any]) -> list[Any]:
        """The values of a call that went well."""
        error, *values = result
        codes = self._api.CUresult
        if error == codes.CUDA_ERROR_OUT_OF_MEMORY:
            raise OutOfDeviceMemory("the GPU has no free physical memory")
        if error != codes.CUDA_SUCCESS:
            raise RuntimeError(f"CUDA's virtual memory API: {error}")
        return values
