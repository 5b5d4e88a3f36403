"""`podsim kernels`: its workloads and tables, and what it says where there is no GPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from podsim import kernel_report
from podsim.cli import app
from podsim.kernel_workloads import (
    LEAST_SHARE,
    POOL_BYTES,
    reference_workloads,
    sweep_workloads,
    uneven_workloads,
)

torch = pytest.importorskip("torch", reason="the commands need torch")
pytest.importorskip("triton", reason="the commands need triton")
pytest.importorskip("pynvml", reason="the commands need nvidia-ml-py")


def test_work_of_a_batch_by_hand() -> None:
    workload = reference_workloads()[0]  # 1024@8192 + 64x8192, 32 and 8 heads of 128
    assert workload.flops == 4 * 128 * 32 * sum(range(8192 - 1023, 8193))
    assert workload.kv_bytes == 2 * 2 * 128 * 8 * 64 * 8192


def test_random_workloads_are_the_same_for_a_seed_and_both_sides_matter() -> None:
    assert sweep_workloads(24, seed=7) == sweep_workloads(24, seed=7)
    assert sweep_workloads(24, seed=7) != sweep_workloads(24, seed=11)
    for workload in [*sweep_workloads(24, seed=7), *uneven_workloads(12, seed=7)]:
        sides = workload.flops / 600e12, workload.kv_bytes / 4.35e12
        assert min(sides) >= LEAST_SHARE * sum(sides), workload.name
    names = [workload.name for workload in sweep_workloads(24, seed=7)]
    assert len(set(names)) > 20


def test_uneven_workloads_have_several_chunks_and_a_heavy_tail() -> None:
    for workload in uneven_workloads(12, seed=7):
        batch = workload.batch
        assert 2 <= len(batch.prefills) <= 4
        tail = np.percentile(batch.decode_contexts, 99) / np.percentile(batch.decode_contexts, 50)
        assert tail >= 8
        pool = 4 * 128 * workload.num_kv_heads * batch.num_slots * batch.max_context
        assert pool <= POOL_BYTES


def rows_of(times: dict[str, float], mode: str = "burst") -> list[dict[str, object]]:
    """Three rounds of each kernel: too fast, right, too slow."""
    name = reference_workloads()[0].name
    return [
        {"workload": name, "kernel": kernel, "mode": mode, "round": i, "seconds": seconds * factor}
        | ({"joules": seconds * 600} if mode == "sustained" else {})
        for kernel, seconds in times.items()
        for i, factor in enumerate((0.5, 1.0, 3.0))
    ]


TIMES = {"prefill": 2e-4, "decode": 5e-4, "serial": 7e-4} | {
    "streams": 6e-4,
    "unified": 7.7e-4,
    "pod": 5.6e-4,
}


def test_results_are_ratios_of_medians() -> None:
    workload = reference_workloads()[0]
    sustained = rows_of({"serial": 8e-4, "pod": 6.4e-4}, "sustained")
    found = kernel_report.results(pd.DataFrame([*rows_of(TIMES), *sustained]), [workload])
    (row,) = found.to_dict("records")
    assert row["pod gain"] == pytest.approx(1.25)
    assert row["streams gain"] == pytest.approx(7 / 6)
    assert row["unified gain"] == pytest.approx(1 / 1.1)
    assert row["sustained gain"] == pytest.approx(1.25)
    assert row["energy of pod"] == pytest.approx(0.8)
    assert row["oracle s"] == pytest.approx(5e-4)
    assert row["prefill TFLOP/s"] == pytest.approx(workload.flops / 2e-4 / 1e12)
    assert row["decode TB/s"] == pytest.approx(workload.kv_bytes / 5e-4 / 1e12)


def test_results_judge_by_flashinfer_where_it_ran() -> None:
    theirs = {"fi prefill": 1.9e-4, "fi decode": 5.5e-4, "fi serial": 7.28e-4, "fi pod": 6.16e-4}
    found = kernel_report.results(
        pd.DataFrame(rows_of(TIMES | theirs | {"fi batch pod": 9e-4})), [reference_workloads()[0]]
    )
    (row,) = found.to_dict("records")
    assert row["prefill / fi"] == pytest.approx(0.95)
    assert row["decode / fi"] == pytest.approx(1.1)
    assert row["gain over fi serial"] == pytest.approx(1.3)
    assert row["gain over fi pod"] == pytest.approx(1.1), "the better of its two PODs"
    summary = kernel_report.summary(found).set_index(["group", "ratio"])
    assert summary.loc[("all", "gain over fi pod"), "least"] == pytest.approx(1.1)


def test_paging_overhead_is_over_contiguous_keys() -> None:
    times = {"pod contiguous": 1e-4, "pod 16": 1.1e-4, "pod 256": 1e-4, "decode contiguous": 2e-4}
    found = kernel_report.paging_overhead(pd.DataFrame(rows_of(times | {"decode 16": 2.1e-4})))
    overhead = found.set_index(["kernel", "page_size"])["overhead"].to_dict()
    assert overhead == pytest.approx(
        {("pod", 16): 0.1, ("pod", 256): 0.0, ("decode", 16): 0.05}, abs=1e-12
    )


def test_the_figure_is_a_picture(tmp_path: Path) -> None:
    found = kernel_report.results(pd.DataFrame(rows_of(TIMES)), [reference_workloads()[0]])
    kernel_report.write_figure(found, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments",
    [["bench", "--out"], ["tune", "--out"], ["paging", "--out"], ["questions", "--out"]],
)
def test_without_a_gpu_nothing_is_left(arguments: list[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = CliRunner().invoke(app, ["kernels", *arguments, str(tmp_path / "out")])
    assert run.exit_code != 0
    assert "no CUDA GPU on this machine" in str(run.exception) + run.output
    assert list(tmp_path.iterdir()) == []
