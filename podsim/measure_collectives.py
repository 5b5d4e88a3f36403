"""Times NCCL's all-reduce and all-gather among this machine's GPUs: rows to calibrate by.

One process drives each GPU. A collective is timed as a step runs it: captured in a CUDA graph,
where one call follows the other on the device without the host. A timing is the replay of such a
graph between two events, divided by its calls; of the GPUs, the slowest counts. An untimed call
before it brings the GPUs into step.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from podsim.collective_calibration import CollectivePoint
from podsim.collectives import ALL_REDUCE, NVLS_SETTING
from podsim.errors import InputError
from podsim.hardware import Gpu

PASSES = 3
"""Times all messages are gone through, each time in another order."""
REPEATS = 11
WARM_UP_REPLAYS = 2
MOST_CALLS, LEAST_CALLS = 48, 4
"""Calls in a graph: as many as make the launch of the graph small beside them."""
BYTES_OF_A_GRAPH = 64 * 2**20
"""About how many bytes the calls of a graph move, within those limits."""
LEAD_CYCLES = 10_000_000
"""Cycles (about 5 ms) that a GPU sleeps first, so that the host queues all repeats ahead of it."""
TIMEOUT = timedelta(minutes=5)
"""How long a process waits for another before it gives up."""
TEAR_DOWN = 20
"""Seconds that the processes may take to end once all is measured."""
START_STD = 2.0**-120
"""Each sum is as many times larger as there are GPUs: from here, all calls of a repeat together do
not leave the range of bfloat16, so that the values stay random."""
SETTINGS = (NVLS_SETTING, "NCCL_ALGO", "NCCL_PROTO", "NCCL_P2P_DISABLE")
"""NCCL's environment variables that decide how it moves the bytes."""

# Its name since torch 2.13, and the one before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

Row = dict[str, object]
Points = Mapping[int, Sequence[CollectivePoint]]
"""What to time, by the number of GPUs."""


def gpu_counts(gpu: Gpu, asked: str | None) -> list[int]:
    """Among how many GPUs to measure: as `asked` ("2,4"), or 2, 4 and 8 of those there are.

    Raises InputError for a text that says something else, or if this machine lacks the GPUs.
    """
    counts = None if asked is None else parsed_counts(asked)
    if not torch.cuda.is_available():
        raise InputError(
            f"no CUDA GPU on this machine: run `podsim profile-collectives` where several "
            f"{gpu.name} are"
        )
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    for name in names:
        if name != gpu.device_name:
            raise InputError(f"this machine has a '{name}', but '{gpu.name}' are to be measured")
    if counts is None:
        counts = [count for count in (2, 4, 8) if count <= len(names)]
    if not counts or counts[-1] > len(names):
        needed = counts[-1] if counts else 2
        raise InputError(f"this machine has {len(names)} GPU(s), but {needed} are needed")
    return counts


def parsed_counts(text: str) -> list[int]:
    """Numbers of GPUs from a comma list, ascending; InputError if one is not a number over 1."""
    try:
        counts = sorted({int(part) for part in text.split(",")})
    except ValueError:
        counts = []
    if not counts or counts[0] < 2:
        raise InputError(f"gpus is '{text}', expected numbers of at least 2, such as 2,4")
    return counts


def provenance() -> dict[str, object]:
    """What the measurements depend on."""
    query = "driver_version,power.limit,clocks.max.sm"
    output = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    driver, power_limit, sm_clock = (part.strip() for part in output.split(","))
    return {
        "device_name": torch.cuda.get_device_name(),
        "gpus_of_the_machine": torch.cuda.device_count(),
        "peer_access": torch.cuda.can_device_access_peer(0, 1),
        "driver": driver,
        "power_limit": power_limit,
        "max_sm_clock": sm_clock,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        **{name: os.environ.get(name, "unset") for name in SETTINGS},
    }


def measure(
    points: Points, on_progress: Callable[[int, int], None], backend: str = "nccl"
) -> list[Row]:
    """Every row; `on_progress` is told how many of how many are there.

    The backend "gloo" measures processes on the CPU instead: that tests all but NCCL. Processes
    inherit the environment, and with it NCCL's settings. Raises what a process raised.
    """
    total = PASSES * sum(map(len, points.values()))
    rows: list[Row] = []
    results: SimpleQueue[Row] = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "meeting").as_uri()
        processes = spawn(
            _drive,
            (points, backend, meeting, results),
            nprocs=max(points),
            join=False,
            daemon=True,
            start_method="spawn",
        )
        while len(rows) < total:
            ended = processes.join(timeout=0.1)
            while not results.empty():
                rows.append(results.get())
                on_progress(len(rows), total)
            if ended and len(rows) < total:
                raise RuntimeError(f"the processes ended after {len(rows)} of {total} rows")
        # All is measured: NCCL's taking down, which has been known to hang, cannot undo it.
        deadline = time.monotonic() + TEAR_DOWN
        for process in processes.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
    return rows


# ------------------------------------------------------------------------------ in each process


def _drive(
    rank: int, points: Points, backend: str, meeting: str, results: SimpleQueue[Row]
) -> None:
    """One process: its GPU takes part in every group that it belongs to; the first one reports."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=meeting, rank=rank, world_size=max(points), timeout=TIMEOUT
    )
    # Every process takes part in making every group, its own or not.
    groups = {count: dist.new_group(list(range(count)), timeout=TIMEOUT) for count in points}
    for count, group in groups.items():
        if rank < count:
            for row in _rows(points[count], group, device):
                if rank == 0:
                    results.put(row)
    dist.destroy_process_group()


def _rows(
    points: Sequence[CollectivePoint], group: dist.ProcessGroup, device: torch.device
) -> Iterator[Row]:
    """The rows of one group of GPUs, the same on each."""
    _check(group, device)
    most = max(point.num_bytes for point in points) // torch.bfloat16.itemsize
    source = torch.empty(most, device=device, dtype=torch.bfloat16).normal_(std=START_STD)
    target = torch.empty_like(source)
    kind = _GraphOfCalls if device.type == "cuda" else _LoopOfCalls
    timed = [kind(Message(point, group, source, target)) for point in points]
    rng = np.random.default_rng(0)  # the same order in each process
    for number in range(PASSES):
        for index in rng.permutation(len(points)):
            point, calls = points[index], timed[index]
            slowest = torch.tensor(calls.seconds(), device=device, dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
            yield {
                "op": point.op,
                "num_gpus": group.size(),
                "bytes": point.num_bytes,
                "split": point.split,
                "pass": number,
                **_timing(slowest.tolist()),
                "calls": calls.num_calls,
                "repeats": REPEATS,
            }
    for calls in timed:
        calls.release()


def _check(group: dist.ProcessGroup, device: torch.device) -> None:
    """Raise RuntimeError unless sums and gathered values are right: whole numbers are exact."""
    count, rank = group.size(), group.rank()
    ranks = torch.arange(count, device=device, dtype=torch.bfloat16)
    summed = torch.full((4096,), float(rank), device=device, dtype=torch.bfloat16)
    dist.all_reduce(summed, group=group)
    gathered = torch.empty(4096 * count, device=device, dtype=torch.bfloat16)
    mine = torch.full((4096,), float(rank), device=device, dtype=torch.bfloat16)
    all_gather(gathered, mine, group=group)
    right = bool((summed == ranks.sum()).all()) and torch.equal(
        gathered, ranks.repeat_interleave(4096)
    )
    if not right:
        raise RuntimeError(f"a collective among {count} GPUs gave a wrong result")


class Message:
    """A collective over parts of two buffers."""

    def __init__(
        self,
        point: CollectivePoint,
        group: dist.ProcessGroup,
        source: torch.Tensor,
        target: torch.Tensor,
    ) -> None:
        self.num_calls = min(MOST_CALLS, max(LEAST_CALLS, BYTES_OF_A_GRAPH // point.num_bytes))
        self._group = group
        self._adds = point.op == ALL_REDUCE
        num_values = point.num_bytes // torch.bfloat16.itemsize
        self._target = target[:num_values]
        self._source = source[: num_values if self._adds else num_values // group.size()]

    def refill(self) -> None:
        """What each repeat starts from: sums would grow without end."""
        if self._adds:
            self._target.copy_(self._source)

    def call(self) -> None:
        if self._adds:
            dist.all_reduce(self._target, group=self._group)
        else:
            all_gather(self._target, self._source, group=self._group)


class _GraphOfCalls:
    """A message's calls captured as a CUDA graph."""

    def __init__(self, message: Message) -> None:
        self.num_calls = message.num_calls
        self._message = message
        message.refill()
        message.call()  # NCCL sets up what this size needs, which cannot be captured
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # NCCL's own threads may call CUDA meanwhile: only this thread is held to the rules.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            for _ in range(message.num_calls):
                message.call()

    def seconds(self) -> list[float]:
        """Of one call, by repeat, on this GPU."""
        for _ in range(WARM_UP_REPLAYS):
            self._message.refill()
            self._graph.replay()
        torch.cuda._sleep(LEAD_CYCLES)
        marks = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._message.refill()
            self._message.call()
            start.record()
            self._graph.replay()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 / self.num_calls for start, end in marks]

    def release(self) -> None:
        """A communicator cannot be taken down while a graph holds its kernels."""
        self._graph.reset()


class _LoopOfCalls:
    """The same on the CPU, by the host's clock."""

    def __init__(self, message: Message) -> None:
        self.num_calls = message.num_calls
        self._message = message

    def seconds(self) -> list[float]:
        found = []
        for _ in range(REPEATS):
            self._message.refill()
            self._message.call()
            start = time.perf_counter()
            for _ in range(self.num_calls):
                self._message.call()
            found.append((time.perf_counter() - start) / self.num_calls)
        return found

    def release(self) -> None:
        pass


def _timing(seconds: Sequence[float]) -> Row:
    low, *_, high = quantiles(seconds, n=10)
    return {
        "time_us": median(seconds) * 1e6,
        "time_p10_us": low * 1e6,
        "time_p90_us": high * 1e6,
    }
