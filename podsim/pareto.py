"""The Pareto front: what no other row beats in one number without losing in the other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MORE_IS_BETTER = frozenset(
    {
        *("request_throughput", "output_throughput", "total_token_throughput"),
        *("goodput", "slo_attainment", "completed", "busy_share"),
    }
)
"""Of all other columns, less is better."""


def on_front(
    first: NDArray[np.float64], second: NDArray[np.float64], group: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Rows that none of their group beats: as good in both numbers and better in one; less is
    better. Rows with a NaN are not on it.
    """
    front = np.zeros(len(first), dtype=np.bool_)
    valid = np.flatnonzero(~(np.isnan(first) | np.isnan(second)))
    order = valid[np.lexsort((second[valid], first[valid], group[valid]))]
    a, b, g = first[order], second[order], group[order]
    starts = np.flatnonzero(np.diff(g, prepend=g[:1] - 1)) if len(g) else np.empty(0, np.int64)
    for start, end in zip(starts, [*starts[1:], len(order)], strict=True):
        best = np.minimum.accumulate(b[start:end])
        before = np.concatenate(([np.inf], best[:-1]))
        better = b[start:end] < before
        # A row equal in both numbers to the one that is on the front is there with it.
        leader = np.maximum.accumulate(np.where(better, np.arange(end - start), 0))
        same = (a[start:end] == a[start:end][leader]) & (b[start:end] == b[start:end][leader])
        front[order[start:end][better | same]] = True
    return front
