"""Rows brought to the clock that the card usually has at their work.

What ran before a row decides a part of the clock at which it is timed: two passes over one point
differ by 7 % and more in one case of ten, and their times as much where they wait for the SMs and
not for the memory. Three things are found, each from rows that are fitted on alone:

- how much a time follows the clock: from the differences between the passes of a point, in which
  all but the clock is the same (`Sensitivity`);
- the usual clock: on a plane through the clocks of the points whose work is most like this one's,
  its own left out (`_usual_clocks`);
- what part of a point's distance from that plane its passes have in common, and is its own and
  not chance (`_agreement`): so much of the distance stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim.hardware import Gpu
from podsim.model import Model
from podsim.points import AttentionPoint
from podsim.roofline import attention_traffic, op_traffic
from podsim.sensitivity import Sensitivity

Floats = NDArray[np.float64]

TIMED_TOGETHER = {"qkv": ("qkv", "output", "gate_up", "down"), "lm_head": ("lm_head",)}
"""Matrix products of one sequence, so of one clock, by the first of them."""
ALIKE_PRODUCTS = (0.5, 0.05)
"""Products are alike that are no farther apart: in the logarithm of the number of tokens, and in
FLOPs a cycle, of the most. This and the following by cross-validation on clocks."""
ALIKE_LAYERS = (0.5, 0.125, 0.125, 0.25, 0.25)
"""Layers whose attention is timed: in the same logarithm, and in shares of their time or of peaks,
see `attention_at_usual_clock`."""
OTHER_KIND = 0.01
"""Weight of a point under another strategy or with other sides (prefill, decodes or both), beside
one of the same kind: prefill alone runs at lower clocks than mixed batches that are alike
otherwise."""
AT_THE_MEAN, LEVEL = 0.1, 0.4
"""Points that the mean of all clocks counts as, and those that a level plane does."""
NOISE_OF_CLOCKS, NOISE_OF_TIMES = 0.03, 0.01
"""Distances (of logarithms) below them count by their square, larger ones by their size."""
REWEIGHTINGS = 4
FEWEST_PAIRS = 20
"""Points that were timed twice: with fewer of a kind, rows stay as timed."""
TO_THE_BOTTOM: dict[str, Any] = {
    **{"jac": "3-point", "x_scale": "jac"},
    **{"xtol": 1e-12, "ftol": 1e-15, "gtol": 1e-12, "max_nfev": 5000},
}
"""How `scipy.optimize.least_squares` searches. Where few points tell a parameter the valley is long
and flat, and a search that stops on its way ends elsewhere on another machine."""

_POINT = ["op", "strategy", "num_tokens", "prefills", "decodes"]


def products_at_usual_clock(
    passes: pd.DataFrame, model: Model
) -> tuple[pd.Series[float], dict[str, Sensitivity], pd.Series[float]]:
    """Seconds of all rows, those of matrix products at their usual clocks; how they follow them;
    and those clocks, NaN for other rows.

    `passes` are the rows of every pass, with `seconds`, as timed, and `sm_clock_mhz`, NaN where it
    is not known.
    """
    parts = []
    for first, ops in TIMED_TOGETHER.items():
        mine = _with_clocks(passes[passes["op"].isin(ops)])
        works = [
            op_traffic(model, op, n) for op, n in zip(mine["op"], mine["num_tokens"], strict=True)
        ]
        mine = mine.assign(
            flops=[work.flops for work in works],
            intensity=[work.flops / work.bytes for work in works],
            cycles=mine["seconds"] * mine["sm_clock_mhz"] * 1e6,
        )
        timed = mine[mine["op"] == first]
        sums = mine.groupby("num_tokens")[["flops", "cycles"]].transform("sum").loc[timed.index]
        rate = (sums["flops"] / sums["cycles"]).to_numpy(float)
        most = rate[timed["split"] == "grid"].max(initial=0.0)
        states = [np.log(timed["num_tokens"].to_numpy(float)), rate / (most or 1.0)]
        beyond = _beyond_usual(timed, np.stack(states, axis=1) / ALIKE_PRODUCTS)
        clocks = timed.assign(beyond=beyond)[["num_tokens", "pass", "beyond"]]
        parts.append(mine.reset_index().merge(clocks, on=["num_tokens", "pass"]).set_index("index"))
    rows = pd.concat(parts)
    usual = rows["sm_clock_mhz"] * np.exp(-rows["beyond"])
    return *_brought(passes, {"products": rows}), usual.reindex(passes.index)


def attention_at_usual_clock(
    passes: pd.DataFrame,
    model: Model,
    gpu: Gpu,
    linear_token_seconds: float,
    quiet_layer_seconds: float,
) -> tuple[pd.Series[float], dict[str, Sensitivity]]:
    """The same of attention under each strategy; the last two are those of `Geometry`."""
    rows = _with_clocks(passes[passes["op"] == "attention"]).copy()
    points = [
        AttentionPoint.from_text(prefills, decodes, "")
        for prefills, decodes in zip(rows["prefills"], rows["decodes"], strict=True)
    ]
    flops = np.array([attention_traffic(model, p.prefills, 0).flops for p in points])
    keys = np.array([attention_traffic(model, (), sum(p.decode_contexts)).bytes for p in points])
    linear = linear_token_seconds * rows["num_tokens"].to_numpy(float)
    attention = rows.groupby(_POINT)["seconds"].transform("mean").to_numpy(float)
    layer = linear + quiet_layer_seconds + attention
    # What the card works at meanwhile decides its power, and so the clock.
    states = [
        np.log(rows["num_tokens"].to_numpy(float)),
        linear / layer,
        flops / layer / gpu.peak_flops,
        keys / layer / gpu.peak_bandwidth,
        attention / layer,
    ]
    rows["beyond"] = _beyond_usual(rows, np.stack(states, axis=1) / ALIKE_LAYERS)
    with np.errstate(divide="ignore"):
        rows["intensity"] = flops / keys
    return _brought(passes, {str(name): mine for name, mine in rows.groupby("strategy")})


def _with_clocks(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["sm_clock_mhz"].notna()]


def _brought(
    passes: pd.DataFrame, groups: dict[str, pd.DataFrame]
) -> tuple[pd.Series[float], dict[str, Sensitivity]]:
    """Seconds of all rows, and the sensitivity of each group of rows.

    These have `intensity` and `beyond`, the logarithm of their clocks over the usual ones.
    """
    seconds, found = passes["seconds"].copy(), {}
    for name, rows in groups.items():
        pairs = _pairs(rows, ["intensity", "beyond", "seconds"])
        if len(pairs) < FEWEST_PAIRS:
            continue
        found[name] = fit_sensitivity(
            pairs["intensity"].to_numpy(float)[:, 0],
            np.diff(pairs["beyond"], axis=1)[:, 0],
            np.diff(np.log(pairs["seconds"]), axis=1)[:, 0],
        )
        follows = found[name].at(rows["intensity"].to_numpy(float))
        seconds[rows.index] *= np.exp(follows * rows["beyond"].to_numpy(float))
    return seconds, found


def _pairs(rows: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """[points to fit on, columns x the first two passes], without those that were timed once."""
    grid = rows[(rows["split"] == "grid") & (rows["pass"] < 2)]
    if grid["pass"].nunique() < 2:
        return grid[:0]
    return grid.pivot_table(
        index=_POINT, columns="pass", values=list(columns), sort=False
    ).dropna()  # fmt: skip


def fit_sensitivity(intensity: Floats, clocks: Floats, seconds: Floats) -> Sensitivity:
    """From pairs of passes: logarithms of the ratios of their clocks, and of their seconds."""
    from scipy.optimize import least_squares  # takes half a second to load

    def residuals(parameters: Floats) -> Floats:
        low, high, turn, steepness = parameters
        follows = Sensitivity(low, high, np.exp(turn), np.exp(steepness)).at(intensity)
        return np.asarray(seconds + follows * clocks)

    found = least_squares(
        residuals,
        [0.1, 0.9, np.log(200.0), np.log(2.0)],
        bounds=([0.0, 0.0, np.log(2.0), np.log(0.5)], [1.0, 1.0, np.log(2000.0), np.log(8.0)]),
        loss="soft_l1",
        f_scale=NOISE_OF_TIMES,
        **TO_THE_BOTTOM,
    )
    low, high, turn, steepness = map(float, found.x)
    return Sensitivity(low, high, float(np.exp(turn)), float(np.exp(steepness)))


def _beyond_usual(rows: pd.DataFrame, states: Floats) -> Floats:
    """Of every row, the logarithm of its clock over the usual one of its point.

    `states` [rows, quantities] say what the card works at meanwhile, in units in which works no
    farther apart than 1 are alike.
    """
    clocks = np.log(rows["sm_clock_mhz"].to_numpy(float))
    away = clocks - _usual_clocks(rows, states)
    own = rows.assign(away=away).groupby(_POINT, sort=False)["away"]
    for strategy in rows["strategy"].unique():
        mine = (rows["strategy"] == strategy).to_numpy()
        agreement = _agreement(rows[mine].assign(away=away[mine]))
        count = own.transform("size").to_numpy(float)[mine]
        # The expected own part of a point, by the mean over its passes.
        part = count * agreement / (1 + (count - 1) * agreement)
        away[mine] -= part * own.transform("mean").to_numpy(float)[mine]
    return np.asarray(away)


def _usual_clocks(rows: pd.DataFrame, states: Floats) -> Floats:
    """Of every row: on a plane through the clocks of alike points to fit on, in logarithms."""
    clocks = np.log(rows["sm_clock_mhz"].to_numpy(float))
    batches, _ = pd.factorize(pd.MultiIndex.from_frame(rows[["num_tokens", "prefills", "decodes"]]))
    sides = (rows[["prefills", "decodes"]] == "").to_numpy() @ (1, 2)
    kinds, _ = pd.factorize(pd.MultiIndex.from_arrays([rows["strategy"], sides]))
    grid = (rows["split"] == "grid").to_numpy()
    mean = clocks[grid].mean() if grid.any() else 0.0
    usual = np.empty(len(rows))
    for same in rows.reset_index(drop=True).groupby(_POINT, sort=False).indices.values():
        one = same[0]
        weights = np.where(kinds[grid] == kinds[one], 1.0, OTHER_KIND)
        weights[batches[grid] == batches[one]] = 0.0
        usual[same] = mean + _plane(states[grid] - states[one], clocks[grid] - mean, weights)
    return usual


def _plane(away: Floats, clocks: Floats, weights: Floats) -> float:
    """At the origin: through `clocks` [points] at `away` [points, quantities]."""
    near = weights * np.exp(-(away * away).sum(axis=1) / 2)
    features = np.concatenate([np.ones((len(away), 1)), away], axis=1)
    held = np.diag([AT_THE_MEAN] + [LEVEL] * away.shape[1])
    robust = near
    for _ in range(REWEIGHTINGS):
        weighted = features * robust[:, None]
        plane = np.linalg.solve(weighted.T @ features + held, weighted.T @ clocks)
        distance = np.abs(features @ plane - clocks)
        robust = near / np.maximum(distance / NOISE_OF_CLOCKS, 1.0)
    return float(plane[0])


def _agreement(rows: pd.DataFrame) -> float:
    """The share of the squares of `away` that passes over one point have in common."""
    pairs = _pairs(rows, ["away"]).to_numpy(float)
    if len(pairs) < FEWEST_PAIRS:
        return 1.0
    squares = float((pairs * pairs).sum())
    return max(0.0, 2 * float(pairs.prod(axis=1).sum()) / squares) if squares else 1.0
