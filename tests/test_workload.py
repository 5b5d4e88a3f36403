"""Traces: what each file format becomes, what a wrong file says, how arrivals are made."""

from __future__ import annotations

import gzip
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podsim.errors import InputError
from podsim.workload import Trace, load_trace, shipped_traces, synthetic_trace

REAL = Path(__file__).parents[2] / "shared" / "traces"
AZURE_CODE = REAL / "azure2023" / "AzureLLMInferenceTrace_code.csv"
MOONCAKE = REAL / "mooncake" / "conversation_trace.jsonl"

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
VIDUR = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
PODSIM = "arrival_time,num_prompt_tokens,num_output_tokens\n"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a file into the current directory, so that messages name it alone."""
    monkeypatch.chdir(tmp_path)

    def write(content: str | bytes, name: str = "x.csv") -> Path:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return Path(name)

    return write


def timeline(trace: Trace) -> list[tuple[float, int, int]]:
    columns = (trace.arrival_time, trace.num_prompt_tokens, trace.num_output_tokens)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def gap_cv(trace: Trace) -> float:
    gaps = np.diff(trace.arrival_time)
    return float(gaps.std() / gaps.mean())


# ---- formats


def test_azure_dates_of_every_kind(write: Write) -> None:
    path = write(
        AZURE
        + "2023-11-16 18:17:03.9799601,4808,10\n"  # seven digits: the last is 100 ns
        + "2023-11-16 18:17:04,3180,8\n"  # a zero fraction, left out
        + "2023-11-16 18:17:04.500000+00:00,110,27\n"
        + "2023-11-16T18:17:05.269Z,7433,14\n"
        + "2023-11-16 20:17:06+02:00,34,12\n"
        + "2023-11-16 16:47:07-0130,374,14\n"
    )
    assert timeline(load_trace(path)) == [
        (0.0, 4808, 10),
        (0.0200399, 3180, 8),
        (0.5200399, 110, 27),
        (1.2890399, 7433, 14),
        (2.0200399, 34, 12),
        (3.0200399, 374, 14),
    ]


def test_azure_across_midnight_of_a_leap_day(write: Write) -> None:
    path = write(AZURE + "2024-02-29 23:59:59.5,1,2\n2024-03-01 00:00:00.25,3,4\n")
    assert timeline(load_trace(path)) == [(0.0, 1, 2), (0.75, 3, 4)]


def test_a_columns_place_does_not_matter_and_unused_ones_are_noted(write: Write) -> None:
    path = write(
        "TIMESTAMP,NumImages,GeneratedTokens, contexttokens\n"
        '2024-10-15T12:00:00.269Z,"a, ""b""",491, 770\n'
    )
    trace = load_trace(path)
    assert timeline(trace) == [(0.0, 770, 491)]
    assert trace.notes == ("columns not used: NumImages",)


def test_vidur_seconds(write: Write) -> None:
    path = write(VIDUR + "5.0,4808,10\n5.052,3180,8\n5.098188999999999,110,27\n1.0e1,1,1\n")
    assert timeline(load_trace(path)) == [
        (0.0, 4808, 10),
        (0.052, 3180, 8),
        (0.098189, 110, 27),  # to the nanosecond
        (5.0, 1, 1),
    ]


def test_a_far_origin_costs_no_digits(write: Write) -> None:
    path = write(VIDUR + "1700000000.123456789,1,1\n1700000000.123456790,1,1\n")
    assert load_trace(path).arrival_time.tolist() == [0.0, 1e-9]


def test_podsims_own_columns(write: Write) -> None:
    path = write(PODSIM + "0.25,100,7\n0.75,50.0,1\n")
    trace = load_trace(path)
    assert timeline(trace) == [(0.0, 100, 7), (0.5, 50, 1)]
    assert (trace.name, trace.rows_read, dict(trace.dropped), trace.notes) == ("x.csv", 2, {}, ())
    assert trace.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert trace.hash_ids is None
    assert trace.hash_block_size is None


def test_mooncake_milliseconds_and_blocks(write: Write) -> None:
    path = write(
        '{"timestamp": 27, "input_length": 513, "output_length": 5, "hash_ids": [0, 14]}\n'
        '{"timestamp": 3027, "input_length": 512, "output_length": 9, "hash_ids": [0]}\n',
        "x.jsonl",
    )
    trace = load_trace(path)
    assert timeline(trace) == [(0.0, 513, 5), (3.0, 512, 9)]
    assert trace.hash_ids is not None
    assert [ids.tolist() for ids in trace.hash_ids] == [[0, 14], [0]]
    assert trace.hash_block_size == 512


def test_mooncake_without_blocks(write: Write) -> None:
    path = write('{"input_length": 600, "output_length": 5, "timestamp": 0, "delay": 3}\n')
    trace = load_trace(path)
    assert timeline(trace) == [(0.0, 600, 5)]
    assert trace.hash_ids is None
    assert trace.notes == ()
    assert trace.session_id is None


def test_qwen_bailian_has_the_fields_of_mooncake_but_seconds_and_short_blocks(write: Write) -> None:
    record = (
        '{"chat_id": %d, "parent_chat_id": -1, "timestamp": %s, "input_length": 17, '
        '"output_length": 3, "type": "text", "turn": 1, "hash_ids": [0, 1]}\n'
    )
    trace = load_trace(write(record % (0, "0.5") + record % (1, "2.0"), "x.jsonl"))
    assert timeline(trace) == [(0.0, 17, 3), (1.5, 17, 3)]
    assert trace.hash_block_size == 16
    assert trace.notes == ("columns not used: type, turn",)
    assert trace.session_id is not None
    assert trace.session_id.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "unused"),
    [
        ("num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.8\n", ["pd_ratio"]),
        (AZURE + "XXX,3772,54\n", []),
    ],
    ids=["vidur", "nanoflow"],
)
def test_lengths_without_times(write: Write, content: str, unused: list[str]) -> None:
    trace = load_trace(write(content))
    assert trace.num_prompt_tokens.tolist() == [3772]
    assert trace.num_output_tokens.tolist() == [54]
    assert not trace.has_times
    assert np.isnan(trace.arrival_time).all()
    noted = [f"columns not used: {', '.join(unused)}"] if unused else []
    assert list(trace.notes) == [*noted, "the file holds lengths only, no arrival times"]


@pytest.mark.parametrize("change", ["duration", "qps", "scaled", "at_rate", "until"])
def test_lengths_alone_cannot_be_timed(write: Write, change: str) -> None:
    trace = load_trace(write("num_prefill_tokens,num_decode_tokens\n3772,54\n"))
    message = "x.csv: has no arrival times, give it some (--arrivals, --qps)"
    with pytest.raises(InputError) as error:
        getattr(trace, change)(2.0)  # the properties fail before they are called
    assert str(error.value) == message


# ---- files as they come


def test_crlf_without_a_last_newline_is_the_same_file(write: Write) -> None:
    plain = AZURE + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319600,3180,8\n"
    windows = plain.replace("\n", "\r\n").removesuffix("\r\n")
    assert timeline(load_trace(write(windows))) == timeline(load_trace(write(plain)))


def test_byte_order_mark_and_blank_lines(write: Write) -> None:
    path = write("\ufeff" + PODSIM + "0,1,2\n\n1,3,4\n  \n\n")
    trace = load_trace(path)
    assert timeline(trace) == [(0.0, 1, 2), (1.0, 3, 4)]
    assert trace.rows_read == 2


def test_gzip_is_seen_by_its_content(write: Write) -> None:
    data = gzip.compress((PODSIM + "0,1,2\n").encode())
    trace = load_trace(write(data, "x.csv"))
    assert timeline(trace) == [(0.0, 1, 2)]
    assert trace.sha256 == hashlib.sha256(data).hexdigest()


def test_repeated_rows_are_requests(write: Write) -> None:
    assert len(load_trace(write(PODSIM + "0,1,2\n" * 3))) == 3


def test_ties_keep_the_order_of_the_file(write: Write) -> None:
    path = write(PODSIM + "3,1,1\n0,2,1\n3,3,1\n0,4,1\n0,5,1\n")
    trace = load_trace(path)
    assert timeline(trace) == [(0, 2, 1), (0, 4, 1), (0, 5, 1), (3, 1, 1), (3, 3, 1)]
    assert trace.notes == (
        "3 rows were not in time order: sorted (line 3 goes back furthest, 3 s; "
        "if the clock was set back there, two stretches overlap now)",
    )


def test_blocks_follow_their_rows_when_sorted(write: Write) -> None:
    record = '{"timestamp": %d, "input_length": 1, "output_length": 1, "hash_ids": [%d]}\n'
    trace = load_trace(write(record % (9, 90) + record % (5, 50), "x.jsonl"))
    assert trace.hash_ids is not None
    assert [ids.tolist() for ids in trace.hash_ids] == [[50], [90]]


def test_zero_lengths_are_dropped_and_counted_when_asked(write: Write) -> None:
    path = write(PODSIM + "5,472,0\n45,1087,230\n118,0,276\n119,0,0\n120,7,7\n")
    trace = load_trace(path, zero_length="drop")
    assert timeline(trace) == [(0.0, 1087, 230), (75.0, 7, 7)]
    assert dict(trace.dropped) == {"zero output tokens": 2, "zero prompt tokens": 1}
    assert trace.rows_read == 5


# ---- wrong files: one line, with the place and the value


def error_of(path: str | Path, **options: str) -> str:
    with pytest.raises(InputError) as error:
        load_trace(path, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


NUMBER = "expected a whole number of tokens"
SECONDS = "expected a time in seconds"
DATE = "expected a date and time such as 2023-11-16 18:17:03.9799600"
ZERO = "expected at least 1 (--zero-length drop leaves out such rows)"
OK = "2023-11-16 18:17:04,1,1\n"
NO_DAY = "2023-11-31 18:17:04"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PODSIM + "0,\x1c29,2\n", f"2: num_prompt_tokens is '\\x1c29', {NUMBER}"),
        (AZURE + OK + OK.replace(",1\n", ",abc\n"), f"3: GeneratedTokens is 'abc', {NUMBER}"),
        (AZURE + OK + OK.replace(",1\n", ",\n"), f"3: GeneratedTokens is missing, {NUMBER}"),
        (AZURE + OK.replace(",1,", ",-1,") + OK, f"2: ContextTokens is '-1', {NUMBER}"),
        (AZURE + OK.replace(",1,", ",1.5,") + OK, f"2: ContextTokens is '1.5', {NUMBER}"),
        (AZURE + OK.replace(",1,", ",nan,") + OK, f"2: ContextTokens is 'nan', {NUMBER}"),
        (AZURE + OK.replace(",1,", ",inf,") + OK, f"2: ContextTokens is 'inf', {NUMBER}"),
        (AZURE + OK.replace(",1,", ",1_0,") + OK, f"2: ContextTokens is '1_0', {NUMBER}"),
        (AZURE + OK.replace(",1,", ",٣,") + OK, f"2: ContextTokens is '٣', {NUMBER}"),
        (
            AZURE + OK.replace(",1,", ",4000000000,"),
            "2: ContextTokens is '4000000000', expected fewer than 1000000000 tokens",
        ),
        (
            AZURE + OK.replace(",1,", f",{'9' * 50},"),
            f"2: ContextTokens is '{'9' * 40}...', {NUMBER}",
        ),
        (AZURE + "\n" + OK + OK.replace(",1\n", ",0\n"), f"4: GeneratedTokens is '0', {ZERO}"),
        (AZURE + OK + OK.replace(",1,", ",0,"), f"3: ContextTokens is '0', {ZERO}"),
        (AZURE + OK + f"{NO_DAY},1,1\n", f"3: TIMESTAMP is '{NO_DAY}', {DATE}"),
        (AZURE + OK + "1700000000,1,1\n", f"3: TIMESTAMP is '1700000000', {DATE}"),
        (AZURE + OK + "XXX,1,1\n", f"3: TIMESTAMP is 'XXX', {DATE}"),
        (VIDUR + "0,1,1\nNaN,1,1\n", f"3: arrived_at is 'NaN', {SECONDS}"),
        (VIDUR + "0,1,1\n-1,1,1\n", f"3: arrived_at is '-1', {SECONDS}"),
        (VIDUR + "0,1,1\n,1,1\n", f"3: arrived_at is missing, {SECONDS}"),
        (VIDUR + "0,1,1\n1e30,1,1\n", f"3: arrived_at is '1e30', {SECONDS}, below 146 years"),
        (VIDUR + "0,1,1\n0,1\n", "3: has 2 fields, expected 3"),
        (VIDUR + "0,1,1\n0,1,1,1\n", "3: has 4 fields, expected 3"),
        (VIDUR + '0,1,1\n0,"1,1\n0,1,1\n', "3: is not CSV: unexpected end of data"),
        # The first wrong line is named, whatever is wrong with later ones.
        (VIDUR + "0,1,1\n0,1,x\nx,1,1\n0,1\n", f"3: num_decode_tokens is 'x', {NUMBER}"),
        (VIDUR + "0,1,1\nx,1,1\n0,1,x\n", f"3: arrived_at is 'x', {SECONDS}"),
        # A quoted line break: rows are numbered by the line they start on.
        ("a," + VIDUR + '"x\ny",0,1,1\nz,0,1,w\n', f"4: num_decode_tokens is 'w', {NUMBER}"),
        ("", "1: is empty, expected the header or first record of a trace"),
        (" \n", "1: is empty, expected the header or first record of a trace"),
        (VIDUR, "2: is missing, expected a row after the header"),
        (
            "TIMESTAMP,ContextTokens\n2023-11-16 18:17:04,1\n",
            "1: GeneratedTokens is missing, expected a field of that name "
            "(azure needs TIMESTAMP, ContextTokens, GeneratedTokens)",
        ),
        (
            VIDUR.replace("arrived_at", "num_decode_tokens") + "1,2,3\n",
            "1: num_decode_tokens is there twice, expected one such column",
        ),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:4bb3\nsize 52283111\n",
            "1: is a git-lfs pointer, not the data: fetch it with git lfs pull",
        ),
        (b"\x89PNG\r\n\x1a\n\0\0", "1: is '\ufffdPNG\\r\\n', expected text: CSV or JSON lines"),
        ("a,b".encode("utf-16-le"), "1: is 'a\\x00,\\x00b\\x00', expected text: CSV or JSON lines"),
        (PODSIM.encode() + b"0,1,1\n0,1,\xff\n", f"3: num_output_tokens is '\ufffd', {NUMBER}"),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_a_wrong_csv_file(write: Write, content: str | bytes, message: str) -> None:
    assert error_of(write(content)) == f"x.csv:{message}"


RECORD = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]}\n'


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("5,", "5.5,", f"output_length is '5.5', {NUMBER}"),
        ("5,", "null,", f"output_length is missing, {NUMBER}"),
        ("5,", "true,", f"output_length is 'true', {NUMBER}"),
        ("5,", "0,", f"output_length is '0', {ZERO}"),
        ("5,", "NaN,", f"output_length is 'NaN', {NUMBER}"),
        ('"output_length": 5, ', "", f"output_length is missing, {NUMBER}"),
        ("0, ", '"soon", ', "timestamp is 'soon', expected a time in milliseconds"),
        ("[0, 1]", "7", "hash_ids is '7', expected a list of block numbers"),
        ("[0, 1]", "[0, -1]", "hash_ids is '[0, -1]', expected a list of block numbers"),
        (
            "[0, 1]",
            "[0, 1, 2]",
            "hash_ids is '[0, 1, 2]', "
            "expected 2 block numbers (600 tokens in blocks of 512; "
            "--block-size sets another), not 3",
        ),
        ("}", "", f"is {RECORD.strip()[:40] + '...'!r}, expected a JSON object"),
        (RECORD, "[1, 2]\n", "is '[1, 2]', expected a JSON object"),
    ],
)
def test_a_wrong_json_line(write: Write, old: str, new: str, message: str) -> None:
    path = write(RECORD + "\n" + RECORD.replace(old, new, 1) + RECORD, "x.jsonl")
    place = "x.jsonl:3: "
    assert error_of(path) == place + message


def test_a_missing_field_of_the_first_json_line(write: Write) -> None:
    assert error_of(write(RECORD.replace("output_", "out_"), "x.jsonl")) == (
        "x.jsonl:1: output_length is missing, expected a field of that name "
        "(mooncake needs timestamp, input_length, output_length)"
    )


def test_unknown_fields_list_the_known_formats(write: Write) -> None:
    message = error_of(write("Timestamp,Model,Request,Response\n5,ChatGPT,472,18\n"))
    assert message.startswith(
        "x.csv:1: the fields are 'Timestamp, Model, Request, Response', "
        "expected those of a known format (podsim: arrival_time, num_prompt_tokens, "
    )


def test_a_header_of_nothing_but_quotes(write: Write) -> None:
    assert error_of(write('""\n')).startswith("x.csv:1: the fields are '', expected those of ")


def test_a_cut_gzip_file(write: Write) -> None:
    data = gzip.compress((PODSIM + "0,1,2\n" * 1000).encode())
    assert error_of(write(data[:-20], "x.gz")) == (
        "x.gz: cannot be read: Compressed file ended before the end-of-stream marker was reached"
    )


def test_a_directory(write: Write) -> None:
    Path("folder").mkdir()
    assert error_of("folder") == (
        "folder: is a folder without session files (*.json) or client files"
    )


def test_a_missing_file_names_the_shipped_traces() -> None:
    assert error_of("azure-conv") == (
        "azure-conv: no such file, nor a trace that podsim ships (azure-conv-like)"
    )


def test_nothing_left(write: Write) -> None:
    assert error_of(write(PODSIM + "0,1,0\n0,0,1\n"), zero_length="drop") == (
        "x.csv: all 2 rows have zero tokens, none is left"
    )


def test_unknown_zero_length_rule(write: Write) -> None:
    assert error_of(write(PODSIM + "0,1,1\n"), zero_length="keep") == (
        "zero length is 'keep', expected 'error' or 'drop'"
    )


SAMPLES = [
    (AZURE + OK * 3).encode(),
    (VIDUR + "0.5,10,20\n1e1,30,40\n").encode(),
    RECORD.encode() * 2,
    gzip.compress((PODSIM + "0,1,2\n").encode(), mtime=0),
]


@settings(deadline=None)
@given(
    sample=st.sampled_from(SAMPLES),
    place=st.floats(0, 1),
    removed=st.integers(0, 5),
    added=st.one_of(st.binary(max_size=5), st.text('0123456789-+.eE:TZ,"\n\r{}[]').map(str.encode)),
)
def test_damaged_bytes_are_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    sample: bytes,
    place: float,
    removed: int,
    added: bytes,
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged"
    start = int(place * len(sample))
    path.write_bytes(sample[:start] + added + sample[start + removed :])
    try:
        trace, message = load_trace(path), ""
    except InputError as error:
        trace, message = None, str(error)
    assert "\n" not in message
    if trace is not None:
        assert not trace.has_times or trace.arrival_time[0] == 0
        assert not trace.has_times or (np.diff(trace.arrival_time) >= 0).all()
        assert trace.num_prompt_tokens.min() >= 1


# ---- blocks of rows


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 7])
def test_rows_are_the_same_however_they_are_read(
    write: Write, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr("podsim.trace_rows.BLOCK_ROWS", {"csv": 3})
    path = write(PODSIM + "".join(f"{i},{i + 1},{i + 2}\n" for i in range(rows)))
    assert timeline(load_trace(path)) == [(i, i + 1, i + 2) for i in range(rows)]
    write(path.read_text() + "0,1,x\n0,1\n")
    assert error_of(path) == f"x.csv:{rows + 2}: num_output_tokens is 'x', {NUMBER}"


# ---- real traces


@pytest.mark.skipif(not AZURE_CODE.exists(), reason="no real traces here")
def test_real_azure_code() -> None:
    trace = load_trace(AZURE_CODE)
    assert len(trace) == trace.rows_read == 8819
    assert trace.duration == pytest.approx(3435.948, abs=1e-3)
    assert trace.qps == pytest.approx(2.5664, abs=1e-4)
    assert gap_cv(trace) == pytest.approx(13.15, abs=0.01)
    assert trace.num_prompt_tokens.sum() == 18_059_974
    assert trace.num_output_tokens.sum() == 245_896
    assert timeline(trace)[:3] == [(0.0, 4808, 10), (0.052, 3180, 8), (0.098189, 110, 27)]


@pytest.mark.skipif(not MOONCAKE.exists(), reason="no real traces here")
def test_real_mooncake_conversation() -> None:
    trace = load_trace(MOONCAKE)
    assert len(trace) == trace.rows_read == 12_031
    assert trace.duration == pytest.approx(3536.999)
    assert len(np.unique(trace.arrival_time)) == 1180
    assert trace.num_prompt_tokens.mean() == pytest.approx(12035.1, abs=0.05)
    assert trace.num_output_tokens.mean() == pytest.approx(342.6, abs=0.05)
    assert trace.hash_ids is not None
    assert sum(map(len, trace.hash_ids)) == 288_500
    assert len(np.unique(np.concatenate(trace.hash_ids))) == 182_790


@pytest.mark.skipif(not REAL.exists(), reason="no real traces here")
@pytest.mark.parametrize(
    ("name", "rows", "mean_prompt", "has_times"),
    [
        ("vidur/arxiv_summarization_first2000.csv", 2000, 2539.88, False),
        ("qwen-bailian/README_quoted_record.jsonl", 1, 502, True),
    ],
)
def test_other_real_files(name: str, rows: int, mean_prompt: float, has_times: bool) -> None:
    trace = load_trace(REAL / name)
    assert (len(trace), trace.has_times) == (rows, has_times)
    assert trace.num_prompt_tokens.mean() == pytest.approx(mean_prompt, abs=0.01)


# ---- changes of a trace


@pytest.fixture
def trace(write: Write) -> Trace:
    """Five requests: at 0, 1, 1, 2 and 8 s, after one that was dropped."""
    rows = "0,9,0\n10,1,10\n11,2,20\n11,3,30\n12,4,40\n18,5,50\n"
    return load_trace(write(PODSIM + rows), zero_length="drop")


def test_rate(trace: Trace) -> None:
    assert (len(trace), trace.duration, trace.qps) == (5, 8.0, 0.5)


def test_scaled_divides_time_and_loses_nothing(trace: Trace) -> None:
    double = trace.scaled(2)
    assert timeline(double) == [(0, 1, 10), (0.5, 2, 20), (0.5, 3, 30), (1, 4, 40), (4, 5, 50)]
    assert double.qps == 2 * trace.qps
    assert gap_cv(double) == gap_cv(trace)
    assert double.notes == ("arrival rate multiplied by 2",)
    assert double.sha256 == trace.sha256


def test_at_rate(trace: Trace) -> None:
    slow = trace.at_rate(0.1)
    assert slow.arrival_time.tolist() == [0.0, 5.0, 5.0, 10.0, 40.0]
    assert slow.qps == pytest.approx(0.1)
    assert gap_cv(slow) == pytest.approx(gap_cv(trace))
    assert slow.notes == ("arrivals stretched to 0.1 requests/s",)


def test_at_rate_needs_a_rate_to_stretch(trace: Trace) -> None:
    with pytest.raises(InputError) as error:
        trace.head(1).at_rate(3)
    assert str(error.value) == (
        "x.csv: all requests arrive at once, so no stretching gives 3 requests/s; "
        "replace the arrivals (--arrivals)"
    )
    assert trace.head(1).qps == float("inf")


def test_head_counts_what_it_leaves_out(trace: Trace) -> None:
    first = trace.head(2)
    assert timeline(first) == [(0, 1, 10), (1, 2, 20)]
    assert first.dropped == {"zero output tokens": 1, "after the first 2 requests": 3}
    assert first.rows_read == 6
    assert trace.head(5) is trace
    assert trace.head(99) is trace


def test_until_is_before_its_end(trace: Trace) -> None:
    assert timeline(trace.until(2)) == [(0, 1, 10), (1, 2, 20), (1, 3, 30)]
    assert trace.until(2).dropped == {"zero output tokens": 1, "after the first 2 s": 2}
    assert len(trace.until(2.001)) == 4
    assert trace.until(9) is trace


def test_blocks_are_cut_with_their_requests(write: Write) -> None:
    trace = load_trace(write(RECORD * 3, "x.jsonl")).head(2)
    assert trace.hash_ids is not None
    assert len(trace.hash_ids) == 2


def test_with_arrivals_keeps_the_requests(trace: Trace) -> None:
    timed = trace.with_arrivals("uniform", qps=4)
    assert timeline(timed) == [
        (0.0, 1, 10),
        (0.25, 2, 20),
        (0.5, 3, 30),
        (0.75, 4, 40),
        (1.0, 5, 50),
    ]
    assert timed.notes == ("arrival times made: uniform at 4 requests/s, seed 0",)
    assert timed.rows_read == 6


def test_with_arrivals_gives_lengths_times(write: Write) -> None:
    trace = load_trace(write("num_prefill_tokens,num_decode_tokens\n7,5\n8,6\n"))
    assert timeline(trace.with_arrivals("static")) == [(0.0, 7, 5), (0.0, 8, 6)]
    gamma = trace.with_arrivals("gamma", 2, seed=3, burstiness=0.5)
    assert gamma.has_times
    assert gamma.notes[-1] == (
        "arrival times made: gamma at 2 requests/s, burstiness 0.5, seed 3"
    )  # fmt: skip


def test_columns_cannot_be_changed_by_accident(trace: Trace) -> None:
    with pytest.raises(ValueError, match="read-only"):
        trace.arrival_time[0] = 3


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("scaled", 0, "rate scale is 0, expected a number above 0"),
        ("scaled", float("nan"), "rate scale is nan, expected a number above 0"),
        ("at_rate", -2.5, "qps is -2.5, expected a number above 0"),
        ("at_rate", float("inf"), "qps is inf, expected a number above 0"),
        ("until", 0, "duration is 0, expected a number above 0"),
        ("head", 0, "number of requests is 0, expected at least 1"),
    ],
)
def test_wrong_changes(trace: Trace, change: str, value: float, message: str) -> None:
    with pytest.raises(InputError) as error:
        getattr(trace, change)(value)
    assert str(error.value) == message


# ---- synthetic requests


def test_equal_gaps_and_fixed_lengths() -> None:
    trace = synthetic_trace("uniform", 2, 3, 1500, "100")
    assert timeline(trace) == [(0.0, 1500, 100), (0.5, 1500, 100), (1.0, 1500, 100)]
    assert trace.qps == 2
    assert (trace.name, trace.rows_read) == ("synthetic", 3)
    assert trace.notes == (
        "arrivals uniform, qps 2, num_requests 3, prompt_tokens 1500, output_tokens 100, "
        "seed 0, burstiness 1.0",
    )


def test_all_at_once() -> None:
    trace = synthetic_trace("static", None, 3, 10, 20)
    assert timeline(trace) == [(0.0, 10, 20)] * 3
    assert trace.qps == float("inf")


@pytest.mark.parametrize(
    ("kind", "burstiness", "cv"),
    [("poisson", 1.0, 1.0), ("gamma", 1.0, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4.0, 0.5)],
)
def test_burstiness_is_the_shape_of_the_gaps(kind: str, burstiness: float, cv: float) -> None:
    trace = synthetic_trace(kind, 5, 100_000, 1, 1, seed=1, burstiness=burstiness)
    assert trace.qps == pytest.approx(5, rel=0.02)
    assert gap_cv(trace) == pytest.approx(cv, rel=0.02)


def test_the_seed_decides() -> None:
    def make(seed: int) -> Trace:
        return synthetic_trace("poisson", 5, 50, "uniform:1:99", "lognormal:200:0.5", seed)

    assert timeline(make(7)) == timeline(make(7))
    assert make(7).sha256 == make(7).sha256
    assert timeline(make(7)) != timeline(make(8))
    assert make(7).sha256 != make(8).sha256


def test_arrivals_do_not_change_the_lengths() -> None:
    def make(kind: str, qps: float) -> Trace:
        return synthetic_trace(kind, qps, 50, "uniform:1:99", "lognormal:200:0.5", seed=7)

    lengths = [row[1:] for row in timeline(make("poisson", 5))]
    assert [row[1:] for row in timeline(make("uniform", 9))] == lengths


def test_length_distributions() -> None:
    trace = synthetic_trace("static", None, 20_000, "uniform:10:12", "lognormal:200:0.5", seed=2)
    values, counts = np.unique(trace.num_prompt_tokens, return_counts=True)
    assert values.tolist() == [10, 11, 12]
    assert counts / 20_000 == pytest.approx([1 / 3] * 3, abs=0.02)
    assert np.median(trace.num_output_tokens) == pytest.approx(200, rel=0.02)
    assert np.log(trace.num_output_tokens).std() == pytest.approx(0.5, rel=0.02)


def test_a_short_lognormal_never_has_zero_tokens() -> None:
    assert synthetic_trace("static", None, 1000, "lognormal:1:3", 1).num_prompt_tokens.min() == 1


LENGTHS = (
    "expected a number from 1, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA with SIGMA from 0 to 3"
)


@pytest.mark.parametrize(
    "spec",
    ["", "abc", "0", "1.5", "nan", "inf", "1e12", "uniform:5", "uniform:0:9", "uniform:9:5",
     "uniform:1:2:3", "lognormal:5:-1", "lognormal:5:4", "lognormal:5:nan", "normal:5:1", "5:", -3],
)  # fmt: skip
def test_wrong_lengths(spec: str | int) -> None:
    with pytest.raises(InputError) as error:
        synthetic_trace("static", None, 1, 1, spec)
    assert str(error.value) == f"output tokens are {str(spec)!r}, {LENGTHS}"


@pytest.mark.parametrize(
    ("kind", "qps", "num_requests", "seed", "burstiness", "message"),
    [
        (
            *("x", 1, 5, 0, 1),
            "arrivals are 'x', expected one of poisson, gamma, weibull, uniform, static",
        ),
        ("poisson", None, 5, 0, 1, "qps is missing, poisson arrivals need one"),
        ("poisson", 0, 5, 0, 1, "qps is 0, expected a number above 0"),
        ("static", 3, 5, 0, 1, "qps is 3, but static arrivals have none: all come at once"),
        ("poisson", 1, 0, 0, 1, "number of requests is 0, expected at least 1"),
        ("poisson", 1, 5, -1, 1, "seed is -1, expected 0 or more"),
        ("gamma", 1, 5, 0, 0, "burstiness is 0, expected a number above 0"),
        ("poisson", 1, 5, 0, 2, "burstiness is 2, but only gamma and weibull have one"),
    ],
)  # fmt: skip
def test_wrong_arrivals(
    kind: str, qps: float | None, num_requests: int, seed: int, burstiness: float, message: str
) -> None:
    with pytest.raises(InputError) as error:
        synthetic_trace(kind, qps, num_requests, 1, 1, seed, burstiness)
    assert str(error.value) == message


def test_shipped_traces() -> None:
    assert shipped_traces() == ["azure-conv-like"]
