"""Each trace format beyond the plain ones: what its rows become, trap by trap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from podsim.errors import InputError
from podsim.workload import ReadOptions, Trace, load_trace, read_trace

BURSTGPT_1 = """\
Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,230,1317,Conversation log
45,GPT-4,417,276,693,API log
118,GPT-4,417,0,417,Conversation log
118,GPT-4,0,5,5,Conversation log
"""
BURSTGPT_3 = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
19440110.0,a,43,GPT-4,906,446,1352,Conversation log
19440161.0,,2,ChatGPT,36,29,65,API log
19440192.0,a,8,GPT-4,1779,123,1902,Conversation log
19440195.0,a,3,ChatGPT,935,178,1113,Conversation log
"""


def read(path: Path, content: str | list[object], **options: object) -> Trace:
    """The trace of a file of this content: text, or records for JSON lines."""
    if not isinstance(content, str):
        content = "".join(json.dumps(record) + "\n" for record in content)
    path.write_text(content)
    return read_trace(path, ReadOptions(**options))  # type: ignore[arg-type]


def error_of(path: Path, content: str | list[object], **options: object) -> str:
    with pytest.raises(InputError) as error:
        read(path, content, **options)
    message = str(error.value)
    assert "\n" not in message
    return message.removeprefix(f"{path.parent}/")


def timeline(trace: Trace) -> list[tuple[float, int, int]]:
    columns = (trace.arrival_time, trace.num_prompt_tokens, trace.num_output_tokens)
    return list(zip(*(column.tolist() for column in columns), strict=True))


def sessions(trace: Trace) -> list[tuple[int, float | None]]:
    """Session and think time of each request; None where it has none."""
    assert trace.session_id is not None
    think = np.full(len(trace), np.nan) if trace.think_time is None else trace.think_time
    known = [None if np.isnan(seconds) else seconds for seconds in think.tolist()]
    return list(zip(trace.session_id.tolist(), known, strict=True))


def hash_ids(trace: Trace) -> list[list[int]]:
    assert trace.hash_ids is not None
    return [ids.tolist() for ids in trace.hash_ids]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x"


# ---- BurstGPT


def test_burstgpt_1_starts_late_and_its_failures_are_dropped(path: Path) -> None:
    trace = read(path, BURSTGPT_1, zero_length="drop")
    assert timeline(trace) == [(0.0, 472, 18), (40.0, 1087, 230), (40.0, 417, 276)]
    assert trace.dropped == {"zero output tokens": 1, "zero prompt tokens": 1}
    assert trace.rows_read == 5
    assert (trace.format, trace.session_id) == ("burstgpt", None)


def test_burstgpt_3_has_two_more_columns_and_blank_sessions(path: Path) -> None:
    trace = read(path, BURSTGPT_3)
    assert timeline(trace) == [(0, 906, 446), (51, 36, 29), (82, 1779, 123), (85, 935, 178)]
    # 82 - 0 - 43 s elapsed; the third turn came before the second had completed.
    assert sessions(trace) == [(0, None), (-1, None), (0, 39.0), (0, 0.0)]


# ---- podsim's own


PODSIM = (
    "# hash_block_size 32\n# seed 7\n#\n"
    "arrival_time,num_prompt_tokens,num_output_tokens,session_id,think_time,hash_ids\n"
)


def test_podsims_optional_columns(path: Path) -> None:
    trace = read(path, PODSIM + "0,33,2,9,,4 5\n1.5,90,2,9,0.25,4\n2,1,1,,,\n2,1,1,-1,,7\n")
    assert hash_ids(trace) == [[4, 5], [4], [], [7]]
    assert trace.hash_block_size == 32
    assert sessions(trace) == [(0, None), (0, 0.25), (-1, None), (-1, None)]
    assert trace.notes == ("made with: seed 7",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (PODSIM + "0,33,2,9,,4 5 6\n", "x:5: hash_ids is '4 5 6', expected 2 block numbers (33 "
         "tokens in blocks of 32; --block-size sets another), not 3"),
        (PODSIM + "0,33,2,9,,4;5\n", "x:5: hash_ids is '4;5', expected a list of block numbers"),
        (PODSIM + "0,33,2,9,x,4\n", "x:5: think_time is 'x', expected a time in seconds"),
        (PODSIM.replace("32", "0") + "0,33,2,9,,4\n", "x:1: hash_block_size is '0', expected "
         "tokens"),
        ("# only a comment\n", "x:2: is empty, expected the header or first record of a trace"),
        (PODSIM, "x:5: is missing, expected a row after the header"),
    ],
)  # fmt: skip
def test_wrong_podsim_files(path: Path, content: str, message: str) -> None:
    assert error_of(path, content) == message


# ---- Mooncake and its supersets


def mooncake(timestamp: int | None = None, **fields: object) -> dict[str, object]:
    record = {"timestamp": timestamp, "input_length": 600, "output_length": 5, **fields}
    return {name: value for name, value in record.items() if value is not None}


def test_mooncake_turns_without_a_time_follow_their_predecessor(path: Path) -> None:
    records = [
        mooncake(1000, session_id="a"),
        mooncake(1500, session_id="b"),
        mooncake(None, session_id="a", delay=2500),
        mooncake(1700),
        mooncake(None, session_id="a", delay=500),
    ]
    trace = read(path, list(records))
    assert trace.arrival_time.tolist() == [0.0, 0.5, 0.7, 2.5, 3.0]
    assert sessions(trace) == [(0, None), (1, None), (-1, None), (0, 2.5), (0, 0.5)]
    assert trace.notes[0] == (
        "2 turns come after the turn before them: their arrival times count its service as no time"
    )


def test_a_turn_needs_a_time_or_a_predecessor(path: Path) -> None:
    lone = [mooncake(0), mooncake(None, delay=5, session_id="a")]
    expected = "expected one, or an earlier turn of the same session_id"
    assert error_of(path, list(lone)) == f"x:2: timestamp is missing, {expected}"


def test_rows_may_lack_hash_ids(path: Path) -> None:
    trace = read(path, [mooncake(0, hash_ids=[7, 8]), mooncake(1)])
    assert hash_ids(trace) == [[7, 8], []]


@pytest.mark.parametrize("ids", [[1.5, 2], ["1", "2"], [[1], [2]], [-1, 2], {"a": 1}, [1, [2]], 5])
def test_wrong_hash_ids(path: Path, ids: object) -> None:
    message = error_of(path, [mooncake(0, hash_ids=ids)], format="mooncake")
    assert message.startswith("x:1: hash_ids is ")
    assert message.endswith("expected a list of block numbers")


def test_vllm_timed_is_named_because_nothing_tells_its_blocks(path: Path) -> None:
    record = mooncake(250, input_length=33, hash_ids=[4, 5, 6])
    assert error_of(path, [record]) == (
        "x:1: hash_ids is '[4, 5, 6]', expected 1 block numbers (33 tokens in blocks of 512; "
        "--block-size sets another), not 3"
    )
    assert read(path, [record], format="vllm-timed").hash_block_size == 16
    assert read(path, [record], block_size=16).hash_block_size == 16


def test_aiperf_texts_need_a_tokenizer(path: Path) -> None:
    records = [
        {"timestamp": 2000, "text_input": "a b c", "output_length": 7, "session_id": "s"},
        {"delay": 1500, "text_input": "d e", "output_length": 8, "session_id": "s"},
    ]
    trace = read(path, list(records), count_tokens=lambda text: len(text.split()))
    assert timeline(trace) == [(0.0, 3, 7), (1.5, 2, 8)]
    assert sessions(trace) == [(0, None), (0, 1.5)]
    assert error_of(path, list(records)) == (
        "x: aiperf holds texts, count their tokens with --chars-per-token 4 "
        "or --tokenizer MODULE:FUNCTION"
    )


# ---- qwen-bailian


def test_qwen_bailian_turns_find_their_session_through_their_parents(path: Path) -> None:
    def turn(chat: int, parent: int, seconds: float) -> dict[str, object]:
        return {
            **{"chat_id": chat, "parent_chat_id": parent, "timestamp": seconds},
            **{"input_length": 17, "output_length": 3, "type": "text", "turn": 1},
            "hash_ids": [0, chat],
        }

    trace = read(
        path, [turn(5, -1, 0.5), turn(6, 5, 2.0), turn(7, 3, 2.5), turn(8, 6, 9.0), turn(9, 3, 9)]
    )
    assert trace.arrival_time.tolist() == [0.0, 1.5, 2.0, 8.5, 8.5]
    # The parent of chats 7 and 9 came before the trace began; they share a session all the same.
    assert sessions(trace) == [(0, None), (0, None), (1, None), (0, None), (1, None)]
    assert (trace.hash_block_size, trace.think_time) == (16, None)


# ---- other simulators


def test_splitwise_sim(path: Path) -> None:
    header = (
        "request_id,request_type,application_id,arrival_timestamp,batch_size,"
        "prompt_size,token_size\n"
    )
    trace = read(path, header + "0,2,0,1,1,4096,32\n1,2,0,3.5,1,2048,8\n")
    assert timeline(trace) == [(0.0, 4096, 32), (2.5, 2048, 8)]
    message = error_of(path, header + "0,2,0,1,1,4096,32\n1,1,0,3,1,2048,8\n")
    assert message == "x:3: request_type is '1', expected 2"


def test_llmservingsim_flat_and_agentic_rows_in_one_file(path: Path) -> None:
    agent = {
        "session_id": "swe-1",
        "arrival_time_ns": 500_000_000,
        "sub_requests": [
            {"input_toks": 100, "output_toks": 10, "tool_duration_ns": 2_000_000_000},
            {"input_toks": 200, "output_toks": 20, "tool_duration_ns": 0},
            {"input_toks": 300, "output_toks": 30},
        ],
    }
    flat = {"input_toks": 2358, "output_toks": 531, "arrival_time_ns": 46_926_808}
    trace = read(path, [flat, agent])
    assert trace.arrival_time == pytest.approx([0, 0.453073192, 2.453073192, 2.453073192], abs=1e-9)
    assert trace.num_prompt_tokens.tolist() == [2358, 100, 200, 300]
    assert sessions(trace) == [(-1, None), (0, None), (0, 2.0), (0, 0.0)]
    assert read(path, [agent, flat]).num_prompt_tokens.tolist() == [2358, 100, 200, 300]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"session_id": None}, "session_id is missing, expected one beside sub_requests"),
        ({"sub_requests": 5}, "sub_requests is '5', expected a list of objects"),
        ({"sub_requests": [5]}, "sub_requests is '[5]', expected a list of objects"),
        (
            {"sub_requests": [{"output_toks": 1}]},
            "input_toks is missing, expected a whole number of tokens",
        ),
        ({"arrival_time_ns": None}, "arrival_time_ns is missing, expected one, or an earlier "
         "turn of the same session_id"),
    ],
)  # fmt: skip
def test_wrong_agentic_rows(path: Path, change: dict[str, object], message: str) -> None:
    agent = {
        "session_id": "a",
        "arrival_time_ns": 5,
        "sub_requests": [{"input_toks": 100, "output_toks": 10}],
    }
    assert error_of(path, [{**agent, **change}]) == f"x:1: {message}"


def test_apex_nanoseconds(path: Path) -> None:
    def request(offset: int) -> dict[str, object]:
        return {"ContextTokens": 304, "GeneratedTokens": 822, "StartTimeOffset": offset}

    trace = read(path, [request(618_518_284), request(1_236_439_963)])
    assert timeline(trace) == [(0.0, 304, 822), (0.617921679, 304, 822)]


def test_lmcache_microseconds_texts_and_disorder(path: Path) -> None:
    def request(timestamp: int, session: str, text: str) -> dict[str, object]:
        return {"timestamp": timestamp, "input": text, "output": "ok", "session_id": session}

    records = [
        request(1_700_000_000_500_000, "a", "twelve chars"),
        request(1_700_000_000_000_001, "b", "four"),
        request(1_700_000_009_000_000, "a", "12345678"),
    ]
    trace = read(path, list(records), count_tokens=lambda text: -(-len(text) // 4))
    assert timeline(trace) == [(0.0, 1, 1), (0.499999, 3, 1), (8.999999, 2, 1)]
    assert sessions(trace) == [(1, None), (0, None), (0, None)]
    assert trace.notes[0].startswith("1 rows were not in time order: sorted (line 2 goes back")


def test_a_text_without_tokens(path: Path) -> None:
    record = {"timestamp": 1, "input": "", "output": "ok", "session_id": "a"}
    assert (
        error_of(path, [record], count_tokens=len)
        == "x:1: input is '0', expected a text with tokens"
    )


# ---- RAGPulse


def ragpulse(timestamp: str, session: str = "1-x", **parts: list[int]) -> dict[str, object]:
    return {
        **{"timestamp": timestamp, "input_length": 1400, "output_length": 9},
        **{"session_id": session, "hash_ids": parts},
    }


def test_ragpulse_unwraps_its_clock(path: Path) -> None:
    content = "".join(
        json.dumps(ragpulse(t, session=s, sys_prompt=[1])) + "\n"
        for t, s in [("82", "1-x"), ("604453", "2-y"), ("0", "2-y"), ("17", "3-z")]
    )
    trace = read(path, content + "\n")  # it ends with a blank line
    assert trace.arrival_time.tolist() == [0.0, 604_371.0, 604_718.0, 604_735.0]
    assert "the clock starts again at line 3: unwrapped, 604800 s later each time" in trace.notes
    assert [session for session, _ in sessions(trace)] == [0, 1, 1, 2]


def test_ragpulse_parts_become_prefixes(path: Path) -> None:
    same = ragpulse("1", sys_prompt=[7], passages_ids=[3], user_input=[5])
    moved = ragpulse("2", sys_prompt=[7], passages_ids=[5], user_input=[3])
    other = ragpulse("3", sys_prompt=[8], passages_ids=[3], user_input=[5])
    swapped = dict(reversed(list(dict(same["hash_ids"]).items())))  # type: ignore[call-overload]
    first, again, second, third = hash_ids(
        read(path, [same, {**same, "hash_ids": swapped}, moved, other])
    )
    assert first == again  # whatever the order of the names
    assert first[0] == second[0]
    assert not set(first) & set(second[1:])  # 3 and 5 come after another prefix
    assert not set(first) & set(third)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1], "hash_ids is '[1]', expected an object of lists"),
        ({"history": 5}, "history is '5', expected a list"),
    ],
)
def test_wrong_ragpulse_parts(path: Path, ids: object, message: str) -> None:
    records = [ragpulse("1", sys_prompt=[1]), {**ragpulse("1"), "hash_ids": ids}]
    assert error_of(path, list(records)) == f"x:2: {message}"


# ---- naming a format


def test_a_named_format_is_not_guessed(path: Path) -> None:
    both = (
        "arrived_at,num_prefill_tokens,num_decode_tokens,"
        "arrival_time,num_prompt_tokens,num_output_tokens\n5,1,2,7,3,4\n"
    )
    assert timeline(read(path, both)) == [(0.0, 3, 4)]
    assert timeline(read(path, both, format="vidur")) == [(0.0, 1, 2)]
    assert not read(path, both, format="vidur-lengths").has_times


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        ("a,b\n1,2\n", "vidur", "x:1: arrived_at is missing, expected a field of that name "
         "(vidur needs arrived_at, num_prefill_tokens, num_decode_tokens)"),
        ("a,b\n1,2\n", "mooncake", "x:1: is CSV, but mooncake is JSON lines"),
        ('{"a": 1}\n', "azure", "x:1: is JSON lines, but azure is CSV"),
        ('{"a": 1}\n', "claude-code", "x:1: requests is missing, expected a list of objects"),
    ],
)  # fmt: skip
def test_a_file_of_another_format(path: Path, content: str, format: str, message: str) -> None:
    assert error_of(path, content, format=format) == message


def test_an_unknown_format(path: Path) -> None:
    path.write_text(BURSTGPT_1)
    with pytest.raises(InputError, match=r"^format is 'excel', expected one of: podsim, azure-"):
        load_trace(path, format="excel")
