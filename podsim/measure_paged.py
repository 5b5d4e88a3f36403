"""Times what a block table costs: attention from pages, and the table's preparation for each step.

Rows of `paged.csv` (docs/memory.md). The kernels are those of `podsim kernels paging`, on batches
that an engine forms. The table is the engine's own: what its steps do beyond those over contiguous
slots is timed, for requests that decode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
import pandas as pd
import torch

from podsim.batch import Chunk
from podsim.block_tables import NewBlocks, PagedBlocks
from podsim.kernel_report import medians
from podsim.kernel_workloads import KernelWorkload, serving_workloads
from podsim.kernels.config import kernels_for
from podsim.kernels.plan import PAGE_SIZES, Room
from podsim.measure_kernels import paging
from podsim.request import Request
from podsim.step_buffers import StepBuffers
from podsim.step_inputs import Lengths

ROUNDS = 3
REQUESTS = (1, 8, 32, 128, 512)
CONTEXTS = (1024, 8192)
"""Of the requests of a table."""
STEPS, WARM_UP = 32, 4
"""Of a table in a round, after those that are not timed."""

LEAD_CYCLES = 200_000
"""About a tenth of a millisecond that the GPU sleeps while the host queues."""

Row = dict[str, object]
Progress = Callable[[str], None]


def measure(on_progress: Progress = lambda text: None) -> list[Row]:
    """Every row."""
    kernels = kernels_for(torch.cuda.get_device_capability())
    return [*kernel_rows(serving_workloads(), kernels, on_progress), *table_rows(on_progress)]


def kernel_rows(
    workloads: Sequence[KernelWorkload], kernels: str, on_progress: Progress
) -> list[Row]:
    """Both sides of each batch, from contiguous keys and from pages of every size, in turn."""
    done = iter(workloads)
    timed = paging(
        workloads, kernels, ROUNDS, lambda: on_progress(next(done).name), ("prefill", "decode")
    )
    seconds = medians(pd.DataFrame(timed)).to_dict("index")
    rows: list[Row] = []
    for workload in workloads:
        of_kernel = seconds[workload.name]
        sides = {
            "prefill": [chunk[1] for chunk in workload.batch.prefills],
            "decode": list(workload.batch.decode_contexts),
        }
        for op, contexts in sides.items():
            for size in PAGE_SIZES:
                rows.append(  # noqa: PERF401
                    {
                        "op": op,
                        "block_size": size,
                        "requests": len(contexts),
                        "blocks": sum(-(-context // size) for context in contexts),
                        "contiguous_us": of_kernel[f"{op} contiguous"] * 1e6,
                        "paged_us": of_kernel[f"{op} {size}"] * 1e6,
                        "workload": workload.name,
                    }
                )
    return rows


def table_rows(on_progress: Progress) -> list[Row]:
    """Median seconds of preparing and copying a table, every round in another random order."""
    points = [(size, n, context) for size in PAGE_SIZES for n in REQUESTS for context in CONTEXTS]
    tables = {point: DecodeSteps(*point) for point in points}
    for number in range(ROUNDS):
        on_progress(f"block tables, round {number}")
        for i in np.random.default_rng(number).permutation(len(points)):
            tables[points[i]].time_steps(number)
    return [
        {
            "op": "table",
            "block_size": size,
            "requests": n,
            "blocks": n * -(-context // size),
            "contiguous_us": None,
            "paged_us": tables[size, n, context].seconds * 1e6,
            "workload": f"{n}x{context}",
        }
        for size, n, context in points
    ]


class DecodeSteps:
    """Requests of one context that decode, and what a block table adds to their steps."""

    def __init__(self, block_size: int, num_requests: int, context: int) -> None:
        longest = context + ROUNDS * (STEPS + WARM_UP)
        per_slot = -(-longest // block_size)
        room = Room(tiles=0, splits=4 * num_requests, combines=num_requests)
        sizes = (num_requests, num_requests, room, torch.device("cuda"))
        self.paged = StepBuffers(*sizes, block_size, (num_requests + 1, per_slot))
        self.plain = StepBuffers(*sizes)
        self.cache = PagedBlocks(num_requests * per_slot, block_size, num_requests)
        self.requests = [Request(i, 0.0, context, longest) for i in range(num_requests)]
        self.preparing: list[float] = []
        self.copying: dict[str, list[float]] = {"paged": [], "plain": []}
        for request in self.requests:
            self.cache.start(request, context, 0)
        new_blocks = self.cache.allot((Chunk(r, context) for r in self.requests), ())
        self.slots = {request: self.cache.slot_of(request) for request in self.requests}
        for request in self.requests:
            request.num_computed_tokens = context
        self._enter(new_blocks)

    @property
    def seconds(self) -> float:
        """Of the host, and by which a table makes the copy of the inputs longer."""
        longer = median(self.copying["paged"]) - median(self.copying["plain"])
        return median(self.preparing) + max(longer, 0.0)

    def time_steps(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for number in range(WARM_UP + STEPS):
            preparing = self._prepare()
            copies = {"paged": self.paged, "plain": self.plain}
            for i in rng.permutation(2):
                name = list(copies)[i]
                seconds = _seconds_on_gpu(copies[name].copy)
                if number >= WARM_UP:
                    self.copying[name].append(seconds)
            if number >= WARM_UP:
                self.preparing.append(preparing)

    def _prepare(self) -> float:
        """One step's table: seconds of choosing blocks, entering them and looking up places."""
        new = sum(r.num_computed_tokens % self.cache.block_size == 0 for r in self.requests)
        taken = self.cache.take(new)
        assert taken, "there are blocks for every step"
        started = time.perf_counter()
        new_blocks = self.cache.allot((), self.requests)
        choosing = time.perf_counter() - started
        self._enter(new_blocks)
        for request in self.requests:
            request.num_computed_tokens += 1
        return choosing + self.paged.table_seconds

    def _enter(self, new_blocks: Sequence[NewBlocks]) -> None:
        lengths = [(r.num_computed_tokens + 1, self.slots[r]) for r in self.requests]
        step = Lengths((), lengths)
        self.paged.slots_of(step.slots, step.positions, new_blocks)


def _seconds_on_gpu(work: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(LEAD_CYCLES)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000
