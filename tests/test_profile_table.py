"""The table of held-out errors says which are over their bars."""

from __future__ import annotations

from pathlib import Path

import clock_table
import heat_table
import pandas as pd
import profile_table
import pytest
from profile_table import missed

from podsim.errors import InputError
from podsim.heat_fitting import OF_OTHER_CARDS
from podsim.model import model_named
from podsim.profile import find_profile
from podsim.profile_plan import SUSTAINED_ENDS

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


def test_profiles_that_are_named_stand_under_their_cards(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = ROOT / "profiles" / "h200" / "llama-3-8b"
    monkeypatch.setattr("sys.argv", ["profile_table.py", str(shipped), str(shipped)])
    profile_table.main()
    head, _, *lines = capsys.readouterr().out.splitlines()
    card = find_profile("h200", model_named("llama-3-8b")).provenance["card"]
    assert head.split(" | ")[1:] == [card, card, "bar", "met |"]
    assert len(lines) == len(profile_table.ROWS)


def test_an_error_is_held_against_its_bars_as_fitted_and_as_timed() -> None:
    bars = {"median": 0.03, "p90": 0.08, "bias": 0.01}
    sound = {"median": 0.03, "p90": 0.08, "bias": -0.01}
    assert list(missed(sound, bars)) == []
    assert list(missed({**sound, "bias": -0.011}, bars)) == ["bias"]
    timed = {**sound, "median_as_timed": 0.031, "p90_as_timed": 0.02, "bias_as_timed": -0.01}
    assert list(missed(timed, bars)) == ["median as timed"]
    assert list(missed({**timed, "p90": 0.081}, bars)) == ["median as timed", "P90"]
    assert list(missed({**timed, "bias_as_timed": -0.011}, bars)) == [
        "median as timed",
        "bias as timed",
    ]
    assert list(missed({**timed, "p90": 0.081}, {"median": 0.05})) == []


def test_what_profiles_take_from_other_cards_is_the_median_of_those_that_tell_it() -> None:
    """After another fit of them: the last line of the command that `heat_fitting` names."""
    folders = sorted((ROOT / "validation" / "h200").glob("*/profile"))
    table = heat_table.fitted_table(folders)
    medians = table.loc["median", list(OF_OTHER_CARDS)]
    assert medians.to_dict() == pytest.approx(OF_OTHER_CARDS, abs=1.1e-3)
    told = table.drop(index="median").count()
    assert told["decodes"] == told["overlap"] == told["balanced_overlap"] == 6
    assert told["idle"] == len(folders) == 9


def test_steps_of_every_strategy_are_seen_by_their_clock() -> None:
    rows = clock_table.rows_by_clock(ROOT / "validation" / "h200" / "41d2336d" / "profile")
    long = rows[(rows["op"] == "sustained") & rows["decodes"].isin(["16x12288", "48x16384"])]
    assert len(long) == 4 * len(SUSTAINED_ENDS)
    assert long["by clock"].abs().median() < 0.012


def test_steps_of_some_sizes_follow_the_clock_less_than_those_near_them() -> None:
    folder = ROOT / "validation" / "h200" / "4ac2db1d"
    runs = ("chat-serial-512-0.30", "chat-serial-512-0.70")
    steps = pd.concat([clock_table.recorded_steps(folder / run) for run in runs])
    kinds = clock_table.steps_by_clock(steps)
    assert kinds["steps"].sum() == len(steps)
    assert set(kinds["run"]) == set(runs)
    sizes = clock_table.sizes_by_clock(steps).set_index("size")
    assert (sizes["steps"] >= clock_table.FEWEST_STEPS).all()
    assert sizes.loc[512, "steps"] == ((steps["size"] == 512) & (steps["kind"] != "decode")).sum()
    assert sizes.loc[384, "per 1 %"] > 0.001 > 0.0 > sizes.loc[512, "per 1 %"]
    with pytest.raises(InputError, match="no size of graph has 20 steps"):
        clock_table.sizes_by_clock(steps[:9])


def test_what_is_no_recording_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing.engine\.json: No such file"):
        clock_table.show_all([tmp_path / "nothing"], by_size=True)
    profile = ROOT / "validation" / "h200" / "4ac2db1d" / "profile"
    with pytest.raises(InputError, match="profile: --sizes is of recordings"):
        clock_table.show_all([profile], by_size=True)


def test_whole_steps_take_what_their_parts_do_at_the_clock_that_they_ran_at() -> None:
    rows = clock_table.rows_by_clock(ROOT / "validation" / "h200" / "e9214e9e" / "profile")
    assert set(rows["op"]) == {"step", "sustained", "duty"}
    sizes = rows.groupby("op")[["sum of parts", "by clock"]].agg(lambda some: some.abs().median())
    assert (sizes.loc[["step", "sustained"], "by clock"] < 0.012).all()
    assert (sizes["sum of parts"] > sizes["by clock"]).all()
