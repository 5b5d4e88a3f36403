"""`podsim validate` as typed, on a server that is made up: the engine, and the profile's times."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("triton", reason="the kernels need triton")

from podsim import serving, shared_server, validate_command
from podsim.cli import main
from podsim.decode_group import ListedDecodes
from podsim.engine import Engine
from podsim.hardware import gpu_named
from podsim.kv_cache import num_blocks_for
from podsim.memory_system import kv_cache_for
from podsim.model import model_named
from podsim.replica_heat import Heat
from podsim.scheduler import SCHEDULERS
from podsim.simulation import latency_model_for, requests_of

MACHINE = {"device_name": "made up", "driver": "1", "torch": "2", "triton": "3"}
HOST_TIME = serving.HostTime(0.0, 0.0, 0.0, [(1, 0.0)], [(1, 0.0)])
HEADER = "arrival_time,num_prompt_tokens,num_output_tokens"


class MadeUpSteps:
    """Steps take what the latency model says; the clock is by hand."""

    gpu_seconds = table_seconds = 0.0

    def __init__(self, heat: Heat) -> None:
        self.heat, self.time = heat, 0.0

    def now(self) -> float:
        return self.time

    def wait_until(self, time: float) -> None:
        self.time = time

    def run(self, inputs, foresee):
        self.gpu_seconds = self.heat.step_time(inputs.shape, self.time)
        self.time += self.gpu_seconds
        return np.zeros(len(inputs.sample_rows), np.int64)


class MadeUpServer:
    num_served = 0
    kernel_starts = (1.1e-6, 1.12e-6)

    def __init__(self, deployment, max_len, on_progress) -> None:
        serving.require_servable(deployment)
        self.deployment = deployment

    def serve(self, trace, step_time, seed):
        MadeUpServer.num_served += 1
        deployment, model = self.deployment, model_named(self.deployment.model)
        num_blocks = num_blocks_for(deployment, model, gpu_named(deployment.gpu))
        kv_cache = kv_cache_for(deployment, model, num_blocks)
        steps = MadeUpSteps(Heat(latency_model_for(deployment, model)))
        engine = Engine(
            steps,
            SCHEDULERS[deployment.scheduler](kv_cache, deployment, ListedDecodes(16), step_time),
            kv_cache,
            num_slots=deployment.max_num_seqs,
            max_model_len=deployment.max_model_len or model.max_model_len,
            vocab_size=1000,
            seed=seed,
            clock=steps,
        )
        samples = [(0.0, 1900.0, 500.0)]
        recording = engine.serve(requests_of(trace))
        starts = self.kernel_starts
        return serving.Served(recording, samples, HOST_TIME, num_blocks, MACHINE, starts)

    def close(self) -> None:
        pass


@pytest.fixture
def podsim(monkeypatch, capsys, tmp_path):
    """Types `podsim validate ...` in an empty folder: exit status, stdout, stderr."""
    monkeypatch.setattr(shared_server, "server_for", MadeUpServer)
    monkeypatch.setattr(MadeUpServer, "num_served", 0)
    monkeypatch.chdir(tmp_path)

    def typed(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["podsim", "validate", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return typed


def write_trace(*rows: str, more: str = "") -> str:
    Path("trace.csv").write_text("\n".join([HEADER + more, *rows]) + "\n")
    return "trace.csv"


def test_requests_are_let_in_by_priority_and_simulated_so(podsim):
    trace = write_trace("0,400,9,3", "0.001,400,2,2", "0.001,400,2,0", more=",priority")
    options = ("--order", "priority", "--max-num-seqs", "1", "--token-budget", "512")
    code, _, err = podsim(trace, *options, "--out", "run")
    assert (code, err) == (0, "")
    requests = pd.read_csv("run/requests.csv")
    assert requests["priority"].tolist() == [3, 2, 0]
    assert requests["finish_time"].argsort().tolist() == [0, 2, 1]
    pairs = pd.read_csv("run/request_pairs.csv")
    assert pairs["e2e_latency"].tolist() == pytest.approx(pairs["e2e_latency_simulated"], rel=0.02)
    assert podsim("--from", "run", "--out", "again")[0] == 0
    assert "priority" in Path("again/requests.csv").read_text()
    requests.drop(columns="priority").to_csv("run/requests.csv", index=False)
    line = "podsim: run/requests.csv: no column 'priority'\n"
    assert podsim("--from", "run") == (2, "", line)


def test_kernels_that_begin_closer_together_after_a_run_are_told_of(podsim, monkeypatch):
    trace = write_trace("0,400,9", "0.001,400,2")
    _, out, _ = podsim(trace)
    assert "small kernels" not in out
    monkeypatch.setattr(MadeUpServer, "kernel_starts", (1.1e-6, 0.9e-6))
    _, out, _ = podsim(trace, "--out", "run")
    note = (
        "Note         small kernels began 1.10 us apart when the engine's graphs were captured and "
        "0.90 after the run: another process began or ended"
    )
    assert note in out
    assert json.loads(Path("run/engine.json").read_text())["kernel_starts"] == [1.1e-6, 9e-7]
    assert note in podsim("--from", "run")[1]
    monkeypatch.setattr(MadeUpServer, "kernel_starts", (0.9e-6, 1.1e-6))
    _, out, _ = podsim(trace)
    assert "1.10 after the run: the GPU was not in one state" in out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--replay", "closed"), "the engine serves with replay 'open', not 'closed'"),
        (("--order", "priority"), "trace.csv: order 'priority' needs a column 'priority'"),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_is(podsim, options, line):
    trace = write_trace("0,400,20,1,", "0.1,700,10,1,5.0", more=",session_id,think_time")
    assert podsim(trace, *options, "--out", "run") == (2, "", f"podsim: {line}\n")
    assert MadeUpServer.num_served == 0
    assert not Path("run").exists()


@pytest.mark.parametrize("fails", ["compare", "save"])
def test_what_was_served_is_kept_whatever_becomes_of_the_comparison(podsim, monkeypatch, fails):
    """It is compared later, from the recording."""
    trace = write_trace("0,400,9", "0.1,700,5")

    def fail(*arguments):
        raise ZeroDivisionError(fails)

    with monkeypatch.context() as broken:
        broken.setattr(validate_command, fails, fail)
        with pytest.raises(ZeroDivisionError):
            podsim(trace, "--out", "run")
    assert [path.name for path in Path().glob("*run*")] == ["run"]
    assert not Path("run/comparison.csv").exists()
    code, out, _ = podsim("--from", "run", "--out", "run")
    assert (code, MadeUpServer.num_served) == (0, 1)
    assert ": 2 requests" in out
    assert Path("run/comparison.csv").exists()


def test_a_run_in_which_every_request_was_refused_is_one_line(podsim):
    trace = write_trace("0,400,9", "0.1,700,5")
    code, out, err = podsim(trace, "--max-model-len", "300", "--out", "run")
    assert (code, out) == (2, "")
    assert err == (
        "podsim: trace.csv, 10.00 req/s, serial attention: every request was refused: the first is "
        "longer than max_model_len (300)\n"
    )
    assert not Path("run").exists()


def test_refused_requests_are_counted_where_there_are_any(podsim):
    trace = write_trace("0,400,9", "0.1,700,5", "0.2,600,5")
    code, out, _ = podsim(trace, "--max-model-len", "500", "--out", "run")
    assert code == 0
    assert "refused 2.00 2.00 +0.0%" in " ".join(out.split())
    counted = json.loads(Path("run/comparison.json").read_text())["metrics"]["refused"]
    assert (counted["measured"], counted["simulated"]) == (2, 2)
    code, out, _ = podsim(trace, "--out", "run")
    assert (code, "refused" in out) == (0, False)
    assert "refused" not in json.loads(Path("run/comparison.json").read_text())["metrics"]
