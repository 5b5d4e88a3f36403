"""Any bytes give a trace or one clear line, whatever the reader."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from podsim.errors import InputError
from podsim.trace_formats import FORMATS
from podsim.workload import ReadOptions, Trace, read_trace


def records(*rows: dict[str, object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


LENGTHS = {"input_length": 33, "output_length": 3}
TURN = {"t": 1.0, "in": 130, "out": 9, "hash_ids": [1, 2], "think_time": 2.0, "api_time": 1.5}

# A good file of every format.
SAMPLES: dict[str, bytes] = {
    "podsim": b"# hash_block_size 16\n# seed 7\narrival_time,num_prompt_tokens,num_output_tokens,"
    b"session_id,parent_session,think_time,hash_ids\n0.5,17,2,,,,1 2\n1.25,33,4,7,,0.5,1 2 3\n"
    b"2,1,4,8,7,0.5,\n3,33,4,7,,0.5,1\n",
    "azure-lengths": b"TIMESTAMP,ContextTokens,GeneratedTokens\nXXX,107,15\nXXX,396,513\n",
    "azure": b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-16 18:17:03.9799600,4808,10\r\n"
    b"2023-11-16 18:17:04+00:00,3180,8",
    "vidur": b"arrived_at,num_prefill_tokens,num_decode_tokens\n0.5,10,20\n1e1,30,40\n",
    "vidur-lengths": b"num_prefill_tokens,num_decode_tokens,pd_ratio\n3772,54,69.8\n",
    "burstgpt": b"Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens\n"
    b"19440110.0,1-a,43,GPT-4,906,446\n19440161.0,,2,ChatGPT,36,29\n19440170.0,1-a,2,GPT-4,36,29\n",
    "splitwise-sim": b"request_id,request_type,arrival_timestamp,prompt_size,token_size\n"
    b"0,2,1,4096,32\n1,2,3,2048,8\n",
    "claude-code": records(
        {
            **{"id": "s", "block_size": 64, "hash_id_scope": "local"},
            "requests": [TURN, {"type": "subagent", "agent_id": "a", "requests": [TURN]}, TURN],
        }
    ),
    "llmservingsim": records(
        {"input_toks": 2358, "output_toks": 531, "arrival_time_ns": 46926808},
        {
            **{"session_id": "a", "arrival_time_ns": 5},
            "sub_requests": [{"input_toks": 7, "output_toks": 3, "tool_duration_ns": 9}] * 2,
        },
    ),
    "apex": records({"ContextTokens": 304, "GeneratedTokens": 822, "StartTimeOffset": 618518284}),
    "ragpulse": records(
        *(
            {**LENGTHS, "timestamp": t, "session_id": "1-a", "hash_ids": {"sys_prompt": [1, 2]}}
            for t in ("82", "604453", "0")
        )
    ),
    "qwen-bailian": records(
        {**LENGTHS, "chat_id": 0, "parent_chat_id": -1, "timestamp": 0.5, "hash_ids": [0, 1, 2]},
        {**LENGTHS, "chat_id": 1, "parent_chat_id": 0, "timestamp": 1.5, "hash_ids": [0, 1, 2]},
    ),
    "lmcache": records({"timestamp": 10**15, "input": "a b", "output": "c", "session_id": "s"}),
    "aiperf": records({"timestamp": 5, "text_input": "a b", "output_length": 3, "delay": 4}),
    "mooncake": records(
        {**LENGTHS, "timestamp": 27, "session_id": "a", "hash_ids": [14]},
        {**LENGTHS, "delay": 27, "session_id": "a", "hash_ids": [14]},
    ),
    "vllm-timed": records({**LENGTHS, "timestamp": 27, "hash_ids": [14, 15, 16]}),
}
CLIENTS = {
    "chunk-0-trace.csv": b"0,0.05,2.0,Gamma,0.25,8.0\n600,0,0,,0,0\n1200,0.01,1.0,Weibull,0.7,9\n",
    "chunk-0-dataset.json": b'{"0": {"input_tokens": "{10: 0.4, 11: 0.6}", "output_tokens": '
    b'"{5: 1.0}"}, "1200": {"input_tokens": "{}", "output_tokens": "{6: 1.0}"}}',
}

damage = st.tuples(
    st.floats(0, 1),
    st.integers(0, 12),
    st.one_of(
        st.binary(max_size=6),
        st.text('0123456789-+.eE:TZ,"\n\r{}[] #').map(str.encode),
        st.sampled_from([b"[", b"{", b"null", b"true", b"1e400", b"-1", b'""', b"9" * 25, b"NaN"]),
    ),
)
quick = settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def damaged(sample: bytes, place: float, removed: int, added: bytes) -> bytes:
    start = int(place * len(sample))
    return sample[:start] + added + sample[start + removed :]


def read_or_refuse(path: Path, **options: object) -> None:
    """Reads the trace and checks it whole, or gets a message of one line that names the file."""

    def count(text: str) -> int:
        return len(text.split())

    message = ""
    try:
        check(read_trace(path, ReadOptions(count_tokens=count, **options)))  # type: ignore[arg-type]
    except InputError as error:
        message = str(error)
    assert "\n" not in message
    assert not message or str(path) in message


def check(trace: Trace) -> None:
    assert trace.rows_read == len(trace) + sum(trace.dropped.values())
    assert trace.num_prompt_tokens.min() >= 1
    assert trace.num_output_tokens.min() >= 1
    if trace.has_times:
        assert trace.arrival_time[0] == 0
        assert (np.diff(trace.arrival_time) >= 0).all()
    if trace.hash_ids is not None:
        assert trace.hash_block_size is not None
        blocks = -(-trace.num_prompt_tokens // trace.hash_block_size)
        assert all(len(ids) <= n for ids, n in zip(trace.hash_ids, blocks, strict=True))
    for first, last, started_by, after in trace.parent_turns:
        assert started_by < first <= last
        assert after == -1 or after > first
    if trace.think_time is not None:
        assert not (trace.think_time < 0).any()


def test_there_is_a_sample_of_every_format() -> None:
    assert {*SAMPLES, "servegen"} == {fmt.name for fmt in FORMATS}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_are_recognised(tmp_path: Path, name: str) -> None:
    path = tmp_path / "sample"
    path.write_bytes(SAMPLES[name])
    forced = "vllm-timed" if name == "vllm-timed" else None
    trace = read_trace(path, ReadOptions(format=forced, count_tokens=len))
    check(trace)
    assert trace.format == name


@pytest.mark.parametrize("name", SAMPLES)
@quick
@given(change=damage, zipped=st.booleans(), zero_length=st.sampled_from(["error", "drop"]))
def test_damaged_files(
    tmp_path: Path, name: str, change: tuple[float, int, bytes], zipped: bool, zero_length: str
) -> None:
    content = damaged(SAMPLES[name], *change)
    path = tmp_path / "damaged"
    path.write_bytes(gzip.compress(content) if zipped else content)
    read_or_refuse(path, zero_length=zero_length)
    read_or_refuse(path, format=name)


@quick
@given(content=st.binary(max_size=200), name=st.sampled_from([*SAMPLES, "servegen"]))
def test_any_bytes(tmp_path: Path, content: bytes, name: str) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    read_or_refuse(path)
    read_or_refuse(path, format=name)


@quick
@given(change=damage, cut=st.integers(1, 200))
def test_cut_archives(tmp_path: Path, change: tuple[float, int, bytes], cut: int) -> None:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as archive:
        for name, content in CLIENTS.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    whole = data.getvalue()
    path = tmp_path / "clients.tar.gz"
    for content in (damaged(whole, *change), whole[:-cut]):
        path.write_bytes(content)
        read_or_refuse(path)
        read_or_refuse(path, format="servegen")


@quick
@given(name=st.sampled_from(list(CLIENTS)), change=damage)
def test_damaged_clients(tmp_path: Path, name: str, change: tuple[float, int, bytes]) -> None:
    for other, content in CLIENTS.items():
        (tmp_path / other).write_bytes(damaged(content, *change) if other == name else content)
    read_or_refuse(tmp_path)


@quick
@given(change=damage)
def test_damaged_session_folders(tmp_path: Path, change: tuple[float, int, bytes]) -> None:
    (tmp_path / "a.json").write_bytes(SAMPLES["claude-code"])
    (tmp_path / "b.json").write_bytes(damaged(SAMPLES["claude-code"], *change))
    read_or_refuse(tmp_path)


def test_deep_nesting(tmp_path: Path) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    for name in ("mooncake", "ragpulse", "claude-code", "llmservingsim"):
        path = tmp_path / name
        path.write_bytes(SAMPLES[name].replace(b"[1, 2]", deep) + b'{"a": ' + deep + b"}\n")
        read_or_refuse(path)
    agent = b'{"type": "subagent", "requests": ['
    path.write_bytes(
        b'{"hash_id_scope": "", "requests": [' + agent * 400 + b"{}" + b"]}" * 400 + b"]}"
    )
    read_or_refuse(path)
