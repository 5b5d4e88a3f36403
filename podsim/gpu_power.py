"""Energy and throttling of the GPU, from its own counters (NVML)."""

from __future__ import annotations

from types import TracebackType

import pynvml

from podsim.gpu_sampler import current_gpu

REASONS = {
    "nvmlClocksThrottleReasonSwPowerCap": "power cap",
    "nvmlClocksThrottleReasonHwSlowdown": "hardware slowdown",
    "nvmlClocksThrottleReasonSwThermalSlowdown": "temperature",
    "nvmlClocksThrottleReasonHwThermalSlowdown": "temperature",
    "nvmlClocksThrottleReasonHwPowerBrakeSlowdown": "power brake",
}


class GpuPower:
    """The counters of the GPU that torch uses, while the context is open."""

    def __enter__(self) -> GpuPower:
        pynvml.nvmlInit()
        self._gpu = pynvml.nvmlDeviceGetHandleByUUID(current_gpu())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pynvml.nvmlShutdown()

    def joules(self) -> float:
        """Used since the driver was loaded; it counts in millijoules, some ten times a second."""
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._gpu)) / 1000

    def throttle_reasons(self) -> str:
        """Why the clock is below its maximum now, such as "power cap"; empty if it is not."""
        mask = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._gpu)
        names = {text for name, text in REASONS.items() if mask & getattr(pynvml, name)}
        return ", ".join(sorted(names))
