"""The table of benchmarks/same_tokens.py, of recordings whose differences are known."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from podsim.config import Deployment
from podsim.simulation import simulate
from podsim.validation import Recorded

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("triton", reason="the kernels need triton")

from tests.test_validation import DEPLOYMENT, ENGINE, paged_deployment, recording

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "benchmarks" / "same_tokens.py"
KEPT = ROOT / "benchmarks" / "memory" / "h200-same-tokens"


@pytest.fixture
def same_tokens(monkeypatch):
    spec = importlib.util.spec_from_file_location("same_tokens", SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "same_tokens", module)
    spec.loader.exec_module(module)
    return module


def a_round(deployment: Deployment, slowdown: float = 1.0, kv: str = "made up") -> Recorded:
    return Recorded.of(recording(slowdown, deployment, qps=1e4), deployment, ENGINE, kv)


def kind(same_tokens, deployment, tokens, *slowdowns):
    made = same_tokens.Kind()
    for slowdown in slowdowns:
        made.add(a_round(deployment, slowdown), tokens)
    return made


def mapped_round(slowdown: float = 1.0) -> Recorded:
    """Prompts wait 2 ms, in which each maps 32 page-groups."""
    deployment = Deployment(attention="pod", token_budget=512, max_num_seqs=32, kv="vattention")
    run = a_round(deployment, slowdown)
    prompts = run.steps["num_prefills"] > 0
    steps = run.steps.assign(
        mapping_seconds=prompts * 0.002,
        mapped_page_groups=prompts * 32,
        duration=run.steps["duration"] + prompts * 0.002,
    )
    return replace(run, steps=steps)


def test_differences_of_times_and_tokens(same_tokens, tmp_path):
    """Blocks cost what is simulated; then 5 % more, which the simulation does not know."""
    paged = paged_deployment(tmp_path / "costs")
    tokens = {0: [1, 2, 3], 1: [4, 5], 2: [6]}
    base = kind(same_tokens, DEPLOYMENT, tokens, 1.0, 1.3, 1.0)
    equal = kind(same_tokens, paged, {**tokens}, 1.0)
    slower = kind(same_tokens, paged, tokens | {0: [1, 9, 8], 2: [7]}, 1.05)
    kinds = {"ideal": base, "paged": equal, "slower": slower}
    rows = same_tokens.table(kinds, same_tokens.parts(kinds))
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
    rows = same_tokens.table(kinds, same_tokens.parts(kinds))
    by_part = same_tokens.parts(kinds)
    same_tokens.report(rows, by_part, tmp_path / "tokens.csv")
    printed = capsys.readouterr().out
    assert re.search(rf"throughput measured % +{rows['throughput measured %'][0]:.2f}\n", printed)
    assert re.search(r"same tokens +yes\n", printed)
    left = pd.read_csv(tmp_path / "tokens.csv")
    assert left["points off"][0] == pytest.approx(rows["points off"][0], abs=1e-6)
    parts = pd.read_csv(tmp_path / "tokens-parts.csv").set_index(["kv", "source"])
    step_ms = by_part.loc[("paged", "simulated"), "step_ms"]
    assert parts.loc[("paged", "simulated"), "step_ms"] == pytest.approx(step_ms, abs=1e-6)

    monkeypatch.setattr(pd.DataFrame, "to_string", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        same_tokens.report(rows, by_part, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == (tmp_path / "tokens.csv").read_bytes()


def test_a_step_is_taken_apart(same_tokens, tmp_path):
    """What a kind measured and what is simulated of it add up. A table takes 40 us by its costs,
    and one a request.
    """
    paged = paged_deployment(tmp_path / "costs")
    kinds = {"paged": kind(same_tokens, paged, {0: [1]}, 1.0), "vattention": same_tokens.Kind()}
    kinds["vattention"].add(mapped_round(), {0: [1]})
    found = same_tokens.parts(kinds)
    for row in found.to_dict("records"):
        named = sum(row[f"{name}_ms"] for name in ("gpu", "mapping", "table", "host"))
        assert named == pytest.approx(row["step_ms"])
    of_paged, simulated = found.loc["paged", "measured"], found.loc["paged", "simulated"]
    assert simulated["step_ms"] == pytest.approx(of_paged["step_ms"], rel=2e-4)
    assert of_paged["table_ms"] > 0.05
    assert 0.04 < simulated["table_ms"] < 0.04 + 0.033
    assert simulated["host_ms"] > 0.2
    mapped = kinds["vattention"].rounds[0].steps["num_prefills"] > 0
    assert found.loc[("vattention", "measured"), "mapping_ms"] == pytest.approx(2 * mapped.mean())
    assert 0 < found.loc[("vattention", "simulated"), "mapping_ms"] < 2 * mapped.mean()


def test_what_a_page_group_took_is_said(same_tokens):
    mapped = same_tokens.Kind()
    for _ in range(2):
        mapped.add(mapped_round(), {0: [1]})
    steps = mapped.rounds[0].steps["num_prefills"].gt(0).sum()
    said = same_tokens.mapping_summary("vattention", mapped)
    assert f"{steps} steps a round mapped {32 * steps} page-groups; us of one: 62.5 (by" in said
    assert "nan while the host's time was measured, 51.4 by the memory costs" in said
    host = {**ENGINE["host_time"], "mapping_rows": [[64, 0.003], [32, 0.0018]]}
    mapped.rounds[0] = replace(mapped.rounds[0], engine={**ENGINE, "host_time": host})
    assert ", 50.0 while the host's" in same_tokens.mapping_summary("vattention", mapped)


def test_rounds_that_were_kept_say_the_same(same_tokens, tmp_path):
    """As a user types it, without a GPU. The second round of one kind had another token."""
    kinds = {"ideal": same_tokens.Kind(), "vattention": same_tokens.Kind()}
    for number in range(2):
        for kv, made in (("ideal", a_round(DEPLOYMENT)), ("vattention", mapped_round())):
            tokens = {3: [5, 6], 1: [7, 8 + (kv == "ideal" and number)]}
            kinds[kv].add(made, tokens)
            same_tokens.keep(tmp_path / "served" / f"{kv}-{number}", made, tokens)
    again = same_tokens.read_kept(list(kinds), tmp_path / "served", None)
    assert [again[kv].tokens for kv in again] == [kinds[kv].tokens for kv in kinds]
    assert [again[kv].num_changed for kv in again] == [1, 0]
    before, after = same_tokens.parts(kinds), same_tokens.parts(again)
    pd.testing.assert_frame_equal(before, after, rtol=1e-3, atol=1e-3)

    command = [sys.executable, str(SOURCE), "--from", "served", "--kv", "ideal,vattention"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 tokens changed from round to round" in done.stdout
    assert "62.5 (by step: P10 62.5" in done.stdout
    assert re.search(r"points off +-?\d", done.stdout)
    command[-1] = "ideal,paged"
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Error: served: no rounds of paged, which would be paged-0 and so on\n"


@pytest.mark.parametrize(
    ("kv", "seconds", "mapped"), [("vattention", 0.263, 85), ("sliced", 0.042, 488)]
)
def test_the_page_names_what_mapping_takes_as_simulated(same_tokens, kv, seconds, mapped):
    """docs/memory.md has them by step, of the requests that were served on the H200."""
    options = argparse.Namespace(
        model="llama-3-8b", attention="serial", block_size=16, longest=2560, memory_costs=None
    )
    deployment = same_tokens.deployment(kv, options)
    result = simulate(same_tokens.requests(96, 2560), deployment)
    memory = result.memory[0].summary()
    assert len(result.steps["duration"]) == 366
    assert memory["stall_time"] == pytest.approx(seconds, abs=1.5e-3)
    assert memory["mapped_blocks"] == mapped


KINDS = ["vattention", "paged", "sliced"]


@pytest.fixture(scope="module")
def served_on_the_h200(tmp_path_factory):
    """What the command of docs/memory.md prints of the recording, and the tables that it leaves."""
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, str(SOURCE), "--kv", ",".join(KINDS), "--from", str(KEPT)]
    command += ["--out", str(folder / "tokens.csv")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tables = {name: pd.read_csv(folder / f"tokens{name}.csv") for name in ("", "-parts")}
    return done.stdout, tables


def test_the_shipped_tables_are_of_the_shipped_recording(served_on_the_h200):
    """A refitted profile changes what is simulated: then run benchmarks/same_tokens.py --from."""
    printed, tables = served_on_the_h200
    for name, found in tables.items():
        shipped = pd.read_csv(KEPT.with_name(f"{KEPT.name}{name}.csv"))
        pd.testing.assert_frame_equal(found, shipped, rtol=1e-4, atol=1e-4)
    shipped = KEPT.with_suffix(".txt").read_text().splitlines()
    assert [line[:60] for line in printed.splitlines()] == [line[:60] for line in shipped]


def test_the_simulated_difference_is_within_two_points(served_on_the_h200):
    rows = served_on_the_h200[1][""]
    assert rows["points off"].abs().max() < 2
    assert set(rows["same sign"]) == {"yes"}
    assert rows["tokens differing"].sum() == 0


def test_a_later_engine_gives_equal_tokens_and_the_differences_that_the_page_says(same_tokens):
    kinds = same_tokens.read_kept(KINDS, KEPT.with_name(f"{KEPT.name}-later"), None)
    by_part = same_tokens.parts(kinds)
    rows = same_tokens.table(kinds, by_part)
    assert rows["tokens differing"].tolist() == [0, 0]
    assert rows["throughput measured %"].tolist() == pytest.approx([3.64, 2.41], abs=0.01)
    assert rows["simulated %"].tolist() == pytest.approx([4.4, 3.2], abs=0.05)
    host = by_part.xs("measured", level=1)["host_ms"]
    assert sorted(host) == pytest.approx([0.323, 0.411, 0.529], abs=1e-3)


def test_the_page_says_what_a_page_group_took(same_tokens, served_on_the_h200):
    printed, _ = served_on_the_h200
    said = (
        "66 steps a round mapped 5120 page-groups; us of one: 58.4 (by step: P10 50.4, P50 57.0, "
        "P90 70.7), 47.8 while the host's time was measured, 51.4 by the memory costs"
    )
    assert f"vattention: {said}\n" in printed
    assert "us of one: 84.6 (" in printed
    assert ", 52.7 by the memory costs" in printed
    (kind,) = same_tokens.read_kept(["vattention"], KEPT, None).values()
    each = []
    for recorded in kind.rounds:
        steps = recorded.steps[recorded.steps["mapped_page_groups"] > 0]
        each.append(steps["mapping_seconds"].sum() / steps["mapped_page_groups"].sum() * 1e6)
        most = (steps["mapping_seconds"] / steps["mapped_page_groups"]).max() * 1e6
        assert most < 91
    assert each == pytest.approx([54.5, 63.4, 57.3], abs=0.05)
    calls = pd.read_csv(KEPT / same_tokens.CALLS_FILE)
    long = calls[(calls["kv"] == "vattention") & (calls["seconds"] > 1e-3)]
    long = long[long["api"].isin(["map", "set_access"])]
    assert long.groupby("sampling").size().to_dict() == {"none": 17, "starting": 28, "steady": 33}
    assert long["seconds"].max() == pytest.approx(0.033, abs=5e-4)


@pytest.mark.parametrize(
    ("us", "simulated", "off"),
    [(None, (3.49, 3.23), (-1.78, -0.96)), (46.3, (5.12, None), None), (61.8, (7.02, None), None)],
)
def test_the_page_says_what_other_times_of_mapping_would_give(
    same_tokens, tmp_path, us, simulated, off
):
    """Those of calls in a loop (None), and of the fastest and the slowest pass of growth."""
    costs = json.loads((ROOT / "profiles" / "h200" / "memory" / "memory.json").read_text())
    if us is None:
        del costs["growth"]
    else:
        costs["growth"][str(2**21)]["idle"] = {"fixed": 0.0, "per_unit": us * 1e-6}
    (tmp_path / "memory.json").write_text(json.dumps(costs))
    kinds = same_tokens.read_kept(KINDS, KEPT, str(tmp_path))
    by_part = same_tokens.parts(kinds)
    rows = same_tokens.table(kinds, by_part)
    for found, wanted in zip(rows["simulated %"], simulated, strict=True):
        assert wanted is None or found == pytest.approx(wanted, abs=0.05)
    if off:
        assert rows["points off"].tolist() == pytest.approx(off, abs=0.02)
        waits = by_part.loc[("vattention", "simulated"), "mapping_ms"]
        assert waits == pytest.approx(0.46, abs=0.005)
    assert rows["points off"].abs().max() < 2.25


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
