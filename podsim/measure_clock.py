"""The clock that the SMs really run at, from their own cycle counters.

Two small kernels, one before and one after the work, note cycles and nanoseconds of every SM. This
needs nothing but Triton, costs the work nothing, and is a mean over exactly that work, where the
driver's tools sample the clock now and then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SLOTS = tl.constexpr(1024)
"""%smid may exceed the number of SMs."""
MARKS_AT_ONCE = 256
"""That memory is taken for."""


@triton.jit
def slot():  # type: ignore[no-untyped-def]
    """The place of this SM in stamps."""
    sm = tl.inline_asm_elementwise(
        "mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    return sm % SLOTS


@triton.jit
def cycles():  # type: ignore[no-untyped-def]
    """Of this SM's counter."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %clock64;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def nanoseconds():  # type: ignore[no-untyped-def]
    """Of the GPU's clock."""
    return tl.inline_asm_elementwise(
        "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
    )


@triton.jit
def stamp(stamps):  # type: ignore[no-untyped-def]
    """Note this SM's cycles and nanoseconds: stamps [SLOTS, 2], int64."""
    sm = slot()
    tl.store(stamps + sm * 2, cycles())
    tl.store(stamps + sm * 2 + 1, nanoseconds())


class SmClock:
    """Reads the mean SM clock between two places of the current stream, or from mark to mark."""

    def __init__(self, num_sms: int) -> None:
        self._stamps = torch.zeros((2, SLOTS.value, 2), dtype=torch.int64, device="cuda")
        self._num_ctas = 2 * num_sms  # so that every SM gets one
        self.clear()
        self.start()  # compiles it
        torch.cuda.synchronize()

    def clear(self) -> None:
        self._stamps.zero_()
        self._marks: list[torch.Tensor] = []
        self._num_marks = 0

    def start(self) -> None:
        stamp[(self._num_ctas,)](self._stamps[0], num_warps=1)

    def stop(self) -> None:
        stamp[(self._num_ctas,)](self._stamps[1], num_warps=1)

    def mean_hertz(self) -> float | None:
        """Between start and stop, once the device is done; None if no SM ran both."""
        return mean_hertz(self._stamps.cpu())

    def mark(self) -> None:
        """One place of many."""
        index = self._num_marks % MARKS_AT_ONCE
        if index == 0:
            self._marks.append(torch.zeros_like(self._stamps[0].expand(MARKS_AT_ONCE, -1, -1)))
        stamp[(self._num_ctas,)](self._marks[-1][index], num_warps=1)
        self._num_marks += 1

    def hertz_between_marks(self) -> list[float | None]:
        """From each mark to the next, once the device is done."""
        marks = torch.cat(self._marks)[: self._num_marks].cpu()
        return [mean_hertz(marks[i : i + 2]) for i in range(self._num_marks - 1)]


def mean_hertz(stamps: torch.Tensor) -> float | None:
    """The median over the SMs of cycles a second, from [2, SLOTS, 2] cycles and nanoseconds."""
    seen = (stamps != 0).all(dim=2).all(dim=0)
    cycles, nanoseconds = (stamps[1] - stamps[0])[seen].double().unbind(dim=1)
    ran = nanoseconds > 0
    if not bool(ran.any()):
        return None
    return float((cycles[ran] / nanoseconds[ran]).median()) * 1e9
