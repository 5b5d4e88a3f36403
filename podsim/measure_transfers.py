"""Times copies between host and GPU, and the products that recompute K and V.

Rows of `transfer.csv` and `recompute.csv` (docs/memory.md). Copies are timed alone and beside large
matrix products or decode attention, that another stream runs all the while.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import product
from statistics import median, quantiles

import numpy as np
import torch

from podsim.offloaded_layers import Recompute, Weights, rope_angles
from podsim.offloaded_shapes import SHAPES, LayerShape

SMALLEST, LARGEST = 2**14, 2**30
"""Bytes of a copy; pageable memory, which is slow, and small copies have their own ends."""
LARGEST_PAGEABLE = 2**27
NUM_HELD_OUT = 8
TOKENS = (*(2**power * part // 2 for power in range(6, 17) for part in (2, 3)), 2**17)
"""64, 96, 128, 192, ...: in between, times are interpolated."""
BATCH = 4
"""Requests that share the tokens."""
CHAIN_LAYERS, DECODES = 6, 16
"""Layers in a row, and tokens that each computes besides."""
PASSES = 3
REPEATS = 7
MOST_TRIES = 6
HANDOFFS = 64
LEAD_CYCLES = 4_000_000
"""About two milliseconds that the GPU sleeps while the host queues a copy; two of them while it
queues layers, and five copies and kernels in turn."""

Row = dict[str, object]
Progress = Callable[[str], None]


def _timing(seconds: list[float]) -> Row:
    tenths = quantiles(seconds, n=10)
    low, high = tenths[0] * 1e6, tenths[8] * 1e6
    return {
        "time_us": median(seconds) * 1e6,
        "time_p10_us": low,
        "time_p90_us": high,
        "repeats": len(seconds),
    }


# ----------------------------------------------------------------------------------- transfers


Kind = tuple[str, str, str]
"""Direction, memory, and what goes on beside."""


def measure_transfers(
    on_progress: Progress = lambda text: None, known: Collection[Kind] = ()
) -> list[Row]:
    """Every row of transfer.csv, but for kinds of copies that are known."""
    buffers = {
        "pinned": torch.empty(LARGEST, dtype=torch.uint8, pin_memory=True),
        "pageable": torch.empty(LARGEST_PAGEABLE, dtype=torch.uint8),
    }
    for buffer in buffers.values():
        buffer.zero_()  # memory that was never touched is no memory yet
    device = torch.empty(LARGEST, dtype=torch.uint8, device="cuda")
    work = {"nothing": None, "matrix": _matrix(), "attention": _attention()}
    rows: list[Row] = []
    for number in range(PASSES):
        if not known:
            rows += _handoff_rows(number)
        for beside, memory, direction in product(work, buffers, ("h2d", "d2h")):
            if (direction, memory, beside) in known:
                continue
            on_progress(f"pass {number}: {direction} {memory} beside {beside}")
            for size, split in _sizes(len(buffers[memory])):
                host, gpu = buffers[memory][:size], device[:size]
                pair = (gpu, host) if direction == "h2d" else (host, gpu)
                seconds = _copies(*pair, work[beside])
                labels = {"direction": direction, "memory": memory, "beside": beside}
                place = {"bytes": size, "split": split, "pass": number}
                rows.append(labels | place | _timing(seconds))
    return rows


def _sizes(largest: int) -> Iterator[tuple[int, str]]:
    size = SMALLEST
    while size <= largest:
        yield size, "grid"
        size *= 4
    rng = np.random.default_rng(0)
    for exponent in rng.uniform(np.log2(SMALLEST), np.log2(largest), NUM_HELD_OUT):
        yield int(2**exponent) // 512 * 512, "held_out"


def _copies(
    target: torch.Tensor, source: torch.Tensor, other: Callable[[], float] | None
) -> list[float]:
    """Seconds of each of REPEATS copies in a row, after one that is not timed."""
    copying = torch.cuda.Stream()
    if not (target.is_pinned() or source.is_pinned()):
        return [_waited(target, source, copying, other) for _ in range(REPEATS + 1)][1:]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(LEAD_CYCLES)
    copying.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(copying):
        target.copy_(source, non_blocking=True)
        for number, mark in enumerate(marks):
            if number:
                target.copy_(source, non_blocking=True)
            mark.record()
    _queue(other, (REPEATS + 1) * (source.numel() / 20e9 + 20e-6))  # longer than the copies take
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(marks)]


def _waited(
    target: torch.Tensor,
    source: torch.Tensor,
    copying: torch.cuda.Stream,
    other: Callable[[], float] | None,
) -> float:
    """Seconds by the host's clock: it waits for a pageable copy, and queues nothing meanwhile. What
    goes on beside is queued before, and twice as much where it was through before the copy was.
    RuntimeError if the copy waits for it.
    """
    done = torch.cuda.Event()
    needed = source.numel() / 5e9 + 2e-3
    for _ in range(MOST_TRIES):
        torch.cuda.synchronize()
        _queue(other, needed)
        done.record()
        with torch.cuda.stream(copying):
            begin = time.perf_counter()
            target.copy_(source)
            copying.synchronize()
            seconds = time.perf_counter() - begin
        if other is None or not done.query():
            return seconds
        needed *= 2
    raise RuntimeError(f"a pageable copy of {source.numel()} bytes outlasts whatever is beside it")


def _queue(other: Callable[[], float] | None, seconds: float) -> None:
    """So much of it on the current stream."""
    while other is not None and seconds > 0:
        seconds -= other()


def _handoff_rows(number: int) -> Iterator[Row]:
    """Beyond their own time: half of what copies and kernels that wait for each other in turn take,
    and what copies take that wait for a mark of another stream, which itself waits for them.
    """
    host = torch.empty(SMALLEST, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(SMALLEST, dtype=torch.uint8, device="cuda")
    value = torch.zeros(1024, device="cuda")
    streams = torch.cuda.Stream(), torch.cuda.Stream()

    def copy() -> None:
        device.copy_(host, non_blocking=True)

    def kernel() -> None:
        value.add_(1)

    def alone(work: Callable[[], None]) -> None:
        with torch.cuda.stream(streams[0]):
            for _ in range(HANDOFFS):
                work()

    def in_turn(other: Callable[[], None]) -> None:
        for _ in range(HANDOFFS):
            for here, there, work in ((0, 1, copy), (1, 0, other)):
                streams[here].wait_stream(streams[there])
                with torch.cuda.stream(streams[here]):
                    work()

    def seconds(run: Callable[[], None]) -> float:
        return median(_queued(run, streams, leads=5) / HANDOFFS for _ in range(REPEATS))

    copies = seconds(partial(alone, copy))
    with_kernels = seconds(partial(in_turn, kernel)) - copies - seconds(partial(alone, kernel))
    with_nothing = seconds(partial(in_turn, lambda: None)) - copies
    for name, lost in (("handoff", with_kernels / 2), ("relay", with_nothing)):
        labels = {"direction": name, "memory": "pinned", "beside": "nothing"}
        place = {"bytes": SMALLEST, "split": "", "pass": number}
        yield labels | place | {"time_us": max(lost, 1e-9) * 1e6, "repeats": REPEATS}


def _queued(run: Callable[[], None], streams: Sequence[torch.cuda.Stream], leads: int) -> float:
    """Seconds of what `run` queues on two streams, all of it before it begins."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(leads * LEAD_CYCLES)
    start.record()
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    run()
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _matrix() -> Callable[[], float]:
    """Queues a large product; about the seconds that it takes."""
    a, out = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))

    def run() -> float:
        torch.mm(a, a, out=out)
        return 1e-3

    run()
    return run


def _attention() -> Callable[[], float]:
    """Queues decode attention over 2 GB of keys and values; about the seconds that it takes."""
    q = torch.randn(32, 32, 1, 128, device="cuda").bfloat16()
    k, v = (torch.randn(32, 32, 4096, 128, device="cuda").bfloat16() for _ in range(2))

    def run() -> float:
        torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return 4e-4

    run()
    return run


# ----------------------------------------------------------------------------------- recompute


def measure_recompute(on_progress: Progress = lambda text: None) -> list[Row]:
    """Every row of recompute.csv: what K and V of so many tokens add to layers of each model."""
    shapes = {(s.hidden_size, s.num_outputs, s.rotary): s for s in SHAPES.values()}
    rows = []
    for number in range(PASSES):
        for (hidden, outputs, rotary), shape in shapes.items():
            on_progress(f"pass {number}: {hidden} x {outputs}{' rotated' * rotary}")
            chain = _Chain(shape)
            for tokens, split in _token_counts():
                labels = {"hidden": hidden, "outputs": outputs, "rotated": int(rotary)}
                place = {"layers": CHAIN_LAYERS, "tokens": tokens, "split": split, "pass": number}
                rows.append(labels | place | _timing(chain.recomputing(tokens)))
    return rows


def _token_counts() -> Iterator[tuple[int, str]]:
    for tokens in TOKENS:
        yield tokens, "grid"
    rng = np.random.default_rng(1)
    for exponent in rng.uniform(np.log2(TOKENS[0]), np.log2(TOKENS[-1]), NUM_HELD_OUT):
        yield int(2**exponent) // BATCH * BATCH, "held_out"


class _Chain:
    """Layers of decodes, as far as they read weights: between them, the caches are cold.

    Before a layer K and V may be recomputed, between the marks of copies that are long there: as
    in `podsim.offloaded_layers`, where no copy is waited for.
    """

    def __init__(self, shape: LayerShape) -> None:
        self.shape = shape
        self.weights = Weights.random(shape, "cuda", torch.bfloat16, 0)
        self.inputs = [
            torch.randn(DECODES, matrix.shape[1], device="cuda").bfloat16()
            for matrix in self.weights.parts.values()
        ]
        self.copying = torch.cuda.Stream()
        self.host = torch.empty(SMALLEST, dtype=torch.uint8, pin_memory=True)
        self.device = torch.empty(SMALLEST, dtype=torch.uint8, device="cuda")

    def recomputing(self, tokens: int) -> list[float]:
        """Seconds that a layer takes longer, of each repetition."""
        size = self.shape.hidden_size
        angles = rope_angles(tokens // BATCH, self.shape.head_dim, "cuda", torch.bfloat16)
        made = Recompute(self.shape, self.weights.parts["qkv"][size:], angles)
        x = torch.randn(tokens // BATCH, BATCH, size, device="cuda", dtype=torch.bfloat16)
        kv = torch.empty(tokens // BATCH, BATCH, 2 * size, device="cuda", dtype=torch.bfloat16)
        alone = partial(self._layers, None)
        with_it = partial(self._layers, partial(made, x, kv))
        for run in (alone, with_it):
            run()

        def seconds(run: Callable[[], None]) -> float:
            return _queued(run, [self.copying], leads=2)

        longer = [seconds(with_it) - seconds(alone) for _ in range(REPEATS)]
        return [max(each / CHAIN_LAYERS, 1e-9) for each in longer]

    def _layers(self, recompute: Callable[[], None] | None) -> None:
        stream = torch.cuda.current_stream()
        complete = stream.record_event()
        self._products()
        for _ in range(CHAIN_LAYERS):
            if recompute is not None:
                x_there, kv_there = self._copies(after=complete)
                stream.wait_event(x_there)
                recompute()
                stream.wait_event(kv_there)
                complete = stream.record_event()
            self._products()

    def _products(self) -> None:
        for given, matrix in zip(self.inputs, self.weights.parts.values(), strict=True):
            torch.mm(given, matrix.t())

    def _copies(self, after: torch.cuda.Event) -> list[torch.cuda.Event]:
        self.copying.wait_event(after)
        marks = []
        with torch.cuda.stream(self.copying):
            for _ in range(2):
                self.device.copy_(self.host, non_blocking=True)
                marks.append(self.copying.record_event())
        return marks
