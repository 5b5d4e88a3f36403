"""`podsim kernels`: its workloads and tables, and what it says where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import Result
from typer.testing import CliRunner

from podsim import kernel_report, kernels_command
from podsim.cli import app
from podsim.errors import InputError
from podsim.kernel_workloads import (
    LEAST_SHARE,
    POOL_BYTES,
    KernelWorkload,
    reference_workloads,
    sweep_workloads,
    uneven_workloads,
)
from podsim.kernels_command import BENCH_SEED

torch = pytest.importorskip("torch", reason="the commands need torch")
pytest.importorskip("triton", reason="the commands need triton")
pytest.importorskip("pynvml", reason="the commands need nvidia-ml-py")

ROOT = Path(__file__).parent.parent


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


def test_what_bench_times_has_names_of_its_own_and_a_group() -> None:
    workloads = {kind: workloads() for kind, workloads in kernels_command.KINDS.items()}
    names = [workload.name for kind in workloads.values() for workload in kind]
    assert len(set(names)) == len(names)
    for kind, some in workloads.items():
        assert {workload.batch.split for workload in some} == {kind}


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


def podsim(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["kernels", *map(str, arguments)])


# ---- results from earlier rows


MACHINE = {"device_name": "Fake GPU", "driver": "1.2", "kernels_sha256": "abc"}


def bench_folder(folder: Path, workload: KernelWorkload, machine: dict[str, str]) -> Path:
    """As a run that timed one workload leaves it."""
    folder.mkdir()
    rows = pd.DataFrame(rows_of(TIMES)).assign(workload=workload.name, group="?")
    rows.to_csv(folder / "rows.csv", index=False)
    (folder / "launch_overhead.csv").write_text("kernel,how,seconds\npod,replayed,2e-06\n")
    (folder / "provenance.json").write_text(json.dumps(machine))
    return folder


def test_results_again_from_the_rows_of_several_folders(tmp_path: Path) -> None:
    first = bench_folder(tmp_path / "a", reference_workloads()[0], MACHINE | {"command": "one"})
    second = bench_folder(tmp_path / "b", sweep_workloads(24, BENCH_SEED)[0], MACHINE)
    out = tmp_path / "out"
    run = podsim("bench", "--from", first, "--from", second, "--out", out)
    assert run.exit_code == 0, run.output
    rows = pd.read_csv(out / "rows.csv")
    assert len(rows) == 2 * 3 * len(TIMES)
    assert rows["group"].unique().tolist() == ["reference", "sweep"], "of this version's workloads"
    summary = pd.read_csv(out / "summary.csv")
    assert summary.query("ratio == 'pod gain'")["workloads"].tolist() == [1, 1, 2]
    assert len(pd.read_csv(out / "launch_overhead.csv")) == 2
    assert json.loads((out / "provenance.json").read_text()) == MACHINE | {"command": "one; "}
    run = podsim("bench", "--from", out, "--workloads", "sweep", "--out", tmp_path / "sweep")
    assert run.exit_code == 0, run.output
    assert pd.read_csv(tmp_path / "sweep" / "rows.csv")["group"].unique().tolist() == ["sweep"]


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("rows.csv", ("0.0002,", "fast,"), "rows.csv:3: seconds is 'fast', expected a positive"),
        ("rows.csv", ("seconds", "minutes"), "rows.csv: misses the column seconds"),
        ("rows.csv", ("64x8192", "63x8192"), "+ 63x8192' is no workload of this version"),
        ("rows.csv", ("streams", "stream"), "lacks the kernel 'streams'"),
        ("provenance.json", ("1.2", "1.3"), "driver is 1.3, and 1.2 in"),
        ("provenance.json", ("{", ""), "provenance.json: not JSON"),
        ("launch_overhead.csv", ("2e-06", "0"), "launch_overhead.csv:2: seconds is '0'"),
    ],
)
def test_rows_that_are_not_what_was_written(
    file: str, change: tuple[str, str], said: str, tmp_path: Path
) -> None:
    right, wrong = (
        bench_folder(tmp_path / name, reference_workloads()[0], MACHINE) for name in "ab"
    )
    (wrong / file).write_text((wrong / file).read_text().replace(*change))
    run = podsim("bench", "--from", right, "--from", wrong, "--out", tmp_path / "out")
    assert isinstance(run.exception, InputError)
    assert said in str(run.exception)
    assert not (tmp_path / "out").exists()


def test_workloads_that_the_rows_lack(tmp_path: Path) -> None:
    folder = bench_folder(tmp_path / "a", reference_workloads()[0], MACHINE)
    run = podsim("bench", "--from", folder, "--workloads", "uneven", "--out", tmp_path / "out")
    assert "has no rows of --workloads uneven" in str(run.exception)


# ---- check


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Batches without a GPU, of which the second of POD from pages of 16 is wrong."""
    from podsim import check_kernels

    seen: list[Any] = []

    def faults(kernels: str, case: Any, *_: object) -> list[str]:
        seen.append(case)
        if len(seen) > 5:
            raise KeyboardInterrupt
        return ["Decode: relative error 0.5"] if (case.page_size, len(seen)) == (16, 2) else []

    monkeypatch.setattr(check_kernels, "faults", faults)
    monkeypatch.setattr(kernels_command, "measuring", lambda: None)
    return seen


def test_an_interrupted_check_says_how_far_it_came(checked: list[Any]) -> None:
    arguments = ["--kernels", "triton", "--batches", 2, "--strategy", "pod,serial"]
    run = podsim("check", *arguments, "--heads", "32/8,28/4", "--page-size", "0")
    assert run.exit_code == 130
    assert "interrupted: 5 random batches of 3 kernels in 0 s: 0 wrong" in run.output
    assert {case.strategy for case in checked} <= {"pod", "serial"}
    assert {case.heads for case in checked} <= {(32, 8), (28, 4)}
    assert {case.page_size for case in checked} == {0}


def test_a_check_that_found_something_fails_and_tells_its_progress(
    checked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_command, "PROGRESS_SECONDS", 0.0)
    run = podsim("check", "--kernels", "triton", "--strategy", "pod", "--page-size", "16")
    assert run.exit_code == 1
    assert "relative error 0.5" in run.stdout
    assert "interrupted: 5 random batches of 1 kernels in 0 s: 1 wrong" in run.stdout
    assert run.stderr.count("random batches of") == 5
    assert "1 random batches of 1 kernels in 0 s: 0 wrong" in run.stderr


@pytest.mark.parametrize(
    ("option", "text"), [("--strategy", "podd"), ("--heads", "3/2"), ("--page-size", "8")]
)
def test_a_check_of_nothing(checked: list[Any], option: str, text: str) -> None:
    run = podsim("check", "--kernels", "triton", option, text)
    assert f"{option} has '{text}', expected some of" in str(run.exception)
    assert not checked
