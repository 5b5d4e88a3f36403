"""Files for other tools: the JSON of `vllm bench serve`, AIPerf's records, Parquet."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import podsim
from podsim.config import Workload
from podsim.errors import InputError
from podsim.report import Outputs, save
from podsim.request_records import AIPERF_FILE, token_gaps
from podsim.simulation import Result

# A result as `vllm bench serve --save-result --save-detailed --percentile-metrics
# ttft,tpot,itl,e2el` writes it: three requests, one of which failed. Written by hand.
VLLM_RESULT = {
    "date": "20260101-120000",
    "backend": "openai",
    "label": None,
    "model_id": "meta-llama/Meta-Llama-3-8B",
    "tokenizer_id": "meta-llama/Meta-Llama-3-8B",
    "num_prompts": 3,
    "request_rate": 2.0,
    "burstiness": 1.0,
    "max_concurrency": None,
    "duration": 1.5,
    "completed": 2,
    "failed": 1,
    "total_input_tokens": 30,
    "total_output_tokens": 5,
    "request_throughput": 2 / 1.5,
    "request_goodput": None,
    "output_throughput": 5 / 1.5,
    "total_token_throughput": 35 / 1.5,
    "max_output_tokens_per_s": 4.0,
    "max_concurrent_requests": 2,
    "input_lens": [10, 20, 5],
    "output_lens": [3, 2, 0],
    "ttfts": [0.1, 0.3, 0.0],
    "itls": [[0.1, 0.3], [0.5], []],
    "latencies": [0.5, 0.8, 0.0],
    "start_times": [100.0, 100.4, 100.6],
    "errors": ["", "", "too long"],
    **{"mean_ttft_ms": 200.0, "median_ttft_ms": 200.0, "std_ttft_ms": 100.0, "p99_ttft_ms": 298.0},
    **{"mean_tpot_ms": 350.0, "median_tpot_ms": 350.0, "std_tpot_ms": 150.0, "p99_tpot_ms": 497.0},
    **{"mean_itl_ms": 300.0, "median_itl_ms": 300.0, "p99_itl_ms": 496.0},
    **{"std_itl_ms": float(np.std([100, 300, 500]))},
    **{"mean_e2el_ms": 650.0, "median_e2el_ms": 650.0, "std_e2el_ms": 150.0, "p99_e2el_ms": 797.0},
}


def check_as_vllm_does(found: dict[str, object]) -> None:
    """Recompute every number from the lists, by the definitions of vLLM's calculate_metrics."""

    def column(name: str) -> list[object]:
        values = found[name]
        assert isinstance(values, list)
        return values

    ok = [not error for error in column("errors")]
    assert found["completed"] == sum(ok)
    assert found["failed"] == len(ok) - sum(ok)
    assert found["num_prompts"] == len(ok)
    lists = ("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times")
    inputs, outputs, ttfts, itls, latencies, starts = (
        [value for value, keep in zip(column(name), ok, strict=True) if keep] for name in lists
    )
    duration = found["duration"]
    assert isinstance(duration, float)
    assert found["total_input_tokens"] == sum(inputs)
    assert found["total_output_tokens"] == sum(outputs)
    assert found["request_throughput"] == pytest.approx(len(inputs) / duration)
    assert found["output_throughput"] == pytest.approx(sum(outputs) / duration)
    assert found["total_token_throughput"] == pytest.approx(sum([*inputs, *outputs]) / duration)
    tpots = [
        (latency - ttft) / (n - 1)
        for latency, ttft, n in zip(latencies, ttfts, outputs, strict=True)
        if n > 1
    ]
    samples = {
        "ttft": np.array(ttfts, dtype=float),
        "tpot": np.array(tpots),
        "itl": np.array([gap for gaps in itls for gap in gaps]),
        "e2el": np.array(latencies, dtype=float),
    }
    for name, values in samples.items():
        expected = {"mean": values.mean(), "median": np.median(values), "std": values.std()}
        expected["p99"] = np.percentile(values, 99)
        for statistic, value in expected.items():
            assert found[f"{statistic}_{name}_ms"] == pytest.approx(value * 1000, rel=1e-6)
    begin = min(starts)
    tokens = [
        start + ttft + after - begin
        for start, ttft, gaps in zip(starts, ttfts, itls, strict=True)
        for after in [0.0, *np.cumsum(gaps).tolist()]
    ]
    assert found["max_output_tokens_per_s"] == np.bincount(np.array(tokens).astype(int)).max()
    changes = [(start, 1) for start in starts]
    changes += [(a + b, -1) for a, b in zip(starts, latencies, strict=True)]
    running = np.cumsum([change for _, change in sorted(changes)])
    assert found["max_concurrent_requests"] == running.max()


@pytest.fixture(scope="module")
def result() -> Result:
    trace = podsim.load_trace("azure-conv-like").head(400)
    return podsim.simulate(trace, podsim.Deployment(attention="pod", replicas=2))


@pytest.fixture(scope="module")
def folder(result: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results")
    workload = Workload(trace="azure-conv-like", requests=400)
    pytest.importorskip("pyarrow")
    save(result, workload, path, Outputs(parquet=True, aiperf=True, save_detailed=True))
    return path


def test_the_reader_of_vllm_results_reads_both(folder: Path) -> None:
    ours = json.loads((folder / "summary.json").read_text())
    for found in (VLLM_RESULT, ours):
        check_as_vllm_does(found)
    missing = VLLM_RESULT.keys() - ours.keys()
    # A date would differ between runs; the others have no meaning without a client.
    assert missing == {"date", "label", "tokenizer_id", "burstiness", "max_concurrency"}
    assert ours["failed"] > 0  # the trace has requests that are too long


def test_the_gaps_of_all_requests_are_the_gaps_of_the_log(result: Result) -> None:
    gaps = np.concatenate([*token_gaps(result.requests, result.steps)])
    assert len(gaps) == sum(result.log.gap_count)
    expected = np.repeat(result.log.gap_duration, result.log.gap_count)
    np.testing.assert_allclose(np.sort(gaps), np.sort(expected), rtol=1e-6)


def test_the_gaps_of_a_preempted_request_are_not_made_up() -> None:
    trace = podsim.synthetic_trace(
        arrivals="static", qps=None, num_requests=40, prompt_tokens="200", output_tokens="300"
    )
    deployment = podsim.Deployment(num_blocks=500)
    result = podsim.simulate(trace, deployment, latency_model=podsim.ConstantLatency(0.01))
    preempted = (result.requests["num_preemptions"] > 0).tolist()
    assert any(preempted)
    for gaps, lost in zip(token_gaps(result.requests, result.steps), preempted, strict=True):
        assert len(gaps) in ((0, 299) if lost else (299,))
    assert sum(not gaps for gaps in token_gaps(result.requests, result.steps)) > 0


def test_aiperf_records(result: Result, folder: Path) -> None:
    records = [json.loads(line) for line in (folder / AIPERF_FILE).read_text().splitlines()]
    table = result.requests
    assert len(records) == len(table)
    for record, row in zip(records, table.to_dict("records"), strict=True):
        assert set(record) == {"metadata", "metrics", "error"}
        metadata, metrics = record["metadata"], record["metrics"]
        assert metadata["benchmark_phase"] == "profiling"
        assert metadata["request_start_ns"] == round(row["arrival_time"] * 1e9)
        if row["refused"]:
            assert record["error"]["message"] == row["refused"]
            assert metrics == {"error_isl": {"value": row["num_prompt_tokens"], "unit": "tokens"}}
            continue
        assert record["error"] is None
        assert metrics["time_to_first_token"]["unit"] == "ms"
        assert metrics["time_to_first_token"]["value"] == pytest.approx(row["ttft"] * 1000)
        assert metrics["request_latency"]["value"] == pytest.approx(row["e2e_latency"] * 1000)
        length = metadata["request_end_ns"] - metadata["request_start_ns"]
        assert length / 1e6 == pytest.approx(metrics["request_latency"]["value"], rel=1e-5)
        assert ("inter_token_latency" in metrics) == (row["num_output_tokens"] > 1)


def test_parquet_holds_the_tables(folder: Path, result: Result) -> None:
    for name, table in (("requests", result.requests), ("steps", result.steps)):
        parquet, csv = pd.read_parquet(folder / f"{name}.parquet"), folder / f"{name}.csv"
        assert list(parquet.columns) == list(pd.read_csv(csv, nrows=1).columns)
        assert len(parquet) == len(table)
        seconds = [column for column in parquet.columns if column.endswith("_s")]
        expected = table[[column.removesuffix("_s") for column in seconds]].to_numpy()
        np.testing.assert_array_equal(parquet[seconds].to_numpy(), expected)


def test_outputs_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="trace_events is 0, expected at least 1"):
        Outputs(trace_events=0)
    with pytest.raises(InputError, match="--aiperf needs a folder: give --out FOLDER"):
        Outputs(aiperf=True).require_folder(None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--parquet needs pyarrow"):
        Outputs(parquet=True)
