"""Rows at their usual clock: what chance adds to a clock goes, what is a point's own stays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from podsim import calibration
from podsim.hardware import gpu_named
from podsim.model import model_named
from podsim.overlap import SHARES, Overlap, longer_side, place, tables
from podsim.profile import find_profile
from podsim.row_clocks import (
    FEWEST_PAIRS,
    Sensitivity,
    _usual_clocks,
    attention_at_usual_clock,
    fit_sensitivity,
    products_at_usual_clock,
)

Floats = NDArray[np.float64]

SHIPPED = Path(__file__).parent.parent / "profiles" / "h200" / "llama-3-8b"
LLAMA = model_named("llama-3-8b")
TOKENS = np.unique(np.geomspace(1, 8192, 120).astype(int))


def usual_mhz(num_tokens: Floats) -> Floats:
    return np.asarray(1900 - 50 * np.log(num_tokens))


def passes(chance: float, own: float = 0.0, held_out: int = 7) -> pd.DataFrame:
    """Two passes over products of a microsecond a token, at clocks that are off by so much.

    `own` is what both passes over a point have in common. Every `held_out`th point is not fitted
    on.
    """
    rng = np.random.default_rng(0)
    mine = own * rng.standard_normal(len(TOKENS))
    tables_ = []
    for number in (0, 1):
        off = mine + chance * rng.standard_normal(len(TOKENS))
        clocks = usual_mhz(TOKENS) * np.exp(off)
        for op in ("qkv", "output", "gate_up", "down", "lm_head"):
            seconds = 1e-6 * TOKENS * np.where(TOKENS >= 512, np.exp(-off), 1.0)
            tables_.append(
                pd.DataFrame(
                    {
                        "op": op,
                        "strategy": "",
                        "split": np.where(np.arange(len(TOKENS)) % held_out, "grid", "held_out"),
                        "num_tokens": TOKENS,
                        "prefills": "",
                        "decodes": "",
                        "pass": number,
                        "seconds": seconds,
                        "sm_clock_mhz": clocks,
                    }
                )
            )
    return pd.concat(tables_, ignore_index=True)


def apart(rows: pd.DataFrame, seconds: pd.Series[float]) -> Floats:
    """How far the passes over each point lie apart, relatively."""
    both = rows.assign(seconds=seconds).pivot_table(
        index=["op", "num_tokens"], columns="pass", values="seconds"
    )
    return np.abs(np.log(both[1] / both[0])).to_numpy()


def test_how_times_follow_the_clock_is_found_from_pairs_of_passes() -> None:
    rng = np.random.default_rng(0)
    true = Sensitivity(low=0.1, high=0.9, turn=200.0, steepness=3.0)
    intensity = np.geomspace(1, 4000, 400)
    clocks = 0.04 * rng.standard_normal(400)
    seconds = -true.at(intensity) * clocks + 0.001 * rng.standard_normal(400)
    seconds[::40] += 0.3  # a stalled host now and then
    found = fit_sensitivity(intensity, clocks, seconds)
    assert found.at(intensity) == pytest.approx(true.at(intensity), abs=0.02)


def test_memory_waits_for_no_clock_and_endless_intensity_for_nothing_else() -> None:
    follows = Sensitivity(low=0.1, high=0.9, turn=200.0, steepness=2.0)
    assert follows.at(np.array([0.0, 200.0, np.inf])) == pytest.approx([0.1, 0.5, 0.9])


def test_what_chance_adds_to_the_clocks_goes_from_the_times() -> None:
    rows = passes(chance=0.03)
    seconds, follows, _ = products_at_usual_clock(rows, LLAMA)
    assert follows["products"].high == pytest.approx(1.0, abs=0.02)
    assert follows["products"].low == pytest.approx(0.0, abs=0.02)
    many = (rows["num_tokens"] >= 1024).to_numpy()
    true = 1e-6 * rows["num_tokens"].to_numpy()
    before, after = (np.abs(s / true - 1)[many].mean() for s in (rows["seconds"], seconds))
    assert before > 0.02
    assert after < before / 3
    assert apart(rows, seconds).mean() < apart(rows, rows["seconds"]).mean() / 3


def test_points_that_are_timed_oftener_leave_the_pairs_of_the_others() -> None:
    rows = passes(chance=0.03)
    again = rows[(rows["num_tokens"] == rows["num_tokens"].iloc[-1]) & (rows["pass"] == 0)]
    often = pd.concat([rows, again.assign(**{"pass": 2})], ignore_index=True)
    _, follows, _ = products_at_usual_clock(often, LLAMA)
    assert follows["products"].high == pytest.approx(1.0, abs=0.02)


def test_what_is_a_points_own_stays() -> None:
    rows = passes(chance=0.002, own=0.03)
    seconds, _, _ = products_at_usual_clock(rows, LLAMA)
    assert np.abs(seconds / rows["seconds"] - 1).max() < 0.01


def test_held_out_rows_decide_nothing() -> None:
    rows = passes(chance=0.03)
    seconds, follows, _ = products_at_usual_clock(rows, LLAMA)
    grid = rows["split"] == "grid"
    other = rows.assign(
        seconds=rows["seconds"].where(grid, rows["seconds"] * 3),
        sm_clock_mhz=rows["sm_clock_mhz"].where(grid, 1000.0),
    )
    again, follows_again, _ = products_at_usual_clock(other, LLAMA)
    assert follows_again == follows
    assert again[grid].tolist() == seconds[grid].tolist()


def test_the_usual_clock_of_a_point_does_not_know_its_own() -> None:
    rows = passes(chance=0.0)
    mine = rows[rows["op"] == "qkv"].reset_index(drop=True)
    states = np.log(mine["num_tokens"].to_numpy(float))[:, None] / 0.3
    usual = _usual_clocks(mine, states)
    many = mine["num_tokens"] >= 16  # fewer are too far apart
    expected = usual_mhz(mine["num_tokens"].to_numpy())
    assert np.exp(usual)[many] == pytest.approx(expected[many], rel=0.01)
    one = mine["num_tokens"] == mine["num_tokens"][60]
    faster = mine.assign(sm_clock_mhz=mine["sm_clock_mhz"].where(~one, 1980.0))
    assert _usual_clocks(faster, states)[one] == pytest.approx(usual[one], abs=1e-4)


def test_batches_have_the_usual_clock_of_their_kind() -> None:
    """Prefill alone at 1,500 MHz, mixed batches at 1,600 and, under pod, at 1,550; else alike."""
    kinds = [("serial", "64@64", "", 1500.0), ("serial", "64@64", "1x9", 1600.0)]
    kinds.append(("pod", "64@64", "1x9", 1550.0))
    rows = pd.DataFrame(
        [
            ("attention", strategy, "grid", tokens, prefills, decodes, clock)
            for strategy, prefills, decodes, clock in kinds
            for tokens in range(100, 200)
        ],
        columns=[*("op", "strategy", "split", "num_tokens", "prefills", "decodes"), "sm_clock_mhz"],
    )
    alike = np.zeros((len(rows), 1))
    found = np.exp(_usual_clocks(rows, alike))
    assert found == pytest.approx(rows["sm_clock_mhz"].to_numpy(), abs=5.0)


def test_rows_without_clocks_or_of_few_points_stay_as_timed() -> None:
    rows = passes(chance=0.03)
    unknown = rows.assign(sm_clock_mhz=np.nan)
    few = rows[rows["num_tokens"].isin(TOKENS[: FEWEST_PAIRS // 5 - 1])]
    for some in (unknown, few):
        seconds, follows, _ = products_at_usual_clock(some, LLAMA)
        assert follows == {}
        assert seconds.tolist() == some["seconds"].tolist()


def test_passes_of_the_shipped_rows_agree_at_their_usual_clocks() -> None:
    rows = calibration._read_passes(SHIPPED / "measurements.csv")
    rows["seconds"] = rows["time_us"] * 1e-6
    seconds, _, _ = products_at_usual_clock(rows, LLAMA)
    many = rows["op"].isin(["qkv", "gate_up", "down"]) & (rows["num_tokens"] >= 512)
    before, after = (apart(rows[many], s[many]) for s in (rows["seconds"], seconds))
    assert np.percentile(before, 90) > 0.05
    assert np.percentile(after, 90) < 0.025

    geometry = find_profile("h200", LLAMA).attention["geometry"]
    layer = (geometry["linear_token_seconds"], geometry["quiet_layer_seconds"])
    seconds, follows = attention_at_usual_clock(rows, LLAMA, gpu_named("h200"), *layer)
    assert set(follows) == {"serial", "streams", "unified", "pod"}
    prefill = (rows["op"] == "attention") & (rows["decodes"] == "")
    key = rows.assign(op=rows["prefills"])[prefill]
    assert np.median(apart(key, seconds[prefill])) < np.median(apart(key, key["seconds"])) / 2
    others = rows["op"] != "attention"
    assert seconds[others].tolist() == rows["seconds"][others].tolist()


def test_profiles_tell_errors_against_what_was_timed_too() -> None:
    errors = find_profile("h200", LLAMA).errors
    brought = {kernel for kernel, error in errors.items() if "median_as_timed" in error}
    assert {"qkv", "lm_head", "attention prefill", "attention pod, heavy tail"} <= brought
    assert not brought & {"rmsnorm", "embedding", "step serial", "step pod"}


@pytest.mark.parametrize("busy", [0.1, 0.9])
def test_the_longer_side_is_in_a_table(busy: float) -> None:
    overlap = Overlap.of(tables(longer_side()))
    for share in (*SHARES, 0.33, 0.77):
        assert overlap.at(share, place((0.0, 1.0), busy), place((0.0, 8.0), 3.0)) == pytest.approx(
            max(share, 1 - share)
        )
