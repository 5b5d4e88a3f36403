"""report.html: its figures hold the simulated numbers, it needs no network, it renders."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import podsim
from podsim.config import Workload
from podsim.metrics import STEP_KINDS, step_kinds
from podsim.report import save, save_comparison
from podsim.report_charts import CDF_PERCENTILES, NUM_BINS, time_means
from podsim.simulation import Result, simulate_with_error_bars
from podsim.step_costs import kernel_table, kind_table
from podsim.terminal import comparison, format_seconds

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WORKLOAD = Workload(trace="azure-conv-like", requests=500, qps=9)


def simulated(attention: str, **options: int) -> Result:
    trace = podsim.load_trace("azure-conv-like").head(500).at_rate(9)
    return podsim.simulate(trace, podsim.Deployment(attention=attention, replicas=2, **options))


@pytest.fixture(scope="module")
def result() -> Result:
    return simulated("pod", num_blocks=600)  # small enough for preemptions


@pytest.fixture(scope="module")
def page(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(result, WORKLOAD, folder)
    return folder / "report.html"


@pytest.fixture(scope="module")
def variants() -> dict[str, Result]:
    return {name: simulated(name) for name in ("serial", "pod")}


@pytest.fixture(scope="module")
def compared_page(variants: dict[str, Result], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_comparison(comparison(variants), variants, WORKLOAD, folder)
    return folder / "report.html"


def charts(page: Path) -> dict[str, dict]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())
    assert found is not None
    return {chart["id"]: chart for chart in json.loads(found[1])["charts"]}


def series(chart: dict) -> dict[str, dict]:
    return {line["name"]: line for line in chart["series"]}


def values(line: dict, axis: str = "y") -> np.ndarray:
    return np.array(line[axis], dtype=float)


# ---- numbers


def test_distributions_are_the_percentiles_of_the_run(result: Result, page: Path) -> None:
    gaps = np.repeat(result.log.gap_duration, result.log.gap_count)
    for key, samples in (
        ("cdf-ttft", result.requests["ttft"].dropna()),
        ("cdf-tbt", gaps),
        ("cdf-e2e", result.requests["e2e_latency"].dropna()),
    ):
        chart = charts(page)[key]
        scale = {"(ms)": 1000, "(s)": 1}[chart["x"]["label"].split()[-1]]
        (line,) = chart["series"]
        expected = np.percentile(samples, CDF_PERCENTILES) * scale
        np.testing.assert_allclose(values(line, "x"), expected, rtol=1e-4)
        np.testing.assert_allclose(values(line), CDF_PERCENTILES, rtol=1e-4)


def test_ttft_over_time_is_of_the_requests_that_arrived_then(result: Result, page: Path) -> None:
    served = result.requests.dropna(subset=["ttft"])
    lines = series(charts(page)["ttft"])
    num_bins = len(lines["P50"]["y"])
    edges = np.linspace(0, served["finish_time"].max(), num_bins + 1)
    own = served.groupby(np.digitize(served["arrival_time"], edges[1:-1], right=True))["ttft"]
    for name, share in (("P50", 0.5), ("P99", 0.99)):
        expected = own.quantile(share).reindex(range(num_bins)) * 1000
        np.testing.assert_allclose(values(lines[name]), expected, rtol=1e-4)


def test_tbt_over_time_counts_each_decode(result: Result, page: Path) -> None:
    steps = result.steps[result.steps["num_decodes"] > 0]
    lines = series(charts(page)["tbt"])
    num_bins = len(lines["P99"]["y"])
    edges = np.linspace(0, result.requests["finish_time"].max(), num_bins + 1)
    which = np.digitize(steps["start"] + steps["duration"], edges[1:-1], right=True)
    for bin_, rows in list(steps.groupby(which))[::17]:
        gaps = np.repeat(rows["duration"], rows["num_decodes"])
        assert values(lines["P50"])[bin_] == pytest.approx(np.percentile(gaps, 50) * 1e3, rel=1e-4)
        assert values(lines["P99"])[bin_] == pytest.approx(np.percentile(gaps, 99) * 1e3, rel=1e-4)


def test_the_areas_add_up_to_the_time_of_each_kind(result: Result, page: Path) -> None:
    steps, end = result.steps, result.requests["finish_time"].max()
    kinds = step_kinds(steps)
    areas = series(charts(page)["kinds"])
    for index, kind in enumerate(STEP_KINDS):
        seconds = steps["duration"].to_numpy()[kinds == index].sum()
        share = values(areas[kind]).mean() / 100
        assert share * end * 2 == pytest.approx(seconds, rel=1e-3, abs=1e-6)


def test_kv_and_requests_average_as_the_summary_says(result: Result, page: Path) -> None:
    own = result.summary()["podsim"]
    assert isinstance(own, dict)
    lines = series(charts(page)["kv"])
    assert values(lines["mean"]).mean() / 100 == pytest.approx(own["kv_used_mean"], rel=1e-3)
    assert values(lines["max"]).max() / 100 == pytest.approx(own["kv_used_max"], rel=1e-3)
    running = values(series(charts(page)["requests"])["running"]).mean()
    steps, end = result.steps, result.requests["finish_time"].max()
    assert running == pytest.approx(
        (steps["num_running"] * steps["duration"]).sum() / end, rel=1e-3
    )


def test_a_step_over_two_bins_counts_in_both() -> None:
    steps = pd.DataFrame(
        {"replica": [0, 0, 1], "start": [0.5, 3.0, 0.0], "duration": [2.0, 1.0, 1.0]}
    )
    found = time_means(steps, np.array([10.0, 4.0, 2.0]), np.array([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]))
    np.testing.assert_allclose(found, [5 + 2, 10, 5, 4, 0])


def test_kernels_add_up_to_the_steps(result: Result, page: Path) -> None:
    """All but attention comes from the latency model, so compare attention with it too."""
    kinds = kind_table(result.steps)
    table = kernel_table(result, result.steps, result.requests)
    assert table is not None
    assert (table > 0).all(axis=None)
    np.testing.assert_allclose(table.sum(), kinds["seconds"].loc[table.columns], rtol=1e-9)
    chart = charts(page)["kernels"]
    bars = {bar["name"]: bar["values"] for bar in chart["series"]}
    for row, kind in enumerate(chart["y"]["rows"]):
        total = sum(bar[row] for bar in bars.values())
        assert total == pytest.approx(kinds["mean"][kind] * 1000, rel=1e-3)
    # One request alone: its decode steps have the shapes that the model can be asked for.
    trace = podsim.synthetic_trace(
        arrivals="static", qps=None, num_requests=1, prompt_tokens="700", output_tokens="50"
    )
    alone = podsim.simulate(trace, podsim.Deployment(token_budget=512, max_num_seqs=16))
    table = kernel_table(alone, alone.steps, alone.requests)
    assert table is not None
    model = alone.latency_model
    assert isinstance(model, podsim.ProfiledLatency)
    shapes = [podsim.BatchShape.of((), [context]) for context in range(701, 750)]
    expected = sum(model.breakdown(shape).attention for shape in shapes)
    # A part of it goes with the clock, which the prompt has lowered.
    assert expected < table["decode"]["attention"] < 1.01 * expected


def test_the_slowest_requests_are_listed_with_a_reason(result: Result, page: Path) -> None:
    text = page.read_text()
    by_ttft = text.split("By TTFT")[1].split("By end-to-end")[0]
    listed = [int(number) for number in re.findall(r"<tr><th>(\d+)</th>", by_ttft)]
    assert listed == result.requests.nlargest(10, "ttft")["request_id"].tolist()
    for row in by_ttft.split("<tr><th>")[2:]:
        assert re.search(r"(queue|prefill) \d+%", row)


def test_the_page_names_what_it_was_made_from(result: Result, page: Path) -> None:
    text = page.read_text()
    summary = json.loads((page.parent / "summary.json").read_text())
    hashes = summary["podsim"]["hashes"]
    assert set(hashes) == {"trace_sha256", "config_sha256", "kernels_sha256"}
    assert all(digest in text for digest in hashes.values())
    assert hashes["trace_sha256"] == result.trace.sha256
    assert str(result.deployment.token_budget) in text


def test_variants_are_laid_over_each_other(
    variants: dict[str, Result], compared_page: Path
) -> None:
    found = charts(compared_page)
    for name, result in variants.items():
        line = series(found["cdf-ttft"])[name]
        expected = np.percentile(result.requests["ttft"].dropna(), CDF_PERCENTILES) * 1000
        np.testing.assert_allclose(values(line, "x"), expected, rtol=1e-4)
        assert f"{name} P99" in series(found["tbt"])
    assert {"kinds-0", "kinds-1", "tokens-0", "tokens-1"} <= found.keys()
    assert len(series(found["kv"])["pod mean"]["y"]) == NUM_BINS


# ---- the page


def test_a_comparison_shows_error_bars_and_what_they_leave_unclear(tmp_path: Path) -> None:
    trace = podsim.load_trace("azure-conv-like").head(100).at_rate(9)
    results = {
        name: simulate_with_error_bars(trace, podsim.Deployment(attention=name))
        for name in ("serial", "pod")
    }
    save_comparison(comparison(results), results, None, tmp_path)
    text = (tmp_path / "report.html").read_text()
    row = re.search(r"<th>TTFT P50</th>(.*?)</tr>", text)
    assert row is not None
    for result in results.values():
        assert result.intervals is not None
        low, high = (format_seconds(seconds) for seconds in result.intervals["ttft_p50"])
        assert f"<small>{low} to {high}</small>" in row[1]
    assert " ~</small>" in text
    assert "the error bars of the two overlap" in text


def test_variants_of_other_loads_have_their_own_configuration(
    variants: dict[str, Result], tmp_path: Path
) -> None:
    loads = {"serial": WORKLOAD, "pod": replace(WORKLOAD, qps=12)}
    save_comparison(comparison(variants), variants, loads, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "<tr><th>qps</th><td><b>9</b></td><td><b>12</b></td></tr>" in text


@pytest.mark.parametrize("fixture", ["page", "compared_page"])
def test_the_page_refers_to_nothing_outside(fixture: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(fixture).read_text()
    for outside in ("http:", "https:", "src=", "href=", "url(", "@import", "fetch(", "import("):
        assert outside not in text, outside
    assert len(text) < 400_000


def test_every_chart_has_its_place(page: Path, compared_page: Path) -> None:
    for path in (page, compared_page):
        assert set(charts(path)) == set(re.findall(r'<figure id="([^"]+)"', path.read_text()))


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    trace = podsim.load_trace("azure-conv-like").head(3)
    result = podsim.simulate(trace, podsim.Deployment(), latency_model=podsim.ConstantLatency(0.1))
    evil = "</script><script>alert(1)</script>"
    save_comparison(
        comparison({evil: result, "b": result}), {evil: result, "b": result}, None, tmp_path
    )
    text = (tmp_path / "report.html").read_text()
    assert evil not in text
    assert evil in {line["name"] for line in charts(tmp_path / "report.html")["cdf-ttft"]["series"]}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("fixture", ["page", "compared_page"])
def test_chromium_renders_it_without_errors(
    fixture: str, scheme: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    path = request.getfixturevalue(fixture)
    dumped, log = rendered(path, tmp_path, "--force-dark-mode" if scheme == "dark" else "")
    assert "CONSOLE" not in log, log
    assert f'data-drawn="{len(charts(path))}"' in dumped
    assert dumped.count("<svg") == len(charts(path))
    assert dumped.count('class="line') >= 8
    assert "NaN" not in dumped
    assert "Infinity" not in dumped


def test_chromium_draws_as_wide_as_the_window(page: Path, tmp_path: Path) -> None:
    """So that letters on a phone are not shrunk with the chart."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    widths = {}
    for window in (500, 1280):
        dumped, _ = rendered(page, tmp_path, f"--window-size={window},900")
        widths[window] = [int(width) for width in re.findall(r'viewBox="0 0 (\d+)', dumped)]
        assert max(widths[window]) < window
    assert max(widths[1280]) > 1000


@pytest.mark.parametrize("num_requests", [1, 2, 3])
def test_chromium_renders_the_smallest_runs(num_requests: int, tmp_path: Path) -> None:
    """One token, one request, nothing served at all."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    trace = podsim.synthetic_trace(
        *("static", None, num_requests, "50"), output_tokens="1" if num_requests < 3 else "5"
    )
    deployment = podsim.Deployment(max_model_len=20 if num_requests == 1 else None)
    result = podsim.simulate(trace, deployment, latency_model=podsim.ConstantLatency(0.1))
    save(result, None, tmp_path)
    dumped, log = rendered(tmp_path / "report.html", tmp_path / "profile")
    assert "CONSOLE" not in log, log
    assert "data-drawn=" in dumped
    assert "NaN" not in dumped


def rendered(path: Path, profile: Path, *switches: str) -> tuple[str, str]:
    """The page after its script has run, and Chromium's log with the console in it."""
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--enable-logging=stderr", f"--user-data-dir={profile}", *filter(None, switches)),
        *("--dump-dom", path.as_uri()),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return re.sub(r"<script.*?</script>", "", run.stdout, flags=re.DOTALL), run.stderr
