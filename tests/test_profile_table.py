"""The table of held-out errors says which are over their bars."""

from __future__ import annotations

from pathlib import Path

import clock_table
import profile_table
import pytest
from profile_table import missed

from podsim.model import model_named
from podsim.profile import find_profile

ROOT = Path(__file__).parent.parent


def test_every_kernel_model_has_a_row_and_a_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["profile_table.py"])
    profile_table.main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    verdicts = {cells[0]: cells[-1] for cells in lines if len(cells) > 3}
    assert set(find_profile("h200", model_named("llama-3-8b")).errors) <= set(verdicts)
    assert {"all_reduce", "all_gather"} <= set(verdicts)
    for row, verdict in verdicts.items():
        judged = not row.startswith(("step", "median"))
        assert (verdict == "pass" or verdict.startswith("miss: ")) == judged


def test_an_error_is_held_against_its_bars_as_fitted_and_as_timed() -> None:
    bars = {"median": 0.03, "p90": 0.08, "bias": 0.01}
    sound = {"median": 0.03, "p90": 0.08, "bias": -0.01}
    assert list(missed(sound, bars)) == []
    assert list(missed({**sound, "bias": -0.011}, bars)) == ["bias"]
    timed = {**sound, "median_as_timed": 0.031, "p90_as_timed": 0.02}
    assert list(missed(timed, bars)) == ["median as timed"]
    assert list(missed({**timed, "p90": 0.081}, bars)) == ["median as timed", "P90"]
    assert list(missed({**timed, "p90": 0.081}, {"median": 0.05})) == []


def test_the_bias_as_timed_is_within_what_the_page_says() -> None:
    found = profile_table.bias_as_timed([ROOT / "profiles" / "h200" / "yi-6b"])["yi-6b"]
    assert set(found.index) == {f"attention {name}" for name in profile_table.ATTENTION_KERNELS}
    assert found["attention prefill"] == pytest.approx(-0.0206, abs=1e-3)
    assert found.drop("attention prefill").abs().max() < 0.01


def test_whole_steps_take_what_their_parts_do_at_the_clock_that_they_ran_at() -> None:
    rows = clock_table.rows_by_clock(ROOT / "validation" / "h200" / "910cdec5" / "profile")
    assert set(rows["op"]) == {"step", "sustained", "duty"}
    sizes = rows.groupby("op")[["sum of parts", "by clock"]].agg(lambda some: some.abs().median())
    assert (sizes.loc[["step", "sustained"], "by clock"] < 0.012).all()
    assert (sizes["sum of parts"] > sizes["by clock"]).all()
