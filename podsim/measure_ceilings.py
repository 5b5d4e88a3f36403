"""The machine's own ceilings: the best that simple kernels and copies reach, in short bursts.

A ceiling bounds what a row of a profile can be, so each is the best of several repetitions after a
pause, when the power limit does not act yet; and bandwidth and matrix rate are the best of several
kernels.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl

from podsim.kernels import launch
from podsim.points import AttentionPoint
from podsim.profile_run import Round
from podsim.roofline import linear_shapes

if TYPE_CHECKING:
    from podsim.measure import LayerBench

BURSTS = 6
BURST_REPEATS = 3
PAUSE = 0.05
"""Seconds before a burst."""
LEAD_CYCLES = 2_000_000
"""About a millisecond that the card sleeps while the host queues a burst."""
READ_BYTES = 8 * 2**30
COPY_BYTES = 4 * 2**30
DECODE_BYTES = 4 * 10**9
NUM_DECODES = 64
HOST_BYTES = 2**28
MATRIX_SIZE = 8192
READ_BLOCK = 16384
"""int32 values that a CTA reads."""


@triton.jit
def _read_kernel(source, sums, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read one block of int32 a CTA and write its sum, so that the reads are needed."""
    block = tl.program_id(0)
    offsets = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(sums + block, tl.sum(tl.load(source + offsets)))


class _Burst(NamedTuple):
    run: Callable[[], object]
    work: float
    """Bytes or FLOPs of one run; 0 where only the time counts."""


class CeilingSequence:
    """One ceiling, ready to be timed; see `profile_run.TimedSequence`."""

    def __init__(self, name: str, bench: LayerBench) -> None:
        self._run, self.work = _BURSTS[name](bench)

    def round(self, first: bool) -> Round:
        """BURSTS times a pause and BURST_REPEATS repetitions."""
        self._run()
        torch.cuda.synchronize()
        seconds = []
        for _ in range(BURSTS):
            time.sleep(PAUSE)
            torch.cuda._sleep(LEAD_CYCLES)
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(BURST_REPEATS + 1)]
            marks[0].record()
            for mark in marks[1:]:
                self._run()
                mark.record()
            torch.cuda.synchronize()
            seconds += [start.elapsed_time(end) / 1000 for start, end in itertools.pairwise(marks)]
        return Round({"ceiling": seconds}, None)


def _read(bench: LayerBench) -> _Burst:
    """A plain read of the KV pool."""
    source = bench.k_pool.view(-1).view(torch.int32)[: READ_BYTES // 4]
    num_blocks = len(source) // READ_BLOCK
    sums = torch.empty(num_blocks, dtype=torch.int32, device="cuda")

    def run() -> None:
        _read_kernel[(num_blocks,)](source, sums, READ_BLOCK, num_warps=8)

    return _Burst(run, 4.0 * num_blocks * READ_BLOCK)


def _matvec(bench: LayerBench) -> _Burst:
    """The LM head for one token: its weights, read once."""
    row = bench.normed[:1]
    logits = torch.empty(1, bench.model.vocab_size, device="cuda", dtype=row.dtype)
    weights = bench.lm_head
    return _Burst(lambda: torch.mm(row, weights.t(), out=logits), 2.0 * weights.numel())


def _decode(bench: LayerBench) -> _Burst:
    """The decode kernel over contexts that fill DECODE_BYTES."""
    model = bench.model
    bytes_per_key = 4 * model.num_kv_heads * model.head_dim
    context = DECODE_BYTES // (NUM_DECODES * bytes_per_key)
    point = AttentionPoint((), (context,) * NUM_DECODES, "")
    return _Burst(bench.attention(point, "serial"), float(NUM_DECODES * context * bytes_per_key))


def _copy(bench: LayerBench) -> _Burst:
    """Device to device: every byte is read and written. Values go to values, as they stay."""
    source, target = bench.v_pool.view(-1)[:COPY_BYTES].chunk(2)
    return _Burst(lambda: target.copy_(source), 4.0 * len(source))


def _matrix(bench: LayerBench) -> _Burst:
    """A square product."""
    size = MATRIX_SIZE
    a, b = (torch.randn(size, size, device="cuda").bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    return _Burst(lambda: torch.mm(a, b.t(), out=out), 2.0 * size**3)


def _layer_matrix(bench: LayerBench) -> _Burst:
    """The model's own largest layer, at 4096 tokens."""
    features, inputs = linear_shapes(bench.model)["gate_up"]
    weights, n = bench.weights["gate_up"], 4096
    inputs_of, out = bench.normed[:n], bench.gate_up[:n]
    return _Burst(lambda: torch.mm(inputs_of, weights.t(), out=out), 2.0 * n * features * inputs)


def _host_copy(to_device: bool) -> Callable[[LayerBench], _Burst]:
    def make(bench: LayerBench) -> _Burst:
        host = torch.empty(HOST_BYTES, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(HOST_BYTES, dtype=torch.uint8, device="cuda")
        source, target = (host, device) if to_device else (device, host)
        return _Burst(lambda: target.copy_(source, non_blocking=True), float(HOST_BYTES))

    return make


def _launch(bench: LayerBench) -> _Burst:
    """A graph of one empty kernel."""
    launch.empty()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch.empty()
    return _Burst(graph.replay, 0.0)


_BURSTS: dict[str, Callable[[LayerBench], _Burst]] = {
    "read_bandwidth": _read,
    "matvec_bandwidth": _matvec,
    "decode_bandwidth": _decode,
    "copy_bandwidth": _copy,
    "matrix_rate": _matrix,
    "layer_matrix_rate": _layer_matrix,
    "host_to_device": _host_copy(True),
    "device_to_host": _host_copy(False),
    "launch_latency": _launch,
}
