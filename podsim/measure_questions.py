"""Times of the variants of `podsim.kernel_questions` on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from podsim.gpu_power import GpuPower
from podsim.kernel_questions import Case
from podsim.measure_kernels import Contest, Problem, Row, free_memory

BURST_SECONDS = 0.002
"""Of launches in one round of one variant: short, as there are hundreds of batches."""


def measure(cases: Sequence[Case], rounds: int, on_case: Callable[[], None]) -> list[Row]:
    """Rows of every case's variants, timed in turn as those of `podsim kernels bench` are.

    Each has the columns of its case and its variant, the SM clock, and why that was held down.
    """
    found: list[Row] = []
    with GpuPower() as power:
        for case in cases:
            about = {"workload": case.workload.name, **case.about}
            columns = {variant.name: about | dict(variant.about) for variant in case.variants}
            for row in _contest(case).rounds(rounds, BURST_SECONDS):
                state = {"throttled_by": power.throttle_reasons()}
                found.append(columns[str(row["kernel"])] | row | state)
            on_case()
    free_memory()
    return found


def _contest(case: Case) -> Contest:
    problem = Problem(case.workload)
    launches = {
        variant.name: problem.launch(
            variant.strategy,
            variant.config,
            prefill=variant.side != "decode",
            decode=variant.side != "prefill",
            prefill_share=variant.prefill_share,
        )
        for variant in case.variants
    }
    return Contest(launches, {})
