"""report.html: one page of a run, or of variants side by side, that needs nothing beside itself.

Tables are written here; charts are data in the page, which report.js draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files

import pandas as pd

from podsim.report_charts import Chart, Run, charts
from podsim.result_row import num_gpus
from podsim.step_costs import kind_table
from podsim.terminal import (
    COMPARED,
    LATENCY_ROWS,
    describe,
    format_difference,
    format_metric,
    format_seconds,
    own_part,
    unclear_differences,
)

NUM_SLOWEST = 10
PHASES = ("queue", "prefill", "decode")
LONG = 0.9
"""The quantile from which on a length or a TPOT is called long."""

Hashes = Mapping[str, str]


def run_page(run: Run, hashes: Hashes) -> str:
    """The report of one run."""
    sections = [
        _facts(run),
        _section("Latency", _latency_table(run), *_figures("cdf-ttft", "cdf-tbt", "cdf-e2e")),
        _section("Latency over time", *_figures("ttft", "tbt")),
        _section("Batches over time", *_figures("kinds", "tokens", "requests", "kv")),
        _section("Steps", _kind_table([run]), *_figures("kernels")),
        _section("Slowest requests", *_slowest(run, NUM_SLOWEST), _WHY),
        _section("Configuration", _config_table([run]), _hash_table({"": hashes})),
    ]
    return _page(describe(run.result), [_notes([run]), *sections], charts([run]))


def comparison_page(
    runs: Sequence[Run],
    compared: pd.DataFrame,
    hashes: Mapping[str, Hashes],
) -> str:
    """The report of variants that served the same requests, laid over each other."""
    trace = runs[0].result.trace
    title = f"{trace.name}: {len(trace)} requests"
    if all(run.result.trace.qps == trace.qps for run in runs):
        title += f", {trace.qps:.2f} req/s"
    numbered = range(len(runs))
    sections = [
        _section("Variants", _compared_table(compared, runs)),
        _section("Latency", *_figures("cdf-ttft", "cdf-tbt", "cdf-e2e")),
        _section("Latency over time", *_figures("ttft", "tbt")),
        _section("Batches over time", *_figures("requests", "kv")),
        _section("Time by kind of step", *_figures(*(f"kinds-{i}" for i in numbered))),
        _section("Tokens in a step", *_figures(*(f"tokens-{i}" for i in numbered))),
        _section("Steps", _kind_table(runs), *_figures("kernels")),
        _section("Slowest requests", *(_slowest_of(run) for run in runs), _WHY),
        _section("Configuration", _config_table(runs), _hash_table(hashes)),
    ]
    return _page(title, [_notes(runs), *sections], charts(runs))


def _page(title: str, body: Iterable[str], data: Sequence[Chart]) -> str:
    # `<` is escaped so that no name in the data can end the script element.
    embedded = json.dumps({"charts": data}, separators=(",", ":")).replace("<", "\\u003c")
    css, js = (
        files("podsim").joinpath(f"report.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>podsim: {escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"<main>\n<header><p>podsim report</p><h1>{escape(title)}</h1></header>\n"
        f"{''.join(body)}</main>\n"
        "<noscript>The charts of this page are drawn by its script.</noscript>\n"
        f'<script type="application/json" id="data">{embedded}</script>\n'
        f"<script>\n{js}</script>\n</body>\n</html>\n"
    )


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{_grouped(content)}</section>\n"


def _grouped(content: Sequence[str]) -> str:
    """Figures that follow each other share a grid."""
    parts, figures = [], 0
    for item in (*content, ""):
        if item.startswith("<figure"):
            figures += 1
            parts.append(item if figures > 1 else '<div class="figures">' + item)
        else:
            parts.append(("</div>\n" if figures else "") + item)
            figures = 0
    return "".join(parts)


def _figures(*keys: str) -> list[str]:
    return [f'<figure id="{key}"></figure>' for key in keys]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "numbers") -> str:
    """Cells are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>" + f"<th>{row[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>\n"
    )


# ---- headline


def _facts(run: Run) -> str:
    summary, own = run.summary, own_part(run.summary)
    per_gpu = _number(summary["total_token_throughput"]) / num_gpus(run.result.deployment)
    facts = {
        "Completed": f"{summary['completed']:,}",
        "Refused": f"{summary['failed']:,}",
        "Requests/s": f"{summary['request_throughput']:.2f}",
        "Output tokens/s": f"{summary['output_throughput']:,.0f}",
        "Tokens/s/GPU": f"{per_gpu:,.0f}",
        "Simulated": f"{summary['duration']:,.1f} s",
        "Busy": f"{own['busy_share']:.1%}",
        "KV cache max": f"{own['kv_used_max']:.1%}",
        "Preemptions": f"{own['preemptions']:,}",
    }
    items = "".join(f"<div><dt>{escape(k)}</dt><dd>{v}</dd></div>" for k, v in facts.items())
    return f"<dl>{items}</dl>\n"


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return float(value)


def _latency_table(run: Run) -> str:
    own = own_part(run.summary)
    rows = []
    for key, label in LATENCY_ROWS.items():
        found = own[key]
        assert isinstance(found, dict)
        statistics = ("mean", "p50", "p90", "p99")
        cells = [format_seconds(found[name]) for name in statistics]
        if run.result.intervals:
            spans = [run.result.intervals[f"{key}_{name}"] for name in statistics]
            cells = [
                f"{cell}<br>{_interval(span)}" for cell, span in zip(cells, spans, strict=True)
            ]
        rows.append([label, *cells])
    return _table(["", "mean", "P50", "P90", "P99"], rows)


def _interval(span: tuple[float, float]) -> str:
    low, high = (format_seconds(value) for value in span)
    return f"<small>{low} to {high}</small>"


def _compared_table(compared: pd.DataFrame, runs: Sequence[Run]) -> str:
    """Differences from the first variant in per cent; error bars where they were simulated."""
    first, *others = runs
    unclear = unclear_differences({run.name: run.result for run in runs})
    rows = []
    for key, (label, unit) in COMPARED.items():
        base, *values = compared.loc[[key]].to_numpy(dtype=float)[0].tolist()
        cells = [format_metric(base, unit) + _bars(first, key, unit)]
        for run, value in zip(others, values, strict=True):
            mark = " ~" if (run.name, key) in unclear else ""
            change = f"<small>{format_difference(value, base)}{mark}</small>"
            cells.append(f"{format_metric(value, unit)} {change}{_bars(run, key, unit)}")
        rows.append([label, *cells])
    table = _table(["", *(escape(run.name) for run in runs)], rows)
    return table + ("<p>~ the error bars of the two overlap</p>\n" if unclear else "")


def _bars(run: Run, key: str, unit: str) -> str:
    if run.result.intervals is None or key not in run.result.intervals:
        return ""
    low, high = (format_metric(value, unit) for value in run.result.intervals[key])
    return f"<br><small>{low} to {high}</small>"


def _notes(runs: Sequence[Run]) -> str:
    """What a reader must know; what does not hold for every run names its run."""
    found: dict[str, list[str]] = {}
    for run in runs:
        notes = [*run.result.trace.notes, *run.result.notes]
        notes += [f"dropped {n}: {reason}" for reason, n in run.result.trace.dropped.items() if n]
        refused = own_part(run.summary)["refused"]
        assert isinstance(refused, dict)
        notes += [f"refused {n}: {reason}" for reason, n in refused.items()]
        for note in notes:
            found.setdefault(note, []).append(run.name)
    items = [
        escape(note if len(names) == len(runs) else f"{', '.join(names)}: {note}")
        for note, names in found.items()
    ]
    return (
        f'<ul class="notes">{"".join(f"<li>{item}</li>" for item in items)}</ul>\n' if items else ""
    )


# ---- steps


def _kind_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        table = kind_table(run.steps)
        busy = float(run.steps["duration"].sum())
        for kind, row in table.iterrows():
            name = str(kind) if len(runs) == 1 else f"{kind}, {run.name}"
            cells = [
                f"{row['steps']:,.0f}",
                f"{row['seconds'] / busy:.1%}",
                f"{row['tokens']:,.1f}",
            ]
            cells += [format_seconds(float(row[column])) for column in ("mean", "p50", "p99")]
            rows.append([escape(name), *cells])
    head = ["", "steps", "share of busy time", "tokens, mean", "duration, mean", "P50", "P99"]
    return _table(head, rows)


# ---- slowest requests

_WHY = (
    "<p>The reason names the longest phase and its share of the latency. "
    f"Long prompts, long outputs and slow steps (TPOT) are those from P{LONG * 100:.0f} of the run "
    "on.</p>\n"
)


def _slowest(run: Run, number: int) -> list[str]:
    served = run.requests[run.requests["refused"] == ""]
    if served.empty:
        return ["<p>None was served.</p>\n"]
    limits = {
        name: float(served[name].quantile(LONG))
        for name in ("num_prompt_tokens", "num_output_tokens", "tpot")
    }
    tables = []
    for title, column, phases in (
        ("By TTFT", "ttft", PHASES[:2]),
        ("By end-to-end latency", "e2e_latency", PHASES),
    ):
        slowest = served.nlargest(number, column)
        head = ["request", "arrival", "prompt", "output", *PHASES]
        head += ["TTFT", "end to end", "", "why"]
        longest = float(slowest[column].iloc[0])
        records = [{str(k): v for k, v in row.items()} for row in slowest.to_dict("records")]
        rows = [_slow_row(row, column, phases, longest, limits) for row in records]
        tables.append(f"<h3>{title}</h3>\n" + _table(head, rows, kind="numbers slowest"))
    return tables


def _slow_row(
    row: Mapping[str, float],
    column: str,
    phases: Sequence[str],
    longest: float,
    limits: Mapping[str, float],
) -> list[str]:
    seconds = {
        "queue": row["queue_time"],
        "prefill": row["ttft"] - row["queue_time"],
        "decode": row["e2e_latency"] - row["ttft"],
    }
    bars = "".join(
        f'<i class="{phase}" style="width:{seconds[phase] / longest * 100:.1f}%"></i>'
        for phase in phases
    )
    slowest = max(phases, key=lambda phase: seconds[phase])
    reasons = [f"{slowest} {seconds[slowest] / row[column]:.0%}"]
    if slowest == "prefill" and row["num_prompt_tokens"] >= limits["num_prompt_tokens"]:
        reasons.append("long prompt")
    if slowest == "decode" and row["num_output_tokens"] >= limits["num_output_tokens"]:
        reasons.append("long output")
    if slowest == "decode" and row["tpot"] >= limits["tpot"]:
        reasons.append("slow steps")
    if row["num_preemptions"]:
        plural = "s" if row["num_preemptions"] > 1 else ""
        reasons.append(f"{row['num_preemptions']} preemption{plural}")
    return [
        *(f"{row['request_id']}", f"{row['arrival_time']:,.1f} s"),
        *(f"{row['num_prompt_tokens']:,}", f"{row['num_output_tokens']:,}"),
        *(format_seconds(seconds[phase]) for phase in PHASES),
        *(format_seconds(row["ttft"]), format_seconds(row["e2e_latency"])),
        *(f'<span class="phases">{bars}</span>', ", ".join(reasons)),
    ]


def _slowest_of(run: Run) -> str:
    tables = "".join(_slowest(run, NUM_SLOWEST // 2))
    return f"<details open><summary>{escape(run.name)}</summary>\n{tables}</details>\n"


# ---- configuration


def _config_table(runs: Sequence[Run]) -> str:
    """Every option; for variants, those that differ are marked."""
    configs = [
        ({"trace": run.result.trace.name} if run.workload is None else asdict(run.workload))
        | asdict(run.result.deployment)
        for run in runs
    ]
    rows = []
    for name in configs[0]:
        values = [_shown(config[name]) for config in configs]
        mark = len(set(values)) > 1
        rows.append([escape(name), *(f"<b>{value}</b>" if mark else value for value in values)])
    if len(runs) == 1:
        return _table(["option", "value"], rows, kind="options pairs")
    return _table(["option", *(escape(run.name) for run in runs)], rows, kind="options")


def _shown(value: object) -> str:
    return "<small>default</small>" if value is None else escape(str(value))


def _hash_table(hashes: Mapping[str, Hashes]) -> str:
    rows = [
        [escape(f"{name.removesuffix('_sha256')} {variant}".strip()), f"<code>{value}</code>"]
        for variant, found in hashes.items()
        for name, value in found.items()
    ]
    return _table(["made from", "SHA-256"], dict.fromkeys(map(tuple, rows)), kind="options")
