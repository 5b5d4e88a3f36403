"""Records of JSON that hold several requests, or hold them in other words: each as flat ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from podsim.trace_fields import shown

Record = Mapping[str, object]


class BadRecord(Exception):
    """What is wrong with a record."""


def llmservingsim_requests(record: Record) -> Iterator[Record]:
    """A flat request, or the sub-requests of an agent: each after the tool of the one before."""
    if "sub_requests" not in record:
        yield record
        return
    if record.get("session_id") in (None, ""):
        raise BadRecord("session_id is missing, expected one beside sub_requests")
    shared = {"session_id": record["session_id"], "arrival_time_ns": record.get("arrival_time_ns")}
    for sub_request in _list_of_objects(record, "sub_requests"):
        yield {**sub_request, **shared}
        shared["arrival_time_ns"] = None  # known only when the one before has completed
        shared["tool_before_ns"] = sub_request.get("tool_duration_ns")


def claude_code_requests(record: Record) -> Iterator[Record]:
    """The turns of a session; its subagents are sessions that work for it."""
    if record.get("block_size", 64) != 64:
        raise BadRecord(f"block_size is {shown(str(record['block_size']))}, expected 64")
    yield from _turns(record, str(record.get("id") or "session"), "")


def _turns(record: Record, session: str, parent: str) -> Iterator[Record]:
    for number, turn in enumerate(_list_of_objects(record, "requests")):
        if turn.get("type") == "subagent":
            yield from _turns(turn, f"{session}/{number} {turn.get('agent_id') or ''}", session)
        else:
            yield {**turn, "session_id": session, "parent_session": parent}


RAGPULSE_PARTS = ("sys_prompt", "passages_ids", "history", "web_search", "user_input")


def ragpulse_requests(record: Record) -> Iterator[Record]:
    """The parts of the prompt, which have numbers of their own, as numbers of prefixes."""
    parts = record.get("hash_ids")
    if not isinstance(parts, dict):
        raise BadRecord(f"hash_ids is {shown(json.dumps(parts))}, expected an object of lists")
    prefix = 0
    prefixes = []
    for name in RAGPULSE_PARTS:
        numbers = parts.get(name) or []
        if not isinstance(numbers, list):
            raise BadRecord(f"{name} is {shown(json.dumps(numbers))}, expected a list")
        for number in numbers:
            prefix = _chained(prefix, name, number)
            prefixes.append(prefix)
    yield {**record, "hash_ids": prefixes}


def _chained(prefix: int, part: str, number: object) -> int:
    text = json.dumps([prefix, part, number])
    # 59 bits: room in an int64, and 18 digits at most in a file.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 5


def _list_of_objects(record: Record, name: str) -> list[dict[str, object]]:
    items = record.get(name)
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        text = shown(json.dumps(items)) if items is not None else "missing"
        raise BadRecord(f"{name} is {text}, expected a list of objects")
    return items
