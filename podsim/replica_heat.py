"""How one replica's card feels the work behind it: see `podsim.heat`."""

from __future__ import annotations

from podsim.batch import BatchShape
from podsim.heat import Heats
from podsim.latency import LatencyModel, WarmsUp, decode_run_times


class Heat:
    """How one replica's card feels the matrix work behind it, and how long its steps take then.

    To the heats steps of decodes alone are a rest, but they feel them. A model that does not warm
    up has its own step times.
    """

    def __init__(self, model: LatencyModel) -> None:
        self._model = model
        self._warms_up = model if isinstance(model, WarmsUp) else None
        self._warming = None if self._warms_up is None else self._warms_up.warming
        self._heats = Heats() if self._warming is None else self._warming.at_rest
        self._time = 0.0
        self._decode_run_times = decode_run_times(model)

    def step_time(self, shape: BatchShape, start: float) -> float:
        """Seconds of a step that begins at `start`, later than all before.

        Recorded steps may begin before the one before would have ended: without a rest between.
        """
        model, warming = self._warms_up, self._warming
        if model is None or warming is None:
            return self._model.step_time(shape)
        if not shape.prefills:
            return self._heated([self._model.step_time(shape)], shape, start)[0]
        heats = warming.rested(self._heats, max(start - self._time, 0.0))
        seconds, drive = model.step_time_at(shape, heats)
        self._heats = warming.worked(heats, drive, seconds)
        self._time = start + seconds
        return seconds

    def decode_run_times(self, shape: BatchShape, num_steps: int, start: float) -> list[float]:
        """Seconds of consecutive steps of decodes, as `step_time` gives them one by one."""
        times = self._decode_run_times(shape, num_steps)
        return times if self._warming is None else self._heated(times, shape, start)

    def is_cold(self, start: float) -> bool:
        """Whether no step of decodes alone from `start` on feels a heat, until one with prefill."""
        warming = self._warming
        return warming is None or warming.left(self._heats, start - self._time, 1e-9) == 0.0

    def _heated(self, times: list[float], shape: BatchShape, start: float) -> list[float]:
        model, warming = self._warms_up, self._warming
        assert model is not None
        assert warming is not None
        num_decodes = shape.num_decodes
        for step, seconds in enumerate(times):
            share = warming.left(self._heats, max(start - self._time, 0.0), seconds)
            if share == 0.0:
                break
            times[step] += model.clocked_seconds(num_decodes, seconds) * share
            start += times[step]
        return times
