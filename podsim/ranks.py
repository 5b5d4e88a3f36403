"""Processes that work together, one a rank, with a main process that works on none of it.

The main process only waits: what fails in one rank, or a rank that dies, ends all of them at once
and is raised there, even while the others wait for it in a collective. They are killed, as whoever
waits for a GPU that never answers hears nothing else, and end with the main process, however that
ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from podsim.errors import InputError

GRACE = 0.5
"""Seconds in which a rank is found to have died of which another one complains."""


@dataclass(frozen=True, slots=True)
class Rank:
    """One of the processes, as it sees itself."""

    number: int
    size: int
    links: Sequence[Connection]
    """Of the first, to each other one in their order; of another, to the first."""
    main: Connection

    def questions(self) -> Iterator[Any]:
        """What the main process asks, until it asks no more."""
        with suppress(EOFError):
            while True:
                yield self.main.recv()

    def answer(self, value: object) -> None:
        self.main.send(("answer", value))

    def tell(self, *progress: object) -> None:
        """Tell the main process how far it is."""
        self.main.send(("progress", progress))


class Ranks:
    """Runs `function(rank, *arguments)` in `size` processes that are started afresh (spawned).

    The first rank answers what is asked. `on_progress` is given what ranks `tell`. A context
    manager: all processes are gone when it is left.
    """

    def __init__(
        self,
        function: Callable[..., None],
        size: int,
        arguments: Sequence[object] = (),
        on_progress: Callable[..., None] = lambda *progress: None,
    ) -> None:
        self.size = size
        self._on_progress = on_progress
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")
        links = [context.Pipe() for _ in range(1, size)]
        ends = [[first for first, _ in links], *([other] for _, other in links)]
        resource_tracker.ensure_running()  # its start would let Ctrl-C through again
        # The children inherit that Ctrl-C is not for them: the main process ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for number in range(size):
                ours, theirs = context.Pipe()
                rank = Rank(number, size, ends[number], theirs)
                process = context.Process(
                    target=_live, args=(rank, function, arguments), daemon=True
                )
                process.start()
                self._pipes.append(ours)
                self._processes.append(process)
                for connection in (theirs, *ends[number]):
                    connection.close()
        except BaseException:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def ask(self, question: object) -> Any:
        """What the first rank answers. InputError if a rank fails or dies meanwhile."""
        with suppress(BrokenPipeError):  # it has died, which is found below
            self._pipes[0].send(question)
        return self.answer()

    def answer(self) -> Any:
        """Wait for an answer of the first rank: also for one that it gives unasked."""
        while True:
            for pipe in wait(self._pipes):
                assert isinstance(pipe, Connection)
                number = self._pipes.index(pipe)
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    kind, value = "failed", "is gone"
                if kind == "answer":
                    return value
                if kind == "progress":
                    self._on_progress(*value)
                elif kind == "refused":
                    raise InputError(value)
                else:
                    raise self._death() or InputError(f"{self._name(number)} {value}")

    def _death(self) -> InputError | None:
        """A rank that has died: what others say then is only that it is gone."""
        dying = wait([process.sentinel for process in self._processes], timeout=GRACE)
        for number, process in enumerate(self._processes):
            if process.sentinel in dying:
                process.join(GRACE)
                code = process.exitcode or 0
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                return InputError(f"{self._name(number)} died ({how})")
        return None

    def _name(self, number: int) -> str:
        return f"rank {number} of {self.size}"

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------ in each process


def _live(rank: Rank, function: Callable[..., None], arguments: Sequence[object]) -> None:
    threading.Thread(target=_end_with_the_main_process, daemon=True).start()
    try:
        function(rank, *arguments)
        return
    except InputError as error:
        rank.main.send(("refused", str(error)))
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        rank.main.send(("failed", f"failed: {type(error).__name__}: {first_line}"))
    # Not gone before the others are: they would complain of that.
    threading.Event().wait()


def _end_with_the_main_process() -> None:
    main = multiprocessing.parent_process()
    assert main is not None
    wait([main.sentinel])
    os._exit(1)
