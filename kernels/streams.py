"""Two launches on two CUDA streams."""

from collections.abc import Callable
from functools import cache

import torch


def concurrently(
    device: torch.device, first: Callable[[], None], second: Callable[[], None]
) -> None:
    """Fork from the current stream and join it again, which a CUDA graph can capture."""
    if device.type != "cuda":  # interpreted: there are no streams, the order is the only one
        first()
        second()
        return
    current = torch.cuda.current_stream(device)
    side = next(stream for stream in _side_streams(device) if stream != current)
    side.wait_stream(current)
    first()
    with torch.cuda.stream(side):
        second()
    current.wait_stream(side)


@cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Return two streams: torch hands out 32 in turn, and one may be the current one."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
