"""How much faster a sweep is with more processes, or on Ray: 1,000 small simulations.

    python benchmarks/sweep_speed.py --jobs 1 2
    python benchmarks/sweep_speed.py --jobs 1 2 --ray

Each is a run of `podsim sweep` from its start to its table; all tables must be the same bytes.
Run it on a quiet machine: it prints how many cores other processes took meanwhile.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PLAN = """
arrivals = "poisson"
requests = {requests}
prompt_tokens = "lognormal:1000:0.8"
output_tokens = "lognormal:150:0.8"
qps = {{from = 1, to = 25, count = 25}}
token_budget = [512, 1024, 1536, 2048]
attention = ["serial", "pod"]
seed = [0, 1, 2, 3, 4]
"""
NUM_SIMULATIONS = 25 * 4 * 2 * 5


def sweep(plan: Path, out: Path, *options: object) -> tuple[float, float, float]:
    """Seconds of one sweep, its CPU seconds, and the cores that others took meanwhile.

    Where CPU seconds grow with the processes, cores are not whole: shared, or two threads of one.
    """
    command = [sys.executable, "-m", "podsim", "sweep", plan, "--out", out, *options]
    started, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    seconds, own = time.perf_counter() - started, own_seconds() - own
    return seconds, own, (busy_seconds() - busy - own) / seconds


def busy_seconds() -> float:
    """Of all cores, since the machine started, with what a host took away."""
    columns = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _, _, irq, softirq, steal = map(int, columns)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Of the commands that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, os.cpu_count() or 1])
    parser.add_argument("--requests", type=int, default=150, help="of each simulation")
    parser.add_argument("--repeat", type=int, default=1, help="take the fastest of so many")
    parser.add_argument("--ray", action="store_true", help="also on a local Ray of the most jobs")
    options = parser.parse_args()
    runs = {f"{jobs} processes": ("--jobs", jobs) for jobs in options.jobs}
    if options.ray:
        most = max(options.jobs)
        runs[f"Ray, {most} cores"] = ("--ray", "local", "--jobs", most)
    tables, first = set(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        plan = Path(folder) / "plan.toml"
        plan.write_text(PLAN.format(requests=options.requests))
        for name, arguments in runs.items():
            outs = [Path(folder) / f"{name} {i}" for i in range(options.repeat)]
            seconds, own, others = min(sweep(plan, out, *arguments) for out in outs)
            first = first or seconds
            tables |= {(out / "sweep.csv").read_bytes() for out in outs}
            use = "" if "--ray" in arguments else f" ({own:.1f} CPU s; others {others:.2f} cores)"
            print(
                f"{name:14} {seconds:6.1f} s, {NUM_SIMULATIONS / seconds:6.1f} simulations/s, "
                f"{first / seconds:.2f} x the first{use}",
                flush=True,
            )
    if len(tables) > 1:
        sys.exit("the tables differ")
    print("all tables are the same")


if __name__ == "__main__":
    main()
