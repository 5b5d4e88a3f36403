"""The shipped trace: made again byte for byte, and true to the published statistics."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from podsim.traces import azure_conv_like

from podsim.workload import load_trace

# Of the conversation workload of the Azure LLM inference trace 2023.
RATE = 5.53  # requests/s
GAP_CV = 1.094
CORRELATION = -0.112
PROMPTS = {"mean": 1154.7, "quantiles": [1020, 2734.5, 4142, 14050]}
OUTPUTS = {"mean": 211.1, "quantiles": [129, 424, 601, 1000]}


def test_made_again_byte_for_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "again.csv"
    monkeypatch.setattr(sys, "argv", ["azure_conv_like", "--out", str(out)])
    azure_conv_like.main()
    assert capsys.readouterr().out == f"6000 requests with seed 2023: {out}\n"
    assert out.read_bytes() == azure_conv_like.OUT.read_bytes()
    assert out.stat().st_size < 150_000


def test_arrivals() -> None:
    trace = load_trace("azure-conv-like")
    assert (trace.name, len(trace), trace.notes) == ("azure-conv-like", 6000, ())
    assert trace.qps == pytest.approx(RATE, rel=0.01)
    gaps = np.diff(trace.arrival_time)
    assert gaps.std() / gaps.mean() == pytest.approx(GAP_CV, rel=0.03)
    # Consecutive gaps are independent.
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.04


@pytest.mark.parametrize(
    ("column", "published"), [("num_prompt_tokens", PROMPTS), ("num_output_tokens", OUTPUTS)]
)
def test_lengths(column: str, published: dict[str, object]) -> None:
    lengths: NDArray[np.int64] = getattr(load_trace("azure-conv-like"), column)
    assert lengths.mean() == pytest.approx(published["mean"], rel=0.01)
    quantiles = np.percentile(lengths, [50, 90, 99, 100])
    assert quantiles == pytest.approx(published["quantiles"], rel=0.02)


def test_long_prompts_have_slightly_shorter_outputs() -> None:
    trace = load_trace("azure-conv-like")
    correlation = np.corrcoef(trace.num_prompt_tokens, trace.num_output_tokens)[0, 1]
    assert correlation == pytest.approx(CORRELATION, abs=0.02)
