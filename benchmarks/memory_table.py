"""The tables of docs/memory.md: of measured memory costs, and of what same_tokens.py left.

python benchmarks/memory_table.py --costs profiles/h200/memory \
    --same-tokens benchmarks/memory/h200-same-tokens.csv --page docs/memory.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from podsim.batch import BatchShape
from podsim.config import Deployment
from podsim.layer_predictions import RESIDENT, as_good, predicted_layer, split_error
from podsim.memory_calibration import non_negative
from podsim.memory_costs import ADDRESS_APIS, APIS, DIRECTIONS, MemoryCosts, read_memory_costs
from podsim.model import MODELS
from podsim.offloaded_shapes import SHAPES
from podsim.simulation import latency_model_for

PAGE_GROUP = 2 * 2**20
"""Bytes of the page-groups that are shown."""
GPU, OWN_MODEL = "h200", "llama-2-7b"
"""Of the models with offloaded layers, the one with a profile."""
POINT = ["model", "batch", "context", "layers"]
SIZES = (16 * 2**10, 256 * 2**10, 4 * 2**20, 64 * 2**20, 2**30)
SIZE_NAMES = ("16 KB", "256 KB", "4 MB", "64 MB", "1 GB")
SHARES = ["throughput measured %", "simulated %", "step measured %", "step simulated %"]
SHARES += ["gpu measured %", "gpu simulated %"]
PARTS = ["step", "gpu", "mapping", "table", "host"]
"""Of a step, as benchmarks/same_tokens.py names them."""
LONG = 1e-3
"""Seconds of a call that stands out: twenty others take as long."""
ONE_CALL = {"create": (1,), "map": (1,), "set_access": (1, 8, 64), "unmap": (1, 8, 64)}
ONE_CALL["release"] = (1,)
"""Page-groups of a call, for each that is shown."""


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def mapping_table(rows: pd.DataFrame, page_group: int) -> str:
    """Microseconds a page-group of so many bytes, by call, state of the GPU and thread; of address
    ranges, where they were timed, microseconds a range.
    """
    calls = rows[rows["api"].isin([*APIS, *ADDRESS_APIS]) & (rows["page_group"] == page_group)]
    medians = calls.groupby(["api", "page_groups", "gpu", "thread"])["time_us"].median()
    states = [(gpu, thread) for gpu in ("idle", "busy") for thread in ("main", "background")]
    lines = []
    for api in APIS:
        for count in ONE_CALL[api]:
            times = [medians[api, count, *state] / count for state in states]
            what = f"`{api}`" + (f", {count} in a call" if count > 1 else "")
            lines.append([what, *(f"{time:.1f}" for time in times)])
    ranges = calls.loc[calls["api"].isin(ADDRESS_APIS), ["api", "page_groups"]].drop_duplicates()
    for api, count in sorted(ranges.itertuples(index=False, name=None), reverse=True):
        times = [medians[api, count, *state] for state in states]
        what = f"`{api}`, a range of {count * page_group >> 20} MB"
        lines.append([what, *(f"{time:.1f}" for time in times)])
    size = f"us a page-group of {page_group >> 20} MB"
    return markdown([size, *(f"{gpu} GPU, {thread} thread" for gpu, thread in states)], lines)


def growth_table(rows: pd.DataFrame) -> str:
    """Microseconds a page-group of growing blocks, in each pass: the mean, and the median."""
    keys = ["page_group", "page_groups", "thread", "beside"]
    times = rows.groupby([*keys, "pass"], sort=False)[["time_us", "time_p50_us"]].mean()
    besides, passes = (rows[name].drop_duplicates().tolist() for name in ("beside", "pass"))
    lines = []
    for key in rows[keys[:3]].drop_duplicates().itertuples(index=False, name=None):
        size, count, thread = key
        cells = [f"{size >> 20} MB, {count} in a block, {thread} thread"]
        for beside in besides:
            found = [times.loc[(*key, beside, number)] / count for number in passes]
            cells += [", ".join(f"{mean:.1f} ({middle:.1f})" for mean, middle in found)]
        lines.append(cells)
    return markdown(["us a page-group, each pass", *(f"beside {what}" for what in besides)], lines)


def calls_table(calls: pd.DataFrame, kv: str = "vattention") -> str:
    """What the calls of a kind took while it served, by thread and sampling of the card."""
    mine = calls[calls["kv"] == kv]
    lines = []
    for thread, sampling in product(("main", "background"), mine["sampling"].unique()):
        of = mine[(mine["thread"] == thread) & (mine["sampling"] == sampling)]
        maps, access = (of.loc[of["api"] == api, "seconds"] for api in ("map", "set_access"))
        both = pd.concat([maps, access])
        long = both[both > LONG]
        lines.append(
            [
                f"{thread} thread, sampling {sampling}",
                str(len(access)),
                f"{maps.median() * 1e6:.1f}",
                *(f"{us * 1e6:.1f}" for us in (access.median(), access.mean())),
                f"{len(long)}, {long.sum() * 1e3:.0f} ms",
            ]
        )
    header = ["", "page-groups", "`map`, P50, us", "`set_access`, P50, us", "mean, us"]
    return markdown([*header, "calls over 1 ms"], lines)


def transfer_table(rows: pd.DataFrame) -> str:
    """GB/s by size of a copy."""
    copies = rows[rows["direction"].isin(DIRECTIONS) & rows["bytes"].isin(SIZES)]
    medians = copies.groupby(["memory", "beside", "direction", "bytes"])["time_us"].median()
    lines = []
    for memory, beside in copies[["memory", "beside"]].drop_duplicates().to_numpy().tolist():
        for direction in DIRECTIONS:
            of_kind = medians[memory, beside, direction]
            cells = [f"{n / of_kind[n] / 1e3:.1f}" if n in of_kind else "" for n in SIZES]
            beside_what = "" if beside == "nothing" else f" beside {beside}"
            lines.append([f"{direction}, {memory}{beside_what}", *cells])
    return markdown(["GB/s", *SIZE_NAMES], lines)


def paged_table(costs: MemoryCosts) -> str:
    """Overhead of blocks, by their size."""
    lines = []
    for size in map(int, costs.paged):
        of = costs.paged_costs(size)
        kernels = (f"{ratio - 1:+.1%}" for ratio in (of.prefill, of.decode))
        fixed, request = of.table_step * 1e6, of.table_request * 1e6
        lines.append([str(size), *kernels, f"{fixed:.1f}", f"{request:.3f}"])
    header = ["tokens of a block", "prefill", "decode", "table, us a step", "us a request"]
    return markdown(header, lines)


def errors_table(costs: MemoryCosts) -> str:
    """Of fitted lines, on rows that were held out."""
    lines = []
    for name, error in costs.errors.items():
        if name.startswith("layers"):
            continue
        shares = (f"{error[part]:.1%}" for part in ("median", "p90", "worst"))
        lines.append([name, str(int(error["points"])), *shares, f"{error['bias']:+.1%}"])
    return markdown(["line", "points", "median error", "P90", "worst", "bias"], lines)


LayerSeconds = Callable[[str, int, int], float]
"""Of computing a layer, by model, batch and context."""


def simulated_layer(model: str, batch: int, context: int) -> float:
    """What a simulation has for it: from the model's shipped profile, of podsim's own kernels."""
    latency = latency_model_for(Deployment(model=model, gpu=GPU), MODELS[model])
    keys = context + 1
    step = latency.breakdown(BatchShape.of_decodes(batch, batch * keys, keys))
    return (step.attention + step.layers) / latency.num_layers


def layer_of_other_points(rows: pd.DataFrame) -> LayerSeconds:
    """What a model's other points say: so much a layer, a token in the cache, and a request.

    Non-negative least squares of relative errors over the chains without offloading.
    """
    resident = rows[rows["split"] == RESIDENT].groupby(POINT)["time_us"].median().reset_index()

    def seconds(model: str, batch: int, context: int) -> float:
        mine = resident[resident["model"] == model]
        others = mine[(mine["batch"] != batch) | (mine["context"] != context)]
        assert len(others) == len(mine) - 1
        timed = (others["time_us"] / others["layers"]).to_numpy(float) * 1e-6
        requests, tokens = others["batch"].to_numpy(float), (others["batch"] * others["context"])
        features = np.column_stack([np.ones(len(others)), tokens, requests])
        found = non_negative(features / timed[:, None])
        return float(found @ (1.0, batch * context, batch))

    return seconds


def judged(
    costs: MemoryCosts, rows: pd.DataFrame, layer_seconds: LayerSeconds | None = None
) -> pd.DataFrame:
    """Of each chain of layers: milliseconds without offloading, with all transferred and at the
    best split that was timed; errors and splits beside what is predicted. `kvpr_error` is that at
    the timed split nearest to the predicted one, `worst_error` that of any but nothing. `outputs`
    is by how much what came out of them differed. The seconds that computing a layer takes are
    those of the chain without offloading, if not given.
    """
    found = []
    for (model, batch, context, layers, schedule), group in rows.groupby(
        [*POINT, "schedule"], sort=False
    ):
        seconds = group.groupby("split")["time_us"].median() * 1e-6
        timed = seconds.drop(RESIDENT)
        tokens, resident = batch * context, seconds[RESIDENT] / layers
        compute = layer_seconds(model, batch, context) if layer_seconds else resident
        layer = predicted_layer(costs, SHAPES[model], tokens, compute, schedule)
        errors = {n: layer.seconds(layers, n * batch, schedule) / timed[n] - 1 for n in timed.index}
        of_kvpr = [error for split, error in errors.items() if split]
        wanted = layer.best_split(layers, schedule) / batch
        nearest = min(timed.index, key=lambda split: abs(split - wanted))
        best, good = timed.idxmin(), as_good(group)
        known = min(max(round(wanted), good[0]), good[1])
        found.append(
            {
                "schedule": schedule,
                "point": f"{model}, {batch} x {context}",
                "resident": seconds[RESIDENT] * 1e3,
                "compute": compute,
                "full": timed[0] * 1e3,
                "kvpr": timed[best] * 1e3,
                "full_error": errors[0],
                "kvpr_error": errors[nearest],
                "splits": len(of_kvpr),
                "splits_within": sum(abs(error) <= 0.05 for error in of_kvpr),
                "worst_error": max(of_kvpr, key=abs),
                "best": best,
                "predicted": wanted,
                "good": f"{good[0]} to {good[1]}",
                "split_error": split_error(wanted, best),
                "good_error": split_error(wanted, known),
                "regret": timed[nearest] / timed[best] - 1,
                "outputs": group["error"].max() if "error" in group else np.nan,
            }
        )
    return pd.DataFrame(found)


def layers_table(points: pd.DataFrame) -> str:
    lines = [
        [
            p.point,
            *(f"{ms:.2f}" for ms in (p.resident, p.full, p.kvpr)),
            f"{p.kvpr / p.full - 1:+.1%}",
            *(f"{error:+.1%}" for error in (p.full_error, p.kvpr_error)),
            str(p.best),
            f"{p.predicted:.0f}",
            f"{p.split_error:+.1%}",
            p.good,
            f"{p.good_error:+.1%}",
            f"{p.regret:.1%}",
        ]
        for p in points.itertuples()
    ]
    header = ["batch x context", "resident, ms", "full, ms", "KVPR, ms", "KVPR over full"]
    header += ["error, full", "error, KVPR", "best l", "predicted l", "error", "as good", "error"]
    header += ["regret"]
    return markdown(header, lines)


def layers_summary(points: pd.DataFrame) -> str:
    lines = []
    for schedule, mine in points.groupby("schedule", sort=False):
        gain = 1 - mine["kvpr"] / mine["full"]
        within, known = ((mine[name].abs() <= 0.1).sum() for name in ("split_error", "good_error"))
        names = ("full_error", "kvpr_error", "worst_error", "regret")
        full, kvpr, any_split, regret = (f"{mine[name].abs().max():.1%}" for name in names)
        lines.append(
            [
                str(schedule),
                str(len(mine)),
                f"{gain.min():.1%} to {gain.max():.1%}",
                *(full, kvpr),
                f"{mine['splits_within'].sum()} of {mine['splits'].sum()}",
                *(any_split, regret),
                f"{within} of {len(mine)}",
                f"{known} of {len(mine)}",
                "not known" if mine["outputs"].isna().any() else f"{mine['outputs'].max():.2%}",
            ]
        )
    header = ["schedule", "points", "KVPR saves", "worst error, full", "worst error, KVPR"]
    header += ["of all splits within 5 %", "worst error of any", "worst regret"]
    header += ["l within 10 %", "of as good ones", "outputs off by at most"]
    return markdown(header, lines)


def own_layers_table(measured: pd.DataFrame, simulated: pd.DataFrame) -> str:
    """Of the same points, judged with the measured times of computing and with podsim's own."""
    lines = [
        [
            a.point,
            *(f"{seconds * 1e6:.0f}" for seconds in (a.compute, b.compute)),
            *(f"{error:+.1%}" for error in (a.full_error, b.full_error)),
            *(f"{error:+.1%}" for error in (a.kvpr_error, b.kvpr_error)),
            str(a.best),
            *(f"{split:.0f}" for split in (a.predicted, b.predicted)),
            f"{b.regret:.1%}",
        ]
        for a, b in zip(measured.itertuples(), simulated.itertuples(), strict=True)
    ]
    header = ["batch x context", "a layer of torch's, us", "of podsim's, us", "error, full"]
    header += ["with podsim's", "error, KVPR", "with podsim's", "best l", "predicted l"]
    return markdown([*header, "with podsim's", "its regret"], lines)


def same_tokens_table(rows: pd.DataFrame) -> str:
    """What benchmarks/same_tokens.py found: percent, points and numbers of tokens."""
    lines = [
        [
            row["kv"],
            *(f"{row[name]:+.1f} %" for name in SHARES),
            f"{row['points off']:+.2f}",
            str(row["tokens differing"]),
        ]
        for row in rows.to_dict("records")
    ]
    header = ["", "throughput", "simulated", "step", "simulated", "GPU's part of it", "simulated"]
    return markdown([*header, "points off", "tokens that differ"], lines)


def parts_table(rows: pd.DataFrame) -> str:
    """Of a step with each kind of memory: milliseconds, measured and simulated."""
    lines = [
        [f"{row['kv']}, {row['source']}", *(f"{row[f'{part}_ms']:.2f}" for part in PARTS)]
        for row in rows.to_dict("records")
    ]
    header = ["", "a step, ms", "of the GPU", "mapping", "block table", "the host besides"]
    return markdown(header, lines)


def served_tables(same_tokens: Path) -> dict[str, str]:
    """Of what benchmarks/same_tokens.py left, and the calls kept beside."""
    folder = same_tokens.with_suffix("")
    return {
        "differences": same_tokens_table(pd.read_csv(same_tokens)),
        "parts": parts_table(pd.read_csv(same_tokens.with_name(f"{same_tokens.stem}-parts.csv"))),
        "calls": calls_table(pd.read_csv(folder / "calls.csv.gz")),
    }


def tables(folder: Path) -> dict[str, str]:
    """Every table, by what it is about."""
    costs = read_memory_costs(folder, str(folder))
    rows = {part: pd.read_csv(folder / f"{part}.csv") for part in ("mapping", "growth", "transfer")}
    chains = [pd.read_csv(folder / f"{part}.csv") for part in ("layers", "layers-column")]
    points = judged(costs, pd.concat(chains))
    blind = pd.concat(judged(costs, rows, layer_of_other_points(rows)) for rows in chains)
    blind["schedule"] += ", computing by other points"
    own = chains[0][chains[0]["model"] == OWN_MODEL]
    simulated = judged(costs, own, simulated_layer)
    return {
        "mapping": mapping_table(rows["mapping"], PAGE_GROUP),
        "growth": growth_table(rows["growth"]),
        "transfer": transfer_table(rows["transfer"]),
        "paged": paged_table(costs),
        "errors": errors_table(costs),
        "layers": layers_table(points[points["schedule"] == "row"]),
        "schedules": layers_summary(pd.concat([points, blind])),
        "own layers": own_layers_table(judged(costs, own), simulated),
    }


def filled(page: str, table: str) -> str:
    """The page with this table in the place of the one with its header. ValueError if there is
    none, or more than one.
    """
    header = table.split("\n", 1)[0]
    before, *after = page.split(f"{header}\n")
    if len(after) != 1:
        raise ValueError(f"{len(after)} tables begin with: {header}")
    lines = after[0].split("\n")
    end = next(i for i, line in enumerate([*lines, ""]) if not line.startswith("|"))
    return before + "\n".join([table, *lines[end:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--costs", type=Path, required=True)
    parser.add_argument("--same-tokens", type=Path)
    parser.add_argument("--page", type=Path, help="put the tables there")
    options = parser.parse_args()
    made = tables(options.costs)
    if options.same_tokens:
        made |= served_tables(options.same_tokens)
    for table in made.values():
        print(table, end="\n\n")
    if options.page:
        page = options.page.read_text()
        for table in made.values():
            page = filled(page, table)
        options.page.write_text(page)


if __name__ == "__main__":
    main()
