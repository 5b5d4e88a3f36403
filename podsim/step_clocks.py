"""The SM clock that each step of an engine runs at, from the SMs' own cycle counters.

One small kernel at the start of a step's graph notes cycles and nanoseconds of every SM, one behind
the step notes how fast they went by: both while the GPU would wait for the host. The host copies
nothing until it is asked. `podsim.gpu_sampler` has the driver's clock, of now and then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from podsim.measure_clock import SLOTS, cycles, nanoseconds, slot, stamp

NOTES = 4096
"""Steps that memory is taken for at once."""


@triton.jit
def _note_kernel(stamps, hertz):  # type: ignore[no-untyped-def]
    """Cycles a second since this SM's stamp, to hertz [1], float64. Whichever SM is last counts:
    all have one clock."""
    sm = slot()
    begun, time = tl.load(stamps + sm * 2), tl.load(stamps + sm * 2 + 1)
    passed = nanoseconds() - time
    ran = (time != 0) & (passed > 0)
    rate = (cycles() - begun).to(tl.float64) * 1e9 / tl.maximum(passed, 1).to(tl.float64)
    tl.store(hertz, rate, mask=ran)


class StepClocks:
    """Notes the mean clock of one step after another."""

    def __init__(self, num_sms: int) -> None:
        self._stamps = torch.zeros((SLOTS.value, 2), dtype=torch.int64, device="cuda")
        self._num_ctas = 2 * num_sms  # so that every SM gets one
        self.clear()
        self.begin()
        self.end()  # compiles both
        torch.cuda.synchronize()
        self.clear()

    def clear(self) -> None:
        """Forget all steps."""
        self._notes: list[torch.Tensor] = []
        self._num_steps = 0

    def begin(self) -> None:
        """A step begins; it may be captured in a graph."""
        stamp[(self._num_ctas,)](self._stamps, num_warps=1)

    def end(self) -> None:
        """The step that began last ends; not to be captured."""
        row = self._num_steps % NOTES
        if row == 0:
            # Two numbers a step, of which one is used: the kernel is compiled for addresses that
            # are multiples of 16 bytes.
            self._notes.append(torch.zeros((NOTES, 2), dtype=torch.float64, device="cuda"))
        _note_kernel[(self._num_ctas,)](self._stamps, self._notes[-1][row], num_warps=1)
        self._num_steps += 1

    def megahertz(self) -> list[float]:
        """Of each step since the last `clear`."""
        if not self._notes:
            return []
        found: list[float] = (torch.cat(self._notes)[: self._num_steps, 0] * 1e-6).tolist()
        return found
