"""The table of benchmarks/same_tokens.py, of recordings whose differences are known."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("triton", reason="the kernels need triton")

from tests.test_validation import DEPLOYMENT, ENGINE, paged_deployment, recording

SOURCE = Path(__file__).parent.parent / "benchmarks" / "same_tokens.py"


@pytest.fixture
def same_tokens(monkeypatch):
    spec = importlib.util.spec_from_file_location("same_tokens", SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "same_tokens", module)
    spec.loader.exec_module(module)
    return module


def kind(same_tokens, deployment, tokens, *slowdowns):
    served = []
    for slowdown in slowdowns:
        made = recording(slowdown, deployment, qps=1e4)
        served.append(SimpleNamespace(recording=made, engine=lambda options: ENGINE))
    return same_tokens.Kind(deployment, None, tokens, served)


def test_differences_of_times_and_tokens(same_tokens, tmp_path):
    """Blocks cost what is simulated; then 5 % more, which the simulation does not know."""
    paged = paged_deployment(tmp_path / "costs")
    tokens = {0: [1, 2, 3], 1: [4, 5], 2: [6]}
    base = kind(same_tokens, DEPLOYMENT, tokens, 1.0, 1.3, 1.0)
    equal = kind(same_tokens, paged, {**tokens}, 1.0)
    slower = kind(same_tokens, paged, tokens | {0: [1, 9, 8], 2: [7]}, 1.05)
    rows = same_tokens.table({"ideal": base, "paged": equal, "slower": slower})
    first, second = rows.to_dict("records")
    assert first["kv"] == "paged over ideal"
    assert first["throughput measured %"] < -0.2
    assert first["points off"] == pytest.approx(0, abs=0.1)
    assert first["step simulated %"] == pytest.approx(first["step measured %"], abs=0.1)
    assert (first["same sign"], first["same tokens"]) == ("yes", "yes")
    assert first["tokens differing"] == 0
    assert second["points off"] == pytest.approx(4.7, abs=0.4)
    assert second["gpu measured %"] - first["gpu measured %"] == pytest.approx(5.0, abs=0.4)
    assert (second["same tokens"], second["tokens differing"]) == ("no", 3)
    assert second["requests differing"] == 2


def test_the_table_is_left_as_csv_and_printed(same_tokens, tmp_path, capsys, monkeypatch):
    """Its columns hold text beside numbers, whose format pandas calls. The file comes first."""
    paged = paged_deployment(tmp_path / "costs")
    tokens = {0: [1, 2, 3]}
    kinds = {"ideal": kind(same_tokens, DEPLOYMENT, tokens, 1.0)}
    kinds["paged"] = kind(same_tokens, paged, tokens, 1.0)
    rows = same_tokens.table(kinds)
    same_tokens.report(rows, tmp_path / "tokens.csv")
    printed = capsys.readouterr().out
    assert re.search(rf"throughput measured % +{rows['throughput measured %'][0]:.2f}\n", printed)
    assert re.search(r"same tokens +yes\n", printed)
    left = pd.read_csv(tmp_path / "tokens.csv")
    assert left["points off"][0] == pytest.approx(rows["points off"][0], abs=1e-6)

    monkeypatch.setattr(pd.DataFrame, "to_string", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        same_tokens.report(rows, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "tokens.csv").read_bytes()


def test_every_kind_has_room_for_the_same_requests(same_tokens):
    options = argparse.Namespace(
        model="llama-3-8b", attention="pod", block_size=32, longest=3000, memory_costs=None
    )
    kinds = ("ideal", "paged", "vattention", "sliced")
    blocks = {kv: same_tokens.deployment(kv, options) for kv in kinds}
    assert blocks["ideal"].num_blocks == blocks["paged"].num_blocks == 48 * 94
    assert blocks["vattention"].num_blocks == 48 * 3
    assert blocks["sliced"].num_blocks == 48 * 24
    assert (blocks["sliced"].kv, blocks["sliced"].kv_tensors) == ("vattention", "sliced")
    trace = same_tokens.requests(50, 3000)
    assert (trace.num_prompt_tokens + trace.num_output_tokens).max() <= 3000
    assert set(trace.arrival_time) == {0.0}
