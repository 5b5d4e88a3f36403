"""Record what an engine does on an H200 under many loads: the runs that docs/accuracy.md compares.

    python benchmarks/record_runs.py --out validation/h200 [--only chat-serial chat-pod-1024 ...]

Each run serves one workload at one load under one deployment with real forward passes, and leaves a
folder as `podsim validate` does. A run whose folder is there is not made again. The loads are
shares of the requests/s that the workload reaches offline, about.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import podsim
from podsim.model import model_named
from podsim.report import result_folder
from podsim.simulation import latency_model_for
from podsim.validation import ENGINE_FILE, Recorded


@dataclass(frozen=True)
class Workload:
    prompt_tokens: str
    output_tokens: str
    capacity: float
    """Requests/s."""
    model: str = "llama-3-8b"
    max_num_seqs: int = 64
    max_model_len: int = 8192


WORKLOADS = {
    "chat": Workload("lognormal:250:1.0", "lognormal:180:0.7", 32.0, "llama-3-8b", 128, 4096),
    "code": Workload("lognormal:1500:0.8", "lognormal:20:0.8", 21.0),
    "summary": Workload("uniform:8000:16000", "lognormal:250:0.5", 2.1, "llama-3.1-8b", 40, 18000),
}
NUM_REQUESTS = 300


@dataclass(frozen=True)
class Setup:
    """What one set-up of the engine serves."""

    workload: str
    attention: str
    token_budget: int
    loads: tuple[float, ...]

    @property
    def name(self) -> str:
        return f"{self.workload}-{self.attention}-{self.token_budget}"


ALL_LOADS = (0.3, 0.5, 0.7, 0.85, 0.95, 1.2)
SETUPS = (
    Setup("chat", "serial", 512, ALL_LOADS),
    Setup("chat", "pod", 512, ALL_LOADS),
    Setup("code", "serial", 1024, ALL_LOADS),
    Setup("code", "pod", 1024, ALL_LOADS),
    Setup("summary", "serial", 1024, (0.7, 0.85, 1.2)),
    Setup("summary", "pod", 1024, (0.7, 0.85, 1.2)),
    *(Setup("chat", "pod", budget, (0.85,)) for budget in (256, 1024, 2048)),
    *(Setup("chat", strategy, 512, (0.85,)) for strategy in ("streams", "unified")),
)


def record(setup: Setup, out: Path) -> Iterator[str]:
    """Make the runs of a set-up that are not there yet; a line on each."""
    from podsim.serving import Server

    workload = WORKLOADS[setup.workload]
    missing = [load for load in setup.loads if not (out / f"{setup.name}-{load:.2f}").exists()]
    if not missing:
        return
    deployment = podsim.Deployment(
        model=workload.model,
        attention=setup.attention,
        token_budget=setup.token_budget,
        max_num_seqs=workload.max_num_seqs,
        max_model_len=workload.max_model_len,
    )
    step_time = latency_model_for(deployment, model_named(deployment.model)).step_time
    server = Server(deployment, workload.max_model_len, _on_progress)
    yield f"{setup.name}: {server.host_time.fixed * 1e6:.0f} us of host time a step"
    for load in missing:
        trace = podsim.synthetic_trace(
            arrivals="poisson",
            qps=load * workload.capacity,
            num_requests=NUM_REQUESTS,
            prompt_tokens=workload.prompt_tokens,
            output_tokens=workload.output_tokens,
            seed=0,
        )
        served = server.serve(trace, step_time)
        name = f"{setup.name}-{load:.2f}"
        options = {"workload": setup.workload, "load": load}
        recorded = Recorded.of(
            served.recording, deployment, served.engine(options), name, served.gpu_samples
        )
        with result_folder(out / name, made_by=ENGINE_FILE) as folder:
            recorded.save(folder)
        yield f"{name}: {len(recorded.steps)} steps"


def _on_progress(what: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"          {what}: {done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("validation/h200"))
    parser.add_argument("--only", nargs="*", help="names of set-ups, or how they begin")
    arguments = parser.parse_args()
    started = time.monotonic()
    for setup in SETUPS:
        if arguments.only and not any(setup.name.startswith(name) for name in arguments.only):
            continue
        for line in record(setup, arguments.out):
            print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
