"""The recorded run of a real engine on four GPUs: the simulation stays as near as it is today."""

from __future__ import annotations

from pathlib import Path

import collectives_in_steps
import pandas as pd
import pytest

from podsim.latency import ProfiledLatency
from podsim.validate_command import headline_table, step_table
from podsim.validation import Comparison, compare, read_recording

ROOT = Path(__file__).parent.parent
RUN = ROOT / "validation" / "tp4"
PAGE = (ROOT / "docs" / "tensor-parallel.md").read_text(encoding="utf-8")
MOST = {"ttft": 0.08, "tbt": 0.10, "tpot": 0.06, "e2e_latency": 0.06}
"""What no percentile's error may reach; today the worst of each is 0.068, 0.099, 0.057, 0.057."""


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(read_recording(RUN))


def test_it_is_whole_and_of_the_kernels_of_the_shipped_profile(comparison: Comparison) -> None:
    recorded, model = comparison.recorded, comparison.simulated.latency_model
    assert isinstance(model, ProfiledLatency)
    assert recorded.engine["tensor_parallel_size"] == 4
    assert recorded.engine["kernels_sha256"] == model.profile.provenance["kernels_sha256"]
    assert (recorded.requests["refused"] == "").all()
    assert len(recorded.requests) == recorded.engine["options"]["requests"]
    assert len(recorded.tokens) == recorded.requests["num_output_tokens"].sum()


def test_its_collectives_have_the_settings_of_those_that_were_measured(
    comparison: Comparison,
) -> None:
    model = comparison.simulated.latency_model
    assert isinstance(model, ProfiledLatency)
    assert model.collectives is not None
    measured = model.collectives.collectives.provenance
    same = [name for name in measured if name.startswith("NCCL_") or name in ("nccl", "driver")]
    assert len(same) == 6
    for name in same:
        assert comparison.recorded.engine[name] == measured[name], name


def test_the_simulation_is_as_near_as_today(comparison: Comparison) -> None:
    errors = comparison.headline()["error"]
    for name, most in MOST.items():
        for percentile in (50, 90, 99):
            assert abs(errors[f"{name}_p{percentile}"]) < most, (name, percentile)
    assert abs(errors["request_throughput"]) < 0.01
    steps = comparison.steps()
    assert abs(steps.loc["decode", "total"]) < 0.10
    assert abs(steps.loc["mixed", "total"]) < 0.05


def test_what_is_left_for_an_all_reduce_makes_up_the_gpus_time(comparison: Comparison) -> None:
    """With it in the place of what was measured alone, a step's prediction is its GPU time."""
    model = comparison.simulated.latency_model
    assert isinstance(model, ProfiledLatency)
    assert model.collectives is not None
    table = collectives_in_steps.by_size(comparison)
    assert table["steps"].sum() == len(comparison.recorded.steps)
    assert model.collectives.num_all_reduces == 161
    smallest = table.loc[8]
    added = 161 * (smallest["left_us"] - smallest["alone_us"]) / 1e3
    assert smallest["predicted_ms"] + added == pytest.approx(smallest["gpu_ms"], rel=0.005)


def test_the_page_shows_the_run(comparison: Comparison) -> None:
    assert collectives_in_steps.markdown(collectives_in_steps.by_size(comparison)) in PAGE
    for table in (headline_table(comparison), step_table(comparison)):
        for row in zip(*(column.cells for column in table.columns), strict=True):
            cells = " | ".join(str(cell) for cell in row if cell)
            assert f"| {cells} |" in PAGE


def test_the_page_shows_the_logits_of_several_gpus() -> None:
    rows = pd.read_csv(ROOT / "benchmarks/tensor_parallel/h200.csv")
    assert rows["gpus"].tolist() == [1, 2, 4]
    assert f"| 1 | | | | {rows['gpu_ms_of_a_step'][0]:.2f} |" in PAGE
    for row in rows[1:].itertuples():
        errors = f"{row.error_median:.3f} | {row.error_worst:.3f}"
        same = f"{row.same_tokens} of {row.tokens}"
        assert f"| {row.gpus} | {errors} | {same} | {row.gpu_ms_of_a_step:.2f} |" in PAGE
    later = pd.read_csv(ROOT / "benchmarks/tensor_parallel/h200-later.csv")
    one, two = later["gpu_ms_of_a_step"]
    assert f"({one:.2f} and {two:.2f} ms;" in PAGE
    assert later["same_tokens"].tolist() == rows["same_tokens"].tolist()[:2]
    errors = ["error_median", "error_worst"]
    assert later[errors].round(3).equals(rows[errors][:2].round(3))
