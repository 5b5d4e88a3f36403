"""Record what an engine does on an H200: the runs that docs/accuracy.md compares.

    python benchmarks/record_runs.py --dry-run
    podsim profile --gpu h200 --model llama-3-8b --out validation/h200/CARD/profile
    python benchmarks/record_runs.py --out validation/h200/CARD --only chat code [--within 540]

Runs are compared with the profile in the folder beside them, which is to be of the same card, or,
where there is none, with the shipped one.

Each run serves one workload at one load under one deployment with real forward passes, and leaves
a folder as `podsim validate` does, as soon as it ends. A run whose folder is there is not made
again. Loads are shares of the requests/s that a run's own requests reach offline, simulated with
serial attention: every strategy is given the same arrivals. `--only` names groups, or how set-ups'
names begin, or single runs, and their order; `--within` leaves out what would not end in so many
seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import podsim
from podsim.model import model_named
from podsim.report import result_folder
from podsim.simulation import latency_model_for
from podsim.validation import ENGINE_FILE, Recorded
from podsim.workload import Trace


@dataclass(frozen=True)
class Workload:
    prompt_tokens: str
    output_tokens: str
    token_budget: int
    """Of the runs that its capacity is simulated from."""
    max_num_seqs: int
    max_model_len: int
    num_requests: int
    """Of a run: as many as take a minute or so, so that percentiles are more than chance."""
    model: str = "llama-3-8b"


WORKLOADS = {
    "chat": Workload("lognormal:250:1.0", "lognormal:180:0.7", 512, 128, 4096, 600),
    "code": Workload("lognormal:1500:0.8", "lognormal:20:0.8", 1024, 64, 8192, 600),
    "summary": Workload(
        "uniform:8000:16000", "lognormal:250:0.5", 1024, 40, 18000, 300, "llama-3.1-8b"
    ),
}
CAPACITY_REQUESTS = 1000

OFFLINE_TOKENS = 16384
"""Prompt and output of an offline request together, and how many requests there are at each ratio
of prompt to output tokens (P:D): as many as take half a minute to a minute."""
OFFLINE_REQUESTS = {8: 32, 17: 48, 64: 48}

FEW_BLOCKS = 2000
"""Of KV cache, so that requests are preempted under `chat` at 0.85 of the capacity."""

WARM_UP = 20.0
"""Seconds that an engine serves before it is recorded."""
START_SECONDS = 35.0 + WARM_UP
"""An engine's own time before its first run, about: weights, graphs, the host's time, warm-up."""
HOST_SECONDS = 7.0
"""In which the host's time is measured before each run, about."""
HOST = {
    "host_overhead": 1.9e-4,
    "host_overhead_per_request": 1.3e-6,
    "host_overhead_with_prefill": 1.3e-4,
    "graph_padding": True,
}
"""About what an engine measures: for the plan alone."""


@dataclass(frozen=True)
class Run:
    """A trace that an engine is to serve."""

    name: str
    load: float | None
    """Share of the capacity; None where all requests are there at the start."""
    trace: Trace

    @property
    def qps(self) -> float | None:
        return None if self.load is None else self.trace.qps


@dataclass(frozen=True)
class Setup:
    """What one set-up of the engine serves, the most wanted first."""

    group: str
    workload: str
    """Of WORKLOADS, or "offline"."""
    attention: str
    token_budget: int
    loads: tuple[float, ...] = ()
    """Offline: none; every ratio of OFFLINE_REQUESTS."""
    num_blocks: int | None = None
    """Of KV cache; None: all that the memory holds."""

    @property
    def name(self) -> str:
        name = f"{self.workload}-{self.attention}-{self.token_budget}"
        return name if self.num_blocks is None else f"{self.group}-{name}"

    @property
    def run_names(self) -> list[str]:
        ratios = OFFLINE_REQUESTS if self.workload == "offline" else ()
        names = [*(f"pd{ratio}" for ratio in ratios), *(f"{load:.2f}" for load in self.loads)]
        return [f"{self.name}-{name}" for name in names]

    def deployment(self) -> podsim.Deployment:
        if self.workload == "offline":
            served = ("llama-3.1-8b", max(OFFLINE_REQUESTS.values()), OFFLINE_TOKENS)
        else:
            workload = WORKLOADS[self.workload]
            served = (workload.model, workload.max_num_seqs, workload.max_model_len)
        model, max_num_seqs, max_model_len = served
        return podsim.Deployment(
            model=model,
            attention=self.attention,
            token_budget=self.token_budget,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            num_blocks=self.num_blocks,
        )

    def runs(self) -> Iterator[Run]:
        if self.workload == "offline":
            for ratio, num_requests in OFFLINE_REQUESTS.items():
                yield Run(f"{self.name}-pd{ratio}", None, offline(ratio, num_requests))
        for load in self.loads:
            trace = drawn(self.workload, 1.0, WORKLOADS[self.workload].num_requests)
            most = capacity(self.workload, lengths_of(trace))
            yield Run(f"{self.name}-{load:.2f}", load, trace.at_rate(load * most))


LOADS = (0.85, 0.5, 1.2, 0.7, 0.95, 0.3)
BOTH = ("serial", "pod")
SETUPS = (
    *(Setup("chat", "chat", attention, 512, LOADS) for attention in BOTH),
    *(Setup("code", "code", attention, 1024, LOADS) for attention in BOTH),
    *(Setup("summary", "summary", attention, 1024, LOADS) for attention in BOTH),
    *(
        Setup("budgets", "chat", attention, budget, (0.85,))
        for budget in (256, 1024, 2048)
        for attention in BOTH
    ),
    *(
        Setup("strategies", "chat", attention, 512, (0.85, 0.5))
        for attention in ("streams", "unified")
    ),
    *(Setup("memory", "chat", attention, 512, (0.85,), FEW_BLOCKS) for attention in BOTH),
    *(Setup("offline", "offline", attention, 1024) for attention in (*BOTH, "streams", "unified")),
)


# ------------------------------------------------------------------------------- what is served


def drawn(workload: str, qps: float | None, num_requests: int) -> Trace:
    """Requests of a workload; without a rate all are there at the start."""
    lengths = WORKLOADS[workload]
    return podsim.synthetic_trace(
        arrivals="static" if qps is None else "poisson",
        qps=qps,
        num_requests=num_requests,
        prompt_tokens=lengths.prompt_tokens,
        output_tokens=lengths.output_tokens,
        seed=0,
    )


def offline(ratio: int, num_requests: int) -> Trace:
    """Equal requests that are all there at the start."""
    outputs = round(OFFLINE_TOKENS / (ratio + 1))
    return Trace.of(*[(0.0, OFFLINE_TOKENS - outputs, outputs)] * num_requests, name="offline")


def warm_up_trace(setup: Setup) -> Trace:
    """A few seconds of what a set-up serves."""
    return offline(17, 4) if setup.workload == "offline" else drawn(setup.workload, None, 100)


Lengths = tuple[tuple[int, int], ...]
"""Prompt and output tokens of requests."""


def lengths_of(trace: Trace) -> Lengths:
    """In order."""
    return tuple(
        zip(trace.num_prompt_tokens.tolist(), trace.num_output_tokens.tolist(), strict=True)
    )


@cache
def capacity(workload: str, lengths: Lengths) -> float:
    """Requests/s of these requests, offline, simulated with serial attention and the profile that
    is shipped: served several times over, so that their end, of small batches, counts little.
    """
    setup = Setup("", workload, "serial", WORKLOADS[workload].token_budget)
    served = lengths * -(-CAPACITY_REQUESTS // len(lengths))
    trace = Trace.of(*[(0.0, *length) for length in served], name="offline")
    return len(served) / seconds(setup, trace)


def seconds(setup: Setup, trace: Trace) -> float:
    """Until the last token, simulated."""
    result = podsim.simulate(trace, replace(setup.deployment(), **HOST))
    return float(result.requests["finish_time"].max())


# ------------------------------------------------------------------------------------ the plan


def chosen(only: Sequence[str] | None) -> list[Setup]:
    """The set-ups of groups, or whose names begin so, or of single runs, in the order asked for."""
    if not only:
        return list(SETUPS)
    found = []
    for name in only:
        mine = [setup for setup in SETUPS if setup.group == name]
        mine = mine or [setup for setup in SETUPS if setup.name.startswith(name)]
        mine = mine or [
            replace(setup, loads=(load,))
            for setup in SETUPS
            for load in setup.loads
            if name == f"{setup.name}-{load:.2f}"
        ]
        if not mine:
            groups = ", ".join(dict.fromkeys(setup.group for setup in SETUPS))
            raise SystemExit(f"--only: no group, set-up or run '{name}'; groups: {groups}")
        found += [setup for setup in mine if setup not in found]
    return found


def by_engine(setups: Sequence[Setup]) -> list[list[Setup]]:
    """Those that one engine can serve one after another: only the token budget differs."""
    engines: dict[tuple[object, ...], list[Setup]] = {}
    for setup in setups:
        engine = setup.workload, setup.attention, setup.num_blocks
        engines.setdefault(engine, []).append(setup)
    return list(engines.values())


def show_plan(setups: Sequence[Setup], out: Path, within: float) -> None:
    """Print every run that is missing, how long it takes, and what has no time."""
    spent = 0.0
    for served in by_engine(setups):
        expected = missing_runs(served, out)
        if not fits(expected, within - spent - START_SECONDS):
            continue
        first = served[0]
        print(f"{first.name}  ({START_SECONDS:.0f} s to start)")
        spent += START_SECONDS
        for _, run, each in expected:
            rate = "all at once" if run.qps is None else f"{run.qps:.2f} req/s"
            left_out = "" if spent + each <= within else "  no time left"
            spent += 0.0 if left_out else each
            requests = f"{len(run.trace):5} requests  {rate:>12}"
            print(f"  {run.name:30}{requests}{each:7.0f} s{left_out}")
    print(f"all: {spent:.0f} s")


def missing_runs(setups: Sequence[Setup], out: Path) -> list[tuple[Setup, Run, float]]:
    """The runs that are not there yet, of no card, and the seconds that each takes, about."""
    there = {path.parent.name for path in out.rglob(ENGINE_FILE)}
    return [
        (setup, run, HOST_SECONDS + seconds(setup, run.trace))
        for setup in setups
        for run in setup.runs()
        if run.name not in there
    ]


def fits(expected: Sequence[tuple[Setup, Run, float]], time_left: float) -> bool:
    return any(each <= time_left for _, _, each in expected)


# -------------------------------------------------------------------------------- the recording


def record(setups: Sequence[Setup], out: Path, deadline: float) -> Iterator[str]:
    """Make the runs of one engine that are not there yet and end in time; a line on each."""
    from podsim.serving import Server

    expected = missing_runs(setups, out)
    if not fits(expected, deadline - time.monotonic() - START_SECONDS):
        yield f"{setups[0].name}: recorded, or no time left for {len(expected)} runs"
        return
    largest = max(setups, key=lambda setup: setup.token_budget).deployment()
    step_time = latency_model_for(largest, model_named(largest.model)).step_time
    server = Server(largest, largest.max_model_len, _on_progress)
    warm_at = time.monotonic() + WARM_UP
    while time.monotonic() < warm_at:
        server.serve(warm_up_trace(setups[0]), step_time)
    for setup, run, each in expected:
        if time.monotonic() + each > deadline:
            yield f"{run.name}: no time left"
            continue
        server.set_token_budget(setup.token_budget)
        # Before every run: the same machine takes a third more or less some minutes later.
        server.host_time = host = server.measure_host_time(_on_progress)
        yield (
            f"{run.name}: host {host.fixed * 1e6:.0f} us a step, "
            f"{host.per_request * 1e6:.1f} us a request, "
            f"{host.with_prefill * 1e6:.0f} us with prefill"
        )
        served = server.serve(run.trace, step_time)
        options = {
            "group": setup.group,
            "workload": setup.workload,
            "load": run.load,
            "qps": run.qps,
        }
        recorded = Recorded.of(
            served.recording,
            server.deployment,
            served.engine(options),
            run.name,
            served.gpu_samples,
        )
        with result_folder(out / run.name) as folder:
            recorded.save(folder)
        yield f"{run.name}: {len(recorded.steps)} steps"


def _on_progress(what: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"          {what}: {done} of {total}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("validation/h200"))
    parser.add_argument("--only", nargs="*", help="groups, how names of set-ups begin, or runs")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds for all")
    parser.add_argument("--dry-run", action="store_true", help="print the plan; needs no GPU")
    arguments = parser.parse_args()
    started = time.monotonic()
    setups = chosen(arguments.only)
    if arguments.dry_run:
        show_plan(setups, arguments.out, arguments.within)
        return
    for served in by_engine(setups):
        for line in record(served, arguments.out, started + arguments.within):
            print(f"{time.monotonic() - started:6.0f} s  {line}", flush=True)


if __name__ == "__main__":
    main()
