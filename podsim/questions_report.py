"""Tables of what `podsim kernels questions` measured, from its rows alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from podsim.errors import InputError
from podsim.kernel_report import medians

COLUMNS = ("workload", "kernel", "mode", "round", "seconds")
OF_PART = {
    "sweep": ("model", "context", "chunk", "prompt", "decodes"),
    "quantization": ("decodes",),
    "tiles": ("context", "decodes", "family", "tile"),
    "policies": (),
    "split": ("context", "decodes", "side", "knob", "value"),
}
"""Further columns of each part's rows."""
NEEDED = {
    "sweep": ("prefill", "decode", "serial", "streams", "unified", "pod"),
    "quantization": ("decode",),
    "tiles": ("serial",),
    "policies": ("prefill", "decode", "serial", "unified", "pod"),
    "split": ("decode", "pod"),
}
"""Kernels that every batch of a part must have."""

LEAST_SHARE = 0.2
"""Of both sides alone, below which the paper's Fig. 11 leaves a batch out."""
SHARES = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 1.0)
"""Edges of the bins of the prefill's share."""
GAINS = ("streams", "unified", "pod", "oracle")
PAPERS_STEP = 54
"""Decodes beyond which Yi-6B's CTAs need another wave on an A100: 4 KV heads, 2 CTAs an SM."""

Tables = dict[str, pd.DataFrame]


def read_rows(path: Path, part: str) -> pd.DataFrame:
    """The rows of a part; InputError, naming file and line, if they are not what was written."""
    try:
        rows = pd.read_csv(path, keep_default_na=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not a table of times: {error}") from None
    missing = [name for name in (*COLUMNS, *OF_PART[part]) if name not in rows]
    if missing:
        raise InputError(f"{path}: misses the column {missing[0]}")
    seconds = pd.to_numeric(rows["seconds"], errors="coerce")
    wrong = np.flatnonzero(~(np.isfinite(seconds) & (seconds > 0)))
    if len(wrong):
        line, text = wrong[0] + 2, rows["seconds"].iloc[wrong[0]]
        raise InputError(f"{path}:{line}: seconds is '{text}', expected a positive number")
    rows["seconds"] = seconds
    _require_all_kernels(path, part, rows)
    return rows


def _require_all_kernels(path: Path, part: str, rows: pd.DataFrame) -> None:
    """In `split` the variants depend on the context; elsewhere every batch has the same."""
    needed = {*NEEDED[part], *(() if part == "split" else rows["kernel"])}
    for workload, kernels in rows.groupby("workload", sort=False)["kernel"]:
        missing = needed - set(kernels)
        if missing:
            raise InputError(f"{path}: {workload} lacks the kernel '{min(missing)}'")


def _batches(rows: pd.DataFrame, columns: tuple[str, ...]) -> pd.DataFrame:
    """What is constant for a batch, in the order of `medians`."""
    return rows.drop_duplicates("workload").set_index("workload")[list(columns)]


def _spread(values: pd.Series, digits: int = 2) -> str:
    """Such as 1.30 (1.05 to 1.46): mean, least and most."""
    if not len(values):
        return "-"
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


# ---- sweep


def sweep_results(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each batch: the prefill's share of both sides alone, and speedups over serial.

    The oracle takes as long as the longer side alone.
    """
    times = medians(rows)
    found = _batches(rows, OF_PART["sweep"])
    found["prefill share"] = times["prefill"] / (times["prefill"] + times["decode"])
    for name in ("streams", "unified", "pod"):
        found[name] = times["serial"] / times[name]
    found["oracle"] = times["serial"] / times[["prefill", "decode"]].max(axis=1)
    return found


def sweep_tables(rows: pd.DataFrame) -> Tables:
    found = sweep_results(rows)
    share = found["prefill share"]
    both = found[(share >= LEAST_SHARE) & (share <= 1 - LEAST_SHARE)]
    by_model = [(str(model), part) for model, part in both.groupby("model", sort=False)]
    groups = [*by_model, (f"each side at least {LEAST_SHARE:.0%}", both), ("all", found)]
    by_share = [
        (f"{low:.0%} to {high:.0%}", found[(share >= low) & (share < high)])
        for low, high in itertools.pairwise(SHARES)
    ]
    return {
        "Speedup over serial; of each model, where both sides count": pd.DataFrame(
            _speedups("batches", name, part) for name, part in groups
        ),
        "Speedup over serial, by the share of prefill in the time of both sides": pd.DataFrame(
            _speedups("prefill's share", name, part) for name, part in by_share if len(part)
        ),
        "How often": pd.DataFrame(_how_often(name, part) for name, part in groups if len(part)),
    }


def _speedups(column: str, name: str, part: pd.DataFrame) -> dict[str, object]:
    return {column: name, "number": len(part)} | {gain: _spread(part[gain]) for gain in GAINS}


def _how_often(name: str, part: pd.DataFrame) -> dict[str, object]:
    cases = {
        "pod slower than serial": part["pod"] < 1,
        "pod slower than streams": part["pod"] < part["streams"],
        "pod within 10 % of the oracle": part["pod"] >= part["oracle"] / 1.1,
    }
    shares: dict[str, object] = {text: f"{true.mean():.0%}" for text, true in cases.items()}
    return {"batches": name} | shares


# ---- quantization


def quantization_results(rows: pd.DataFrame) -> pd.DataFrame:
    """Median seconds: one row for each number of decodes, one column a kernel."""
    times = medians(rows)
    times.index = pd.Index(_batches(rows, ("decodes",))["decodes"].astype(int), name="decodes")
    return times.sort_index().sort_index(axis="columns")


def quantization_tables(rows: pd.DataFrame) -> Tables:
    times = quantization_results(rows)
    return {
        "Time when one more decode joins": pd.DataFrame(
            _steps(str(kernel), times[kernel]) for kernel in times
        )
    }


def _steps(kernel: str, seconds: pd.Series) -> dict[str, object]:
    rises = (seconds / seconds.shift() - 1).dropna()
    largest = int(rises.index[int(rises.argmax())])
    found: dict[str, object] = {"kernel": kernel}
    for count in (seconds.index[0], seconds.index[-1]):
        found[f"ms at {count}"] = f"{seconds[count] * 1e3:.3f}"
    if PAPERS_STEP + 1 in rises.index:
        found[f"{PAPERS_STEP} to {PAPERS_STEP + 1}"] = f"{rises[PAPERS_STEP + 1]:+.1%}"
    found["largest step"] = f"{largest - 1} to {largest}: {rises.max():+.1%}"
    found["mean step"] = f"{rises.mean():+.1%}"
    return found


# ---- tiles


def tiles_results(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each variant and batch: seconds over those of the fastest of the same family."""
    timed = rows[rows["family"] != ""]
    keys = ["family", "tile", "context", "decodes"]
    found = timed.groupby(keys)["seconds"].median().reset_index()
    best = found.groupby(["family", "context", "decodes"])["seconds"].transform("min")
    return found.assign(over_best=found["seconds"] / best)


def tiles_tables(rows: pd.DataFrame) -> Tables:
    found = tiles_results(rows)
    lines = []
    for (family, tile), part in found.groupby(["family", "tile"], sort=False):
        by_context = part.groupby("context")["over_best"].mean()
        line = {"kernel": family, "tile": tile, "all": _spread(part["over_best"])}
        line |= {f"at {context}": f"{value:.2f}" for context, value in by_context.items()}
        lines.append(line | {"fastest in": int((part["over_best"] == 1).sum())})
    return {"Time over that of the fastest tile, batch by batch": pd.DataFrame(lines)}


# ---- policies


def policies_results(rows: pd.DataFrame) -> pd.DataFrame:
    """Speedups over serial: one row a batch, one column a way to share the SMs, best first."""
    times = medians(rows)
    gains = times.rdiv(times["serial"], axis=0)
    gains = gains.drop(columns=["prefill", "decode", "serial", "unified"])
    return gains[gains.mean().sort_values(ascending=False, kind="stable").index]


def policies_tables(rows: pd.DataFrame) -> Tables:
    gains = policies_results(rows)
    each = gains.map(lambda gain: f"{gain:.2f}")
    summary = pd.DataFrame(
        {
            "kernel": name,
            "speedup over serial": _spread(gains[name]),
            "over pod": _spread(gains[name] / gains["pod"]),
            "fastest in": int((gains[name] == gains.max(axis=1)).sum()),
        }
        for name in gains
    )
    return {
        "Speedup over serial, by how the SMs are shared": summary,
        "The same, batch by batch": each.rename_axis("batch").reset_index(),
    }


# ---- split


def split_results(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each variant over those of the configuration as it is: side, knob, value."""
    keys = ["context", "decodes", "side", "knob", "value"]
    found = rows.groupby(keys, sort=False)["seconds"].median().reset_index()
    batch = ["context", "decodes", "side"]
    usual = found[found["knob"] == ""].set_index(batch)["seconds"]
    changed = found[found["knob"] != ""].astype({"value": float})
    base = usual.loc[list(changed[batch].itertuples(index=False, name=None))].to_numpy()
    changed = changed.assign(over_usual=changed["seconds"] / base)
    return changed.sort_values("value", kind="stable")


def split_tables(rows: pd.DataFrame) -> Tables:
    found = split_results(rows)
    found["batch"] = found["decodes"].astype(str) + "x" + found["context"].astype(str)
    found["value"] = found["value"].astype(int)
    tables = {}
    for side, part in found.groupby("side", sort=False):
        table = part.pivot_table("over_usual", ["knob", "value"], "batch")[part["batch"].unique()]
        cells = table.map(lambda ratio: "-" if np.isnan(ratio) else f"{ratio:.2f}")
        tables[f"Time of {side} over that with its own splits"] = cells.reset_index()
    return tables


TABLES: dict[str, Callable[[pd.DataFrame], Tables]] = {
    "sweep": sweep_tables,
    "quantization": quantization_tables,
    "tiles": tiles_tables,
    "policies": policies_tables,
    "split": split_tables,
}


def markdown(tables: Tables) -> str:
    """Each table with its title, as Markdown."""
    return "\n".join(f"{title}:\n\n{_markdown(table)}" for title, table in tables.items())


def _markdown(table: pd.DataFrame) -> str:
    lines = [list(table.columns), ["---"] * len(table.columns), *table.to_numpy().tolist()]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
