"""The statistics of a trace as lines of text, one subject a line."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Part = Mapping[str, float | None]


def statistics_lines(statistics: Mapping[str, object]) -> list[str]:
    """What `inspect_trace` found, for a terminal."""
    requests, rows = statistics["requests"], statistics["rows_read"]
    source = f", {statistics['format']}" if statistics["format"] else ""
    lines = [f"Requests     {requests:,} of {rows:,} rows ({statistics['name']}{source})"]
    for name, describe in DESCRIPTIONS.items():
        part = statistics.get(name)
        if isinstance(part, Mapping):
            lines += describe(part)
    correlation = statistics["length_correlation"]
    if isinstance(correlation, float):
        lines.append(f"Correlation  of prompt and output lengths {_number(correlation)}")
    dropped, notes = statistics["dropped"], statistics["notes"]
    assert isinstance(dropped, Mapping)
    assert isinstance(notes, list)
    lines += [f"Dropped      {count:,}: {reason}" for reason, count in dropped.items()]
    return lines + [f"Note         {note}" for note in notes]


def _arrivals(part: Part) -> list[str]:
    return [
        f"Arrivals     {_number(part['rate'])} requests/s over {_number(part['duration'])} s, "
        f"at most {_number(part['max_in_1s'])} in 1 s, {_number(part['per_minute_min'])} to "
        f"{_number(part['per_minute_max'])} in a minute, "
        f"longest gap {_number(part['longest_gap'])} s",
        f"Burstiness   IAT CV {_number(part['iat_cv'])}, IDC-1s {_number(part['idc_1s'])}; "
        f"{_number(part['distinct_times'])} different arrival times",
    ]


def _lengths(label: str) -> Callable[[Part], list[str]]:
    def describe(part: Part) -> list[str]:
        quantiles = ", ".join(
            f"{name.upper()} {_number(part[name])}" for name in ("p50", "p90", "p99")
        )
        return [
            f"{label} mean {_number(part['mean'])}, {quantiles}, "
            f"min {_number(part['min'])}, max {_number(part['max'])} tokens"
        ]

    return describe


def _prefix(part: Part) -> list[str]:
    return [
        f"Prefix       ideal hit {_percent(part['hit_blocks'])} of blocks, "
        f"{_percent(part['hit_tokens'])} of tokens, "
        f"{_percent(part['requests_with_hit'])} of requests have one; "
        f"{_number(part['unique_blocks'])} different of {_number(part['blocks'])} blocks "
        f"of {_number(part['block_size'])} tokens"
    ]


def _lru(part: Part) -> list[str]:
    hits = ", ".join(f"{_percent(hit)} in {int(blocks):,}" for blocks, hit in part.items())
    return [f"LRU cache    hit {hits} blocks"]


def _sessions(part: Part) -> list[str]:
    think = ""
    if "think_mean" in part:
        think = (
            f"; think time mean {_number(part['think_mean'])} s, P50 {_number(part['think_p50'])} s"
        )
    return [
        f"Sessions     {_number(part['sessions'])} of {_number(part['turns_mean'])} turns in the "
        f"mean, {_number(part['turns_max'])} at most; "
        f"{_number(part['requests_without'])} requests without{think}"
    ]


def _clients(part: Part) -> list[str]:
    means = [
        f"{name.removesuffix('_mean')} {_number(value)}"
        for name, value in part.items()
        if name.endswith("_mean") and name != "rate_mean"
    ]
    return [
        f"Clients      {_number(part['clients'])} in {_number(part['windows'])} windows, together "
        f"{_number(part['rate_mean'])} requests/s ({_number(part['rate_min'])} to "
        f"{_number(part['rate_max'])}), IAT CV P50 {_number(part.get('iat_cv_p50'))} "
        f"P90 {_number(part.get('iat_cv_p90'))}",
        f"             means of window means: {', '.join(means) or 'none'}",
    ]


DESCRIPTIONS: dict[str, Callable[[Part], list[str]]] = {
    "arrivals": _arrivals,
    "prompt_tokens": _lengths("Prompt      "),
    "output_tokens": _lengths("Output      "),
    "prefix": _prefix,
    "lru": _lru,
    "sessions": _sessions,
    "clients": _clients,
}


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    # Four digits that count, and no exponent for large ones.
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
