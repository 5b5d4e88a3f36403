"""Samples of the GPU's clock and power while something runs, from nvidia-smi in the background."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL_MS = 100

Sample = tuple[float, float, float]
"""Seconds, SM clock in MHz, power in W."""


def current_gpu() -> str:
    """What NVML and nvidia-smi call the GPU that torch uses: they see those that torch may not."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


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
def gpu_samples(now: Callable[[], float]) -> Iterator[list[Sample]]:
    """A list that grows while the context is open; `now` gives the time of a sample."""
    query = ["--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    process = subprocess.Popen(
        ["nvidia-smi", *query, f"--id={current_gpu()}", f"--loop-ms={INTERVAL_MS}"],
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
