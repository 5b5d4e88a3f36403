"""Traces of many files: Claude Code sessions, and ServeGen's client statistics."""

from __future__ import annotations

import io
import json
import math
import tarfile
from pathlib import Path

import numpy as np
import pytest

from podsim.errors import InputError
from podsim.trace_clients import client_statistics
from podsim.trace_writers import write_trace
from podsim.workload import ReadOptions, Trace, load_trace, read_trace

SERVEGEN = (
    Path(__file__).parents[2] / "shared" / "traces" / "servegen" / "reason_deepseek-r1.tar.gz"
)


def error_of(path: Path, **options: object) -> str:
    with pytest.raises(InputError) as error:
        read_trace(path, ReadOptions(**options))  # type: ignore[arg-type]
    message = str(error.value)
    assert "\n" not in message
    return message.removeprefix(f"{path.parent}/")


# ---- Claude Code sessions


def turn(t: float, tokens: int, ids: list[int], **fields: object) -> dict[str, object]:
    return {
        **{"t": t, "type": "s", "model": "m", "in": tokens, "out": 9, "hash_ids": ids},
        **{"api_time": 3.1, "think_time": 2.0, **fields},
    }


def write_session(path: Path, name: str, requests: list[object], indent: int | None = None) -> Path:
    session = {
        **{"id": name, "models": ["m"], "block_size": 64, "hash_id_scope": "local"},
        **{"tool_tokens": 1, "system_tokens": 2, "requests": requests, "totals": {}},
    }
    path.write_text(json.dumps(session, indent=indent))
    return path


@pytest.mark.parametrize("indent", [None, 2])
def test_a_session_file(tmp_path: Path, indent: int | None) -> None:
    requests = [
        turn(0.0, 130, [5, 6], think_time=0.0),  # full blocks only: 130 tokens are 2 of 64
        turn(6.0, 200, [5, 6, 9], think_time=3.0),
        turn(8.0, 63, [], out=0),
    ]
    path = write_session(tmp_path / "trace_1.json", "s1", list(requests), indent)
    trace = load_trace(path, zero_length="drop")
    assert trace.format == "claude-code"
    assert trace.arrival_time.tolist() == [0.0, 6.0]
    assert trace.num_prompt_tokens.tolist() == [130, 200]
    assert trace.hash_ids is not None
    assert [ids.tolist() for ids in trace.hash_ids] == [[0, 1], [0, 1, 2]]
    assert trace.think_time is not None
    assert np.isnan(trace.think_time[0])  # a first turn waits for nobody
    assert trace.think_time[1] == 3.0
    assert trace.dropped == {"zero output tokens": 1}


def test_subagents_run_beside_their_session(tmp_path: Path) -> None:
    subagent = {
        **{"type": "subagent", "t": 5.0, "agent_id": "a1", "duration_ms": 9000},
        "requests": [turn(5.0, 64, [8]), turn(7.0, 128, [8, 1])],
    }
    path = write_session(
        tmp_path / "x.json",
        "s1",
        [turn(0, 64, [1]), subagent, turn(20, 128, [1, 2], think_time=16.0)],
    )
    trace = load_trace(path)
    assert trace.arrival_time.tolist() == [0.0, 5.0, 7.0, 20.0]
    assert trace.session_id is not None
    assert trace.session_id.tolist() == [0, 1, 1, 0]
    assert trace.parent_session is not None
    assert trace.parent_session.tolist() == [-1, 0, 0, -1]
    # The first turn is complete at 3.1 s; the subagent's last at 10.1 s, 9.9 s before the turn that
    # waits for it, of which the file says 16 s since the turn before.
    assert trace.think_time is not None
    assert trace.think_time.tolist() == pytest.approx([math.nan, 1.9, 2.0, 9.9], nan_ok=True)
    assert trace.hash_ids is not None
    assert trace.hash_ids[0].tolist() == trace.hash_ids[3].tolist()[:1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two sessions, and a copy of the first under another name and id."""
    folder = tmp_path / "sessions"
    folder.mkdir()
    first: list[object] = [turn(0, 64, [1]), turn(4, 128, [1, 2])]
    write_session(folder / "trace_1.json", "s1", first)
    write_session(folder / "trace_2.json", "s2", [turn(0, 128, [1, 2]), turn(9, 64, [1])])
    write_session(folder / "trace_3.json", "s3", first)
    return folder


def test_sessions_of_a_folder_share_no_blocks_and_copies_are_left_out(folder: Path) -> None:
    trace = load_trace(folder)
    assert trace.arrival_time.tolist() == [0.0, 0.0, 4.0, 9.0]
    assert trace.session_id is not None
    assert trace.session_id.tolist() == [0, 1, 0, 1]
    assert trace.hash_ids is not None
    assert [ids.tolist() for ids in trace.hash_ids] == [[0], [2, 3], [0, 1], [2]]
    assert trace.dropped == {"in a copy of another session's file": 2}
    assert (len(trace), trace.rows_read) == (4, 6)


def test_sessions_start_as_asked(folder: Path) -> None:
    trace = load_trace(folder).with_session_starts(0.01, seed=4)
    assert trace.session_id is not None
    assert (np.diff(trace.arrival_time) >= 0).all()
    starts = [trace.arrival_time[trace.session_id == number] for number in (0, 1)]
    assert np.diff(starts[0]) == pytest.approx([4.0])
    assert np.diff(starts[1]) == pytest.approx([9.0])
    assert starts[0][0] == 0.0
    assert starts[1][0] > 1
    assert trace.notes[-1] == "sessions start anew: poisson at 0.01 sessions/s, seed 4"
    with pytest.raises(InputError, match="has no sessions"):
        load_trace("azure-conv-like").with_session_starts(1)


def test_subagents_start_and_are_kept_with_their_session(tmp_path: Path) -> None:
    folder = tmp_path / "sessions"
    folder.mkdir()
    subagent = {"type": "subagent", "agent_id": "a", "requests": [turn(5, 64, [8])]}
    for name, start in (("s1", 64), ("s2", 65)):
        requests = [turn(0, start, [1]), subagent, subagent, turn(20, 128, [1, 2])]
        write_session(folder / f"{name}.json", name, requests)
    trace = load_trace(folder)
    assert trace.session_id is not None
    assert trace.parent_session is not None
    by_session = dict(zip(trace.session_id.tolist(), trace.parent_session.tolist(), strict=True))
    assert by_session == {0: -1, 1: 0, 2: 0, 3: -1, 4: 3, 5: 3}
    moved = trace.with_session_starts(0.01, seed=4)
    assert moved.session_id is not None
    for session, parent in by_session.items():
        start = moved.arrival_time[moved.session_id == session][0]
        if parent >= 0:
            assert start == pytest.approx(moved.arrival_time[moved.session_id == parent][0] + 5)
    with (tmp_path / "kept.csv").open("wb") as file:
        write_trace(trace, file)
    again = load_trace(tmp_path / "kept.csv")
    assert again.parent_turns == trace.parent_turns != []
    assert again.think_time is not None
    assert trace.think_time is not None
    assert again.think_time.tolist() == pytest.approx(trace.think_time.tolist(), nan_ok=True)
    assert np.count_nonzero(np.isnan(trace.think_time)) == 2  # the first turns of the sessions


def test_block_numbers_of_a_global_scope_are_the_same_in_every_file(folder: Path) -> None:
    for path in folder.iterdir():
        path.write_text(path.read_text().replace('"local"', '"global"'))
    trace = load_trace(folder)
    assert trace.hash_ids is not None
    assert [ids.tolist() for ids in trace.hash_ids] == [[1], [1, 2], [1, 2], [1]]
    write_session(folder / "trace_4.json", "s4", [turn(0, 200, [7, 8, 9])])
    assert error_of(folder).endswith(
        "trace_4.json: hash_id_scope differs from that of other files here"
    )


def test_wrong_session_files(tmp_path: Path, folder: Path) -> None:
    short = write_session(tmp_path / "a.json", "s", [turn(0, 64, [1]), turn(5, 128, [1])])
    assert error_of(short) == (
        "a.json: request 2: hash_ids is '[1]', expected 2 block numbers (128 tokens in blocks of "
        "64; --block-size sets another), not 1"
    )
    nothing = write_session(tmp_path / "b.json", "s", [])
    assert error_of(nothing) == "b.json:2: is missing, expected a row after the header"
    two = write_session(tmp_path / "c.json", "s", [turn(0, 64, [1])])
    two.write_text(two.read_text() + "\n" + two.read_text())
    assert error_of(two) == "c.json:2: is a second session, expected one in a file"
    (folder / "trace_4.json").write_text('{"timestamp": 0, "input_length": 5, "output_length": 5}')
    assert error_of(folder).endswith(
        "trace_4.json: is mooncake, but only session files are read by the folder"
    )
    (tmp_path / "empty").mkdir()
    assert error_of(tmp_path / "empty") == (
        "empty: is a folder without session files (*.json) or client files"
    )


# ---- clients

TRACE = "0,0.5,2.0,Gamma,0.25,8.0\n600,0,0,,0,0\n1200,0.1,1.0,Weibull,0.7,9\n"
DATASET = {
    "0": {"input_tokens": "{10: 1.0}", "output_tokens": "{5: 0.5, 7: 0.5}"},
    "1200": {"input_tokens": "{20: 0.25, 30: 0.75}", "output_tokens": "{}"},
}


def write_clients(folder: Path, traces: list[str], datasets: list[object]) -> Path:
    folder.mkdir(parents=True)
    for i, (trace, dataset) in enumerate(zip(traces, datasets, strict=True)):
        (folder / f"chunk-{i}-trace.csv").write_text(trace)
        if dataset is not None:
            text = dataset if isinstance(dataset, str) else json.dumps(dataset)
            (folder / f"chunk-{i}-dataset.json").write_text(text)
    return folder


def columns(trace: Trace) -> list[list[float]]:
    return [
        trace.arrival_time.tolist(),
        trace.num_prompt_tokens.tolist(),
        trace.num_output_tokens.tolist(),
    ]


def test_requests_are_drawn_from_each_window(tmp_path: Path) -> None:
    trace = load_trace(write_clients(tmp_path / "m", [TRACE], [DATASET]), seed=3)
    assert trace.format == "servegen"
    # 0.5 a second for 600 s, none, and 0.1 a second for 600 s: the windows are filled.
    assert len(trace) == 300 + 60
    first = trace.num_prompt_tokens == 10
    assert first.sum() == 300
    assert trace.arrival_time[first].max() < 600 < 1100 < trace.arrival_time[~first].min()
    assert set(trace.num_prompt_tokens[~first].tolist()) == {20, 30}
    assert set(trace.num_output_tokens[~first].tolist()) == {5, 7}  # no data: the window before
    gaps = np.diff(trace.arrival_time[first])
    assert gaps.std() / gaps.mean() == pytest.approx(2.0, rel=0.25)


def test_the_seed_decides_what_is_drawn(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "m", [TRACE], [DATASET])
    assert columns(load_trace(path, seed=3)) == columns(load_trace(path, seed=3))
    assert columns(load_trace(path, seed=3)) != columns(load_trace(path, seed=4))


def test_an_archive_is_the_same_as_its_folder(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "m", [TRACE] * 11, [DATASET] * 11)
    with tarfile.open(tmp_path / "m.tar.gz", "w:gz") as archive:
        archive.add(path, "data/m")
    assert columns(load_trace(tmp_path / "m.tar.gz")) == columns(load_trace(path))
    assert load_trace(tmp_path / "m.tar.gz").sha256 == load_trace(path).sha256


def test_a_part_of_the_time(tmp_path: Path) -> None:
    path = write_clients(tmp_path / "m", [TRACE], [DATASET])
    part = read_trace(path, ReadOptions(client_window=(1200, 1800)))
    assert len(part) == 60
    assert part.duration < 600
    assert set(part.num_prompt_tokens.tolist()) == {20, 30}
    half = read_trace(path, ReadOptions(client_window=(1200, 1500)))
    assert 10 < len(half) < 50
    assert half.duration < 300


def test_clients_without_lengths_are_noted_and_modalities_add_up(tmp_path: Path) -> None:
    images = {
        "0": {
            **{"text_tokens": "{100: 1.0}", "image_tokens": "{50: 1.0}"},
            **{"image_count": "{3: 1.0}", "output_tokens": "{5: 1.0}"},
        }
    }
    trace = load_trace(write_clients(tmp_path / "m", [TRACE, TRACE], [images, None]))
    assert set(trace.num_prompt_tokens.tolist()) == {150}
    assert trace.notes[1] == "1 clients left out: nothing is known of their lengths"


@pytest.mark.parametrize(
    ("trace", "dataset", "message"),
    [
        ("0,1,1\n", DATASET, "chunk-0-trace.csv:1: has 3 fields, expected 6 (start, rate, CV, "
         "law, ...)"),
        ("0,1,1,Pareto,1,1\n", DATASET, "chunk-0-trace.csv:1: law is 'Pareto', expected Gamma, "
         "Weibull or nothing"),
        ("0,x,1,Gamma,1,1\n", DATASET, "chunk-0-trace.csv:1: rate is 'x', expected a number"),
        ("0,1,1,Gamma,0,1\n", DATASET, "chunk-0-trace.csv:1: shape is '0', expected 0.0001 to "
         "1000000"),
        ("9,1,1,,0,0\n0,1,1,,0,0\n", DATASET, "chunk-0-trace.csv: windows are not in order of "
         "time"),
        ("", DATASET, "chunk-0-trace.csv: is empty, expected a window per line"),
        (TRACE, "[]", "chunk-0-dataset.json: is not JSON, expected an object of windows"),
        (TRACE, {"x": {}}, "chunk-0-dataset.json: window 'x' is wrong, expected a time in seconds"),
        (TRACE, {"0": {"input_tokens": "{1: __import__('os')}"}}, "chunk-0-dataset.json: "
         "input_tokens at 0: is \"{1: __import__('os')}\", expected '{tokens: probability}'"),
        (TRACE, {}, "no client has requests with lengths in the time to draw from"),
        ("0,1e9,1,,0,0\n", DATASET, "600000000000 requests would be drawn, expected 50000000 at "
         "most: choose a part with --client-window FROM:TO (seconds)"),
    ],
)  # fmt: skip
def test_wrong_clients(tmp_path: Path, trace: str, dataset: object, message: str) -> None:
    path = write_clients(tmp_path / "m", [trace], [dataset])
    assert error_of(path) == f"m: {message}"


def test_other_archives_and_folders_of_several_models(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "other.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("readme"), io.BytesIO())
    assert error_of(tmp_path / "other.tar") == (
        "other.tar: holds no client files (chunk-0-trace.csv and so on)"
    )
    for model in ("a", "b"):
        write_clients(tmp_path / "all" / model, [TRACE], [DATASET])
    assert error_of(tmp_path / "all").startswith("all: holds clients of several models, name one")
    assert error_of(tmp_path / "all", format="azure") == (
        "all: holds client statistics (servegen), not azure"
    )


@pytest.mark.skipif(not SERVEGEN.exists(), reason="no real traces here")
def test_real_servegen_clients() -> None:
    statistics = client_statistics(SERVEGEN)
    assert (statistics["clients"], statistics["windows"]) == (73, 144)
    rates = [statistics[f"rate_{name}"] for name in ("mean", "min", "max")]
    assert rates == pytest.approx([16.0, 4.3, 42.5], rel=0.005)
    assert statistics["iat_cv_p50"] == pytest.approx(1.03, abs=0.005)
    assert statistics["iat_cv_p90"] == pytest.approx(3.95, abs=0.005)
    assert statistics["input_tokens_mean"] == pytest.approx(1865, abs=1)
    assert statistics["output_tokens_mean"] == pytest.approx(1207, abs=1)
    # An hour of requests drawn from them arrives at the published rate.
    drawn = read_trace(SERVEGEN, ReadOptions(client_window=(36_000, 39_600)))
    assert drawn.duration == pytest.approx(3600, abs=5)
    assert 4.3 < drawn.qps < 42.5
