"""What `podsim kernels bench` says: one line a workload, a summary, a figure."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table

from podsim.errors import InputError
from podsim.kernel_workloads import KernelWorkload

STRATEGIES = ("serial", "streams", "unified", "pod")


def medians(rows: pd.DataFrame, mode: str = "burst") -> pd.DataFrame:
    """Median seconds of each kernel, one row a workload in the order they were timed."""
    some = rows[rows["mode"] == mode]
    table = some.pivot_table("seconds", "workload", "kernel", aggfunc="median", sort=False)
    return table[[name for name in some["kernel"].unique() if name in table]]


def read_rows(path: Path, known: Container[str]) -> pd.DataFrame:
    """The rows of `bench`; InputError, with file and line, if they are not what was written."""
    columns = ("workload", "kernel", "mode", "round", "seconds")
    rows = _read_times(path, columns)
    unknown = np.flatnonzero([name not in known for name in rows["workload"]])
    if len(unknown):
        name = rows["workload"].iloc[unknown[0]]
        raise InputError(f"{path}:{unknown[0] + 2}: '{name}' is no workload of this version")
    for workload, part in rows[rows["mode"] == "burst"].groupby("workload", sort=False):
        missing = {"prefill", "decode", *STRATEGIES} - set(part["kernel"])
        if missing:
            raise InputError(f"{path}: {workload} lacks the kernel '{min(missing)}'")
    return rows


def read_overhead(path: Path) -> pd.DataFrame:
    """What the host needs for a launch; InputError as `read_rows`."""
    return _read_times(path, ("kernel", "how", "seconds"))


def _read_times(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    try:
        rows = pd.read_csv(path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a table of times: {error}") from None
    missing = [name for name in columns if name not in rows]
    if missing:
        raise InputError(f"{path}: misses the column {missing[0]}")
    seconds = pd.to_numeric(rows["seconds"], errors="coerce")
    wrong = np.flatnonzero(~(np.isfinite(seconds) & (seconds > 0)))
    if len(wrong):
        line, text = wrong[0] + 2, rows["seconds"].iloc[wrong[0]]
        raise InputError(f"{path}:{line}: seconds is '{text}', expected a positive number")
    return rows.assign(seconds=seconds)


def one_machine(paths: Sequence[Path]) -> dict[str, object]:
    """What several runs were measured on, and their commands; InputError if they differ."""
    found = [_read_provenance(path) for path in paths]
    commands = "; ".join(str(machine.pop("command", "")) for machine in found)
    for path, machine in zip(paths, found, strict=True):
        for name in (*found[0], *machine):
            if machine.get(name) != found[0].get(name):
                raise InputError(
                    f"{path}: {name} is {machine.get(name)}, and {found[0].get(name)} in {paths[0]}"
                )
    return found[0] | {"command": commands}


def _read_provenance(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object, got {type(found).__name__}")
    return found


def results(rows: pd.DataFrame, workloads: Sequence[KernelWorkload]) -> pd.DataFrame:
    """Of each workload: seconds, rates of both sides, gains of POD; see docs/pod.md."""
    table = medians(rows)
    by_name = {workload.name: workload for workload in workloads}
    found = pd.DataFrame(index=table.index)
    found["group"] = [by_name[name].batch.split for name in table.index]
    found["prefill TFLOP/s"] = [by_name[n].flops for n in table.index] / table["prefill"] / 1e12
    found["decode TB/s"] = [by_name[n].kv_bytes for n in table.index] / table["decode"] / 1e12
    for name in table:
        found[f"{name} s"] = table[name]
    found["oracle s"] = table[["prefill", "decode"]].max(axis=1)
    found["pod gain"] = table["serial"] / table["pod"]
    found["streams gain"] = table["serial"] / table["streams"]
    found["unified gain"] = table["serial"] / table["unified"]
    sustained = rows[rows["mode"] == "sustained"]
    if len(sustained):
        alone = medians(rows, "sustained")
        joules = sustained.pivot_table("joules", "workload", "kernel", aggfunc="median", sort=False)
        found["sustained gain"] = alone["serial"] / alone["pod"]
        found["energy of pod"] = joules["pod"] / joules["serial"]
    if "fi serial" in table:
        found["prefill / fi"] = table["fi prefill"] / table["prefill"]
        found["decode / fi"] = table["fi decode"] / table["decode"]
        found["gain over fi serial"] = table["fi serial"] / table["pod"]
        found["gain over fi pod"] = (
            table[[n for n in ("fi pod", "fi batch pod") if n in table]].min(axis=1) / table["pod"]
        )
    return found


def paging_overhead(rows: pd.DataFrame) -> pd.DataFrame:
    """Time from pages over time from contiguous keys: workload, kernel, page_size, overhead."""
    table = medians(rows).melt(ignore_index=False, value_name="seconds").reset_index()
    table[["kernel", "page_size"]] = table["kernel"].str.rsplit(" ", n=1, expand=True)
    contiguous = table[table["page_size"] == "contiguous"].set_index(["workload", "kernel"])
    paged = table[table["page_size"] != "contiguous"].astype({"page_size": int})
    base = contiguous["seconds"].loc[list(zip(paged["workload"], paged["kernel"], strict=True))]
    paged["overhead"] = paged["seconds"].to_numpy() / base.to_numpy() - 1
    return paged[["workload", "kernel", "page_size", "overhead"]]


RATIOS = (
    *("pod gain", "streams gain", "unified gain", "sustained gain", "energy of pod"),
    *("prefill / fi", "decode / fi", "gain over fi serial", "gain over fi pod"),
)


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Mean, least and most of every ratio, by group of workloads and over all."""
    columns = [name for name in RATIOS if name in found]
    groups = [*found.groupby("group", sort=False), ("all", found)]
    rows = [
        {"group": group, "workloads": len(part), "ratio": name}
        | {"mean": part[name].mean(), "least": part[name].min(), "most": part[name].max()}
        for group, part in groups
        for name in columns
    ]
    return pd.DataFrame(rows)


def workloads_table(found: pd.DataFrame) -> Table:
    columns = ["prefill TFLOP/s", "decode TB/s"]
    columns += [name for name in RATIOS if name in found]
    table = Table(title="Attention kernels, one workload a line")
    table.add_column("workload")
    for name in columns:
        table.add_column(name, justify="right")
    for name, row in zip(found.index, found.to_dict("records"), strict=True):
        digits = [".0f" if name == "prefill TFLOP/s" else ".2f" for name in columns]
        cells = [f"{row[c]:{digit}}" for c, digit in zip(columns, digits, strict=True)]
        table.add_row(name, *cells)
    return table


def summary_table(found: pd.DataFrame) -> Table:
    table = Table(title="Mean, least and most")
    for name in ("group", "workloads", "ratio", "mean", "least", "most"):
        table.add_column(name, justify="left" if name in ("group", "ratio") else "right")
    for row in summary(found).to_dict("records"):
        numbers = (f"{row[name]:.3f}" for name in ("mean", "least", "most"))
        table.add_row(row["group"], str(row["workloads"]), row["ratio"], *numbers)
    return table


def write_figure(found: pd.DataFrame, path: Path) -> None:
    """Times of the strategies over serial's, and the oracle max(prefill, decode), by workload."""
    from matplotlib.figure import Figure  # takes half a second to load

    figure = Figure(figsize=(10, 0.32 * len(found) + 1.5), layout="constrained")
    axes = figure.subplots()
    ordered = found.iloc[::-1]
    marks = {"pod": ("o", "tab:red"), "streams": ("s", "tab:blue"), "unified": ("^", "tab:green")}
    for name, (mark, colour) in marks.items():
        axes.plot(ordered[f"{name} s"] / ordered["serial s"], ordered.index, mark, color=colour,
                  label=name)  # fmt: skip
    if "fi pod s" in found:
        axes.plot(ordered["fi pod s"] / ordered["serial s"], ordered.index, "x", color="tab:gray",
                  label="FlashInfer's POD")  # fmt: skip
    oracle = ordered["oracle s"] / ordered["serial s"]
    axes.plot(oracle, ordered.index, "|", color="black", markersize=12, label="max of both sides")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xlabel="time / serial time")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    figure.savefig(path, format="png", dpi=120, metadata={"Software": None})
