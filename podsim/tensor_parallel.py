"""The GPUs that compute a model together: their collectives, and how the first tells the others.

One process a GPU. The first runs the scheduler and the clock. It sends the others which of its
graphs comes next and the block of inputs that this graph reads, before it starts itself; so all of
them replay the same step, whose all-reduces and all-gather keep them together.
"""

from __future__ import annotations

import os
import select
import time
from array import array
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from podsim.errors import InputError
from podsim.llama_weights import ModelPart
from podsim.measure_collectives import SETTINGS, all_gather
from podsim.model import Model
from podsim.ranks import Rank

TIMEOUT = timedelta(minutes=5)
"""How long a rank waits for another one to join before it gives up."""
SPIN = 0.05
"""Seconds for which a rank waits awake for the next step: to be woken takes longer."""
SECONDS = b"seconds"
"""Asks for the GPU's seconds of the latest steps; anything else is a step."""


class Group:
    """One rank of those that hold a model together."""

    def __init__(self, rank: Rank, model: Model, device: torch.device) -> None:
        self.part = ModelPart(model, rank.number, rank.size)
        self.device = device
        self._links = rank.links
        self._seconds = array("d")
        self._next_step = select.poll()
        if not self.is_first:
            self._next_step.register(self._links[0].fileno(), select.POLLIN)

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

    def send_step(self, which: bytes, inputs: memoryview) -> None:
        for link in self._links:
            link.send_bytes(which)
            link.send_bytes(inputs)

    def receive_step(self, inputs: memoryview) -> bytes | None:
        """What was sent next; its inputs are in `inputs` then. None if nothing comes any more."""
        link = self._links[0]
        try:
            while (which := self._received()) == SECONDS:
                link.send_bytes(self._seconds)
                self._seconds = array("d")
            link.recv_bytes_into(inputs)
        except (EOFError, ConnectionResetError):
            return None
        return which

    def _received(self) -> bytes:
        awake_until = time.perf_counter() + SPIN
        while not self._next_step.poll(0) and time.perf_counter() < awake_until:
            pass
        return self._links[0].recv_bytes()

    def took(self, gpu_seconds: float) -> None:
        """Keep what a step has taken here, until the first rank asks for it."""
        self._seconds.append(gpu_seconds)

    def least_seconds(self, own: Sequence[float]) -> array[float]:
        """Of each step since the last call, the GPU's seconds on the rank that started last.

        On the others they include the wait for that one. Called by the first rank, with its own.
        """
        for link in self._links:
            link.send_bytes(SECONDS)
        ranks = [array("d", own)]
        for link in self._links:
            ranks.append(array("d"))
            ranks[-1].frombytes(link.recv_bytes())
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


def require_gpus(count: int) -> None:
    """Raise InputError unless this machine has so many GPUs."""
    found = torch.cuda.device_count()
    if found < count:
        raise InputError(f"tensor_parallel_size is {count}, but this machine has {found} GPU(s)")
