"""Samples of the GPU's clock and power while something runs, from nvidia-smi in the background."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL_MS = 100

Sample = tuple[float, float, float]
"""Seconds, SM clock in MHz, power in W."""


@contextmanager
def gpu_samples(now: Callable[[], float]) -> Iterator[list[Sample]]:
    """A list that grows while the context is open; `now` gives the time of a sample."""
    query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "--id=0"]
    process = subprocess.Popen(
        ["nvidia-smi", *query, f"--loop-ms={INTERVAL_MS}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    samples: list[Sample] = []
    reader = threading.Thread(target=_read, args=(process, now, samples), daemon=True)
    reader.start()
    try:
        yield samples
    finally:
        process.terminate()
        process.wait()
        reader.join()


def _read(process: subprocess.Popen[str], now: Callable[[], float], samples: list[Sample]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            clock, power = (float(part) for part in line.split(","))
        except ValueError:  # "[N/A]": this card does not say
            continue
        samples.append((now(), clock, power))
