"""Recordings of an engine, here with made-up steps, and what they are compared with."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from podsim.config import Deployment
from podsim.decode_group import ListedDecodes
from podsim.engine import Engine, Recording
from podsim.errors import InputError
from podsim.latency import LatencyModel
from podsim.memory_system import kv_cache_for
from podsim.model import model_named
from podsim.replica_heat import Heat
from podsim.scheduler import SCHEDULERS
from podsim.simulation import latency_model_for, requests_of
from podsim.validation import (
    CONFIG_FILE,
    ENGINE_FILE,
    GPU_FILE,
    REQUESTS_FILE,
    STEPS_FILE,
    TOKENS_FILE,
    Recorded,
    compare,
    read_recording,
)
from podsim.workload import synthetic_trace

DEPLOYMENT = Deployment(attention="pod", token_budget=512, max_num_seqs=32)
ENGINE = {
    "device_name": "made up",
    "driver": "1",
    "torch": "2",
    "triton": "3",
    "date": "2026-11-21",
    "host_time": {"fixed": 2e-4, "per_request": 1e-6, "with_prefill": 3e-4},
    "num_blocks": 5000,
}


class SlowedForward:
    """Steps take `slowdown` times what the latency model says; the clock is by hand."""

    def __init__(self, latency: LatencyModel, slowdown: float) -> None:
        self.heat, self.slowdown = Heat(latency), slowdown
        self.gpu_seconds = 0.0
        self.table_seconds = 5e-5
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def wait_until(self, time: float) -> None:
        self.time = time

    def run(self, inputs, foresee):
        self.gpu_seconds = self.heat.step_time(inputs.shape, self.time) * self.slowdown
        self.time += self.gpu_seconds
        return np.zeros(len(inputs.sample_rows), np.int64)


def recorded(slowdown: float, deployment: Deployment = DEPLOYMENT) -> Recorded:
    samples = [(0.1 * i, 1980.0, 700.0) for i in range(40)]
    run = recording(slowdown, deployment)
    return Recorded.of(run, deployment, ENGINE, "made up", samples)


def recording(slowdown: float, deployment: Deployment = DEPLOYMENT, qps: float = 5.0) -> Recording:
    """What an engine does whose steps take longer than the profile says."""
    trace = synthetic_trace(
        arrivals="poisson",
        qps=qps,
        num_requests=80,
        prompt_tokens="lognormal:600:0.8",
        output_tokens="lognormal:60:0.6",
        seed=3,
    )
    served = Recorded.of(Recording(), deployment, ENGINE, "").deployment
    model = model_named(served.model)
    kv_cache = kv_cache_for(served, model, ENGINE["num_blocks"])
    latency = latency_model_for(served, model)
    forward = SlowedForward(latency, slowdown)
    engine = Engine(
        forward,
        SCHEDULERS["sarathi"](kv_cache, served, ListedDecodes(16), latency.step_time),
        kv_cache,
        num_slots=served.max_num_seqs,
        max_model_len=served.max_model_len or 8192,
        vocab_size=1000,
        seed=0,
        clock=forward,
    )
    return engine.serve(requests_of(trace))


def test_an_engine_that_keeps_to_the_profile_is_simulated_to_the_nanosecond(tmp_path):
    run = recorded(slowdown=1.0)
    run.save(tmp_path)
    comparison = compare(read_recording(tmp_path), error_bars=False)
    headline = comparison.headline()
    latencies = headline[headline.index.str.contains("_p")]
    assert len(latencies) == 12
    assert headline["error"].abs().max() < 2e-4  # files hold times to 0.1 us
    assert comparison.steps()["p90"].max() < 2e-4
    pairs = comparison.requests()
    assert len(pairs) == 80
    assert (pairs["ttft"] - pairs["ttft_simulated"]).abs().max() < 1e-4


def test_slower_steps_are_seen_in_every_kind_and_in_the_latencies():
    comparison = compare(recorded(slowdown=1.1))
    steps = comparison.steps()
    assert list(steps.index) == ["decode", "mixed", "prefill", "all"]
    assert steps["bias"].to_list() == pytest.approx([1 / 1.1 - 1] * 4)
    assert steps["total"].to_list() == pytest.approx([1 / 1.1 - 1] * 4)
    assert steps.loc["all", "steps"] == steps["steps"].iloc[:3].sum()
    headline = comparison.headline()
    assert headline.loc["tbt_p50", "error"] == pytest.approx(1 / 1.1 - 1, abs=0.02)
    assert headline.loc["ttft_p50", "error"] < -0.05
    assert headline.loc["tbt_p50", "low"] <= headline.loc["tbt_p50", "simulated"]
    assert headline.loc["tbt_p50", "simulated"] < headline.loc["tbt_p50", "high"]


def test_a_recording_is_the_same_when_read_and_written_again(tmp_path):
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()
    recorded(slowdown=1.05).save(first)
    read_recording(first).save(second)
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_a_profile_beside_recordings_is_that_of_those_with_its_kernels(tmp_path):
    shipped = Path(__file__).parent.parent / "profiles" / "h200" / "llama-3-8b"
    shutil.copytree(shipped, tmp_path / "profile", ignore=shutil.ignore_patterns("*.csv"))
    beside = json.loads((shipped / "profile.json").read_text())
    run = recorded(slowdown=1.0)
    profiles = {}
    for name, kernels in (
        ("old", beside["provenance"]["kernels_sha256"]),
        ("new", "others"),
    ):
        (tmp_path / name).mkdir()
        dataclasses.replace(run, engine={**run.engine, "kernels_sha256": kernels}).save(
            tmp_path / name
        )
        profiles[name] = read_recording(tmp_path / name).deployment.profile
    assert profiles == {"old": str(tmp_path / "profile"), "new": None}


def test_collectives_beside_recordings_are_theirs_unless_they_name_others(tmp_path):
    shipped = Path(__file__).parent.parent / "profiles" / "h200" / "collectives"
    run = recorded(slowdown=1.0)
    named = dataclasses.replace(run.deployment, collectives="elsewhere")
    for name, deployment in (("own", run.deployment), ("named", named)):
        (tmp_path / name).mkdir()
        dataclasses.replace(run, deployment=deployment).save(tmp_path / name)
    assert read_recording(tmp_path / "own").deployment.collectives is None
    shutil.copytree(shipped, tmp_path / "collectives")
    found = {
        name: read_recording(tmp_path / name).deployment.collectives for name in ("own", "named")
    }
    assert found == {"own": str(tmp_path / "collectives"), "named": "elsewhere"}


def podsim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podsim", "validate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_validate_from_a_recording(tmp_path):
    source, out = tmp_path / "run", tmp_path / "out"
    source.mkdir()
    recorded(slowdown=1.1).save(source)
    done = podsim("--from", str(source), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "made up: 80 requests" in done.stdout
    assert "-9.1%" in done.stdout
    assert "llama-3-8b/profile.json, of other kernels than the engine's" in done.stdout
    files = {path.name for path in out.iterdir()}
    assert files >= {"comparison.csv", "comparison.json", "comparison.png", "step_errors.csv"}
    assert (out / STEPS_FILE).read_bytes() == (source / STEPS_FILE).read_bytes()
    table = pd.read_csv(out / "comparison.csv", index_col="metric")
    assert table.loc["request_throughput", "measured"] > 0
    again = podsim("--from", str(source), "--json")
    printed = json.loads(again.stdout)
    assert printed == json.loads((out / "comparison.json").read_text())
    assert printed["steps"]["all"]["bias"] == pytest.approx(1 / 1.1 - 1)


def paged_deployment(folder: Path) -> Deployment:
    """Of costs that are made up: a table takes 40 us, 1 a request and 0.01 a block."""
    costs = {"prefill": 1.1, "decode": 1.05}
    costs |= {"table_step": 4e-5, "table_request": 1e-6, "table_block": 1e-8}
    folder.mkdir()
    content = {"schema": 1, "gpu": "h200", "provenance": {}, "paged": {"16": costs}}
    (folder / "memory.json").write_text(json.dumps(content))
    return replace(DEPLOYMENT, kv="paged", memory_costs=str(folder))


def test_a_recording_over_blocks_is_compared_with_their_costs(tmp_path):
    run, source = recorded(1.0, paged_deployment(tmp_path / "costs")), tmp_path / "run"
    source.mkdir()
    run.save(source)
    comparison = compare(read_recording(source), error_bars=False)
    assert comparison.headline()["error"].abs().max() < 2e-4
    assert comparison.steps()["p90"].max() < 2e-4
    assert (comparison.recorded.steps["table_seconds"] > 5e-5 - 1e-7).all()
    done = podsim("--from", str(source))
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("Block table"))
    assert line.endswith("us of the host a step, beside that")
    ideal = compare(recorded(1.0), error_bars=False)
    slower = comparison.headline()["simulated"] / ideal.headline()["simulated"]
    assert slower["tbt_p50"] > 1.01


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A recording of 80 requests, some of which were refused."""
    folder = tmp_path_factory.mktemp("whole")
    recorded(1.0, replace(DEPLOYMENT, max_model_len=2000)).save(folder)
    return folder


def lines_of(path: Path) -> list[str]:
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix == ".gz" else data
    return text.decode().splitlines(keepends=True)


def write_lines(path: Path, lines: list[str]) -> None:
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def refused_with(folder: Path) -> str:
    """The one line that says what is wrong with a file of a recording."""
    with pytest.raises(InputError) as error:
        read_recording(folder)
    message = str(error.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("file", "column", "line", "value", "expected"),
    [
        (REQUESTS_FILE, "request_id", 5, "abc", "is 'abc', expected a whole number"),
        (REQUESTS_FILE, "request_id", 5, "9", "is 9, expected one more in every line"),
        (REQUESTS_FILE, "arrival_time", 5, "0.0", "is 0.0, expected no earlier time than the line"),
        (REQUESTS_FILE, "num_output_tokens", 5, "0", "is 0, expected a number over 0"),
        (REQUESTS_FILE, "finish_time", 5, "", "is nan, expected seconds of a request that was not"),
        (REQUESTS_FILE, "ttft", 5, "7.0", "is 7.0, expected first_token_time less arrival_time"),
        (REQUESTS_FILE, "tpot", 5, "inf", "is inf, expected a number of at least 0"),
        (STEPS_FILE, "duration", 9, "abc", "is 'abc', expected a number"),
        (STEPS_FILE, "duration", 9, "", "is nan, expected a number over 0"),
        (STEPS_FILE, "duration", 9, "-0.5", "is -0.5, expected a number over 0"),
        (STEPS_FILE, "gpu_seconds", 9, "nan", "is nan, expected a number of at least 0"),
        (STEPS_FILE, "num_sampled", 9, "", "is '', expected a whole number"),
        (STEPS_FILE, "num_decodes", 9, "1.5", "is '1.5', expected a whole number"),
        (STEPS_FILE, "num_decodes", 9, "1e400", "is '1e400', expected a whole number"),
        (STEPS_FILE, "start", 9, "0.0", "is 0.0, expected no earlier time than the line before"),
        (STEPS_FILE, "prefills", 2, "5?6", "is '5?6', expected tokens@context of each"),
        (STEPS_FILE, "prefills", 2, "5@6", "is '5@6', expected 1 with"),
        (TOKENS_FILE, "step", 9, "99999", "is 99999, expected one of the"),
        (TOKENS_FILE, "request_id", 9, "-1", "is -1, expected a number of at least 0"),
    ],
)
def test_a_wrong_value_of_a_recording_is_named(
    whole, tmp_path, file, column, line, value, expected
):
    folder = shutil.copytree(whole, tmp_path / "run")
    lines = lines_of(folder / file)
    cells = lines[line - 1].rstrip("\n").split(",")
    cells[lines[0].rstrip("\n").split(",").index(column)] = value
    lines[line - 1] = ",".join(cells) + "\n"
    write_lines(folder / file, lines)
    assert refused_with(folder).startswith(f"{file}: line {line}: {column} {expected}")


@pytest.mark.parametrize(
    ("file", "keep", "expected"),
    [
        (REQUESTS_FILE, 1, "requests.csv: no requests"),
        (REQUESTS_FILE, 41, "tokens.csv.gz: line "),
        (STEPS_FILE, 1, "tokens.csv.gz: line 2: step is 0, expected one of the 0 steps"),
        (STEPS_FILE, 501, "tokens.csv.gz: line "),
        (TOKENS_FILE, 1, "tokens.csv.gz: 0 tokens of step 0, expected 1"),
        (TOKENS_FILE, -1, "tokens.csv.gz: 0 tokens of step "),
        (CONFIG_FILE, 3, "config.toml: no 'attention'"),
        (CONFIG_FILE, -1, "config.toml: no 'preemption'"),
    ],
)
def test_a_recording_that_was_cut_at_the_end_of_a_line(whole, tmp_path, file, keep, expected):
    folder = shutil.copytree(whole, tmp_path / "run")
    write_lines(folder / file, lines_of(folder / file)[:keep])
    assert refused_with(folder).startswith(expected)


@pytest.mark.parametrize("file", [STEPS_FILE, TOKENS_FILE, REQUESTS_FILE, GPU_FILE])
def test_a_recording_that_was_cut_anywhere(whole, tmp_path, file):
    folder = shutil.copytree(whole, tmp_path / "run")
    data = (folder / file).read_bytes()
    for keep in (0, 10, len(data) // 2, len(data) - 5):
        (folder / file).write_bytes(data[:keep])
        assert refused_with(folder).startswith(f"{file}: ")
    middle = len(data) // 2
    (folder / file).write_bytes(data[:middle] + bytes(50) + data[middle + 50 :])
    assert refused_with(folder).startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": 99}, "not of schema 1: record it again"),
        ({"host_time": None}, "host_time is None, expected its parts"),
        ({"host_time": 3}, "host_time is 3, expected its parts"),
        ({"host_time": {"fixed": 1e-4}}, "host_time per_request is None, expected seconds"),
        ({"host_time": {"fixed": -1}}, "host_time fixed is -1, expected seconds"),
        ({"kernel_starts": [1e-6]}, "kernel_starts is [1e-06], expected two times in seconds"),
        ({"driver": None}, "driver is None, expected text"),
        ({"name": 7}, "name is 7, expected text"),
    ],
)
def test_a_machine_that_is_not_described_as_it_must_be(whole, tmp_path, change, expected):
    folder = shutil.copytree(whole, tmp_path / "run")
    content = json.loads((folder / ENGINE_FILE).read_text()) | change
    kept = {name: value for name, value in content.items() if value is not None}
    (folder / ENGINE_FILE).write_text(json.dumps(kept))
    assert refused_with(folder) == f"engine.json: {expected}"
    (folder / ENGINE_FILE).write_text("{")
    assert refused_with(folder).startswith("engine.json: not JSON: ")


def test_a_broken_recording_is_one_line_on_the_command_line(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / STEPS_FILE).write_bytes((whole / STEPS_FILE).read_bytes()[:2000])
    done = podsim("--from", str(folder), "--out", str(tmp_path / "out"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"podsim: {folder}/steps.csv.gz: broken: Compressed file ended before the end-of-stream "
        "marker was reached\n"
    )
    assert not (tmp_path / "out").exists()


def test_validate_refuses_what_cannot_be():
    done = podsim("--from", "nowhere")
    assert (done.returncode, done.stderr) == (
        2,
        "podsim: nowhere/engine.json: No such file or directory\n",
    )
    done = podsim("--from", "nowhere", "--qps", "3")
    assert (done.returncode, done.stderr) == (
        2,
        "podsim: --from takes what was recorded: leave out qps\n",
    )
    done = podsim("azure-conv-like", "--host-overhead", "0.1")
    assert (done.returncode, done.stderr) == (
        2,
        "podsim: host_overhead is the engine's own here: it is measured\n",
    )


def test_steps_keep_the_clock_that_they_ran_at(tmp_path):
    run = recording(1.0)
    run.sm_clock_mhz.extend(1500.0 + i % 7 for i in range(len(run.shapes)))
    Recorded.of(run, DEPLOYMENT, ENGINE, "made up").save(tmp_path)
    clocks = read_recording(tmp_path).steps["sm_clock_mhz"]
    assert clocks.tolist() == list(run.sm_clock_mhz)
    assert "sm_clock_mhz" not in recorded(1.0).steps  # of an engine that did not note it
