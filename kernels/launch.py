"""A kernel that does nothing: its time is the cost of a launch."""

import torch
import triton

from .checks import INTERPRETED, require_runnable


@triton.jit
def _empty_kernel():
    pass


def empty(num_ctas: int = 1) -> None:
    """Launch num_ctas CTAs that return at once, on the current CUDA device and stream."""
    if not INTERPRETED.value and not torch.cuda.is_available():
        require_runnable(torch.device("cpu"))
    _empty_kernel[(num_ctas,)]()
