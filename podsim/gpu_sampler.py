"""Samples of the GPU's clock and power while something runs, from nvidia-smi in the background."""

from __future__ import annotations

import hashlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL_MS = 100
FIRST_WITHIN = 20.0
"""Seconds in which nvidia-smi gives its first line, or is not waited for any more."""

Sample = tuple[float, float, float]
"""Seconds, SM clock in MHz, power in W."""


def current_gpu() -> str:
    """What NVML and nvidia-smi call the GPU that torch uses: they see those that torch may not."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def card() -> str:
    """Tells cards apart, and names none."""
    return hashlib.sha256(current_gpu().encode()).hexdigest()[:8]


def driver_settings() -> dict[str, object]:
    """Of the GPU that torch uses: driver, power limit and the highest clock of its SMs."""
    query = "driver_version,power.limit,clocks.max.sm"
    output = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={current_gpu()}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    names = ("driver", "power_limit", "max_sm_clock")
    return dict(zip(names, (part.strip() for part in output.split(",")), strict=True))


@contextmanager
def gpu_samples(now: Callable[[], float], steady: bool = True) -> Iterator[list[Sample]]:
    """A list that grows while the context is open; `now` gives the time of a sample.

    `steady`: the context opens when sampling is under way. While its process starts, others may
    wait for the driver.
    """
    query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    process = subprocess.Popen(
        ["nvidia-smi", *query, f"--id={current_gpu()}", f"--loop-ms={INTERVAL_MS}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    samples: list[Sample] = []
    under_way = threading.Event()
    reader = threading.Thread(
        target=_read, args=(process, now, samples, under_way.set), daemon=True
    )
    reader.start()
    try:
        if steady:
            under_way.wait(FIRST_WITHIN)
            samples.clear()
        yield samples
    finally:
        process.terminate()
        process.wait()
        reader.join()
        if process.stdout is not None:
            process.stdout.close()


def _read(
    process: subprocess.Popen[str],
    now: Callable[[], float],
    samples: list[Sample],
    under_way: Callable[[], None],
) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        try:
            clock, power = (float(part) for part in line.split(","))
            samples.append((now(), clock, power))
        except ValueError:  # "[N/A]": this card does not say
            pass
        under_way()
    under_way()  # it has ended, and gives nothing more
