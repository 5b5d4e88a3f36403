"""The committed results of the kernels: of their rows, and what docs/pod.md says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from podsim import kernel_report, kernels_command
from podsim.cli import app
from podsim.kernel_questions import PARTS
from podsim.profile import kernels_hash

pytest.importorskip("torch", reason="the command needs torch")
pytest.importorskip("triton", reason="the command needs triton")
pytest.importorskip("pynvml", reason="the command needs nvidia-ml-py")

ROOT = Path(__file__).parent.parent
H200 = ROOT / "benchmarks/kernels/h200"
PAGE = (ROOT / "docs/pod.md").read_text(encoding="utf-8")
WORKLOADS = {w.name: w for kind in kernels_command.KINDS.values() for w in kind()}


def test_the_committed_results_are_of_the_committed_rows(tmp_path: Path) -> None:
    folder = H200 / "bench"
    out = str(tmp_path / "out")
    run = CliRunner().invoke(app, ["kernels", "bench", "--from", str(folder), "--out", out])
    assert run.exit_code == 0, run.output
    for name in ("rows.csv", "results.csv", "summary.csv", "launch_overhead.csv"):
        assert (tmp_path / "out" / name).read_text() == (folder / name).read_text(), name


def test_the_page_shows_the_committed_summary() -> None:
    """Mean, least and most of each ratio, by kind of workload."""
    summary = pd.read_csv(H200 / "bench/summary.csv")
    for ratio, part in summary.groupby("ratio"):
        of = part.set_index("group")
        cells = [
            f"{of['mean'][g]:.2f} ({of['least'][g]:.2f} to {of['most'][g]:.2f})"
            for g in ("reference", "sweep", "uneven")
        ]
        assert f" | {' | '.join(cells)} |\n" in PAGE, ratio


def test_the_page_states_every_bar_as_it_was_measured() -> None:
    """Each line of its table: the committed numbers, and whether they are on the bar's side."""
    results = pd.read_csv(H200 / "bench/results.csv")
    results["kv_bytes"] = [WORKLOADS[name].kv_bytes for name in results["workload"]]
    both, uneven = (results[results["group"] != "uneven"], results.query("group == 'uneven'"))
    means = both.groupby("group").mean(numeric_only=True)
    paging = kernel_report.paging_overhead(pd.read_csv(H200 / "paging/rows.csv"))
    host = pd.read_csv(H200 / "bench/launch_overhead.csv").query("kernel == 'pod'")
    called, replayed = (host.loc[host["how"] == how, "seconds"] for how in ("called", "replayed"))

    def average(ratio: str) -> str:
        return f"{means.loc['reference', ratio]:.2f} and {means.loc['sweep', ratio]:.2f}"

    def verdict(miss: pd.Series) -> str:
        return f"**missed** in {miss.sum()} of {len(miss)}" if miss.any() else "held"

    def costs(sizes: list[int]) -> str:
        most = paging[paging["page_size"].isin(sizes)].groupby("kernel")["overhead"].max() * 100
        cells = f"decode {most['decode']:.1f} %, POD {most['pod']:.1f} %, "
        return cells + f"prefill {most['prefill']:.1f} % at most"

    bandwidth = results.loc[results["kv_bytes"] > 1e9, "decode TB/s"]
    of_prefill, of_decode, of_pod = (
        both[name] for name in ("prefill / fi", "decode / fi", "gain over fi pod")
    )
    assert means["prefill / fi"].min() >= 0.95
    assert means["pod gain"].min() >= 1.25
    assert both.groupby("group")["pod gain"].max().min() >= 1.40
    assert results["pod gain"].min() >= 0.99
    assert means["gain over fi serial"].min() >= 1.25
    assert means["gain over fi pod"].min() >= 1.3
    assert means["sustained gain"].min() >= 1.15
    assert uneven["pod gain"].mean() >= 1.2
    most = both.groupby("group")["pod gain"].max()
    for line in (
        f"| prefill at least 0.95 of FA3 on average | {average('prefill / fi')} | held |",
        f"| ... and 0.88 anywhere | {of_prefill.min():.2f} | {verdict(of_prefill < 0.88)}",
        f"| {average('decode / fi')} on average, least {of_decode.min():.2f} | "
        f"{verdict(of_decode < 1)}",
        f"| {bandwidth.min():.2f} to {bandwidth.max():.2f}, in {len(bandwidth)} batches with "
        f"`uneven` | {verdict(bandwidth < 4.2)} |",
        f"| POD over serial: mean at least 1.25 | {average('pod gain')} | held |",
        f"| ... most at least 1.40 | {most['reference']:.2f} and {most['sweep']:.2f} | held |",
        f"| ... never under 0.99 | {results['pod gain'].min():.2f} | held |",
        f"mean at least 1.25 | {average('gain over fi serial')} | held |",
        f"mean at least 1.3 | {average('gain over fi pod')} | held |",
        f"| ... and 1.10 everywhere | {of_pod.min():.2f} | {verdict(of_pod < 1.1)}",
        f"mean at least 1.15 | {average('sustained gain')} | held |",
        f"mean at least 1.2 | {uneven['pod gain'].mean():.2f} | held |",
        f"cost at most 5 % | {costs([64, 128, 256])} | **missed** in prefill |",
        f"cost at most 10 % | {costs([16])} | **missed** in POD |",
        f"| called {called.min() * 1e6:.0f} to {called.max() * 1e6:.0f} us, `prepared()` "
        f"{replayed.min() * 1e6:.1f} to {replayed.max() * 1e6:.1f} us | **missed** when called |",
    ):
        assert line in PAGE, line
    for sizes, bar, missed in (([64, 128, 256], 0.05, "prefill"), ([16], 0.10, "pod")):
        cost = paging[paging["page_size"].isin(sizes)].groupby("kernel")["overhead"].max()
        assert cost.index[cost > bar].tolist() == [missed]


def test_what_is_committed_is_of_the_installed_kernels() -> None:
    questions = [H200 / f"questions/{part}.json" for part in PARTS]
    others = [H200 / f"{name}/provenance.json" for name in ("bench", "paging", "tune")]
    for file in [*questions, *others]:
        assert json.loads(file.read_text())["kernels_sha256"] == kernels_hash(), file


def test_the_committed_paging_and_tuning_are_of_their_rows() -> None:
    # Rows are rounded to six digits, these to four decimals of what was not yet rounded.
    found = kernel_report.paging_overhead(pd.read_csv(H200 / "paging/rows.csv"))
    shown = pd.read_csv(H200 / "paging/overhead.csv")
    pd.testing.assert_frame_equal(found.reset_index(drop=True), shown, rtol=0, atol=1e-4)
    times = kernel_report.medians(pd.read_csv(H200 / "tune/rows.csv"))
    shown = pd.read_csv(H200 / "tune/gains.csv", index_col="workload")
    found = times.rdiv(times["serial"], axis=0)
    pd.testing.assert_frame_equal(found, shown, rtol=0, atol=1e-4, check_names=False)
