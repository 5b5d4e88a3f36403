"""What another process on the same GPU does to an engine's step: one context, two, and one again.

    python benchmarks/second_context.py --order 0 > benchmarks/second-context/h200-0.txt

Times, on one GPU, an engine's step of 16 decodes (Llama-3-8B, a CUDA graph), 300 kernels that do
next to nothing, a copy of 1 GB and a matrix product: alone, while another process has a context,
after it has ended, and around memory being taken and given back, in two orders. Takes a minute.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch

import podsim
from podsim.llama import DECODE
from podsim.measure_sequences import Timed
from podsim.request import Request
from podsim.serving import Server

DECODES = 16
CONTEXT = "torch.zeros(1, device='cuda'); time.sleep(5)"
SOME_MEMORY = "t = torch.zeros(60 << 30, dtype=torch.uint8, device='cuda'); time.sleep(5)"
ALL_MEMORY = """
kept = []
try:
    while True:
        kept.append(torch.zeros(1 << 28, dtype=torch.uint8, device="cuda"))
except torch.OutOfMemoryError:
    time.sleep(4)
"""


class Contest:
    """What is timed, again and again."""

    def __init__(self) -> None:
        deployment = podsim.Deployment(
            model="llama-3-8b",
            attention="serial",
            token_budget=64,
            max_num_seqs=DECODES,
            max_model_len=512,
        )
        server = Server(deployment, 512)
        engine = server._engine(lambda shape: 0.0, seed=1)
        engine.serve(Request(i, 0.0, 16, 40) for i in range(DECODES))
        step = server.llama._steps[DECODE, DECODES][1]
        source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
        target = torch.empty_like(source)
        self.small = _small_kernels(300)  # its graph writes to what it keeps
        matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        self.timed: dict[str, tuple[Callable[[], object], int]] = {
            "step": (step.run, 60),
            "copy 1 GB": (lambda: target.copy_(source), 40),
            "300 small kernels": (self.small.graph.replay, 40),
            "product": (lambda: torch.mm(matrix, matrix), 20),
        }
        self.started = time.monotonic()

    def print_times(self, label: str) -> None:
        times = "; ".join(f"{name} {_us(*timed):.1f} us" for name, timed in self.timed.items())
        print(f"{time.monotonic() - self.started:6.1f} {label:36} {times}", flush=True)


def _small_kernels(count: int) -> Timed:
    few = torch.zeros(1024, device="cuda")

    def launch() -> None:
        for _ in range(count):
            few.add_(1)

    return Timed("small kernels", launch)


def _us(run: Callable[[], object], count: int) -> float:
    for _ in range(3):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / count * 1e3


def beside(contest: Contest, label: str, code: str, seconds: float) -> None:
    """Times while another process runs `code`, and after it has ended."""
    process = subprocess.Popen([sys.executable, "-c", f"import time, torch\n{code}"])
    time.sleep(seconds)
    contest.print_times(label)
    process.wait()
    contest.print_times("after it")


def asked(contest: Contest) -> None:
    subprocess.run(["nvidia-smi", "-q"], capture_output=True, check=True)
    contest.print_times("after nvidia-smi -q")


def a_context(contest: Contest) -> None:
    beside(contest, "a second context", CONTEXT, 5.0)


def a_rest(contest: Contest) -> None:
    time.sleep(4.0)
    contest.print_times("after 4 s idle")


def products(contest: Contest) -> None:
    multiply, _ = contest.timed["product"]
    end = time.monotonic() + 5.0
    while time.monotonic() < end:
        for _ in range(20):
            multiply()
        torch.cuda.synchronize()
    contest.print_times("after 5 s of products")


def own_memory(contest: Contest) -> None:
    kept = torch.zeros(60 << 30, dtype=torch.uint8, device="cuda")
    contest.print_times("own 60 GB")
    del kept
    torch.cuda.empty_cache()
    contest.print_times("own 60 GB given back")


def some_memory(contest: Contest) -> None:
    beside(contest, "another process has 60 GB", SOME_MEMORY, 5.0)


def all_memory(contest: Contest) -> None:
    beside(contest, "another process has all memory", ALL_MEMORY, 6.0)


ORDERS = (
    (asked, a_context, a_rest, products, own_memory, some_memory, all_memory),
    (own_memory, products, all_memory, some_memory, a_context, asked),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--order", type=int, choices=(0, 1), default=0)
    order = ORDERS[parser.parse_args().order]
    contest = Contest()
    contest.print_times("at the start")
    contest.print_times("again")
    for change in order:
        change(contest)
    contest.print_times("end")


if __name__ == "__main__":
    main()
