"""Simulated beside recorded: the tables and the figure of docs/accuracy.md, without a GPU.

    python benchmarks/accuracy_table.py [--docs docs] [--readme README.md]
    python benchmarks/accuracy_table.py --sizes

Reads the recordings that `benchmarks/record_runs.py` made, simulates each again, leaves
accuracy.csv, others beside it for runs that are not judged, and accuracy.png, and writes the tables
between the markers `<!-- NAME -->` and `<!-- end of NAME -->` of both pages. The tables depend on
the files alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from accuracy_pages import (
    AGAIN_FILE,
    BESIDE,
    CONTEXTS,
    CONTEXTS_FILE,
    DISTURBED_FILE,
    ERRORS_FILE,
    METRICS,
    OWN_HOST,
    PREEMPTED_FILE,
    SHIPPED,
    bars_table,
    filled,
    read_tables,
)
from numpy.typing import NDArray
from record_runs import capacity

from podsim.graph_sizes import graph_size
from podsim.latency import ProfiledLatency
from podsim.metrics import STEP_KINDS, step_kinds
from podsim.model import model_named
from podsim.replica_heat import Heat
from podsim.simulation import latency_model_for
from podsim.validation import ENGINE_FILE, Comparison, Recorded, compare, read_recording

PLACES = (0, 1, 2, 4, 8, 16, 10**9)
"""In a row of steps."""
CHANCES = {"ttft_p50": 50, "ttft_p90": 90}
RESAMPLED = 400
"""Times that a run's requests are drawn again, to see how far its percentiles are chance."""
RUNS = Path(__file__).parent.parent / "validation" / "h200"
DISTURBED = RUNS.with_name("h200-disturbed")
"""Runs of engines beside which processes began and ended on other GPUs: told of, not judged."""
AGAIN = RUNS.with_name("h200-again")
"""Runs that were made a second time, by an engine set up anew on the same card."""
PREEMPTED = RUNS.with_name("h200-preempted")
"""Runs with so little KV cache that requests are preempted: what the load is of is not known."""

# --------------------------------------------------------------------------- what is measured


def row(comparison: Comparison) -> dict[str, object]:
    """Errors of one run (simulated over recorded, minus 1), and what they are errors of."""
    recorded = comparison.recorded
    shipped = dataclasses.replace(recorded.deployment, profile=None)
    variants = {
        OWN_HOST: with_own_host(recorded),
        SHIPPED: dataclasses.replace(recorded, deployment=shipped),
    }
    return errors_and_more(comparison) | {
        prefix + name: error
        for prefix, variant in variants.items()
        for name, error in errors_of(compare(variant, error_bars=False)).items()
    }


def errors_of(comparison: Comparison) -> dict[str, float]:
    """Of what has a bar."""
    steps, headline = comparison.steps(), comparison.headline()
    return {
        **{name: headline.loc[name, "error"] for name in METRICS},
        "step_median": steps.loc["all", "median"],
        "step_bias": steps.loc["all", "bias"],
    }


def errors_and_more(comparison: Comparison) -> dict[str, object]:
    """With the host's time as it was measured before the run."""
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
        "share": share_of_capacity(recorded),
        "requests": len(recorded.requests),
        "refused": int((recorded.requests["refused"] != "").sum()),
        **{f"{name}_chance": chance(recorded.requests["ttft"], p) for name, p in CHANCES.items()},
        **errors_of(comparison),
        "step_total": steps.loc["all", "total"],
        **gpu_errors(recorded),
        **{
            f"{name}_{column}": headline.loc[name, column]
            for name in METRICS
            for column in ("measured", "simulated")
        },
        **{f"{name}_{end}": headline.loc[name, end] for name in METRICS for end in ("low", "high")},
        "host_share": host.sum() / (host.sum() + gpu.sum()),
        "sm_clock_mhz": recorded.gpu["sm_clock_mhz"].mean(),
        "power_w": recorded.gpu["power_w"].mean(),
        "kernels": recorded.engine.get("kernels", "triton"),
        **{name: recorded.engine[name] for name in ("driver", "torch", "triton", "date")},
    }


def chance(values: pd.Series, percentile: int) -> float:
    """Standard deviation of a percentile when the requests are drawn again, over itself."""
    known = values.dropna().to_numpy()
    rng = np.random.default_rng(0)
    drawn = rng.choice(known, size=(RESAMPLED, len(known)))
    return float(np.percentile(drawn, percentile, axis=1).std() / np.percentile(known, percentile))


def share_of_capacity(recorded: Recorded) -> float:
    """Requests/s that arrived over what these requests reach offline, simulated; NaN if offline."""
    options, requests = recorded.engine["options"], recorded.requests
    if options["load"] is None:
        return math.nan
    columns = requests["num_prompt_tokens"].tolist(), requests["num_output_tokens"].tolist()
    return float(options["qps"] / capacity(options["workload"], tuple(zip(*columns, strict=True))))


def gpu_errors(recorded: Recorded) -> dict[str, float]:
    """Of steps with decodes alone, and with both: mean error on the GPU, and median size."""
    error = errors_on_gpu(recorded)
    kinds = step_kinds(recorded.steps)
    found = {}
    for kind in ("decode", "mixed"):
        mine = error[kinds == STEP_KINDS.index(kind)]
        found[f"gpu_{kind}_bias"] = float(mine.mean())
        found[f"gpu_{kind}_median"] = float(np.median(np.abs(mine)))
    return found


def errors_on_gpu(recorded: Recorded) -> NDArray[np.float64]:
    """Of each step: predicted over measured time without the host's, minus 1."""
    without_host = dataclasses.replace(
        recorded.deployment,
        host_overhead=0.0,
        host_overhead_per_request=0.0,
        host_overhead_with_prefill=0.0,
    )
    heat = Heat(latency_model_for(without_host, model_named(without_host.model)))
    timed = zip(recorded.shapes, recorded.steps["start"].tolist(), strict=True)
    predicted = np.array([heat.step_time(shape, start) for shape, start in timed])
    return predicted / recorded.steps["gpu_seconds"].to_numpy() - 1


def steps_on_gpu(folders: list[Path]) -> pd.DataFrame:
    """Every step of all runs: its error on the GPU, and what is looked at by it.

    `tokens` is the size of the graph it was padded to. `in_a_row` is how many steps with prefill
    came before it without another between them, or of one without, how many such steps since.
    """
    parts = []
    for folder in folders:
        recorded = read_recording(folder)
        steps, deployment = recorded.steps, recorded.deployment
        has_prefill = steps["num_prefills"] > 0
        run = (has_prefill != has_prefill.shift()).cumsum()
        table = {
            "workload": recorded.engine["options"]["workload"],
            "attention": deployment.attention,
            "has_prefill": has_prefill,
            "tokens": (steps["num_prefill_tokens"] + steps["num_decodes"]).map(graph_size),
            "in_a_row": steps.groupby(run).cumcount(),
            "error": errors_on_gpu(recorded),
        }
        parts.append(pd.DataFrame(table))
    return pd.concat(parts, ignore_index=True)


def by_size(steps: pd.DataFrame) -> pd.DataFrame:
    """Errors of all steps with prefill, by the size of the graph they were padded to."""
    errors = steps[steps["has_prefill"]].groupby("tokens")["error"]
    return errors.agg(["size", "median", "mean"]).set_axis(["steps", "median", "mean"], axis=1)


def by_row(steps: pd.DataFrame) -> pd.DataFrame:
    """Mean errors by workload, strategy and place in a row of steps with or without prefill."""
    place = pd.cut(
        steps["in_a_row"], PLACES, right=False, labels=[f"from {n}" for n in PLACES[:-1]]
    )
    groups = [steps["workload"], steps["attention"], steps["has_prefill"], place]
    return steps.groupby(groups, observed=True)["error"].mean().unstack()


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


def with_own_host(recorded: Recorded) -> Recorded:
    """The same, as if the host's time had been measured in this run and not before it.

    Fitted to what the GPU waited between the run's own steps: it says what is off beside the host.
    """
    steps = recorded.steps
    has_prefill = steps["num_prefills"] > 0
    columns = [np.ones(len(steps)), steps["num_prefills"] + steps["num_decodes"], has_prefill]
    waited = steps["duration"] - steps["gpu_seconds"]
    found = np.linalg.lstsq(np.column_stack(columns).astype(float), waited, rcond=None)[0]
    return with_host(recorded, *np.maximum(found, 0.0).tolist())


def with_host(
    recorded: Recorded, fixed: float, per_request: float, with_prefill: float
) -> Recorded:
    """The same, simulated with another time of the host."""
    deployment = dataclasses.replace(
        recorded.deployment,
        host_overhead=fixed,
        host_overhead_per_request=per_request,
        host_overhead_with_prefill=with_prefill,
    )
    return dataclasses.replace(recorded, deployment=deployment)


def recordings(runs: Path) -> list[Path]:
    """Of all cards, by name."""
    return sorted((path.parent for path in runs.rglob(ENGINE_FILE)), key=lambda run: run.name)


def measure(folders: list[Path]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of all runs, and of their contexts."""
    rows, by_context = [], []
    for folder in folders:
        comparison = compare(read_recording(folder))
        model = comparison.simulated.latency_model
        assert isinstance(model, ProfiledLatency)
        shipped = model.profile.source.startswith("profiles/")
        source = model.profile.source if shipped else BESIDE
        rows.append({**row(comparison), "profile": source})
        by_context += contexts(comparison)
    return pd.DataFrame(rows), pd.DataFrame(by_context)


def measure_disturbed(folders: list[Path]) -> pd.DataFrame:
    """Of runs that are not judged: errors, and whether those of decodes moved from tenth to last.

    By the profile beside them, of their own card.
    """
    rows = []
    for folder in folders:
        recorded = read_recording(folder)
        error, start = errors_on_gpu(recorded), recorded.steps["start"].to_numpy()
        decodes = step_kinds(recorded.steps) == STEP_KINDS.index("decode")
        tenth = np.floor(10 * (start - start[0]) / (start[-1] - start[0] + 1e-9))
        ends = [error[decodes & (tenth == place)] for place in (0, 9)]
        first, last = (float(np.median(some)) if len(some) else math.nan for some in ends)
        row = {"card": folder.parent.name, "run": recorded.name}
        row |= {"decodes_first": first, "decodes_last": last, **gpu_errors(recorded)}
        rows.append({**row, **errors_of(compare(recorded, error_bars=False))})
    return pd.DataFrame(rows)


def measure_again(folders: list[Path], runs: list[Path]) -> pd.DataFrame:
    """Of runs made twice: what the second measured over the first, minus 1."""
    first = {run.name: run for run in runs}
    rows = []
    for folder in folders:
        pair = [
            compare(read_recording(run), error_bars=False).headline()["measured"]
            for run in (first[folder.name], folder)
        ]
        apart = pair[1] / pair[0] - 1
        rows.append({"run": folder.name, **{name: apart[name] for name in METRICS}})
    return pd.DataFrame(rows)


def measure_preempted(folders: list[Path]) -> pd.DataFrame:
    """Of each run what was measured, simulated, and simulated with the host's time of the run."""
    rows = []
    for folder in folders:
        recorded = read_recording(folder)
        before, own = (
            compare(each, error_bars=False).headline()
            for each in (recorded, with_own_host(recorded))
        )
        rows += [
            {
                "run": recorded.name,
                "metric": name,
                "measured": before.loc[name, "measured"],
                "simulated": before.loc[name, "simulated"],
                "own_simulated": own.loc[name, "simulated"],
            }
            for name in (*METRICS, "preemptions")
        ]
    return pd.DataFrame(rows)


# ---------------------------------------------------------------------------------- the figure


def plot(errors: pd.DataFrame, path: Path) -> None:
    """Error against the share of the capacity, a line for each workload, strategy and budget."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
    online = errors[errors["load"].notna()]
    lines = online.groupby(["workload", "attention", "token_budget"], sort=False)
    for axis, name in zip(axes, ("request_throughput", "tbt_p50", "ttft_p50"), strict=True):
        for key, rows in lines:
            label = "-".join(map(str, key))
            axis.plot(rows["share"], rows[name] * 100, marker="o", ms=4, label=label)
        axis.axhline(0, color="black", lw=0.8)
        axis.set(xlabel="share of capacity", title=METRICS[name], ylim=(-30, 30))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("simulated over recorded (%)")
    axes[-1].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    parser.add_argument(
        "--sizes",
        action="store_true",
        help="print errors of steps by graph size and place in a row; write nothing",
    )
    arguments = parser.parse_args()
    folders = recordings(RUNS)
    if arguments.sizes:
        steps = steps_on_gpu(folders)
        for table in (by_size(steps), by_row(steps)):
            print(table.to_string(float_format="{:+.3f}".format))
        return
    errors, by_context = measure(folders)
    errors.to_csv(arguments.docs / ERRORS_FILE, index=False, float_format="%.5f")
    by_context.to_csv(arguments.docs / CONTEXTS_FILE, index=False, float_format="%.5f")
    disturbed = measure_disturbed(recordings(DISTURBED))
    disturbed.to_csv(arguments.docs / DISTURBED_FILE, index=False, float_format="%.5f")
    again = measure_again(recordings(AGAIN), folders)
    again.to_csv(arguments.docs / AGAIN_FILE, index=False, float_format="%.5f")
    preempted = measure_preempted(recordings(PREEMPTED))
    preempted.to_csv(arguments.docs / PREEMPTED_FILE, index=False, float_format="%.6f")
    kept = read_tables(arguments.docs)
    plot(kept.errors, arguments.docs / "accuracy.png")
    for page in (arguments.docs / "accuracy.md", arguments.readme):
        page.write_text(filled(page.read_text(encoding="utf-8"), kept), encoding="utf-8")
    print(bars_table(kept.errors))


if __name__ == "__main__":
    main()
