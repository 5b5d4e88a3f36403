"""trace.json: what Perfetto reads is what was simulated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import podsim
from podsim.perfetto import write_trace_events
from podsim.simulation import Result

EVERYTHING = 10**9


@pytest.fixture(scope="module")
def result() -> Result:
    trace = podsim.load_trace("azure-conv-like").head(120).at_rate(20)
    deployment = podsim.Deployment(attention="pod", replicas=2, num_blocks=400)
    return podsim.simulate(trace, deployment)


def events(result: Result, path: Path, limit: int = EVERYTHING) -> list[dict[str, object]]:
    write_trace_events(result, path / "trace.json", limit)
    content = json.loads((path / "trace.json").read_text())
    assert content["displayTimeUnit"] == "ms"
    found = content["traceEvents"]
    assert isinstance(found, list)
    return found


def test_every_event_has_what_its_phase_needs(result: Result, tmp_path: Path) -> None:
    needed = {
        "M": {"name", "pid", "args"},
        "X": {"name", "cat", "ts", "dur", "pid", "tid", "args"},
        "C": {"name", "ts", "pid", "args"},
        "b": {"name", "cat", "id2", "ts", "pid"},
        "e": {"name", "cat", "id2", "ts", "pid"},
        "i": {"name", "s", "ts", "pid"},
    }
    for event in events(result, tmp_path):
        assert needed[str(event["ph"])] <= event.keys()
        assert event.get("ts", 0) >= 0


def test_steps_are_the_steps_of_the_run_and_never_overlap(result: Result, tmp_path: Path) -> None:
    steps = [e for e in events(result, tmp_path) if e["ph"] == "X"]
    table = result.steps
    assert len(steps) == len(table)
    for replica in (0, 1):
        mine = [e for e in steps if e["pid"] == replica + 1]
        rows = table[table["replica"] == replica].to_dict("records")
        end = 0.0
        for event, row in zip(mine, rows, strict=True):
            assert event["ts"] == pytest.approx(row["start"] * 1e6, abs=0.001)
            assert event["dur"] == pytest.approx(row["duration"] * 1e6, abs=0.002)
            assert round(event["ts"] * 1000) >= end
            end = round((event["ts"] + event["dur"]) * 1000)
            assert event["args"]["num_decodes"] == row["num_decodes"]
            has = (row["num_prefills"] > 0, row["num_decodes"] > 0)
            kinds = {(True, False): "prefill", (False, True): "decode", (True, True): "mixed"}
            assert event["name"] == kinds[has]


def test_request_spans_hold_their_phases(result: Result, tmp_path: Path) -> None:
    spans: dict[object, list[dict[str, object]]] = {}
    for event in events(result, tmp_path):
        if event["ph"] in "be":
            spans.setdefault(event["id2"]["local"], []).append(event)
    served = result.requests[result.requests["refused"] == ""]
    assert set(spans) == set(served["request_id"].astype(str))
    for row in served.to_dict("records"):
        own = spans[str(row["request_id"])]
        assert {e["pid"] for e in own} == {row["replica"] + 1}
        at = {(e["name"], e["ph"]): e["ts"] for e in own}
        microseconds = {k: row[k] * 1e6 for k in row if str(k).endswith("_time")}
        assert at["request", "b"] == pytest.approx(microseconds["arrival_time"], abs=0.001)
        assert at["request", "e"] == pytest.approx(microseconds["finish_time"], abs=0.001)
        assert at["prefill", "b"] == pytest.approx(microseconds["scheduled_time"], abs=0.001)
        assert at["prefill", "e"] == pytest.approx(microseconds["first_token_time"], abs=0.001)
        open_spans: list[object] = []
        for event in own:  # begins and ends nest
            if event["ph"] == "b":
                open_spans.append(event["name"])
            else:
                assert open_spans.pop() == event["name"]
        assert not open_spans


def test_counters_follow_the_steps(result: Result, tmp_path: Path) -> None:
    """A counter holds its value until the next event: at each step it shows the step's."""
    found = [e for e in events(result, tmp_path) if e["pid"] == 1]
    value: dict[str, int] = {}
    changes = sorted((e for e in found if e["ph"] == "C"), key=lambda e: e["ts"])
    steps = [e for e in found if e["ph"] == "X"]
    for step in steps:
        while changes and changes[0]["ts"] <= step["ts"]:
            value |= changes.pop(0)["args"]
        args = step["args"]
        assert isinstance(args, dict)
        assert value["used"] == args["num_used_blocks"]
        assert (value["running"], value["waiting"]) == (args["num_running"], args["num_waiting"])
    for change in changes:
        value |= change["args"]
    assert value == {"used": 0, "running": 0, "waiting": 0}


def test_lanes_are_named(result: Result, tmp_path: Path) -> None:
    names = {
        (e["pid"], e["name"]): e["args"]["name"]
        for e in events(result, tmp_path)
        if e["ph"] == "M" and "name" in e["args"]
    }
    assert names[1, "process_name"] == "replica 0"
    assert names[2, "process_name"] == "replica 1"
    assert names[1, "thread_name"] == "steps"


def test_a_cap_keeps_the_beginning_and_says_so(result: Result, tmp_path: Path) -> None:
    written = write_trace_events(result, tmp_path / "all.json", EVERYTHING)
    assert written.note == f"all {written.of:,} events"
    limit = written.of // 3
    cut = write_trace_events(result, tmp_path / "cut.json", limit)
    content = json.loads((tmp_path / "cut.json").read_text())
    timed = [e for e in content["traceEvents"] if e["ph"] != "M"]
    notes = [e for e in timed if e["name"].startswith("cut: ")]
    assert limit - 12 < cut.events <= limit
    assert len(timed) - len(notes) == cut.events
    assert cut.of == written.of
    assert len(notes) == 1
    assert f"of {cut.of:,} events" in notes[0]["name"]
    assert content["otherData"]["holds"] == cut.note
    begins = [e["ts"] for e in timed if e["ph"] == "X" or (e["ph"], e["name"]) == ("b", "request")]
    assert max(begins) < cut.until * 1e6


def test_a_preempted_request_shows_when_it_stood_still(tmp_path: Path) -> None:
    trace = podsim.Trace.of((0.0, 19, 5), (0.0, 19, 5))
    deployment = podsim.Deployment(token_budget=100, max_num_seqs=10, block_size=10, num_blocks=4)
    stalled = podsim.simulate(trace, deployment, latency_model=podsim.ConstantLatency(1.0))
    spans = [
        (e["ph"], e["id2"]["local"], e["ts"])
        for e in events(stalled, tmp_path)
        if e["name"] == "preempted"
    ]
    # The second request loses its blocks at 2 s and is computed again from 5 s on.
    assert spans == [("b", "1", 2e6), ("e", "1", 5e6)]
