"""Waiting for a moment of simulated time that is met exactly."""

from __future__ import annotations

from collections.abc import Generator

import simpy
from simpy.events import NORMAL, URGENT, EventPriority

__all__ = ["NORMAL", "URGENT", "until"]


def until(
    env: simpy.Environment, time: float, priority: EventPriority = NORMAL
) -> Generator[simpy.Event, None, None]:
    """Wait until `time`, so that sums of step times are not rounded twice.

    SimPy adds a delay to its clock. From half of `time` on, the delay and the sum are exact
    (Sterbenz' lemma), so an earlier clock first goes to a place in between. At equal times, URGENT
    events come before NORMAL ones.
    """
    if env.now < time / 2:
        yield _After(env, 0.75 * time - env.now, priority)
    yield _After(env, time - env.now, priority)


class _After(simpy.Event):
    """A timeout with a priority."""

    def __init__(self, env: simpy.Environment, delay: float, priority: EventPriority) -> None:
        super().__init__(env)
        self._ok = True
        self._value = None
        env.schedule(self, priority=priority, delay=delay)
