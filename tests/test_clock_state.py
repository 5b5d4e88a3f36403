"""Rows that were timed while the card's clock was held down."""

import pytest

from podsim.clock_state import WINDOW, refuse_held_down

FREE, HELD = "1750", "1490"


def row(point: int, number: int, clock: str) -> dict[str, str]:
    names = ("op", "strategy", "split", "prefills", "decodes")
    return {
        **dict.fromkeys(names, ""),
        "num_tokens": str(point),
        "pass": str(number),
        "sm_clock_mhz": clock,
        "refused": "",
    }


def passes(first: list[str], second: list[str]) -> list[dict[str, str]]:
    rows = [row(point, 0, clock) for point, clock in enumerate(first)]
    return rows + [row(point, 1, clock) for point, clock in enumerate(second)]


def test_rows_of_the_time_when_the_clock_was_held_down_are_refused() -> None:
    held, free = 3 * WINDOW, 2 * WINDOW
    rows = passes([HELD] * held + [FREE] * free, [FREE] * (held + free))
    refused = [bool(found["refused"]) for found in refuse_held_down(rows)]
    assert sum(refused) == pytest.approx(held, abs=1)  # a median knows the edge within a row
    assert not any(refused[held + 1 :])
    first = refuse_held_down(rows)[0]["refused"]
    assert first == "the SM clock was held at 1490 MHz for a while, 1750 in the other pass"


def test_a_point_keeps_its_only_kind_of_rows() -> None:
    always = passes([HELD] * 2 * WINDOW, [HELD] * 2 * WINDOW)
    assert refuse_held_down(always) == always
    alone = [row(point, 0, HELD if point < WINDOW else FREE) for point in range(3 * WINDOW)]
    assert refuse_held_down(alone) == alone


def test_single_slow_rows_and_rows_without_a_clock_stay() -> None:
    first = [HELD if point % 5 == 0 else FREE for point in range(3 * WINDOW)]
    scattered = passes(first, [FREE] * 3 * WINDOW)
    assert refuse_held_down(scattered) == scattered
    unknown = passes([""] * 2 * WINDOW, [FREE] * 2 * WINDOW)
    assert refuse_held_down(unknown) == unknown
