"""How work lowers the clock: timelines of heats, and fits to made-up steps."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from podsim.batch import BatchShape
from podsim.heat import Drive, Heats, Shares, Warming, smooth
from podsim.heat_fitting import (
    CELL,
    OF_OTHER_CARDS,
    WITHOUT_CLOCKS,
    WITHOUT_LONG,
    SustainedRun,
    TimedStep,
    fit_heating,
    predicted,
)
from podsim.latency import ConstantLatency, ProfiledLatency
from podsim.model import model_named
from podsim.op_tables import beyond_neighbours
from podsim.profile import find_profile
from podsim.replica_heat import Heat

LLAMA = model_named("llama-3-8b")
PROFILE = find_profile("h200", LLAMA)

WARMING = Warming(
    products=0.4,
    products_at={512: 0.5},
    attention=0.45,
    decodes=0.2,
    overlap=0.3,
    balanced_overlap=0.2,
    idle=0.1,
    seconds=0.06,
    rest=0.12,
    least=0.08,
    at_once=0.15,
    follows=0.9,
    longer=0.004,
    at_limit=0.06,
    lower=0.04,
)


def test_what_a_step_drives_is_the_mean_over_what_it_does() -> None:
    shares = Shares(products=0.6, attention=0.2, decodes=0.1)
    assert shares.idle == pytest.approx(0.1)
    others = 0.2 * 0.45 + 0.1 * 0.2 - 0.1 * 0.1
    at_once = 0.08 + 0.6 * 0.15
    assert WARMING.drive(512, shares) == pytest.approx(Drive(0.6 * 0.5 + others, at_once))
    assert WARMING.drive(513, shares) == pytest.approx(Drive(0.6 * 0.4 + others, at_once))
    assert WARMING.drive(513, Shares(1.2, 0.0, 0.0)).at_once == pytest.approx(0.08 + 0.15)
    assert Shares(0.8, 0.4, 0.3, 0.5).idle == 0.0
    beyond = WARMING.drive(513, shares, beyond=0.03).fall
    assert beyond == pytest.approx(0.6 * 0.43 + others)  # its matrix kernels draw more
    assert WARMING.drive(512, shares, beyond=0.03) == WARMING.drive(512, shares)  # was watched
    beside = shares._replace(overlapped=0.05)
    assert WARMING.drive(512, beside).fall == pytest.approx(0.6 * 0.5 + others + 0.05 * 0.3)
    balanced = shares._replace(balanced=0.05)
    assert WARMING.drive(512, balanced).fall == pytest.approx(0.6 * 0.5 + others + 0.05 * 0.2)


def test_what_lies_beyond_its_neighbours_is_seen_among_those_of_the_same_kernels() -> None:
    num_tokens = np.array([256, 272, 288, 289, 304, 320, 336, 640, 672, 704])
    falls = np.array([0.20, 0.20, 0.26, 0.50, 0.22, 0.22, 0.23, 0.31, 0.35, 0.33])
    found = beyond_neighbours(num_tokens, falls)
    assert found[2] == pytest.approx(0.04)  # of six aligned ones from 256 to 336 the median is 0.22
    assert found[3] == 0.0  # the only one that is not aligned
    assert found[7:] == pytest.approx([-0.02, 0.02, 0.0])


def test_a_part_of_the_fall_is_there_at_once() -> None:
    drive = Drive(fall=0.4, at_once=0.2)
    falls = [WARMING.fall_in(drive, Heats(fall), 0.001) for fall in (0.0, 0.12, 0.15, 0.3)]
    assert falls[:3] == [0.2, 0.2, 0.2]  # whatever was before, until the heat is beyond it
    assert falls[3] == pytest.approx(0.3, abs=1e-3)
    assert WARMING.fall_as_timed(Drive(fall=0.1, at_once=0.2)) == 0.2
    assert WARMING.fall(Heats(0.1)) == 0.1  # decodes alone do not have it


@pytest.mark.parametrize(
    ("drive", "heats"),
    [
        (Drive(0.4, 0.2), Heats(0.12)),  # rises past it within the step
        (Drive(0.1, 0.2), Heats(0.4)),  # comes down to it
        (Drive(0.4, 0.2), Heats(0.12, 0.9)),  # and with the second fall
        (Drive(0.19, 0.2), Heats(0.12)),  # never past it
        (Drive(0.4, 0.2), Heats(0.3)),  # always
        (Drive(0.2, 0.2), Heats(0.2)),
    ],
)
def test_in_a_long_step_a_fall_leaves_the_part_that_is_there_at_once(
    drive: Drive, heats: Heats
) -> None:
    moments = (np.arange(100_000) + 0.5) * 1e-6  # of 0.1 s
    fall = drive.fall + (heats.fall - drive.fall) * np.exp(-moments / 0.06)
    limited = smooth((float(np.mean(fall)) - 0.12) / 0.06)
    for_long = float(np.mean(limited + (heats.limited - limited) * np.exp(-moments)))
    fall += 0.04 * limited * smooth((for_long - 0.45) / 0.1)
    expected = float(np.mean(np.maximum(fall, drive.at_once)))
    assert WARMING.fall_in(drive, heats, 0.1) == pytest.approx(expected, rel=1e-6)


def test_steps_follow_the_clock_less_than_their_parts() -> None:
    assert WARMING.slower(0.3, as_timed=0.3) == 0.004
    assert WARMING.slower(0.3, as_timed=0.2) == pytest.approx(0.004 + 0.9 * (math.exp(0.1) - 1))


def test_a_smooth_step_has_its_ends_and_its_middle() -> None:
    parts = (-1.0, 0.0, 0.25, 0.5, 0.75, 1.0, 2.0)
    assert [smooth(part) for part in parts] == [0.0, 0.0, 0.15625, 0.5, 0.84375, 1.0, 1.0]


def test_a_card_at_its_limit_for_half_of_a_second_falls_further() -> None:
    for limited, fall in ((0.0, 0.3), (0.45, 0.3), (0.5, 0.32), (0.55, 0.34), (1.0, 0.34)):
        assert WARMING.fall(Heats(0.3, limited)) == pytest.approx(fall)
    assert WARMING.fall(Heats(0.15, 1.0)) == pytest.approx(0.15 + 0.04 * 0.5)  # half at its limit
    assert WARMING.fall(Heats(0.0, 1.0)) == 0.08
    heats, falls, drive = WARMING.at_rest, [], Drive(0.4, at_once=0.1)
    for _ in range(200):  # steps of 10 ms
        falls.append(WARMING.fall_in(drive, heats, 0.01))
        heats = WARMING.worked(heats, drive, 0.01)
    assert falls[59] < 0.4 < falls[59] + 1e-4  # after 0.6 s; e^-0.6 of a second is over a half
    assert falls[85:] == pytest.approx([0.44] * 115)  # e^-0.85 is under 0.45
    limited = WARMING.rested(heats, 1.0).limited
    assert WARMING.fall_in(drive, Heats(0.4, limited), 0.01) == pytest.approx(0.4)  # forgotten


def test_a_rest_is_the_same_in_one_and_in_many_pieces() -> None:
    for heats in (Heats(0.4, 0.9), Heats(0.15, 0.3), Heats(0.1, 0.5), Heats(0.12, 0.0)):
        for pieces in (2, 100):
            rested = heats
            for _ in range(pieces):
                rested = WARMING.rested(rested, 0.3 / pieces)
            assert rested == pytest.approx(WARMING.rested(heats, 0.3))
    moments = np.linspace(0, 0.3, 300_001)  # against the integral
    part = np.clip(0.28 * np.exp(-moments / 0.06) / 0.06, 0, 1)
    at_limit = 3 * part**2 - 2 * part**3
    kept = 0.9 * math.exp(-0.3) + np.trapezoid(at_limit * np.exp(moments - 0.3), moments)
    assert WARMING.rested(Heats(0.4, 0.9), 0.3).limited == pytest.approx(float(kept), rel=1e-6)


def test_the_clock_falls_in_a_row_of_steps_and_rises_in_a_rest() -> None:
    latency = ProfiledLatency(PROFILE, LLAMA, "serial")
    latency.warming = WARMING
    prompt = BatchShape.of([(512, 512)])
    parts = latency.parts(prompt)
    in_all = parts.attention + parts.layers + parts.once
    drive, at_once = WARMING.drive(512, parts.shares)
    row = latency.clock_fall(512)
    assert 0.2 < row < drive < 0.5
    assert 0.2 < at_once < row

    def at(fall: float, limited: float) -> float:
        moments = np.linspace(0, in_all, 1001)
        falls = drive + (fall - drive) * np.exp(-moments / 0.06)
        on = smooth((float(np.mean(falls)) - 0.12) / 0.06)
        limited = float(np.mean(on + (limited - on) * np.exp(-moments)))
        falls += 0.04 * on * smooth((limited - 0.45) / 0.1)
        slower = 0.004 + 0.9 * (math.exp(float(np.mean(np.maximum(falls, at_once))) - row) - 1)
        return in_all + (parts.clocked_attention + parts.clocked_layers) * slower

    heat, time, heats = Heat(latency), 0.0, WARMING.at_rest
    for _ in range(500):
        seconds = heat.step_time(prompt, time)
        assert seconds == pytest.approx(at(*heats), rel=1e-4)
        heats = WARMING.worked(heats, Drive(drive, at_once), seconds)
        time += seconds
    assert time > 5.0
    assert seconds == pytest.approx(at(drive, 1.0), rel=1e-3)  # a long row
    assert latency.step_time(prompt) == pytest.approx(seconds, rel=1e-3)  # as timed
    assert at(0.12, 0.0) < 0.9 * seconds
    decode = BatchShape.of([], [100] * 64)
    cold = latency.step_time(decode)
    moments = np.linspace(0, cold, 1001)  # it feels what is left of the fall
    left = float(np.mean((heats.fall - 0.12) * np.exp(-moments / 0.06)))
    left += 0.04 * smooth(left / 0.06)
    hot = cold + latency.clocked_seconds(64, cold) * math.expm1(left)
    assert heat.step_time(decode, time) == pytest.approx(hot, rel=1e-4)
    assert 1.01 < hot / cold < 1.1
    assert heat.step_time(decode, time + 100.0) == pytest.approx(cold, rel=1e-9)
    start, one_by_one = time, []
    for longer in range(40):  # as long as the heats last, and longer
        contexts = BatchShape.of([], [100 + longer] * 64)
        one_by_one.append(heat.step_time(contexts, start))
        start += one_by_one[-1]
    assert heat.decode_run_times(decode, 40, time) == one_by_one
    rested = WARMING.rested(heats, 0.06)
    assert rested.fall == pytest.approx(0.12 + (heats.fall - 0.12) / math.e)
    assert heat.step_time(prompt, time + 0.06) == pytest.approx(at(*rested), rel=1e-4)
    assert heat.step_time(prompt, time + 100.0) == pytest.approx(at(0.12, 0.0), rel=1e-4)


def test_steps_that_were_shorter_than_predicted_had_no_rest_between() -> None:
    """Recorded ones, of a faster card: the heats do not run away."""
    latency = ProfiledLatency(PROFILE, LLAMA, "serial")
    latency.warming = WARMING
    prompt, decode = BatchShape.of([(512, 512)]), BatchShape.of([], [100] * 8)
    heats = [Heat(latency) for _ in range(2)]
    at_once, in_a_row, time = [], [], 0.0
    for step in range(300):
        at_once.append(heats[0].step_time(prompt, 1e-4 * step))
        in_a_row.append(heats[1].step_time(prompt, time))
        time += in_a_row[-1]
    assert at_once == in_a_row
    early, after = heats[0].step_time(decode, 0.03), heats[1].step_time(decode, time)
    assert early == after > latency.step_time(decode)


def test_a_profile_whose_steps_were_not_watched_knows_nothing_of_the_clock() -> None:
    assert Warming.of({"layer_gap": 1e-6}) is None
    latency = ProfiledLatency(replace(PROFILE, sustained={"layer_gap": 0.0}), LLAMA, "serial")
    prompt = BatchShape.of([(512, 512)])
    parts = latency.parts(prompt)
    assert latency.step_time(prompt) == parts.attention + parts.layers + parts.once
    heat = Heat(latency)
    assert [heat.step_time(prompt, t) for t in (0.0, 0.1)] == [latency.step_time(prompt)] * 2
    assert heat.is_cold(0.0)
    known = Warming.of(PROFILE.sustained)
    assert known is not None
    assert sorted(known.products_at) == [512, 1024, 2048, 4096]


def test_a_model_without_heat_keeps_its_times() -> None:
    heat = Heat(ConstantLatency(0.5))
    assert [heat.step_time(BatchShape.of([(9, 9)]), t) for t in (0.0, 0.5, 9.0)] == [0.5] * 3


WINDOWS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.4)


def made_up(
    warming: Warming, num_tokens: int, shares: Shares, in_a_row: int, rest: int, **more: Any
) -> SustainedRun:
    """Steps of 20 ms at the clock of their parts, then steps of decodes of 10 ms, step by step."""
    row, ends = 0.3, WINDOWS if not rest else (0.4, 0.8, 1.6, 2.4)
    clocked = 0.02 * (shares.products + shares.attention)
    drive, heats, time = warming.drive(num_tokens, shares), warming.at_rest, 0.0
    seconds: list[list[float]] = [[] for _ in ends]
    falls: list[list[float]] = [[] for _ in ends]
    while time < ends[-1]:
        for _ in range(in_a_row):
            fall = warming.fall_in(drive, heats, 0.02)
            step = 0.02 + clocked * warming.slower(fall, row)
            heats, time = warming.worked(heats, drive, step), time + step
            window = int(np.searchsorted(ends, time))
            if window < len(ends):
                seconds[window].append(step)
                falls[window].append(fall)
        heats, time = warming.rested(heats, 0.01 * rest), time + 0.01 * rest
    return SustainedRun(
        batch=f"{num_tokens} {shares}",
        num_tokens=num_tokens,
        layers=0.02,
        clocked=clocked,
        row_fall=row,
        shares=shares,
        ends=ends,
        seconds=[float(np.mean(some)) for some in seconds],
        falls=[float(np.mean(some)) for some in falls],
        between=0.01 * rest,
        in_a_row=in_a_row,
        **more,
    )


def timed_step(warming: Warming, num_tokens: int, shares: Shares) -> TimedStep:
    fall = warming.fall_as_timed(warming.drive(num_tokens, shares))
    return TimedStep(num_tokens, shares, fall)


PREFILL, LONG = Shares(0.9, 0.05, 0.0), Shares(0.6, 0.35, 0.0)
MIXED, SMALL = Shares(0.6, 0.1, 0.2), Shares(0.3, 0.05, 0.1)
BEHIND, BESIDE = Shares(0.4, 0.15, 0.43), Shares(0.45, 0.17, 0.48, 0.12)
BALANCED = Shares(0.58, 0.3, 0.18, 0.0, 0.08)


def test_what_drives_the_clock_is_found_from_steps_that_were_watched() -> None:
    runs = [
        made_up(WARMING, 512, PREFILL, 1, 0, is_watched=True),
        made_up(WARMING, 1024, LONG, 1, 0),
        made_up(WARMING, 600, SMALL, 1, 0),
        *(made_up(WARMING, 600, MIXED, 1, rest) for rest in (0, 1, 3, 7)),
        *(made_up(WARMING, 1024, shares, 1, 0) for shares in (BEHIND, BESIDE, BALANCED)),
    ]
    found = fit_heating(runs, [timed_step(WARMING, 700, s) for s in (PREFILL, LONG, MIXED, SMALL)])
    assert found.products_at == {512: pytest.approx(0.5, rel=0.15)}
    for name in ("products", "attention", "decodes", "overlap", "balanced_overlap", "rest"):
        assert getattr(found, name) == pytest.approx(getattr(WARMING, name), rel=0.15), name
    for run in runs:
        assert predicted(run, found) == pytest.approx(run.seconds, rel=0.015)
        drives = [each.drive(run.num_tokens, run.shares) for each in (found, WARMING)]
        falls = [found.fall_as_timed(drive) for drive in drives]
        assert falls[0] == pytest.approx(falls[1], abs=0.02)
    assert found.follows == pytest.approx(0.9, abs=0.1)


def test_without_clocks_decodes_and_rests_drive_what_they_do_on_other_cards() -> None:
    usual = {name: OF_OTHER_CARDS[name] for name in WITHOUT_CLOCKS}
    true = replace(WARMING, **usual)
    runs = [
        made_up(true, 512, PREFILL, 1, 0, is_watched=True),
        made_up(true, 1024, LONG, 1, 0),
        *(made_up(true, 600, MIXED, 1, rest) for rest in (0, 3)),
    ]
    found = fit_heating([replace(run, falls=()) for run in runs])
    assert {name: getattr(found, name) for name in WITHOUT_CLOCKS} == usual
    assert found.attention != OF_OTHER_CARDS["attention"]


def test_short_contexts_do_not_tell_what_decodes_drive() -> None:
    runs = [
        made_up(WARMING, 1024, LONG, 1, 0),
        *(made_up(WARMING, 600, MIXED, 1, rest) for rest in (0, 3)),
    ]
    found = fit_heating(runs, [timed_step(WARMING, 700, LONG)])
    assert {name: getattr(found, name) for name in WITHOUT_LONG} == {
        name: OF_OTHER_CARDS[name] for name in WITHOUT_LONG
    }
    assert found.idle != OF_OTHER_CARDS["idle"]


@pytest.mark.parametrize(
    ("shares", "untold"), [(BESIDE, "balanced_overlap"), (BALANCED, "overlap")]
)
def test_each_overlap_is_told_by_its_own_tiles(shares: Shares, untold: str) -> None:
    """As of a model without grouped heads, whose batches are never decode-heavy."""
    runs = [
        *(made_up(WARMING, 1024, each, 1, 0) for each in (LONG, BEHIND, shares)),
        *(made_up(WARMING, 600, MIXED, 1, rest) for rest in (0, 3)),
    ]
    found = fit_heating(runs, [timed_step(WARMING, 700, LONG)])
    taken = [name for name in WITHOUT_LONG if getattr(found, name) == OF_OTHER_CARDS[name]]
    assert taken == [untold]


def test_few_steps_tell_what_products_drive_alone() -> None:
    true = replace(WARMING, **OF_OTHER_CARDS)
    found = fit_heating([made_up(true, 600, PREFILL, 1, 0), made_up(true, 1024, MIXED, 1, 0)])
    assert {name: getattr(found, name) for name in OF_OTHER_CARDS} == OF_OTHER_CARDS
    assert found.products == pytest.approx(0.4, rel=0.02)


def test_clocks_of_other_whole_steps_count() -> None:
    """How much of the second fall is in them is found too."""
    runs = [
        made_up(WARMING, 1024, LONG, 1, 0),
        *(made_up(WARMING, 600, SMALL, 1, rest) for rest in (0, 3)),
    ]
    hotter, other = replace(WARMING, attention=0.6), Shares(0.4, 0.55, 0.0)
    steps = [timed_step(hotter, 700, shares) for shares in (LONG, other, PREFILL, SMALL)]
    missed = [
        max(abs(found.fall_as_timed(step.drive(found)) - step.fall) for step in steps)
        for found in (fit_heating(runs), fit_heating(runs, steps * 20))
    ]
    assert missed[0] > missed[1] + 0.01
    assert missed[1] < 0.02


def test_steps_whose_products_were_not_timed_tell_their_course_alone() -> None:
    """All of a batch 10 % longer: that is taken for its matrix products."""
    right = made_up(WARMING, 512, PREFILL, 1, 0, is_watched=True)
    other = made_up(WARMING, 700, LONG, 1, 0)
    longer = replace(other, is_exact=False, seconds=[1.1 * s for s in other.seconds], falls=())
    found = fit_heating([right, made_up(WARMING, 600, MIXED, 1, 3), longer])
    assert predicted(longer, found) == pytest.approx(np.array(longer.seconds) / 1.1, rel=0.02)


def test_steps_without_decodes_between_them_take_all_the_time() -> None:
    """Also where a number of steps ends exactly with a cell."""
    run = replace(made_up(WARMING, 512, PREFILL, 1, 0), ends=(0.1, 0.4, 2.4), seconds=[0.02] * 3)
    assert run.share(np.arange(480) * CELL) == pytest.approx(np.ones(480))


def test_a_window_of_decodes_alone_says_nothing_of_steps_with_prefill() -> None:
    """A step of 0.2 s, then 0.7 s of decodes: no step with prefill is in the second window."""
    run = made_up(WARMING, 600, PREFILL, 1, 3)
    run = replace(run, ends=(0.4, 0.8, 1.6), seconds=(0.25, 0.25, 0.24), between=0.7, falls=())
    assert np.isnan(predicted(run, WARMING)).tolist() == [False, True, False]
    found = fit_heating([run, made_up(WARMING, 512, PREFILL, 1, 0, is_watched=True)])
    assert np.isfinite(found.products)


def test_a_step_of_decodes_feels_the_clock_by_what_goes_with_it() -> None:
    latency = ProfiledLatency(PROFILE, LLAMA, "pod")
    attention = 5e-3 - LLAMA.num_layers * latency._layer_time[8]
    waits = PROFILE.clock_sensitivity["serial"]["low"]
    expected = latency.clocked_products(8) + waits * attention
    assert latency.clocked_seconds(8, 5e-3) == pytest.approx(expected)
    assert 0.02 < expected / 5e-3 < 0.3
