"""Times a KV cache on virtual memory that grows between and beside steps, as in serving.

Rows of `growth.csv` (docs/memory.md). A process as large as the engine's holds slots of several
blocks. After each step one slot grows by a block: the calling thread maps it before the next step,
or the engine's mapping thread while that runs. All slots grow twice, the first time into addresses
that never had memory. Beside it goes nothing, what samples the card's clock and power in serving,
or the start of that.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import product
from statistics import mean, median, quantiles

import torch

from podsim.gpu_sampler import gpu_samples
from podsim.mapping_thread import MappingThread
from podsim.measure_mapping import small_step
from podsim.page_groups import PageGroups
from podsim.vattention import Change
from podsim.virtual_memory import CudaDriver, VirtualMemory

LAYOUTS = ((2**21, 64), (2**21, 16), (2**23, 16), (2**23, 2))
"""Bytes of a page-group, and virtual tensors."""
SLOTS, BLOCKS = 48, 2
"""Requests, and blocks that each grows by, one at a time."""
WEIGHTS, WEIGHT_BYTES = 224, 64 * 2**20
"""Tensors that are there besides, as many and as large as a model of 8 billion parameters has."""
BESIDE = ("nothing", "sampling", "start of sampling")
"""What else asks the driver."""
THREADS = ("main", "background")
PASSES = 2
STARTS_EVERY = 1.0
"""Seconds from one start of sampling to the next."""

Row = dict[str, object]
Progress = Callable[[str], None]


def measure(on_progress: Progress = lambda text: None) -> list[Row]:
    """Every row. Raises RuntimeError if the card does not say its clock and power."""
    driver = CudaDriver()
    torch.cuda.init()
    weights = [torch.empty(WEIGHT_BYTES, dtype=torch.uint8, device="cuda") for _ in range(WEIGHTS)]
    step = small_step()
    rows = []
    for number, beside in product(range(PASSES), BESIDE):
        on_progress(f"pass {number}, growth beside {beside}")
        with _beside(beside):
            for (size, tensors), thread in product(LAYOUTS, THREADS):
                labels = {"page_group": size, "page_groups": tensors, "thread": thread}
                timed = _grown(driver, step, size, tensors, thread)
                rows += [labels | {"beside": beside, "pass": number} | row for row in timed]
    del weights
    return rows


@contextmanager
def _starts() -> Iterator[None]:
    """Sampling is started again and again."""
    stop = threading.Event()

    def start_again() -> None:
        while not stop.is_set():
            with gpu_samples(time.perf_counter, steady=False):
                stop.wait(STARTS_EVERY)

    worker = threading.Thread(target=start_again)
    worker.start()
    try:
        yield
    finally:
        stop.set()
        worker.join()


def _beside(what: str) -> AbstractContextManager[object]:
    """One of BESIDE goes on while the context is open."""
    if what == "nothing":
        return nullcontext()
    return _starts() if what == "start of sampling" else gpu_samples(time.perf_counter)


def _grown(
    driver: CudaDriver, step: Callable[[], None], size: int, tensors: int, thread: str
) -> Iterator[Row]:
    """The first growth of all slots, and the second; seconds of growths, and of steps beside."""
    memory = VirtualMemory(driver, PageGroups(size, tensors, size), SLOTS, BLOCKS, SLOTS * BLOCKS)
    growths: list[float] = []

    def grow(changes: Iterable[Change]) -> None:
        begin = time.perf_counter()
        memory.apply(changes)
        growths.append(time.perf_counter() - begin)

    worker = MappingThread(grow, driver.use_in_this_thread) if thread == "background" else None
    for first in (True, False):
        steps = []
        growths.clear()
        for block, slot in product(range(BLOCKS), range(SLOTS)):
            changes = [Change(slot, block, block + 1, maps=True)]
            if worker is None:
                grow(changes)
            else:
                worker.submit(changes)
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            steps.append(time.perf_counter() - begin)
            if worker is not None:
                worker.wait()
        memory.unmap_all()
        yield {"first": first, **_timing(growths), "step_us": median(steps) * 1e6}
    if worker is not None:
        worker.close()
    memory.close()


def _timing(seconds: list[float]) -> Row:
    """A few growths may wait long, and serving waits for all of them: the mean is what counts."""
    tenths = quantiles(seconds, n=10)
    return {
        "time_us": mean(seconds) * 1e6,
        "time_p10_us": tenths[0] * 1e6,
        "time_p50_us": median(seconds) * 1e6,
        "time_p90_us": tenths[-1] * 1e6,
        "repeats": len(seconds),
    }
