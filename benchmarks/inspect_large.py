"""Inspects a synthetic Azure-format file of 5 million rows; reports seconds and peak memory.

Run: python benchmarks/inspect_large.py [--rows N]. Fails above 60 s or 500 MiB for 5 million rows.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROWS = 5_000_000
MAX_SECONDS = 60.0
MAX_MIB = 500.0
CHUNK = 100_000

INSPECT = (
    "import sys\n"
    "from podsim.trace_command import trace_app\n"
    "trace_app(['inspect', sys.argv[1], '--json'])\n"
)


def write_azure(path: Path, rows: int) -> None:
    """A file such as the Azure trace of 2024: microseconds, UTC offset, some without fraction."""
    rng = np.random.default_rng(2024)
    start = np.datetime64("2024-05-10T00:00:00", "us")
    with path.open("w", encoding="ascii", newline="") as file:
        file.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
        for first in range(0, rows, CHUNK):
            count = min(CHUNK, rows - first)
            times = np.cumsum(rng.exponential(1e6 / 27.8, count)).astype(np.int64)
            dates = (start + times.astype("timedelta64[us]")).astype(str).tolist()
            start += np.timedelta64(int(times[-1]), "us")
            prompts = rng.integers(1, 7437, count).tolist()
            outputs = rng.integers(1, 1899, count).tolist()
            file.writelines(
                f"{date.replace('T', ' ').removesuffix('.000000')}+00:00,{prompt},{output}\n"
                for date, prompt, output in zip(dates, prompts, outputs, strict=True)
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of inspecting a large trace.")
    parser.add_argument("--rows", type=int, default=ROWS, help="rows of the file")
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "azure.csv"
        write_azure(path, rows)
        size = path.stat().st_size
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", INSPECT, str(path)], check=True, stdout=subprocess.DEVNULL
        )
        seconds = time.perf_counter() - started
    mib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{rows} rows, {size / 1e6:.0f} MB: {seconds:.1f} s, {mib:.0f} MiB")
    if rows <= ROWS and (seconds > MAX_SECONDS or mib > MAX_MIB):
        sys.exit(f"expected at most {MAX_SECONDS:g} s and {MAX_MIB:g} MiB")


if __name__ == "__main__":
    main()
