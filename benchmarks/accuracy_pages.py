"""The tables of docs/accuracy.md and the README, from the files that accuracy_table.py leaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from record_runs import SETUPS

ERRORS_FILE, CONTEXTS_FILE = "accuracy.csv", "accuracy-contexts.csv"
DISTURBED_FILE = "accuracy-disturbed.csv"
AGAIN_FILE, PREEMPTED_FILE = "accuracy-again.csv", "accuracy-preempted.csv"
METRICS = {
    "request_throughput": "req/s",
    "tbt_p50": "TBT P50",
    "tbt_p90": "TBT P90",
    "tbt_p99": "TBT P99",
    "ttft_p50": "TTFT P50",
    "ttft_p90": "TTFT P90",
    "ttft_p99": "TTFT P99",
}
TTFTS = ("ttft_p50", "ttft_p90", "ttft_p99")
STEPS = {"step_bias": "step bias", "step_median": "step median"}
NAMES = METRICS | STEPS
OWN_HOST, SHIPPED = "own_", "shipped_"
VARIANTS = {"": "host before", OWN_HOST: "host of the run", SHIPPED: "shipped profile"}
"""Prefixes of the errors' columns: whose host's time, and whose profile, the simulation had."""
BESIDE = "beside the recordings"
"""A run's profile that is of its own card; the others are compared with the shipped one."""
CONTEXTS = (0, 1024, 2048, 4096, 8192, 16384)
"""Tokens: the longest context of a step is above one of these and not above the next."""

MOST_BELOW = 0.85
"""The load up to which the first bars hold; the second are for what is above."""
BARS = {
    **{"request_throughput": 0.02, "tbt_p50": 0.03, "tbt_p90": 0.03, "tbt_p99": 0.06},
    **{"ttft_p50": 0.05, "ttft_p90": 0.08, "ttft_p99": 0.08},
    **{"step_bias": 0.02, "step_median": 0.03},
}
BARS_ABOVE = {"request_throughput": 0.03, "tbt_p50": 0.05, "tbt_p90": 0.05, "tbt_p99": 0.05}
BAR_OF_GAINS = 0.03
README_LOADS = (0.3, 0.85, 1.2)
BUDGETS_LOAD = 0.85


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def percent(value: float, name: str = "") -> str:
    return f"{value:.1%}" if name.endswith("_median") else f"{value:+.1%}"


def verdict(passed: bool) -> str:
    return "pass" if passed else "**fail**"


def machine_table(errors: pd.DataFrame) -> str:
    """What the runs were made with."""
    names = ["kernels", "profile", "driver", "torch", "triton", "date"]
    rows = [
        [*map(str, key), str(len(runs)), f"{runs['requests'].min()} to {runs['requests'].max()}"]
        for key, runs in errors.groupby(names)
    ]
    return table([*names, "runs", "requests each"], rows)


def bars_table(errors: pd.DataFrame) -> str:
    """Each bar, in how many runs it is met, and the worst of them.

    By the host's time as it was measured just before; beside it by that of the run itself, and by
    the shipped profile where runs have one of their own card.
    """
    variants = dict(VARIANTS)
    if not (errors["profile"] == BESIDE).any():
        del variants[SHIPPED]
    online = errors[errors["load"].notna()]
    is_below = online["load"] <= MOST_BELOW
    below, above = online[is_below], online[~is_below]
    rows = []
    for where, runs, bars in ((f"to {MOST_BELOW}", below, BARS), ("above", above, BARS_ABOVE)):
        for name, bar in bars.items():
            size = runs[name].abs()
            if size.empty:
                rows.append(
                    [where, NAMES[name], f"{bar:.0%}", "not recorded", *[""] * (len(variants) + 1)]
                )
                continue
            worst = runs.loc[size.idxmax()]
            met = [int((runs[variant + name].abs() <= bar).sum()) for variant in variants]
            worst_of = f"{percent(worst[name], name)} ({worst['run']})"
            counts = [f"{met[0]} of {len(runs)}", *map(str, met[1:])]
            passed = verdict(met[0] == len(runs))
            rows.append([where, NAMES[name], f"{bar:.0%}", *counts, worst_of, passed])
    return table(["load", "error of", "bar", *variants.values(), "worst", ""], rows)


def runs_table(errors: pd.DataFrame) -> str:
    """One line a run; bold is what misses its bar."""
    columns = [*METRICS, "step_median", "step_bias", "step_total"]
    rows = []
    for _, run in errors.iterrows():
        bars = {} if pd.isna(run["load"]) else BARS if run["load"] <= MOST_BELOW else BARS_ABOVE
        cells = [
            f"**{percent(run[name], name)}**"
            if abs(run[name]) > bars.get(name, np.inf)
            else percent(run[name], name)
            for name in columns
        ]
        share = "" if pd.isna(run["load"]) else f"{run['share']:.2f}"
        tail = [f"{run['host_share']:.1%}", f"{run['sm_clock_mhz']:.0f}"]
        rows.append([run["run"], share, *cells, *tail])
    names = [*METRICS.values(), "step median", "step bias", "all steps", "host", "clock"]
    return table(["run", "of capacity", *names], rows)


def gpu_table(errors: pd.DataFrame) -> str:
    """Steps without the host."""
    columns = [f"gpu_{kind}_{what}" for kind in ("decode", "mixed") for what in ("bias", "median")]
    rows = [
        [run["run"], *(percent(run[name], name) for name in columns)]
        for _, run in errors.iterrows()
    ]
    return table(["run", "decode bias", "decode median", "mixed bias", "mixed median"], rows)


def budgets_table(errors: pd.DataFrame) -> str:
    """Chat at one load under several budgets."""
    chosen = errors[errors["run"].isin(run_names("chat", "budgets"))]
    chosen = chosen[chosen["load"] == BUDGETS_LOAD]
    chosen = chosen[chosen["attention"].isin(["serial", "pod"])]
    return runs_table(chosen.sort_values(["attention", "token_budget"]))


def overload_table(errors: pd.DataFrame) -> str:
    """TTFT with the interval of the simulation."""
    rows = []
    for _, run in errors[errors["load"] > MOST_BELOW].iterrows():
        cells = [run["run"]]
        for name in TTFTS:
            measured, low, high = (run[f"{name}_{part}"] for part in ("measured", "low", "high"))
            inside = "" if low <= measured <= high else " **outside**"
            simulated = run[f"{name}_simulated"]
            cells.append(f"{measured:.3f}: {simulated:.3f} ({low:.3f} to {high:.3f}){inside}")
        rows.append(cells)
    return table(["run", *(f"{METRICS[name]} (s)" for name in TTFTS)], rows)


def error_bars_table(errors: pd.DataFrame) -> str:
    """Of each metric: in how many runs the measured value lies within the error bar."""
    rows = []
    for name, label in METRICS.items():
        cells = [label]
        for runs in (errors, *by_load(errors)):
            measured, low, high = (runs[f"{name}_{part}"] for part in ("measured", "low", "high"))
            inside = (low <= measured) & (measured <= high)
            cells.append(f"{inside.sum()} of {len(runs)}")
        simulated = errors[f"{name}_simulated"]
        below, above = (
            (errors[f"{name}_{end}"] / simulated - 1).median() for end in ("low", "high")
        )
        rows.append([*cells, f"{percent(below)} to {percent(above)}"])
    columns = ["", "runs", f"to {MOST_BELOW}", "above", "offline", "median bar"]
    return table(columns, rows)


def by_load(errors: pd.DataFrame) -> list[pd.DataFrame]:
    """Online runs to MOST_BELOW, those above, and offline ones."""
    load = errors["load"]
    return [errors[load <= MOST_BELOW], errors[load > MOST_BELOW], errors[load.isna()]]


def contexts_table(by_context: pd.DataFrame) -> str:
    """Errors of steps against the longest context, all runs of a strategy together."""
    rows = []
    ends = dict(zip(CONTEXTS, [*map(str, CONTEXTS[1:]), "more"], strict=True))
    for (attention, above), runs in by_context.groupby(["attention", "above"]):
        steps = runs["steps"]
        bias, size = (float(np.average(runs[name], weights=steps)) for name in ("bias", "size"))
        total = runs["predicted"].sum() / runs["measured"].sum() - 1
        of = f"{above + 1} to {ends[above]}"
        cells = [f"{steps.sum():,}", f"{size:.1%}", percent(bias), percent(total)]
        rows.append([str(attention), of, *cells])
    return table(["strategy", "context", "steps", "mean size", "bias", "all steps"], rows)


def offline_table(errors: pd.DataFrame) -> str:
    """Throughput of each strategy over that of serial, all requests there at the start."""
    offline = errors[errors["load"].isna()]
    return gains_table(offline, ["request_throughput"])


def online_table(errors: pd.DataFrame) -> str:
    """Latencies of each strategy over those of serial, under the same arrivals."""
    return gains_table(errors[errors["load"].notna()], ["tbt_p99", *TTFTS])


def gains_table(errors: pd.DataFrame, names: list[str]) -> str:
    """By run: what a strategy changes of some metrics against serial, measured and simulated."""
    by_run = errors.set_index("run")
    rows = []
    for run, other in by_run[by_run["attention"] != "serial"].iterrows():
        serial_run = str(run).replace(f"-{other['attention']}-", "-serial-", 1)
        if serial_run not in by_run.index:
            continue
        serial = by_run.loc[serial_run]
        for name in names:
            measured, simulated = (
                other[f"{name}_{of}"] / serial[f"{name}_{of}"] - 1
                for of in ("measured", "simulated")
            )
            same = np.sign(measured) == np.sign(simulated)
            passed = bool(same and abs(simulated - measured) <= BAR_OF_GAINS)
            cells = [percent(measured), percent(simulated), f"{(simulated - measured) * 100:+.1f}"]
            rows.append([str(run), METRICS[name], *cells, verdict(passed)])
    if not rows:
        return "Not recorded yet."
    return table(["run", "of", "measured", "simulated", "points between", ""], rows)


def run_names(*groups: str) -> list[str]:
    """Of all runs that groups of record_runs.py plan."""
    return [name for setup in SETUPS if setup.group in groups for name in setup.run_names]


def missing_table(errors: pd.DataFrame) -> str:
    """Of each group of record_runs.py: how many runs are recorded, by the kernels they ran."""
    kernels = sorted({*errors["kernels"], "hopper"})
    rows = []
    for group in dict.fromkeys(setup.group for setup in SETUPS):
        names = run_names(group)
        mine = errors[errors["run"].isin(names)]
        counts = [str(int((mine["kernels"] == kind).sum())) for kind in kernels]
        rows.append([group, str(len(names)), *counts])
    return table(["group", "planned", *(f"recorded, {kind} kernels" for kind in kernels)], rows)


def readme_table(errors: pd.DataFrame) -> str:
    """Some runs of POD."""
    return runs_table(errors[(errors["attention"] == "pod") & errors["load"].isin(README_LOADS)])


def disturbed_table(disturbed: pd.DataFrame) -> str:
    """Steps of decodes at a run's beginning and at its end, and what it comes to."""
    columns = ["decodes_first", "decodes_last", "gpu_mixed_bias"]
    columns += ["request_throughput", "tbt_p50", "ttft_p50"]
    rows = [
        [run["card"], run["run"], *("" if pd.isna(run[n]) else percent(run[n]) for n in columns)]
        for _, run in disturbed.iterrows()
    ]
    names = ["decodes, first tenth", "last tenth", "mixed steps", "req/s", "TBT P50", "TTFT P50"]
    return table(["card", "run", *names], rows)


def again_table(again: pd.DataFrame) -> str:
    """How far the engine is from itself."""
    rows = [[run["run"], *(percent(run[name]) for name in METRICS)] for _, run in again.iterrows()]
    return table(["run", *METRICS.values()], rows)


def preempted_table(preempted: pd.DataFrame) -> str:
    """Each metric measured, and simulated with two times of the host."""
    rows = []
    for _, row in preempted.iterrows():
        text = "{:.0f}" if row["metric"] == "preemptions" else "{:.4g}"
        numbers = (text.format(row[name]) for name in ("measured", "simulated", "own_simulated"))
        rows.append([row["run"], METRICS.get(row["metric"], row["metric"]), *numbers])
    return table(["run", "", "measured", VARIANTS[""], VARIANTS[OWN_HOST]], rows)


class Found(NamedTuple):
    """What the tables are made of."""

    errors: pd.DataFrame
    """Of every run."""
    by_context: pd.DataFrame
    disturbed: pd.DataFrame
    """Of runs that are not judged."""
    again: pd.DataFrame
    """Of runs made twice."""
    preempted: pd.DataFrame
    """Of runs with little KV cache."""


TABLES: dict[str, Callable[[Found], str]] = {
    "machine": lambda found: machine_table(found.errors),
    "bars": lambda found: bars_table(found.errors),
    "runs": lambda found: runs_table(found.errors),
    "steps on the gpu": lambda found: gpu_table(found.errors),
    "budgets": lambda found: budgets_table(found.errors),
    "overload": lambda found: overload_table(found.errors),
    "error bars": lambda found: error_bars_table(found.errors),
    "contexts": lambda found: contexts_table(found.by_context),
    "offline gains": lambda found: offline_table(found.errors),
    "online gains": lambda found: online_table(found.errors),
    "disturbed": lambda found: disturbed_table(found.disturbed),
    "again": lambda found: again_table(found.again),
    "preempted": lambda found: preempted_table(found.preempted),
    "what is missing": lambda found: missing_table(found.errors),
    "some runs": lambda found: readme_table(found.errors),
}


def read_tables(docs: Path) -> Found:
    """What accuracy_table.py found when the pages were written last."""
    names = ERRORS_FILE, CONTEXTS_FILE, DISTURBED_FILE, AGAIN_FILE, PREEMPTED_FILE
    return Found(*(pd.read_csv(docs / name, dtype={"card": str}) for name in names))


def filled(page: str, found: Found) -> str:
    """A page with the table between each pair of markers written anew."""

    def between(match: re.Match[str]) -> str:
        name = match[1]
        written = TABLES[name](found)
        return f"<!-- {name} -->\n\n{written}\n\n<!-- end of {name} -->"

    return re.sub(r"<!-- ([a-z ]+) -->\n.*?<!-- end of \1 -->", between, page, flags=re.DOTALL)
