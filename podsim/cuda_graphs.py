"""Parts of a forward pass that are launched kernel by kernel, or replayed as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Captured:
    """A part of a step at one size: launched kernel by kernel, or as a graph."""

    launch: Callable[[], None]
    graph: torch.cuda.CUDAGraph | None = field(default=None)

    def run(self) -> None:
        if self.graph is None:
            self.launch()
        else:
            self.graph.replay()


def capture(
    parts: Sequence[Captured], error_mode: str, on_progress: Callable[[int, int], None]
) -> None:
    """Give each part its graph; `on_progress` is told how many of how many have one.

    `error_mode` is CUDA's: which threads must not call it in a way that breaks a capture.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
    stream.wait_stream(torch.cuda.current_stream())
    for done, part in enumerate(parts):
        on_progress(done, len(parts))
        graph = torch.cuda.CUDAGraph()
        # All on one stream: operations of the same matrix library's workspace must not overlap.
        with torch.cuda.stream(stream):
            part.launch()  # compiles what it needs, which a capture must not do
            stream.synchronize()
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=error_mode):
                part.launch()
            graph.replay()  # the first replay uploads the graph, which takes a while
            stream.synchronize()
        part.graph = graph
    torch.cuda.synchronize()
    on_progress(len(parts), len(parts))
