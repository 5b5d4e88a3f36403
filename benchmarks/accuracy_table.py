"""Simulated beside recorded: the tables and the figure of docs/accuracy.md, without a GPU.

    python benchmarks/accuracy_table.py [--runs validation/h200] [--docs docs] [--readme README.md]

Reads the recordings that `benchmarks/record_runs.py` made, simulates each again, leaves
accuracy.csv, accuracy-contexts.csv and accuracy.png, and writes the tables between the markers
`<!-- NAME -->` and `<!-- end of NAME -->` of both pages. The tables depend on the two files alone.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd

from podsim.latency import ProfiledLatency
from podsim.validation import ENGINE_FILE, Comparison, Recorded, compare, read_recording

ERRORS_FILE, CONTEXTS_FILE = "accuracy.csv", "accuracy-contexts.csv"
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
CONTEXTS = (0, 1024, 2048, 4096, 8192, 16384)
"""Tokens: the longest context of a step is above one of these and not above the next."""

MOST_BELOW = 0.85
"""The load up to which the first bars hold; the second ones are for what is above."""
BARS = {
    **{"request_throughput": 0.02, "tbt_p50": 0.03, "tbt_p90": 0.03, "tbt_p99": 0.06},
    **{"ttft_p50": 0.05, "ttft_p90": 0.08, "ttft_p99": 0.08},
    **{"step_bias": 0.02, "step_median": 0.03},
}
BARS_ABOVE = {"request_throughput": 0.03, "tbt_p50": 0.05, "tbt_p90": 0.05, "tbt_p99": 0.05}
BAR_OF_GAINS = 0.03
README_LOADS = (0.3, 0.85, 1.2)


# --------------------------------------------------------------------------- what is measured


def row(comparison: Comparison) -> dict[str, object]:
    """Errors of one run (simulated over recorded, minus 1), and what they are errors of."""
    recorded, steps, headline = comparison.recorded, comparison.steps(), comparison.headline()
    options, deployment = recorded.engine["options"], recorded.deployment
    gpu = recorded.steps["gpu_seconds"].to_numpy()
    host = recorded.steps["duration"].to_numpy() - gpu
    return {
        "run": recorded.name,
        "workload": options["workload"],
        "attention": deployment.attention,
        "token_budget": deployment.token_budget,
        "load": options["load"],
        "requests": len(recorded.requests),
        **{name: headline.loc[name, "error"] for name in METRICS},
        "step_median": steps.loc["all", "median"],
        "step_bias": steps.loc["all", "bias"],
        "step_total": steps.loc["all", "total"],
        **{
            f"{name}_{column}": headline.loc[name, column]
            for name in METRICS
            for column in ("measured", "simulated")
        },
        **{f"{name}_{end}": headline.loc[name, end] for name in TTFTS for end in ("low", "high")},
        "host_share": host.sum() / (host.sum() + gpu.sum()),
        "sm_clock_mhz": recorded.gpu["sm_clock_mhz"].mean(),
        "power_w": recorded.gpu["power_w"].mean(),
        "kernels": recorded.engine.get("kernels", "triton"),
        **{name: recorded.engine[name] for name in ("driver", "torch", "triton", "date")},
    }


def contexts(comparison: Comparison) -> Iterator[dict[str, object]]:
    """Errors of a run's steps by the longest context in each."""
    recorded = comparison.recorded
    longest = [
        max([shape.decode_context_max, *(context for _, context in shape.prefills)])
        for shape in recorded.shapes
    ]
    measured, predicted = recorded.steps["duration"].to_numpy(), comparison.predicted
    bucket = np.searchsorted(CONTEXTS, longest, side="left") - 1
    for i in np.unique(bucket):
        mine = bucket == i
        error = predicted[mine] / measured[mine] - 1
        yield {
            "run": recorded.name,
            "attention": recorded.deployment.attention,
            "above": CONTEXTS[i],
            "steps": int(mine.sum()),
            "measured": measured[mine].sum(),
            "predicted": predicted[mine].sum(),
            "bias": error.mean(),
            "size": np.abs(error).mean(),
        }


def compared(recorded: Recorded) -> Comparison:
    """With error bars, which only the runs above the first bars' loads need."""
    load = recorded.engine["options"]["load"]
    return compare(recorded, error_bars=load is not None and load > MOST_BELOW)


def recordings(runs: Path) -> list[Path]:
    return sorted(path.parent for path in runs.glob(f"*/{ENGINE_FILE}"))


def measure(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of all runs, and of their contexts."""
    rows, by_context = [], []
    for folder in folders:
        comparison = compared(read_recording(folder))
        model = comparison.simulated.latency_model
        assert isinstance(model, ProfiledLatency)
        shipped = model.profile.source.startswith("profiles/")
        source = model.profile.source if shipped else "beside the recordings"
        rows.append({**row(comparison), "profile": source})
        by_context += contexts(comparison)
    return pd.DataFrame(rows), pd.DataFrame(by_context)


# ---------------------------------------------------------------------------------- the tables


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


def percent(value: float, name: str = "") -> str:
    return f"{value:.1%}" if name == "step_median" else f"{value:+.1%}"


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
    """Each bar, in how many runs it is met, and the worst of them."""
    online = errors[errors["load"].notna()]
    below, above = online[online["load"] <= MOST_BELOW], online[online["load"] > MOST_BELOW]
    rows = []
    for where, runs, bars in ((f"to {MOST_BELOW}", below, BARS), ("above", above, BARS_ABOVE)):
        for name, bar in bars.items():
            size = runs[name].abs()
            if size.empty:
                rows.append([where, NAMES[name], f"{bar:.0%}", "not recorded", "", ""])
                continue
            worst = runs.loc[size.idxmax()]
            met = int((size <= bar).sum())
            worst_of = f"{percent(worst[name], name)} ({worst['run']})"
            count = f"{met} of {len(runs)}"
            passed = verdict(met == len(runs))
            rows.append([where, NAMES[name], f"{bar:.0%}", count, worst_of, passed])
    return table(["load", "error of", "bar", "runs that meet it", "worst", ""], rows)


def runs_table(errors: pd.DataFrame, of: pd.DataFrame | None = None) -> str:
    """One line a run; bold is what misses its bar."""
    columns = [*METRICS, "step_median", "step_bias", "step_total"]
    rows = []
    for _, run in (errors if of is None else of).iterrows():
        bars = {} if pd.isna(run["load"]) else BARS if run["load"] <= MOST_BELOW else BARS_ABOVE
        cells = [
            f"**{percent(run[name], name)}**"
            if abs(run[name]) > bars.get(name, np.inf)
            else percent(run[name], name)
            for name in columns
        ]
        tail = [f"{run['host_share']:.1%}", f"{run['sm_clock_mhz']:.0f}"]
        rows.append([run["run"], *cells, *tail])
    names = [*METRICS.values(), "step median", "step bias", "all steps", "host", "clock"]
    return table(["run", *names], rows)


def budgets_table(errors: pd.DataFrame) -> str:
    """Chat at one load under several budgets."""
    chosen = errors[(errors["workload"] == "chat") & (errors["load"] == MOST_BELOW)]
    chosen = chosen[chosen["attention"].isin(["serial", "pod"])]
    return runs_table(errors, chosen.sort_values(["attention", "token_budget"]))


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
    return gains_table(errors[errors["load"].notna()], ["tbt_p99", "ttft_p50", "ttft_p90"])


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


def readme_table(errors: pd.DataFrame) -> str:
    """Some runs of POD."""
    chosen = errors[(errors["attention"] == "pod") & errors["load"].isin(README_LOADS)]
    return runs_table(errors, chosen)


TABLES: dict[str, Callable[[pd.DataFrame, pd.DataFrame], str]] = {
    "machine": lambda errors, _: machine_table(errors),
    "bars": lambda errors, _: bars_table(errors),
    "runs": lambda errors, _: runs_table(errors),
    "budgets": lambda errors, _: budgets_table(errors),
    "overload": lambda errors, _: overload_table(errors),
    "contexts": lambda _, by_context: contexts_table(by_context),
    "offline gains": lambda errors, _: offline_table(errors),
    "online gains": lambda errors, _: online_table(errors),
    "some runs": lambda errors, _: readme_table(errors),
}


def read_tables(docs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What `measure` found when the pages were written last."""
    return pd.read_csv(docs / ERRORS_FILE), pd.read_csv(docs / CONTEXTS_FILE)


def filled(page: str, errors: pd.DataFrame, by_context: pd.DataFrame) -> str:
    """A page with the table between each pair of markers written anew."""

    def between(match: re.Match[str]) -> str:
        name = match[1]
        written = TABLES[name](errors, by_context)
        return f"<!-- {name} -->\n\n{written}\n\n<!-- end of {name} -->"

    return re.sub(r"<!-- ([a-z ]+) -->\n.*?<!-- end of \1 -->", between, page, flags=re.DOTALL)


# ---------------------------------------------------------------------------------- the figure


def plot(errors: pd.DataFrame, path: Path) -> None:
    """Error against load, a line for each workload, strategy and budget."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    online = errors[errors["load"].notna()]
    lines = online.groupby(["workload", "attention", "token_budget"], sort=False)
    for axis, name in zip(axes, ("request_throughput", "tbt_p50", "ttft_p50"), strict=True):
        for key, rows in lines:
            label = "-".join(map(str, key))
            axis.plot(rows["load"], rows[name] * 100, marker="o", ms=4, label=label)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xlabel="load", title=METRICS[name], ylim=(-30, 30))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("simulated over recorded (%)")
    axes[-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("validation/h200"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    arguments = parser.parse_args()
    folders = recordings(arguments.runs)
    if not folders:
        raise SystemExit(f"{arguments.runs}: no recordings")
    errors, by_context = measure(folders)
    errors.to_csv(arguments.docs / ERRORS_FILE, index=False, float_format="%.5f")
    by_context.to_csv(arguments.docs / CONTEXTS_FILE, index=False, float_format="%.5f")
    kept = read_tables(arguments.docs)
    plot(kept[0], arguments.docs / "accuracy.png")
    for page in (arguments.docs / "accuracy.md", arguments.readme):
        page.write_text(filled(page.read_text(encoding="utf-8"), *kept), encoding="utf-8")
    print(bars_table(kept[0]))


if __name__ == "__main__":
    main()
