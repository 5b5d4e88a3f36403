"""`podsim trace`: what each command prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import gzip
import json
import os
import stat
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from podsim.errors import InputError
from podsim.trace_command import trace_app
from podsim.trace_writers import WRITERS, atomic_file, write_trace
from podsim.workload import ReadOptions, Synthetic, Trace, generate, load_trace, read_trace

REAL = Path(__file__).parents[2] / "shared" / "traces"
MOONCAKE = REAL / "mooncake" / "conversation_trace.jsonl"

VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n5.0,10,3\n5.5,20,4\n5.5,30,5\n8,40,6\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("x.csv").write_text(VIDUR)
    return tmp_path


def run(*arguments: str) -> str:
    """The output of a command that must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["podsim", "trace", *arguments])
        result = CliRunner().invoke(trace_app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(*arguments: str) -> str:
    with pytest.raises(InputError) as error:
        run(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def columns(trace: Trace) -> dict[str, object]:
    """Everything of a trace that a file should keep; NaN as None."""

    def of(values: np.ndarray | None) -> object:
        if values is None:
            return None
        return [None if value != value else value for value in values.tolist()]

    names = ("arrival_time", "num_prompt_tokens", "num_output_tokens", "session_id", "think_time")
    ids = trace.hash_ids
    return {
        **{name: of(getattr(trace, name)) for name in names},
        "hash_ids": None if ids is None else [numbers.tolist() for numbers in ids],
        "hash_block_size": trace.hash_block_size,
    }


# ---- inspect


def test_inspect_prints_a_line_for_each_subject() -> None:
    assert run("inspect", "x.csv").splitlines() == [
        "Requests     4 of 4 rows (x.csv, vidur)",
        "Arrivals     1.333 requests/s over 3 s, at most 3 in 1 s, 4 to 4 in a minute, longest gap "
        "2.5 s",
        "Burstiness   IAT CV 1.08, IDC-1s 1.5; 3 different arrival times",
        "Prompt       mean 25, P50 25, P90 37, P99 39.7, min 10, max 40 tokens",
        "Output       mean 4.5, P50 4.5, P90 5.7, P99 5.97, min 3, max 6 tokens",
        "Correlation  of prompt and output lengths 1",
    ]


def test_inspect_drops_zero_lengths_and_says_so() -> None:
    Path("zero.csv").write_text(VIDUR + "9,0,1\n")
    assert "Dropped      1: zero prompt tokens\n" in run("inspect", "zero.csv")
    assert error_of("inspect", "zero.csv", "--zero-length", "error").startswith("zero.csv:6: ")


def test_inspect_with_caches_of_some_sizes() -> None:
    run("generate", "--out", "g.csv", "--qps", "1", "--requests", "20", "--turns", "3")
    lines = run("inspect", "g.csv", "--cache-blocks", "100,100000").splitlines()
    ideal = next(line for line in lines if line.startswith("Prefix")).split()[3]
    (lru,) = (line for line in lines if line.startswith("LRU cache    hit "))
    assert lru.endswith(f" in 100, {ideal} in 100,000 blocks")
    assert error_of("inspect", "g.csv", "--cache-blocks", "0") == (
        "cache blocks is '0', expected numbers of blocks: 1000,5000"
    )
    assert error_of("inspect", "x.csv", "--cache-blocks", "5") == (
        "x.csv: --cache-blocks needs hash ids, and this has none"
    )


def test_inspect_json() -> None:
    statistics = json.loads(run("inspect", "x.csv", "--json"))
    assert statistics["requests"] == statistics["rows_read"] == 4
    assert statistics["arrivals"]["rate"] == pytest.approx(4 / 3)
    assert (statistics["prefix"], statistics["sessions"]) == (None, None)
    Path("one.csv").write_text(VIDUR.splitlines()[0] + "\n0,1,1\n")
    assert json.loads(run("inspect", "one.csv", "--json"))["arrivals"]["iat_cv"] is None


@pytest.mark.parametrize("content", [VIDUR, "num_prefill_tokens,num_decode_tokens\n10,3\n"])
def test_inspect_draws_a_figure(content: str) -> None:
    Path("y.csv").write_text(content)
    run("inspect", "y.csv", "--figure", "y.png")
    assert Path("y.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir()) == ["x.csv", "y.csv", "y.png"]  # no temporary file stays


def test_inspect_texts() -> None:
    record = {"timestamp": 1, "input": "abcdefghij", "output": "ab", "session_id": "s"}
    Path("t.jsonl").write_text(json.dumps(record))
    assert "mean 3," in run("inspect", "t.jsonl", "--chars-per-token", "4")
    Path("words.py").write_text("def letters(text):\n    return list(text)\n")
    assert "mean 10," in run("inspect", "t.jsonl", "--tokenizer", "words:letters")
    assert "mean 10," in run("inspect", "t.jsonl", "--tokenizer", "builtins:len")
    assert error_of("inspect", "t.jsonl").startswith("t.jsonl: lmcache holds texts, count their")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "words"], "tokenizer is 'words', expected MODULE:FUNCTION"),
        (["--tokenizer", "no_such:f"], "tokenizer no_such:f: cannot be imported: No module named "
         "'no_such'"),
        (["--tokenizer", "json:loads"], "tokenizer json:loads: failed: JSONDecodeError: Expecting "
         "value: line 1 column 1 (char 0)"),
        (["--tokenizer", "builtins:float"], "tokenizer builtins:float: failed: ValueError: could "
         "not convert string to float: 'abcdefghij'"),
        (["--tokenizer", "builtins:bool", "--chars-per-token", "4"], "give --chars-per-token or "
         "--tokenizer, not both"),
        (["--chars-per-token", "0"], "chars per token is 0, expected a number above 0"),
        (["--seed", "-1"], "seed is -1, expected 0 or more"),
        (["--block-size", "0"], "block size is 0, expected at least 1"),
        (["--client-window", "9:5"], "client window is '9:5', expected FROM:TO"),
        (["--client-window", "9"], "client window is '9', expected FROM:TO"),
    ],
)  # fmt: skip
def test_wrong_reading_options(options: list[str], message: str) -> None:
    record = {"timestamp": 1, "input": "abcdefghij", "output": "ab", "session_id": "s"}
    Path("t.jsonl").write_text(json.dumps(record))
    assert error_of("inspect", "t.jsonl", *options) == message


@pytest.mark.skipif(not MOONCAKE.exists(), reason="no real traces here")
def test_mooncake_is_inspected_in_seconds() -> None:
    started = time.perf_counter()
    assert "ideal hit 36.64% of blocks, 37.36% of tokens" in run("inspect", str(MOONCAKE))
    assert time.perf_counter() - started < 3


# ---- convert


def test_convert_to_podsim_says_how_it_was_made() -> None:
    assert run("convert", "x.csv", "--out", "y.csv") == "4 requests of 4 rows: y.csv\n"
    assert Path("y.csv").read_text() == (
        "# command podsim trace convert x.csv --out y.csv\n"
        "arrival_time,num_prompt_tokens,num_output_tokens\n"
        "0,10,3\n0.5,20,4\n0.5,30,5\n3,40,6\n"
    )
    trace = load_trace("y.csv")
    assert trace.notes == ("made with: command podsim trace convert x.csv --out y.csv",)
    assert columns(trace) == columns(load_trace("x.csv"))


def test_convert_to_mooncake_and_vllm() -> None:
    run("convert", "x.csv", "--to", "mooncake", "--out", "m.jsonl")
    assert json.loads(Path("m.jsonl").read_text().splitlines()[1]) == {
        **{"timestamp": 500, "input_length": 20, "output_length": 4}
    }
    run("convert", "x.csv", "--to", "vllm-timed", "--out", "v.jsonl")
    records = [json.loads(line) for line in Path("v.jsonl").read_text().splitlines()]
    assert [record["hash_ids"] for record in records] == [[0], [1, 2], [3, 4], [5, 6, 7]]
    for path, format in (("m.jsonl", "mooncake"), ("v.jsonl", "vllm-timed")):
        again = load_trace(path, format=format)
        assert again.arrival_time.tolist() == [0.0, 0.5, 0.5, 3.0]


def test_convert_to_vidur_names_what_is_lost() -> None:
    run("generate", "--out", "g.csv", "--qps", "1", "--requests", "20", "--turns", "3")
    output = run("convert", "g.csv", "--to", "vidur", "--out", "v.csv.gz")
    assert output.endswith("not kept by vidur: hash_ids, session_id, think_time\n")
    with gzip.open("v.csv.gz", "rt") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["arrived_at", "num_prefill_tokens", "num_decode_tokens"]
    assert len(rows) == 21
    Path("lengths.csv").write_text("num_prefill_tokens,num_decode_tokens\n10,3\n")
    run("convert", "lengths.csv", "--to", "vidur", "--out", "same.csv")
    assert Path("same.csv").read_text() == Path("lengths.csv").read_text()


def test_convert_changes_on_the_way() -> None:
    run("convert", "x.csv", "--out", "y.csv", "--rate-scale", "2", "--max-tokens", "40")
    trace = load_trace("y.csv")
    assert trace.arrival_time.tolist() == [0.0, 0.25, 0.25]
    run("convert", "x.csv", "--out", "y.csv", "--max-tokens", "40", "--overflow", "truncate")
    assert load_trace("y.csv").num_prompt_tokens.tolist() == [10, 20, 30, 34]
    output = run("convert", "x.csv", "--out", "y.csv", "--tick", "0.1", "--seed", "3")
    assert "2 requests that arrived at once spread over ticks of 0.1 s, seed 3" in output
    times = load_trace("y.csv").arrival_time
    assert 0.5 < times[1] < times[2] < 0.6


@pytest.mark.skipif(not MOONCAKE.exists(), reason="no real traces here")
def test_mooncake_keeps_its_prefixes_through_other_formats() -> None:
    run("slice", str(MOONCAKE), "--rows", "0:800", "--out", "part.jsonl", "--to", "mooncake")
    part = load_trace("part.jsonl")
    lines = MOONCAKE.read_text().splitlines()[:800]
    assert [json.loads(line) for line in Path("part.jsonl").read_text().splitlines()] == [
        json.loads(line) for line in lines
    ]
    run("convert", "part.jsonl", "--out", "part.csv")
    assert columns(load_trace("part.csv")) == columns(part)
    run("convert", "part.jsonl", "--to", "vllm-timed", "--out", "fine.jsonl")
    options = ReadOptions(format="vllm-timed")
    with Path("again.jsonl").open("wb") as file:
        write_trace(read_trace("fine.jsonl", options), file, "mooncake")
    hits = [json.loads(run("inspect", name, "--json"))["prefix"]["hit_blocks"]
            for name in ("part.jsonl", "again.jsonl")]  # fmt: skip
    assert hits[1] == pytest.approx(hits[0], abs=0.002)  # partial blocks are not shared again


# ---- slice


def test_slice_by_time_and_rows() -> None:
    output = run("slice", "x.csv", "--from", "0.5", "--until", "3", "--out", "y.csv")
    assert output == "2 requests of 4 rows: y.csv\ndropped 2: outside 0.5 s to 3 s\n"
    assert load_trace("y.csv").num_prompt_tokens.tolist() == [20, 30]
    run("slice", "x.csv", "--rows", "1:", "--out", "y.csv")
    assert load_trace("y.csv").num_prompt_tokens.tolist() == [20, 30, 40]
    run("slice", "x.csv", "--from", "0.5", "--rows", ":1", "--out", "y.csv")
    assert load_trace("y.csv").num_prompt_tokens.tolist() == [20]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to slice by: give --from, --until or --rows"),
        (["--rows", "5"], "rows is '5', expected FROM:TO"),
        (["--rows", "a:b"], "rows is 'a:b', expected FROM:TO"),
        (["--rows", "inf:"], "rows is 'inf:', expected FROM:TO"),
        (["--rows", "7:9"], "x.csv: has no request in rows 7 to 9"),
        (["--from", "50"], "x.csv: has no request in 50 s to inf s"),
        (["--from", "nan"], "x.csv: has no request in nan s to inf s"),
    ],
)
def test_wrong_slices(options: list[str], message: str) -> None:
    assert error_of("slice", "x.csv", "--out", "y.csv", *options) == message
    assert os.listdir() == ["x.csv"]


# ---- generate


def test_generate_records_its_seed_and_command() -> None:
    arguments = ["generate", "--out", "g.csv", "--qps", "2", "--requests", "3", "--seed", "7"]
    run(*arguments)
    lines = Path("g.csv").read_text().splitlines()
    assert lines[:2] == [f"# command podsim trace {' '.join(arguments)}", "# seed 7"]
    trace = load_trace("g.csv")
    assert len(trace) == 3
    assert trace.notes == tuple(f"made with: {line[2:]}" for line in lines[:2])
    first = Path("g.csv").read_bytes()
    run(*arguments)
    assert Path("g.csv").read_bytes() == first
    run("slice", "g.csv", "--rows", "0:2", "--out", "h.csv")
    assert Path("h.csv").read_text().splitlines()[:2] == lines[:2]  # how its source was made


def test_generate_with_the_lengths_of_a_trace() -> None:
    run(
        "generate", "--out", "g.csv.gz", "--qps", "2", "--requests", "50", "--lengths-from", "x.csv"
    )
    trace = load_trace("g.csv.gz")
    assert set(trace.num_prompt_tokens.tolist()) == {10, 20, 30, 40}


def test_generate_refuses_wrong_options() -> None:
    assert error_of("generate", "--out", "g.csv") == "qps is missing, poisson arrivals need one"
    assert os.listdir() == ["x.csv"]


# ---- files


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("no/y.csv", "no/y.csv: cannot be written: No such file or directory"),
        ("x.csv/y.csv", "x.csv/y.csv: cannot be written: Not a directory"),
        (".", ".: cannot be written: is a directory"),
    ],
)
def test_outputs_that_cannot_be_written(out: str, message: str) -> None:
    assert error_of("generate", "--qps", "1", "--out", out) == message
    assert error_of("convert", "no-such-trace", "--out", out) == message  # before any work
    assert error_of("inspect", "x.csv", "--figure", out) == message


def test_an_unknown_output_format() -> None:
    assert error_of("convert", "x.csv", "--to", "azure", "--out", "y.csv") == (
        "output format is 'azure', expected one of: podsim, mooncake, vidur, vllm-timed"
    )


def test_lengths_alone_cannot_be_written_with_times() -> None:
    Path("lengths.csv").write_text("num_prefill_tokens,num_decode_tokens\n10,3\n")
    for format in ("podsim", "mooncake", "vllm-timed"):
        message = error_of("convert", "lengths.csv", "--to", format, "--out", "y")
        assert message.startswith("lengths.csv: has no arrival times")


def test_reading_tells_how_many_bytes_are_done() -> None:
    header, *rows = VIDUR.splitlines(keepends=True)
    Path("long.csv").write_text(header + "".join(rows) * 20_000)
    told: list[int] = []
    assert len(read_trace("long.csv", ReadOptions(on_bytes=told.append))) == 80_000
    assert len(told) == 2  # blocks of 65,536 rows
    assert sum(told) == Path("long.csv").stat().st_size


def test_writing_tells_how_many_lines_are_done() -> None:
    trace = generate(Synthetic(qps=3.0, num_requests=2500))
    told: list[int] = []
    with Path("out").open("wb") as file:
        write_trace(trace, file, "vidur", on_progress=told.append)
    assert told == [0, 1000, 2000]


def test_a_pipe_is_written_to_and_stays_a_pipe() -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDWR | os.O_NONBLOCK)
    run("convert", "x.csv", "--to", "vidur", "--out", "pipe")
    assert os.read(reader, 10_000).startswith(b"arrived_at,")
    os.close(reader)
    assert stat.S_ISFIFO(Path("pipe").stat().st_mode)
    assert sorted(os.listdir()) == ["pipe", "x.csv"]


def test_a_file_stays_as_it_was_until_all_is_written() -> None:
    def half() -> None:
        with atomic_file(Path("x.csv")) as file:
            file.write(b"half")
            assert Path("x.csv").read_text() == VIDUR
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert Path("x.csv").read_text() == VIDUR
    assert os.listdir() == ["x.csv"]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    turns=st.sampled_from(["1", "uniform:1:4"]),
    prefix_tokens=st.sampled_from([0, 7, 64]),
    zipped=st.booleans(),
)
def test_podsims_own_format_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    turns: str,
    prefix_tokens: int,
    zipped: bool,
) -> None:
    options = Synthetic(
        qps=3.0, num_requests=20, turns=turns, prefix_tokens=prefix_tokens, seed=seed,
        prompt_tokens="uniform:1:90",
    )  # fmt: skip
    trace = generate(options)
    path = tmp_path_factory.getbasetemp() / "round"
    with path.open("wb") as file:
        write_trace(trace, file, made=["seed 5", "two\nlines"], zipped=zipped)
    again = load_trace(path)
    for name, values in columns(trace).items():
        kept = columns(again)[name]
        if name in ("arrival_time", "think_time") and values is not None:
            assert kept == pytest.approx(values, abs=1e-9)
        elif name == "session_id" and values is not None:
            numbers: dict[int, int] = {}  # sessions are numbered anew, as they appear
            assert kept == [numbers.setdefault(v, len(numbers)) for v in values]  # type: ignore[attr-defined]
        else:
            assert kept == values


def test_every_output_format_is_read_back() -> None:
    trace = generate(Synthetic(qps=3.0, num_requests=50, turns="uniform:1:4", prefix_tokens=64))
    for format in WRITERS:
        with Path("out").open("wb") as file:
            write_trace(trace, file, format)
        again = load_trace("out", format=format)
        assert again.num_prompt_tokens.tolist() == trace.num_prompt_tokens.tolist()
        assert again.num_output_tokens.tolist() == trace.num_output_tokens.tolist()
        assert again.arrival_time == pytest.approx(trace.arrival_time, abs=1e-3)
        if format in ("mooncake", "vllm-timed"):
            assert again.session_id is not None
            assert again.think_time is not None
            assert trace.think_time is not None
            assert np.nanmean(again.think_time) == pytest.approx(
                np.nanmean(trace.think_time), abs=1e-3
            )
