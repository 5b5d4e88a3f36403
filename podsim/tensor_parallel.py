"""The GPUs that compute a model together: their collectives, and how the first tells the others.

One process a GPU. The first runs the scheduler and the clock. It fills a block of memory, which all
of them share, with a step's inputs and tells the others which of its graphs comes next, before it
starts itself; so all replay the same step, whose all-reduces and all-gather keep them together.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.shared_memory import SharedMemory

import torch
import torch.distributed as dist

from podsim.errors import InputError
from podsim.llama_weights import ModelPart
from podsim.measure_collectives import SETTINGS, all_gather
from podsim.model import Model
from podsim.ranks import Rank

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for another one to join before it gives up."""
SPIN, NAP = 0.2, 1e-4
"""Seconds for which a rank waits awake for the next step, and those that it sleeps at a time then.
"""
HEADER = 16
"""int32 before the shared block: how often the first rank has told something, and what."""
GIVE_SECONDS = -1
"""In place of a step: asks for the GPU's seconds of the latest steps."""


class Group:
    """One rank of those that hold a model together."""

    def __init__(self, rank: Rank, model: Model, device: torch.device) -> None:
        self.part = ModelPart(model, rank.number, rank.size)
        self.device = device
        self._links = rank.links
        self._seconds = array("d")
        self._num_received = 0
        self._lock = threading.Lock()

    @property
    def is_first(self) -> bool:
        return self.part.rank == 0

    # ---- collectives, on the current stream

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Add up in place."""
        dist.all_reduce(tensor)

    def all_gather(self, gathered: torch.Tensor, own: torch.Tensor) -> None:
        """Every rank's [rows, columns], as [ranks * rows, columns]."""
        all_gather(gathered, own)

    # ---- from the first rank to the others

    def shared_block(self, num_ints: int) -> torch.Tensor:
        """[num_ints] int32 zeros that all ranks see: every one of them calls this, once.

        The first rank may write there as soon as it has the result of a step: all have read the
        step's inputs before their first all-reduce.
        """
        size = 4 * (HEADER + num_ints)
        if self.is_first:
            self._memory = SharedMemory(create=True, size=size)
            for link in self._links:
                link.send(self._memory.name)
            for link in self._links:
                link.recv()
            self._memory.unlink()  # nothing stays behind, whatever happens to the processes
        else:
            self._memory = SharedMemory(self._links[0].recv())
            self._links[0].send("mapped")
        buffer = self._memory.buf
        assert buffer is not None
        self._header = buffer[: 4 * HEADER].cast("i")
        whole = torch.frombuffer(buffer, dtype=torch.int32, count=HEADER + num_ints)
        if self.device.type == "cuda":
            _pin(whole)
        return whole[HEADER:]

    def send_step(self, *numbers: int) -> None:
        """Tell the others what to do with what is in the shared block. No system call is made:
        in some containers these take longer than a launch.
        """
        for i, number in enumerate(numbers, 1):
            self._header[i] = number
        self._keep_order()
        self._header[0] += 1

    def receive_step(self, count: int) -> list[int]:
        """The next numbers that were sent, `count` of them."""
        while True:
            self._wait_for_news()
            if self._header[1] != GIVE_SECONDS:
                return self._header[1 : 1 + count].tolist()
            self._links[0].send(self._seconds)
            self._seconds = array("d")

    def _wait_for_news(self) -> None:
        header, known = self._header, self._num_received
        awake_until = time.perf_counter() + SPIN
        while header[0] == known:
            if time.perf_counter() > awake_until:
                time.sleep(NAP)
        self._keep_order()
        self._num_received = known + 1
        if header[0] != self._num_received:
            raise RuntimeError(f"told {header[0]} times, but has seen {known} of them")

    def _keep_order(self) -> None:
        """What was read or written before comes before what is after, on any processor."""
        for _ in range(2):
            with self._lock:
                pass

    def took(self, gpu_seconds: float) -> None:
        """Keep what a step has taken here, until the first rank asks for it."""
        self._seconds.append(gpu_seconds)

    def least_seconds(self, own: Sequence[float]) -> array[float]:
        """Of each step since the last call, the GPU's seconds on the rank that started last.

        On the others they include the wait for that one. Called by the first rank, with its own.
        """
        self.send_step(GIVE_SECONDS)
        ranks = [own, *(link.recv() for link in self._links)]
        return array("d", (min(seconds) for seconds in zip(*ranks, strict=True)))

    def provenance(self) -> dict[str, object]:
        """What the collectives depend on."""
        return {
            "tensor_parallel_size": self.part.size,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            **{name: os.environ.get(name, "unset") for name in SETTINGS},
        }


def join_group(rank: Rank, model: Model, meeting: str, backend: str = "nccl") -> Group:
    """This process as a rank, on the GPU of its number; `meeting` is the URL of a file to meet at.

    The backend "gloo" has CPUs instead. Nothing is taken down in the end: a communicator cannot be
    while graphs hold its kernels, and the processes are ended all at once.
    """
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", rank.number)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=meeting,
        rank=rank.number,
        world_size=rank.size,
        timeout=TIMEOUT,
        device_id=device if backend == "nccl" else None,
    )
    return Group(rank, model, device)


def _pin(block: torch.Tensor) -> None:
    """Let the GPU copy from it while the host goes on."""
    error = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.nbytes, 0)
    if int(error):
        raise RuntimeError(f"cudaHostRegister of {block.nbytes} bytes failed with error {error}")


def require_gpus(count: int) -> None:
    """Raise InputError unless this machine has so many GPUs."""
    found = torch.cuda.device_count()
    if found < count:
        raise InputError(f"tensor_parallel_size is {count}, but this machine has {found} GPU(s)")
