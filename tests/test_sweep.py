"""Sweeps: what a plan says, one table however it is run, and going on after being killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from podsim.config import Deployment
from podsim.errors import InputError
from podsim.pareto import on_front
from podsim.simulation import simulate
from podsim.sweep import run_sweep
from podsim.sweep_plan import read_plan
from podsim.workers import Died, in_processes
from podsim.workload import synthetic_trace

ROOT = Path(__file__).parent.parent

PLAN = """
arrivals = "poisson"
requests = 40
output_tokens = 20
qps = [4, 16]
token_budget = {from = 128, to = 1024, step = 128}
max_num_seqs = 256
replicas = [1, 2]

[sweep]
slo = "ttft:p99:0.1"
pareto = ["gpus", "ttft_p99_s"]
cost_per_gpu_hour = 2.5
"""
NUM_ROWS = 2 * 8 * 2
NUM_FAILED = 4  # a token budget of 128 is less than max_num_seqs


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of PLAN, from one process and without interruption."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "plan.toml").write_text(PLAN)
    return run_sweep(folder / "plan.toml", folder / "out", jobs=1).table.read_bytes()


def sweep(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "podsim", "sweep", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out


def refusal(*arguments: object) -> str:
    process = sweep(*arguments)
    out, err = process.communicate()
    assert process.returncode == 2, err
    assert (out, err.count("\n")) == ("", 1), err
    return err.removeprefix("podsim: ").rstrip("\n")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def num_rows(journal: Path) -> int:
    return max(journal.read_bytes().count(b"\n") - 1, 0) if journal.exists() else 0


# -------------------------------------------------------------------------------------- plan


def test_a_grid_is_every_combination_in_order(plan: Path) -> None:
    grid = read_plan(plan)
    assert len(grid) == NUM_ROWS
    assert grid.options(0)["token_budget"] == 128
    assert grid.options(1) == grid.options(0) | {"replicas": 2}
    assert grid.options(2) == grid.options(0) | {"token_budget": 256}
    assert grid.options(NUM_ROWS - 1)["qps"] == 16
    assert grid.options(0)["output_tokens"] == "20"
    every = {tuple(grid.options(i).values()) for i in range(len(grid))}
    assert len(every) == NUM_ROWS


def test_ranges(plan: Path) -> None:
    plan.write_text(
        'arrivals = "poisson"\n'
        "qps = {from = 1, to = 16, count = 5, log = true}\n"
        "watermark = {from = 0.0, to = 0.3, step = 0.1}\n"
        "token_budget = {from = 256, to = 1000, count = 3}\n"
    )
    choices = read_plan(plan).choices
    assert choices["qps"] == (1.0, 2.0, 4.0, 8.0, 16.0)
    assert choices["watermark"] == (0.0, 0.1, 0.2, 0.3)
    assert choices["token_budget"] == (256, 628, 1000)


def test_samples_are_drawn_by_their_index(plan: Path) -> None:
    plan.write_text(
        'arrivals = "poisson"\n'
        "qps = {from = 1, to = 100, log = true}\n"
        "token_budget = {from = 256, to = 2048}\n"
        'attention = ["serial", "pod"]\n'
        "[sweep]\nsamples = 1000\nseed = 7\n"
    )
    sample = read_plan(plan)
    assert len(sample) == 1000
    assert sample.options(500) == read_plan(plan).options(500)
    table = pd.DataFrame([sample.options(i) for i in range(1000)])
    assert table["qps"].between(1, 100).all()
    assert table["qps"].median() == pytest.approx(10, rel=0.15)
    assert table["token_budget"].between(256, 2048).all()
    assert table["token_budget"].mean() == pytest.approx(1152, rel=0.05)
    assert table["attention"].value_counts()["pod"] == pytest.approx(500, abs=60)
    plan.write_text(plan.read_text().replace("seed = 7", "seed = 8"))
    assert sample.options(500) != read_plan(plan).options(500)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("token_bugdet = [1]", "unknown key 'token_bugdet'; did you mean 'token_budget'?"),
        ("[sweep]\nsample = 3", "unknown key 'sample' in [sweep]; did you mean 'samples'?"),
        ('token_budget = [512, "many"]', "token_budget is 'many', expected a whole number"),
        ("qps = {from = 1, to = 2}", "qps has no steps"),
        ("qps = {from = 2, to = 1, count = 3}", "qps: range from 2 to 1"),
        ("qps = {from = 1, to = 2, stepp = 3}", "qps is {'from': 1, 'to': 2, 'stepp': 3}"),
        ("qps = {from = 1, to = 2, step = 0}", "qps: step is 0, expected above 0"),
        ("qps = {from = 1, to = 2, count = 0}", "qps: a range without any value"),
        ("qps = []", "qps is an empty list"),
        ("attention = {from = 1, to = 2}", "attention is a range, but it is text"),
        ("[sweep]\nsamples = 0", "samples is 0, expected at least 1"),
        ('[sweep]\nslo = ["ttft:p99"]', "SLO 'ttft:p99': expected METRIC:STATISTIC:SECONDS"),
        ('trace = "nowhere.csv"', "trace 'nowhere.csv': no such file"),
    ],
)
def test_a_wrong_plan_is_refused(plan: Path, text: str, complaint: str) -> None:
    plan.write_text('arrivals = "poisson"\n' + text)
    with pytest.raises(InputError) as error:
        read_plan(plan)
    assert str(error.value).startswith(f"{plan}: ")
    assert complaint in str(error.value)


def test_wrong_columns_are_refused_before_any_work(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "unknown column 'ttft_p99'; did you mean" in refusal(
        *(plan, "--out", out, "--pareto", "gpus,ttft_p99")
    )
    assert "expected two columns" in refusal(plan, "--out", out, "--pareto", "gpus")
    assert not out.exists()
    assert "sweep.toml: No such file" in refusal("sweep.toml", "--out", out)


# ------------------------------------------------------------------------------------- table


def test_a_row_is_its_simulation(reference: bytes, tmp_path: Path) -> None:
    (tmp_path / "sweep.csv").write_bytes(reference)
    table = pd.read_csv(tmp_path / "sweep.csv")
    assert table["index"].tolist() == list(range(NUM_ROWS))
    row = table[(table.qps == 16) & (table.token_budget == 512) & (table.replicas == 2)].iloc[0]
    trace = synthetic_trace("poisson", 16, 40, 1500, 20)
    deployment = Deployment(token_budget=512, max_num_seqs=256, replicas=2)
    requests = simulate(trace, deployment).requests
    assert row["ttft_mean_s"] == pytest.approx(requests["ttft"].mean(), rel=1e-8)
    assert row["e2e_p99_s"] == pytest.approx(requests["e2e_latency"].quantile(0.99), rel=1e-8)
    assert row["goodput"] == pytest.approx(
        (requests["ttft"] <= 0.1).sum() / requests["finish_time"].max(), rel=1e-8
    )
    assert row["cost_per_hour"] == 5.0


def test_a_combination_that_cannot_be_is_a_row_with_its_error(
    reference: bytes, tmp_path: Path
) -> None:
    (tmp_path / "sweep.csv").write_bytes(reference)
    table = pd.read_csv(tmp_path / "sweep.csv")
    failed = table[table["token_budget"] == 128]
    assert len(failed) == NUM_FAILED
    assert failed["error"].str.startswith("token_budget is 128").all()
    assert failed["ttft_p99_s"].isna().all()
    assert table["error"].notna().sum() == NUM_FAILED


def test_the_front_is_marked_for_each_workload(reference: bytes, tmp_path: Path) -> None:
    (tmp_path / "sweep.csv").write_bytes(reference)
    table = pd.read_csv(tmp_path / "sweep.csv")
    for _, rows in table[table["error"].isna()].groupby("qps"):
        pairs = rows[["gpus", "ttft_p99_s"]].to_numpy()
        for pair, marked in zip(pairs, rows["pareto"], strict=True):
            beaten = ((pairs <= pair).all(axis=1) & (pairs < pair).any(axis=1)).any()
            assert bool(marked) is not bool(beaten)
    assert table.loc[table["error"].notna(), "pareto"].sum() == 0


def test_on_front_is_the_definition() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        first, second = rng.integers(0, 6, (2, 40)).astype(float)
        first[rng.random(40) < 0.1] = np.nan
        group = rng.integers(0, 3, 40)
        front = on_front(first, second, group)
        for i in range(40):
            with np.errstate(invalid="ignore"):
                no_worse = (first <= first[i]) & (second <= second[i]) & (group == group[i])
                better = (first < first[i]) | (second < second[i])
            beaten = bool((no_worse & better).any())
            assert front[i] == (not beaten and not np.isnan(first[i]))


def test_parquet_is_the_same_table(plan: Path, tmp_path: Path, reference: bytes) -> None:
    pytest.importorskip("pyarrow")
    run_sweep(plan, tmp_path / "out", jobs=1)
    written = pd.read_parquet(tmp_path / "out" / "sweep.parquet")
    read = pd.read_csv(tmp_path / "out" / "sweep.csv")
    assert list(written.columns) == list(read.columns)
    for column in ("index", "token_budget", "qps", "ttft_p99_s", "pareto"):
        np.testing.assert_array_equal(written[column], read[column])


# ---------------------------------------------------------------------------- ways to run it


def test_processes_give_the_same_table(plan: Path, tmp_path: Path, reference: bytes) -> None:
    out = tmp_path / "out"
    said = finish(sweep(plan, "--out", out, "--jobs", 2))
    assert (out / "sweep.csv").read_bytes() == reference
    assert f"Simulations  {NUM_ROWS}, {NUM_FAILED} failed (column error)" in said
    assert (out / "sweep.toml").read_text() == PLAN
    assert (out / "pareto.png").exists()
    again = finish(sweep(out / "sweep.toml", "--out", out))
    assert f"{NUM_ROWS} of them earlier" in again
    assert (out / "sweep.csv").read_bytes() == reference


def test_a_killed_sweep_goes_on_and_ends_with_the_same_table(
    plan: Path, tmp_path: Path, reference: bytes
) -> None:
    out = tmp_path / "out"
    journal = out / "journal.jsonl"
    process = sweep(plan, "--out", out, "--jobs", 2)
    wait_until(lambda: num_rows(journal) >= 5)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    done = num_rows(journal)
    assert 5 <= done < NUM_ROWS
    assert not (out / "sweep.csv").exists()
    with journal.open("ab") as file:
        file.write(b'[30,"",[1.0,2')  # a kill in the middle of a line
    said = finish(sweep(plan, "--out", out, "--jobs", 1))
    assert f"{done} of them earlier" in said
    assert (out / "sweep.csv").read_bytes() == reference


def test_a_lost_worker_is_replaced(plan: Path, tmp_path: Path, reference: bytes) -> None:
    out = tmp_path / "out"
    process = sweep(plan, "--out", out, "--jobs", 2)
    wait_until(lambda: num_rows(out / "journal.jsonl") >= 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    os.kill(int(workers[0]), signal.SIGKILL)
    finish(process)
    assert (out / "sweep.csv").read_bytes() == reference


def test_an_interrupted_sweep_says_how_to_go_on(plan: Path, tmp_path: Path) -> None:
    process = sweep(plan, "--out", tmp_path / "out", "--jobs", 2)
    wait_until(lambda: num_rows(tmp_path / "out" / "journal.jsonl") >= 1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert err == "podsim: interrupted; the same command goes on from here\n"


def test_ray_gives_the_same_table(plan: Path, tmp_path: Path, reference: bytes) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    finish(sweep(plan, "--out", out, "--ray", "local", "--jobs", 1))
    assert (out / "sweep.csv").read_bytes() == reference


def test_no_ray_cluster_is_one_line(plan: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    complaint = refusal(plan, "--out", tmp_path / "out", "--ray", "nonsense://")
    assert complaint.startswith("no Ray cluster at 'nonsense://'")


def test_another_sweep_in_the_folder_is_refused(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan.write_text(PLAN.replace("from = 128", "from = 512"))
    run_sweep(plan, out, jobs=1)
    identity = json.loads((out / "journal.jsonl").read_text().splitlines()[0])
    assert identity["options"]["token_budget"] == [512, 640, 768, 896, 1024]
    plan.write_text(PLAN)
    with pytest.raises(InputError, match=r"holds another sweep \(different options\)"):
        run_sweep(plan, out, jobs=1)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("do not lose")
    with pytest.raises(InputError, match="not empty, and no podsim sweep"):
        run_sweep(plan, precious, jobs=1)


def test_only_one_sweep_writes_into_a_folder(plan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = sweep(plan, "--out", out, "--jobs", 1)
    wait_until(lambda: num_rows(out / "journal.jsonl") >= 1)
    process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(InputError, match="another sweep is writing here"):
            run_sweep(plan, out, jobs=1)
    finally:
        process.kill()
        process.communicate()


def test_a_simulation_whose_workers_died_is_tried_again(
    plan: Path, tmp_path: Path, reference: bytes
) -> None:
    out = tmp_path / "out"
    run_sweep(plan, out, jobs=1)
    lines = (out / "journal.jsonl").read_text().splitlines(keepends=True)
    lines[8] = '[7,"worker died, 3 times: exit code -9",[]]\n'
    (out / "journal.jsonl").write_text("".join(lines))
    assert run_sweep(plan, out, jobs=1).num_simulated == 1
    assert (out / "sweep.csv").read_bytes() == reference


def test_a_full_disk_is_one_line_and_loses_nothing(
    plan: Path, tmp_path: Path, reference: bytes
) -> None:
    out = tmp_path / "out"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000)); "
    command = [sys.executable, "-c", limit + "from podsim.cli import main; main()", "sweep", plan]
    run = subprocess.run([*command, "--jobs", "1", "--out", out], capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f"podsim: {out}: ")
    assert run.stderr.endswith("; what is finished there is kept\n")
    assert 0 < num_rows(out / "journal.jsonl") < NUM_ROWS
    finish(sweep(plan, "--out", out, "--jobs", 1))
    assert (out / "sweep.csv").read_bytes() == reference


def test_a_task_that_kills_its_workers_is_given_up() -> None:
    done = list(in_processes(os._exit, [3, 4], 2))
    assert sorted(task for task, _ in done) == [3, 4]
    assert all(isinstance(result, Died) for _, result in done)
    assert {f"exit code {task}" in str(result) for task, result in done} == {True}


def test_what_a_task_raises_is_raised() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        list(in_processes(int, ["1", "x", "3"], 2))
    with pytest.raises(InputError, match="jobs is 0"):
        list(in_processes(int, ["1"], 0))
