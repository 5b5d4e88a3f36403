"""Capacity searches, against closed forms, and what they say of themselves."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from podsim.capacity import Capacity, find_capacities, find_capacity, measure_loads
from podsim.capacity_search import SeedCapacity
from podsim.config import Deployment, Workload
from podsim.errors import InputError
from podsim.latency import ConstantLatency
from podsim.slo import Slo, default_slos, goodput, parse_slo, queue_grows, slo_attainment
from podsim.workload import synthetic_trace


def podsim(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podsim", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def refusal(*arguments: object) -> str:
    """The one line that a command refuses its input with."""
    run = podsim(*arguments)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1, run.stderr
    return run.stderr.removeprefix("podsim: ").rstrip("\n")


SERVICE = 0.01
"""Seconds of the only step of a request: with max_num_seqs=1, an M/D/1 queue."""


def m_d_1(num_requests: int, slo: Slo, seeds: int = 1, start: float = 40.0) -> Capacity:
    workload = Workload(
        arrivals="poisson", qps=start, prompt_tokens="10", output_tokens="1", requests=num_requests
    )
    return find_capacity(
        workload,
        Deployment(max_num_seqs=1),
        slos=[slo],
        seeds=seeds,
        latency_model=ConstantLatency(SERVICE),
    )


@pytest.mark.parametrize("utilization", [0.5, 0.75])
def test_m_d_1_capacity_of_a_mean_wait_is_the_closed_form(utilization: float) -> None:
    wait = utilization * SERVICE / (2 * (1 - utilization))
    found = m_d_1(20_000, Slo("queue", "mean", wait), seeds=2)
    expected = utilization / SERVICE
    assert abs(found.mean / expected - 1) < found.precision
    assert all(0 < s.failed_qps - s.qps <= found.precision * s.qps for s in found.seeds)
    assert found.limited_by == "queue mean"
    assert found.warnings == []


def test_m_d_1_capacity_of_a_percentile_is_the_closed_form() -> None:
    # Crommelin: P(wait <= t) = (1 - rho) * sum of (-x)^k / k! * exp(x), x = rate * (t - k service)
    def share_within(rate: float, limit: float) -> float:
        terms = (
            (-rate * (limit - k * SERVICE)) ** k
            / math.factorial(k)
            * math.exp(rate * (limit - k * SERVICE))
            for k in range(int(limit / SERVICE) + 1)
        )
        return (1 - rate * SERVICE) * sum(terms)

    limit, expected = 2.5 * SERVICE, 70.0
    percentile = 100 * share_within(expected, limit)
    found = m_d_1(20_000, Slo("queue", f"p{percentile:.4f}", limit), seeds=2)
    assert abs(found.mean / expected - 1) < found.precision


def test_a_growing_queue_bounds_the_load_where_no_latency_does() -> None:
    # One token a request: there is no gap, and any limit on TBT is met.
    found = m_d_1(4000, Slo("tbt", "p99", 1.0), seeds=2)
    assert found.limited_by == "queue grows"
    assert 0.95 / SERVICE < found.mean < 1.1 / SERVICE


def test_the_interval_is_students_t() -> None:
    seeds = tuple(SeedCapacity(i, qps, qps * 1.01, ()) for i, qps in enumerate((9.0, 10.0, 11.0)))
    found = Capacity("", Deployment(), (), 0.025, 100, seeds, ())
    assert found.mean == 10
    low, high = found.interval or (0, 0)
    assert 10 - low == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert high - 10.1 == pytest.approx(10 - low)


def test_a_capacity_that_falls_with_the_length_of_a_trial_is_warned_of() -> None:
    # Overloaded by a tenth, 100 requests wait for one second at most, and 200 for two.
    found = m_d_1(100, Slo("queue", "p99", 0.2))
    assert found.mean > 1.05 / SERVICE
    assert any("depends on the length of a trial" in warning for warning in found.warnings)


def test_slos_that_cannot_be_met_and_that_bound_nothing() -> None:
    impossible = m_d_1(50, Slo("ttft", "p99", SERVICE / 2))
    assert impossible.mean == 0
    assert impossible.seeds[0].trials[-1].alone
    assert any("not even one request at a time" in warning for warning in impossible.warnings)
    boundless = m_d_1(5, Slo("ttft", "p99", 1e6))
    assert math.isinf(boundless.seeds[0].failed_qps)
    assert any("do not bound the load" in warning for warning in boundless.warnings)


def test_a_trace_is_stretched_and_has_one_search() -> None:
    trace = synthetic_trace("poisson", 3.0, 400, 10, 1, seed=5)
    found = find_capacity(
        trace,
        Deployment(max_num_seqs=1),
        slos=[Slo("queue", "mean", SERVICE / 2)],
        seeds=4,
        start=10.0,
        latency_model=ConstantLatency(SERVICE),
    )
    assert len(found.seeds) == 1
    assert found.interval is None
    assert found.mean == pytest.approx(50, rel=0.2)
    assert found.num_requests == 400
    assert any("no more requests" in warning for warning in found.warnings)
    table = found.table()
    assert len(table) == len(found.trials)
    assert table.loc[table["passed"], "qps"].max() == found.mean


def test_processes_find_the_same() -> None:
    workload = Workload(arrivals="poisson", qps=4.0, output_tokens="20", requests=60)
    variants = {name: Deployment(attention=name) for name in ("serial", "pod")}
    slos = [Slo("ttft", "p90", 0.2)]
    alone, spread = (
        find_capacities(workload, variants, slos=slos, seeds=2, jobs=jobs) for jobs in (1, 2)
    )
    assert list(spread) == ["serial", "pod"]
    for name in variants:
        pd.testing.assert_frame_equal(alone[name].table(), spread[name].table())


def test_loads_have_their_goodput() -> None:
    workload = Workload(arrivals="poisson", qps=1.0, output_tokens="20", requests=80)
    slos = [Slo("ttft", "p99", 0.05)]
    table = measure_loads(workload, {"": Deployment()}, [5.0, 80.0], slos=slos, seeds=2)
    assert table["qps"].tolist() == [5.0, 80.0, 5.0, 80.0]
    assert (table["goodput"] <= table["request_throughput"] * (1 + 1e-9)).all()
    assert table["slo_attainment"].is_monotonic_decreasing is False
    assert table.groupby("qps")["slo_attainment"].mean().is_monotonic_decreasing


def test_searches_that_cannot_be_are_refused() -> None:
    workload = Workload(arrivals="poisson", qps=1.0)
    with pytest.raises(InputError, match="precision is 2"):
        find_capacity(workload, Deployment(), precision=2.0)
    with pytest.raises(InputError, match="seeds is 0"):
        find_capacity(workload, Deployment(), seeds=0)
    with pytest.raises(InputError, match="start is -1"):
        find_capacity(workload, Deployment(), start=-1.0)
    with pytest.raises(InputError, match="expected numbers above 0"):
        measure_loads(workload, {"": Deployment()}, [1.0, 0.0])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"arrivals": "static", "qps": None}, "'static' have no rate"),
        ({"duration": 5.0}, "duration has no meaning"),
    ],
)
def test_a_workload_without_a_rate_is_refused(change: dict[str, object], complaint: str) -> None:
    options: dict[str, object] = {"arrivals": "poisson", "qps": 1.0} | change
    with pytest.raises(InputError, match=complaint):
        find_capacity(Workload(**options), Deployment())  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------- SLOs


def request_rows(**columns: list[float]) -> pd.DataFrame:
    table = pd.DataFrame(columns)
    table["refused"] = table.get("refused", "")
    return table


def test_slos_are_written_and_read() -> None:
    slo = parse_slo("ttft:p99.9:0.25")
    assert (slo.metric, slo.statistic, slo.limit) == ("ttft", "p99.9", 0.25)
    assert parse_slo(str(slo)) == slo
    for text, complaint in {
        "ttft": "expected METRIC:STATISTIC:SECONDS",
        "ttft:p99:fast": "expected METRIC:STATISTIC:SECONDS",
        "tftt:p99:1": "unknown metric 'tftt'; did you mean 'ttft'",
        "ttft:99:1": "expected mean or p99",
        "ttft:p101:1": "expected mean or p99",
        "ttft:p99:0": "expected seconds above 0",
        "ttft:p99:nan": "expected seconds above 0",
    }.items():
        with pytest.raises(InputError, match=complaint):
            parse_slo(text)


def test_the_default_is_sarathis() -> None:
    tbt, queue = default_slos(Deployment(), ConstantLatency(0.01))
    assert (str(tbt), str(queue)) == ("tbt:p99:0.05", "queue:p50:2")
    assert default_slos(Deployment(), ConstantLatency(0.01), 25)[0].limit == 0.25


def test_attainment_counts_requests_that_meet_all_limits() -> None:
    table = request_rows(
        ttft=[0.1, 0.1, 0.9, math.nan],
        tpot=[0.01, 0.09, 0.01, math.nan],
        finish_time=[5.0, 6.0, 8.0, math.nan],
    )
    table["refused"] = ["", "", "", "too long"]
    slos = [Slo("ttft", "p50", 0.1), Slo("ttft", "p99", 0.5), Slo("tpot", "mean", 0.05)]
    assert slo_attainment(table, slos) == 0.25
    assert goodput(table, slos) == 1 / 8
    assert slo_attainment(table, [Slo("tbt", "p99", 1e-9)]) == 0.75


def test_a_queue_grows_if_it_does() -> None:
    arrivals = np.arange(400.0)
    for service, grows in ((0.9, False), (1.0, False), (1.5, True)):
        starts = np.maximum(arrivals, np.arange(400) * service)
        table = request_rows(arrival_time=list(arrivals), scheduled_time=list(starts))
        assert queue_grows(table) is grows, service
    assert not queue_grows(request_rows(arrival_time=[0.0], scheduled_time=[9.0]))


# ------------------------------------------------------------------------------ command line


def test_the_command_leaves_a_table_and_a_plot(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = podsim(
        *("capacity", "--requests", 60, "--output-tokens", 20, "--seeds", 2, "--jobs", 1),
        *("--attention", "serial,pod", "--slo", "ttft:p90:0.2", "--slo", "tbt:p99:0.1"),
        *("--qps", 30, "--out", out),
    )
    assert run.returncode == 0, run.stderr
    for word in ("Requests/s", "95% interval", "serial", "pod", "ttft:p90:0.2", "Student's t"):
        assert word in run.stdout
    names = {path.name for path in out.glob("[!.]*")}
    assert names == {"capacity.csv", "capacity.png", "compare.csv", "report.html"}
    table = pd.read_csv(out / "capacity.csv")
    assert set(table["variant"]) == {"serial", "pod"}
    assert set(table["purpose"]) == {"bracket", "bisect", "length"}
    assert f"Simulations  {len(table)}" in run.stdout
    again = podsim(
        *("capacity", "--requests", 60, "--output-tokens", 20, "--at", "5,10", "--seeds", 2),
        *("--jobs", 1, "--out", out),
    )
    assert "Goodput/s" in again.stdout
    assert len(pd.read_csv(out / "capacity.csv")) == 4


def test_bad_searches_are_one_line() -> None:
    assert "unknown metric 'tft'; did you mean 'ttft'" in refusal("capacity", "--slo", "tft:p9:1")
    assert "--at is 'x'" in refusal("capacity", "--at", "x")
    assert "every request is refused" in refusal(
        *("capacity", "--prompt-tokens", 10000, "--jobs", 1, "--requests", 5)
    )
