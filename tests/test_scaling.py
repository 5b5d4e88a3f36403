"""GPUs without a profile: costs by the roofline, labelled wherever a result is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from podsim.batch import BatchShape
from podsim.config import Deployment
from podsim.errors import InputError
from podsim.hardware import GPUS, gpu_named
from podsim.latency import ProfiledLatency, decode_steps
from podsim.model import model_named
from podsim.op_tables import LAYER_OPS
from podsim.profile import find_profile
from podsim.scaling import OTHER_CHIP, SAME_CHIP, Scaling
from podsim.simulation import latency_model_for, simulate_with_error_bars
from podsim.workload import synthetic_trace

LLAMA = model_named("llama-3-8b")
H200 = gpu_named("h200")
SCALED = [name for name in GPUS if name != "h200"]


def latency(gpu: str, attention: str = "serial") -> ProfiledLatency:
    return latency_model_for(Deployment(gpu=gpu, attention=attention), LLAMA)


def attention_ratio(gpu: str, shape: BatchShape) -> float:
    scaled, measured = (latency(name).attention.seconds("serial", shape) for name in (gpu, "h200"))
    return scaled / measured


def ratio(gpu: str, shape: BatchShape, part: str) -> float:
    scaled, measured = (getattr(latency(name).breakdown(shape), part) for name in (gpu, "h200"))
    return float(scaled / measured)


@pytest.mark.parametrize("gpu", SCALED)
def test_what_waits_for_memory_scales_by_bandwidth_and_matrix_work_by_flops(gpu: str) -> None:
    wanted = gpu_named(gpu)
    bandwidth = H200.peak_bandwidth / wanted.peak_bandwidth
    flops = H200.peak_flops / wanted.peak_flops
    decodes = BatchShape.of((), [8192] * 8)
    assert attention_ratio(gpu, decodes) == pytest.approx(bandwidth)
    # One token: the weights of every layer are read; but for the latency of the small kernels.
    assert ratio(gpu, BatchShape.of((), [10]), "layers") == pytest.approx(bandwidth, rel=0.15)
    prompt = BatchShape.of([(8192, 8192)])
    assert attention_ratio(gpu, prompt) == pytest.approx(flops)
    # Most of the layers' time for 8192 tokens is matrix products, the rest element-wise.
    low, high = sorted((bandwidth, flops))
    assert low * 0.99 < ratio(gpu, prompt, "layers") < high * 1.01


def test_which_roof_an_operation_is_under_is_decided_anew() -> None:
    """64 tokens are below the ridge of an H200 (206 FLOP a byte) and of an A100 (153); 180 tokens
    are only below that of an H200."""
    scaling = Scaling("profile", H200, gpu_named("a100"), LLAMA)
    table = {"num_tokens": [64, 180, 8192], "seconds": [1.0, 1.0, 1.0]}
    few, some, many = scaling.ops({"gate_up": table})["gate_up"]["seconds"]
    assert few == pytest.approx(4.8 / 2.039)
    assert many == pytest.approx(989 / 312)
    assert few < some < many


def test_a_kernel_without_weights_keeps_its_latency() -> None:
    scaling = Scaling("profile", H200, gpu_named("a100"), LLAMA)
    table = {"num_tokens": [1, 8192], "seconds": [2e-6, 52e-6]}
    scaled = scaling.ops({"rmsnorm": table})["rmsnorm"]["seconds"]
    assert scaled == pytest.approx([2e-6, 2e-6 + 50e-6 * 4.8 / 2.039])


def test_a_gpu_scaled_to_itself_costs_the_same() -> None:
    profile = find_profile("h200", LLAMA)
    scaling = Scaling("profile", H200, H200, LLAMA)
    same = ProfiledLatency(
        replace(profile, ops=scaling.ops(profile.ops), scaling=scaling), LLAMA, "pod"
    )
    # Numbers of tokens that were measured, where none fewer took longer.
    shape = BatchShape.of([(400, 4096), (30, 30)], [100, 300, 7000])
    measured = ProfiledLatency(profile, LLAMA, "pod")
    assert same.step_time(shape) == pytest.approx(measured.step_time(shape), rel=1e-12)


def test_many_decode_steps_at_once_are_the_same_to_the_last_bit() -> None:
    model = latency("a100")
    shape = BatchShape.of((), [900, 4000, 17])
    steps = [model.step_time(step) for step in decode_steps(shape, 50)]
    assert model.decode_run_times(shape, 50) == steps


def test_the_interval_is_wide_and_widest_on_another_chip() -> None:
    low, high = latency("h200").likely_scales()
    assert np.allclose(latency("h100").likely_scales(), (low / SAME_CHIP, high * SAME_CHIP))
    for gpu in ("a100", "h100-pcie", "l40s", "b200"):
        assert np.allclose(latency(gpu).likely_scales(), (low / OTHER_CHIP, high * OTHER_CHIP))
    trace = synthetic_trace("poisson", 2, 20, "500", "20")
    result = simulate_with_error_bars(trace, Deployment(gpu="a100"))
    assert result.intervals is not None
    short, long = result.intervals["tpot_p50"]
    assert long / short > 2.5


def test_a_measured_gpu_says_nothing_and_no_model_is_made_up() -> None:
    assert find_profile("h200", LLAMA).scaling is None
    assert latency("h200").notes() == []
    with pytest.raises(InputError, match="no shipped profile of deeper on h200"):
        find_profile("h200", replace(LLAMA, name="deeper", num_layers=33))
    with pytest.raises(InputError, match="no shipped profile of deeper on a100"):
        find_profile("a100", replace(LLAMA, name="deeper", num_layers=33))
    with pytest.raises(InputError, match="no shipped profile of llama-3-8b on mi300x"):
        find_profile("mi300x", LLAMA)


def podsim(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "podsim", *arguments], capture_output=True, text=True, check=True
    )
    return run.stdout


REQUESTS = ("azure-conv-like", "--requests", "40")


def test_simulate_labels_terminal_summary_and_report(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = podsim("simulate", *REQUESTS, "--gpu", "a100", "--out", str(out))
    assert "on a100 (uncalibrated)" in printed
    assert "uncalibrated: nobody measured a100" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["podsim"]["uncalibrated"].startswith("uncalibrated: nobody measured a100")
    page = (out / "report.html").read_text()
    assert page.count("uncalibrated") >= 2
    assert "uncalibrated" not in podsim("simulate", *REQUESTS)


def test_compare_labels_the_variants_it_holds_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = podsim("compare", *REQUESTS, "--gpu", "h200,l40s", "--out", str(out))
    assert "l40s: uncalibrated: nobody measured l40s" in printed
    assert "h200: uncalibrated" not in printed
    assert "l40s: uncalibrated" in (out / "report.html").read_text()
    table = pd.read_csv(out / "compare.csv", index_col="metric")
    assert table.loc["uncalibrated", ["h200", "l40s"]].to_dict() == {"h200": 0, "l40s": 1}


def test_what_lies_beyond_the_measured_is_said_by_all(tmp_path: Path) -> None:
    """Two prompts, one of them longer than any that was timed, where memory is no matter."""
    trace = tmp_path / "two.csv"
    trace.write_text("arrival_time,num_prompt_tokens,num_output_tokens\n0,1000,8\n9,120000,2\n")
    options = (str(trace), "--model", "llama-3.1-8b", "--max-num-seqs", "2")
    out = tmp_path / "out"
    podsim("simulate", *options, "--token-budget", "9000", "--out", str(out))
    share = json.loads((out / "summary.json").read_text())["podsim"]["outside_measured_share"]
    assert 0.5 < share < 1.0
    printed = podsim("compare", *options, "--token-budget", "9000,512")
    assert f"token_budget=9000: {share:.1%} of the simulated step time was predicted" in printed
    inside = podsim("compare", *REQUESTS, "--attention", "serial,pod")
    assert "predicted beyond" not in inside


def test_compare_says_which_differences_are_larger_than_their_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--token-budget", "256,4096", "--out", str(out))
    printed = podsim("compare", *REQUESTS, "--attention", "serial", *options)
    (line,) = (line for line in printed.splitlines() if line.startswith("Errors"))
    assert line.startswith("Errors       token_budget=4096 against token_budget=256: larger than")
    clear, rest = line.split("larger than their error: ")[1].split("; not: ")
    table = pd.read_csv(out / "compare.csv", index_col="metric")
    first, other = "token_budget=256", "token_budget=4096"
    apart = (table[f"{first} high"] < table[f"{other} low"]) | (
        table[f"{other} high"] < table[f"{first} low"]
    )
    labels = {"ttft_p50": "TTFT P50", "tbt_p99": "TBT P99", "tpot_p50": "TPOT P50"}
    assert set(labels.values()) <= {*clear.split(", "), *rest.split(", ")}
    for key, label in labels.items():
        assert (label in clear.split(", ")) == apart[key]
    printed = podsim("compare", *REQUESTS, "--attention", "serial,pod", "--no-error-bars")
    assert "Errors  " not in printed
    assert "~" not in printed


def test_simulate_has_error_bars_unless_told_not_to() -> None:
    interval = r"Throughput   [0-9.]+ req/s \([0-9.]+ to [0-9.]+\)"
    assert re.search(interval, podsim("simulate", *REQUESTS))
    assert not re.search(interval, podsim("simulate", *REQUESTS, "--no-error-bars"))


def test_capacity_and_sweep_say_it(tmp_path: Path) -> None:
    printed = podsim(
        *("capacity", "--arrivals", "poisson", "--requests", "40", "--at", "1", "--seeds", "1"),
        *("--gpu", "a100", "--jobs", "1"),
    )
    assert "uncalibrated: nobody measured a100" in printed
    plan = tmp_path / "plan.toml"
    plan.write_text(
        'trace = "azure-conv-like"\nrequests = 20\ngpu = ["h200", "b200"]\nreplicas = [1, 2]\n'
    )
    printed = podsim("sweep", str(plan), "--out", str(tmp_path / "swept"), "--jobs", "1")
    assert printed.count("uncalibrated: nobody measured b200") == 1
    swept = pd.read_csv(tmp_path / "swept" / "sweep.csv")
    assert swept.set_index("gpu")["uncalibrated"].to_dict() == {"h200": 0, "b200": 1}


def test_layers_are_those_of_the_tables() -> None:
    scaling = Scaling("profile", H200, gpu_named("b200"), LLAMA)
    assert set(scaling.ops(find_profile("h200", LLAMA).ops)) >= set(LAYER_OPS)
