"""Processes that work together: answers, and every way in which they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from podsim.errors import InputError
from podsim.ranks import Ranks
from tests import rank_functions

ROOT = Path(__file__).parent.parent


def is_running(pid: int) -> bool:
    """A process that has ended and that nobody has waited for counts as gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def all_end(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_running, pids))


def test_the_first_rank_answers_and_tells() -> None:
    told: list[tuple[object, ...]] = []
    with Ranks(rank_functions.count, 3, on_progress=lambda *what: told.append(what)) as ranks:
        pid = ranks.answer()
        assert ranks.ask(5) == 5 * 1 + 5 * 2
        assert ranks.ask(7) == 21
        assert is_running(pid)
    assert told == [("asked", 5), ("asked", 7)]
    assert not is_running(pid)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("refused", "no such thing"),
        ("failed", "rank 1 of 2 failed: RuntimeError: out of paper"),
        ("ended", r"rank 1 of 2 died \(exit code 3\)"),
        ("killed", r"rank 1 of 2 died \(killed by signal 9\)"),
    ],
)
def test_what_fails_in_one_rank_ends_all(how: str, message: str) -> None:
    pids: list[int] = []
    with (
        pytest.raises(InputError, match=rf"^{message}$"),
        Ranks(rank_functions.fail, 2, (how,), pids.append) as ranks,
    ):
        ranks.answer()
    assert len(pids) == 2
    assert not any(map(is_running, pids))


def test_a_death_is_named_and_not_the_complaint_of_another_rank() -> None:
    with (
        pytest.raises(InputError, match=r"^rank 1 of 2 died \(killed by signal 9\)$"),
        Ranks(rank_functions.complain, 2) as ranks,
    ):
        ranks.answer()


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_the_main_process(ending: signal.Signals) -> None:
    """Ctrl-C goes to every process of the terminal; the other signals to the main one alone."""
    main = subprocess.Popen(
        [sys.executable, "-c", "from tests.rank_functions import *; wait_in_three_ranks()"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert main.stdout is not None
    assert main.stderr is not None
    pids = [int(main.stdout.readline()) for _ in range(3)]
    assert all(map(is_running, pids))
    if ending == signal.SIGINT:
        os.killpg(main.pid, ending)
    else:
        os.kill(main.pid, ending)
    assert all_end([main.pid, *pids])
    _, errors = main.communicate(timeout=10)
    assert main.returncode == -ending
    assert errors.count("Traceback") == (ending == signal.SIGINT)
