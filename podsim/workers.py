"""Tasks spread over the cores of this machine, by processes that are started afresh (spawned)."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from podsim.errors import InputError

Task = TypeVar("Task")
Done = TypeVar("Done")

MAX_DEATHS = 3
WORKER_DIED = "worker died"
"""How the text of `Died` begins."""


@dataclass(frozen=True, slots=True)
class Died:
    """In place of a result: every process that was given the task died of it."""

    reason: str

    def __str__(self) -> str:
        return f"{WORKER_DIED}, {MAX_DEATHS} times: {self.reason}"


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Task], Done], tasks: Iterable[Task], jobs: int
) -> Generator[tuple[Task, Done | Died], None, None]:
    """Each task with what the function gives for it, in the order in which they are finished.

    With one job, in this process. A process that dies is replaced and its task tried again, three
    times in all. Processes end with this one, however it ends. What the function raises is raised.
    """
    if jobs < 1:
        raise InputError(f"jobs is {jobs}, expected at least 1")
    if jobs == 1:
        for task in tasks:
            yield task, function(task)
        return
    pool: _Pool[Task, Done] = _Pool(function, iter(tasks), jobs)
    try:
        yield from pool.results()
    finally:
        pool.close()


@dataclass(slots=True, eq=False)
class _Assigned(Generic[Task]):
    """A task, and how many processes it has cost."""

    task: Task
    deaths: int = 0


class _Pool(Generic[Task, Done]):
    """Workers, each with a pipe of its own, so that it is known who died of what."""

    def __init__(self, function: Callable[[Task], Done], tasks: Iterator[Task], jobs: int) -> None:
        self.function = function
        self.tasks = tasks
        self.jobs = jobs
        self.workers: dict[Connection, _Worker[Task]] = {}

    def results(self) -> Iterator[tuple[Task, Done | Died]]:
        for task in self.tasks:
            self._start(_Assigned(task))
            if len(self.workers) == self.jobs:
                break
        while self.workers:
            for pipe in wait(list(self.workers)):
                assert isinstance(pipe, Connection)
                yield from self._answer(pipe)

    def _start(self, assigned: _Assigned[Task]) -> None:
        worker = _Worker(self.function, assigned)
        self.workers[worker.pipe] = worker

    def _answer(self, pipe: Connection) -> Iterator[tuple[Task, Done | Died]]:
        worker = self.workers[pipe]
        kind, value = worker.answer()
        if kind == "died":
            yield from self._died(worker)
            return
        if kind == "raised":
            raise value
        if kind == "ready":
            worker.is_ready = True
            return
        done = worker.assigned.task
        self._next(worker)  # before the result is dealt with, so that the worker need not wait
        yield done, value

    def _next(self, worker: _Worker[Task]) -> None:
        for task in self.tasks:
            worker.give(_Assigned(task))
            return
        del self.workers[worker.pipe]
        worker.end()

    def _died(self, worker: _Worker[Task]) -> Iterator[tuple[Task, Done | Died]]:
        del self.workers[worker.pipe]
        code = worker.end()
        if not worker.is_ready and (code or 0) >= 0:  # not by a signal
            raise InputError(
                f"worker processes cannot start (exit code {code}): a script that uses several "
                "jobs must keep its calls under `if __name__ == '__main__':`"
            )
        assigned = worker.assigned
        assigned.deaths += 1
        if assigned.deaths < MAX_DEATHS:
            self._start(assigned)
            return
        for task in self.tasks:
            self._start(_Assigned(task))
            break
        yield assigned.task, Died(f"exit code {code}")

    def close(self) -> None:
        for worker in self.workers.values():
            worker.process.terminate()
        for worker in self.workers.values():
            worker.end()


class _Worker(Generic[Task]):
    """A process and this end of its pipe."""

    def __init__(self, function: Callable[[Task], object], assigned: _Assigned[Task]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()
        self.is_ready = False
        self.give(assigned)

    def give(self, assigned: _Assigned[Task]) -> None:
        self.assigned = assigned
        with suppress(BrokenPipeError):  # it has died, which the next read of the pipe shows
            self.pipe.send(assigned.task)

    def answer(self) -> tuple[str, Any]:
        """What it sent, or that it died."""
        try:
            kind, value = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return "died", None
        return kind, value

    def end(self) -> int | None:
        self.pipe.close()
        self.process.join()
        return self.process.exitcode


def _work(pipe: Connection, function: Callable[[Task], object]) -> None:
    """Life of a worker: ends when the pipe does, that is at the latest with the main process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process hears it and ends us
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(("ready", None))
        while True:
            task = pipe.recv()
            answer: tuple[str, object]
            try:
                answer = ("done", function(task))
            except Exception as error:
                answer = ("raised", error)
            pipe.send(answer)
