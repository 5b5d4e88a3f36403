"""Times every call that maps memory while an engine serves (benchmarks/same_tokens.py --calls)."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from podsim.gpu_sampler import gpu_samples
from podsim.serving import Server
from podsim.workload import Trace

SAMPLINGS = {
    "steady": gpu_samples,
    "starting": partial(gpu_samples, steady=False),
    "none": lambda now: nullcontext([]),
}
"""Of the card's clock and power, in the rounds of --calls."""


class TimedDriver:
    """A driver of virtual memory that keeps how long each call took, and in which thread."""

    COLUMNS = ("thread", "api", "time", "seconds")

    def __init__(self, driver: Any) -> None:
        self._driver = driver
        self.rows: list[tuple[str, str, float, float]] = []
        for api in ("map", "set_access", "unmap"):
            setattr(self, api, self._timed(api, getattr(driver, api)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def _timed(self, api: str, call: Any) -> Any:
        def timed(*arguments: Any) -> None:
            begin = time.perf_counter()
            call(*arguments)
            end = time.perf_counter()
            own = threading.current_thread() is threading.main_thread()
            self.rows.append(("main" if own else "background", api, begin, end - begin))

        return timed


def timed_calls(servers: Mapping[str, Server], trace: Trace, rounds: int) -> pd.DataFrame:
    """Serve again where memory is mapped: every call, and the seconds since its round began.

    Rows with "step" in the place of a call are what each step waited for mapping.
    """
    tables = []
    mapping = {kv: server for kv, server in servers.items() if server.virtual_kv is not None}
    for number, (kv, server), sampling in product(range(rounds), mapping.items(), SAMPLINGS):
        memory = server.virtual_kv.memory
        memory.driver, driver = TimedDriver(memory.driver), memory.driver
        try:
            served = server.serve(trace, lambda shape: 0.0, sampling=SAMPLINGS[sampling])
            rows = memory.driver.rows
        finally:
            memory.driver = driver
        steps = served.recording
        starts = np.asarray(steps.log.steps["start"])
        waits = [
            ("main", "step", start, seconds)
            for start, seconds in zip(starts, steps.mapping_seconds, strict=True)
        ]
        calls = pd.DataFrame(rows, columns=TimedDriver.COLUMNS)
        calls["time"] -= calls["time"].min() - starts[0]
        both = pd.concat([calls, pd.DataFrame(waits, columns=TimedDriver.COLUMNS)])
        tables.append(both.assign(kv=kv, sampling=sampling, round=number))
    return pd.concat(tables, ignore_index=True)


def calls_summary(calls: pd.DataFrame) -> pd.DataFrame:
    """Of each call under each sampling: how many a round, microseconds of one, and ms in all."""
    by = calls.groupby(["kv", "sampling", "thread", "api"], sort=False)
    seconds, rounds = by["seconds"], by["round"].nunique()
    tenths = seconds.quantile([0.1, 0.5, 0.9]).unstack() * 1e6
    return pd.DataFrame(
        {
            "calls": seconds.size() / rounds,
            "mean us": seconds.mean() * 1e6,
            "P10": tenths[0.1],
            "P50": tenths[0.5],
            "P90": tenths[0.9],
            "most": seconds.max() * 1e6,
            "ms a round": seconds.sum() / rounds * 1e3,
        }
    )
