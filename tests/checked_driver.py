"""A driver of virtual memory on the CPU: what CUDA's API forbids fails here."""

from __future__ import annotations

import ctypes

from podsim.virtual_memory import OutOfDeviceMemory

PAGE = 4096


class CheckedDriver:
    """Host memory with the rules of CUDA's API: what it forbids fails here."""

    granularity = PAGE

    def __init__(self, pages: int = 10**9) -> None:
        self.pages = pages
        self.ranges: dict[int, int] = {}
        self.buffers: dict[int, object] = {}
        self.handles: set[int] = set()
        self.mapped: dict[int, int] = {}
        """Page address: handle."""
        self.accessible: set[int] = set()
        self.fail_next: str = ""
        self.num_calls = 0
        self._next = 1

    def holds_anything(self) -> bool:
        return bool(self.mapped or self.handles or self.ranges)

    def _count(self, name: str) -> None:
        self.num_calls += 1
        if self.fail_next == name:
            self.fail_next = ""
            raise OutOfDeviceMemory("none left")

    def reserve(self, size: int) -> int:
        self._count("reserve")
        assert size % PAGE == 0
        buffer = ctypes.create_string_buffer(size + PAGE)
        address = -(-ctypes.addressof(buffer) // PAGE) * PAGE
        self.ranges[address] = size
        self.buffers[address] = buffer
        return address

    def free_address(self, address: int, size: int) -> None:
        assert self.ranges.pop(address) == size
        assert not [page for page in self.mapped if address <= page < address + size]
        del self.buffers[address]

    def create(self, size: int) -> int:
        self._count("create")
        assert size % PAGE == 0
        if len(self.handles) * size >= self.pages * PAGE:
            raise OutOfDeviceMemory("none left")
        self._next += 1
        self.handles.add(self._next)
        return self._next

    def release(self, handle: int) -> None:
        assert handle not in self.mapped.values()
        self.handles.remove(handle)

    def map(self, address: int, size: int, handle: int) -> None:
        self._count("map")
        assert handle in self.handles
        assert handle not in self.mapped.values(), "a page-group in two places"
        assert any(a <= address and address + size <= a + n for a, n in self.ranges.items())
        for page in range(address, address + size, PAGE):
            assert page not in self.mapped, "two page-groups in one place"
            self.mapped[page] = handle

    def set_access(self, address: int, size: int) -> None:
        self._count("set_access")
        for page in range(address, address + size, PAGE):
            assert page in self.mapped
            self.accessible.add(page)

    def unmap(self, address: int, size: int) -> None:
        self._count("unmap")
        for page in range(address, address + size, PAGE):
            del self.mapped[page]
            self.accessible.discard(page)
