"""A moment of simulated time that is met exactly."""

from __future__ import annotations

import simpy
from simpy.events import NORMAL, URGENT, EventPriority

__all__ = ["NORMAL", "URGENT", "At"]


class At(simpy.Event):
    """An event at a time, not after a delay: sums of step times are not rounded twice.

    SimPy adds a delay to its clock. From half of `time` on, the delay and the sum are exact
    (Sterbenz' lemma); an earlier clock first goes to a place in between. At equal times, URGENT
    events come before NORMAL ones.
    """

    def __init__(
        self, env: simpy.Environment, time: float, priority: EventPriority = NORMAL
    ) -> None:
        # `Event.__init__`, written out as in SimPy's own Timeout: requests cost some of these each.
        self.env = env
        self.callbacks = []
        self._value = None
        self._ok = True
        now = env.now
        if now >= time / 2:
            env.schedule(self, priority, time - now)
        else:
            halfway = env.timeout(0.75 * time - env.now)
            halfway.callbacks.append(lambda _: env.schedule(self, priority, time - env.now))
