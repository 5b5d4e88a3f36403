"""How fast podsim simulates: requests/s, steps/s, simulated over wall time, peak memory.

    python benchmarks/speed.py 1000 10000 100000
    python benchmarks/speed.py 10000 --replicas 16
    python benchmarks/speed.py 10000 --qps 7 --output-scale 2

Prompts of mean 1500 and outputs of mean 300 tokens (uniform), one H200 a replica serving
Llama-3-8B at about 80 % load, POD attention, all metrics on. Each size runs in its own process.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time

import podsim

QPS_PER_REPLICA = 15.0  # about 80 % of what one replica serves of this workload


def run(num_requests: int, replicas: int, output_scale: int, qps: float) -> dict[str, float]:
    trace = podsim.synthetic_trace(
        arrivals="poisson",
        qps=qps * replicas,
        num_requests=num_requests,
        prompt_tokens="uniform:1000:2000",
        output_tokens=f"uniform:{200 * output_scale}:{400 * output_scale}",
        seed=0,
    )
    deployment = podsim.Deployment(
        attention="pod", replicas=replicas, router="least_outstanding_tokens"
    )
    started = time.perf_counter()
    result = podsim.simulate(trace, deployment)
    summary = result.summary()
    wall = time.perf_counter() - started
    own = summary["podsim"]
    assert isinstance(own, dict)
    return {
        "requests/s": num_requests / wall,
        "steps/s": own["num_steps"] / wall,
        "simulated/wall": summary["duration"] / wall,  # type: ignore[operator]
        "wall s": wall,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "busy": own["busy_share"],
        "batch": own["batch_size_mean"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("num_requests", type=int, nargs="+")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--output-scale", type=int, default=1, help="multiply output lengths")
    parser.add_argument("--qps", type=float, default=QPS_PER_REPLICA, help="of a replica")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for num_requests in options.num_requests:
        with context.Pool(1) as pool:
            row = pool.apply(
                run, (num_requests, options.replicas, options.output_scale, options.qps)
            )
        figures = "  ".join(f"{name} {value:,.2f}" for name, value in row.items())
        print(f"{num_requests:>9,} requests  {figures}", flush=True)


if __name__ == "__main__":
    main()
