"""Times CUDA's virtual memory calls: one by one and over ranges, beside a busy GPU and beside none.

Rows of `mapping.csv` (docs/memory.md). A GPU is kept busy by matrix products that another stream
replays without end; what mapping in a background thread costs the steps is timed on a graph of
small matrix products, whose host time counts, as in decode steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import product
from statistics import median, quantiles

import torch

from podsim.check_mapping import check_data, check_out_of_memory, free_and_total
from podsim.memory_costs import ADDRESS_APIS, APIS
from podsim.page_groups import PageGroups
from podsim.vattention import Change
from podsim.virtual_memory import CudaDriver, VirtualMemory

PAGE_GROUPS = (2**21, 2**23)
"""The driver's own, and one that holds a block of keys of all layers of a small model."""
RANGES = (1, 2, 4, 8, 16, 32, 64)
"""Page-groups that one call makes accessible or unmaps."""
CALLS = 256
"""Page-groups of a repetition, cut into ranges."""
REPEATS = 7
PASSES = 3
STEPS = 200
CYCLES = 10_000

TENSORS = 64
"""Virtual tensors of a request that grows: K and V of 32 layers."""

Row = dict[str, object]
Progress = Callable[[str], None]


def measure(on_progress: Progress = lambda text: None, known: Collection[str] = ()) -> list[Row]:
    """The cycles, and every row of calls that are not known.

    Raises RuntimeError if page-groups are lost, or data is not where it was put.
    """
    driver = CudaDriver()
    torch.cuda.init()
    check_data(driver, PAGE_GROUPS[0])
    check_out_of_memory(driver, PAGE_GROUPS[0])
    on_progress(f"{CYCLES} cycles")
    rows = [_cycles(driver)]
    for number in range(PASSES):
        for size, gpu, thread in product(PAGE_GROUPS, ("idle", "busy"), ("main", "background")):
            on_progress(f"pass {number}, {size >> 20} MB, {gpu} GPU, {thread} thread")
            labels = {"page_group": size, "gpu": gpu, "thread": thread, "pass": number}
            timed = _in_thread(thread, driver, partial(_rows, driver, size, known), gpu)
            rows += [labels | row for row in timed]
        for size in PAGE_GROUPS if "step" not in known else ():
            on_progress(f"pass {number}, steps beside mapping of {size >> 20} MB")
            rows += _interference(driver, size, number)
    return rows


def _in_thread(
    thread: str, driver: CudaDriver, work: Callable[[], list[Row]], gpu: str
) -> list[Row]:
    with _busy_gpu() if gpu == "busy" else _nothing():
        if thread == "main":
            return work()
        with ThreadPoolExecutor(1, initializer=driver.use_in_this_thread) as pool:
            return pool.submit(work).result()


def _rows(driver: CudaDriver, size: int, known: Collection[str] = ()) -> list[Row]:
    """Of the calls that are not known."""
    rows = [] if set(ADDRESS_APIS) <= set(known) else _address_rows(driver, size)
    return rows if set(APIS) <= set(known) else rows + _page_group_rows(driver, size)


def _address_rows(driver: CudaDriver, size: int) -> list[Row]:
    """Address ranges of one page-group and of CALLS: so many as a cache has tensors are reserved,
    and freed.
    """
    rows: list[Row] = []
    for count in (1, CALLS):
        times: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            for api, seconds in _reserved(driver, count * size):
                times.setdefault(api, []).append(seconds)
        rows += [{"api": api, "page_groups": count, **_timing(times[api])} for api in times]
    return rows


def _reserved(driver: CudaDriver, size: int) -> Iterator[tuple[str, float]]:
    begin = time.perf_counter()
    addresses = [driver.reserve(size) for _ in range(TENSORS)]
    begin = yield from _lap("reserve", begin, TENSORS)
    for address in addresses:
        driver.free_address(address, size)
    yield from _lap("free_address", begin, TENSORS)


def _page_group_rows(driver: CudaDriver, size: int) -> list[Row]:
    """Every call, over every size of range; the times of the repetitions as one row."""
    rows: list[Row] = []
    address = driver.reserve(CALLS * size)
    for count in RANGES:
        times: dict[str, list[float]] = {}
        for _ in range(REPEATS):
            for api, seconds in _repetition(driver, address, size, count):
                times.setdefault(api, []).append(seconds)
        # Physical page-groups are created, mapped and released one by one: no range to vary.
        names = times if count == 1 else ("set_access", "unmap")
        rows += [{"api": api, "page_groups": count, **_timing(times[api])} for api in names]
    driver.free_address(address, CALLS * size)
    return rows


def _repetition(
    driver: CudaDriver, address: int, size: int, count: int
) -> Iterator[tuple[str, float]]:
    """Create, map, open, unmap and release CALLS page-groups; seconds of a call of each API."""
    starts = range(address, address + CALLS * size, count * size)
    pages = range(address, address + CALLS * size, size)
    begin = time.perf_counter()
    handles = [driver.create(size) for _ in range(CALLS)]
    begin = yield from _lap("create", begin, CALLS)
    for page, handle in zip(pages, handles, strict=True):
        driver.map(page, size, handle)
    begin = yield from _lap("map", begin, CALLS)
    for start in starts:
        driver.set_access(start, count * size)
    begin = yield from _lap("set_access", begin, len(starts))
    for start in starts:
        driver.unmap(start, count * size)
    begin = yield from _lap("unmap", begin, len(starts))
    for handle in handles:
        driver.release(handle)
    yield from _lap("release", begin, CALLS)


def _lap(api: str, begin: float, calls: int) -> Generator[tuple[str, float], None, float]:
    """Yields the seconds of a call since `begin`, and returns when the next lap begins."""
    yield api, (time.perf_counter() - begin) / calls
    return time.perf_counter()


def _timing(seconds: list[float]) -> Row:
    tenths = quantiles(seconds, n=10) if len(seconds) > 1 else seconds
    return {
        "time_us": median(seconds) * 1e6,
        "time_p10_us": tenths[0] * 1e6,
        "time_p90_us": tenths[-1] * 1e6,
        "repeats": len(seconds),
    }


# -------------------------------------------------------------------------------- beside what


@contextmanager
def _nothing() -> Iterator[None]:
    torch.cuda.synchronize()
    yield


@contextmanager
def _busy_gpu() -> Iterator[None]:
    """Large matrix products, kept in the queue by a thread of their own."""
    a, out = (torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(2))
    stop = threading.Event()

    def keep_busy() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            while not stop.is_set():
                for _ in range(20):
                    torch.mm(a, a, out=out)
                torch.cuda.current_stream().synchronize()

    worker = threading.Thread(target=keep_busy)
    worker.start()
    time.sleep(0.05)
    try:
        yield
    finally:
        stop.set()
        worker.join()
        torch.cuda.synchronize()


def _interference(driver: CudaDriver, size: int, number: int) -> list[Row]:
    """Seconds of a step, alone and while a thread maps and unmaps without a pause."""
    step = small_step()
    rows = []
    for thread in ("none", "background"):
        stop, mapped = threading.Event(), [0.0]
        worker = threading.Thread(target=_keep_mapping, args=(driver, size, stop, mapped))
        if thread == "background":
            worker.start()
        started = time.perf_counter()
        seconds = []
        for _ in range(STEPS):
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        elapsed = time.perf_counter() - started
        stop.set()
        if thread == "background":
            worker.join()
        rows.append(
            {
                "api": "step",
                "page_group": size,
                "page_groups": 0,
                "gpu": "busy",
                "thread": thread,
                "pass": number,
                "share": min(1.0, mapped[0] / elapsed),
                **_timing(seconds),
            }
        )
    return rows


def small_step() -> Callable[[], None]:
    """As a decode step, of some 1.7 ms: a graph of 32 layers of four products that wait for
    memory.
    """
    x = torch.randn(16, 4096, device="cuda").bfloat16()
    weights = [torch.randn(4096, 4096, device="cuda").bfloat16() for _ in range(8)]
    out = torch.empty_like(x)

    def layers() -> None:
        for i in range(128):
            torch.mm(x, weights[i % 8], out=out)

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _keep_mapping(
    driver: CudaDriver, size: int, stop: threading.Event, mapped: list[float]
) -> None:
    """Grow and free a slot of TENSORS; `mapped` is added the seconds in the driver."""
    driver.use_in_this_thread()
    groups = PageGroups(size, TENSORS, size)
    memory = VirtualMemory(driver, groups, num_slots=1, blocks_per_slot=1, num_blocks=1)
    while not stop.is_set():
        begin = time.perf_counter()
        memory.apply([Change(0, 0, 1, maps=True), Change(0, 0, 1, maps=False)])
        mapped[0] += time.perf_counter() - begin
    memory.close()


# ------------------------------------------------------------------------------------- cycles


def _cycles(driver: CudaDriver) -> Row:
    """Grow a request block by block and free it, CYCLES times; RuntimeError if memory is lost."""
    size = PAGE_GROUPS[0]
    groups = PageGroups(size, 2, size)
    before, _ = free_and_total()
    memory = VirtualMemory(driver, groups, num_slots=4, blocks_per_slot=4, num_blocks=8)
    held = memory.num_free_page_groups
    started = time.perf_counter()
    for cycle in range(CYCLES):
        slot, blocks = cycle % 4, cycle % 3 + 1
        memory.apply([Change(slot, i, i + 1, maps=True) for i in range(blocks)])
        memory.apply([Change(slot, 0, blocks, maps=False)])
    seconds = time.perf_counter() - started
    if memory.num_free_page_groups != held:
        raise RuntimeError(f"{held - memory.num_free_page_groups} page-groups were lost")
    memory.close()
    lost = before - free_and_total()[0]
    if lost > 0:
        raise RuntimeError(f"{lost} bytes of the GPU were lost in {CYCLES} cycles")
    timing = _timing([seconds / CYCLES])
    labels = {"api": "cycle", "page_group": size, "page_groups": 4, "gpu": "idle"}
    labels |= {"thread": "main", "pass": 0, **timing, "repeats": CYCLES}
    return labels | {"lost_bytes": lost}
