"""Tasks spread over the machines of a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from typing import TypeVar

from podsim.errors import InputError
from podsim.workers import MAX_DEATHS, Died

Task = TypeVar("Task")
Done = TypeVar("Done")

TASKS_PER_CORE = 4
"""Submitted ahead, so that no core waits for the next one."""


def on_ray(
    function: Callable[[Task], Done], tasks: Iterable[Task], address: str, jobs: int
) -> Generator[tuple[Task, Done | Died], None, None]:
    """As `workers.in_processes`, on the cluster at an address; "local" starts one of `jobs` cores.

    Ray gives the task of a lost worker or machine to another one. InputError without ray, or if
    there is no cluster at the address.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise InputError("--ray needs ray: pip install 'podsim[ray]'") from None
    _connect(address, jobs)
    try:

        @ray.remote(max_retries=MAX_DEATHS - 1)  # type: ignore[untyped-decorator]
        def call(given: Callable[[Task], Done], task: Task) -> Done:
            return given(task)

        shared = ray.put(function)
        queue = iter(tasks)
        ahead = TASKS_PER_CORE * max(1, int(ray.cluster_resources().get("CPU", 1)))
        pending = {call.remote(shared, task): task for task in islice(queue, ahead)}
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            task = pending.pop(ready)
            for following in islice(queue, 1):
                pending[call.remote(shared, following)] = following
            try:
                yield task, ray.get(ready)
            except (
                ray.exceptions.WorkerCrashedError,
                ray.exceptions.OutOfMemoryError,
                ray.exceptions.NodeDiedError,
            ) as error:
                yield task, Died(type(error).__name__)
            except ray.exceptions.RayError as error:
                raise InputError(f"Ray: {str(error).strip().splitlines()[-1]}") from None
    finally:
        ray.shutdown()


def _connect(address: str, jobs: int) -> None:
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address == "local":
            ray.init(address="local", num_cpus=jobs, include_dashboard=False, **quiet)
        else:
            ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"no Ray cluster at '{address}': {reason}") from None
