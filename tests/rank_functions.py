"""What the processes of tests/test_ranks.py do: by name, as they are started afresh."""

from __future__ import annotations

import os
import signal
import sys
import time

from podsim.errors import InputError
from podsim.ranks import Rank, Ranks


def count(rank: Rank) -> None:
    """The first one adds up what the others answer to each question."""
    if rank.number:
        while True:
            rank.links[0].send(rank.links[0].recv() * rank.number)
    rank.answer(os.getpid())
    for question in rank.questions():
        for link in rank.links:
            link.send(question)
        rank.tell("asked", question)
        rank.answer(sum(link.recv() for link in rank.links))


def fail(rank: Rank, how: str) -> None:
    """The second one fails, while the others wait for it without end."""
    rank.tell(os.getpid())
    if rank.number != 1 or how == "never":
        while True:
            time.sleep(60)
    time.sleep(0.5)
    if how == "refused":
        raise InputError("no such thing")
    if how == "failed":
        raise RuntimeError("out of paper\nand a second line")
    if how == "ended":
        sys.exit(3)
    os.kill(os.getpid(), signal.SIGKILL)


def complain(rank: Rank) -> None:
    """The second one dies, and the first one says that it is gone."""
    if rank.number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    rank.links[0].recv()


def wait_in_three_ranks() -> None:
    """A main process that waits for ranks that wait; says who they are."""
    with Ranks(fail, 3, ("never",), lambda pid: print(pid, flush=True)) as ranks:
        ranks.answer()
