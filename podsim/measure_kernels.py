"""Times of the attention kernels on a GPU, one beside the other: `podsim kernels`."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from podsim import flashinfer_kernels
from podsim.gpu_power import GpuPower
from podsim.kernel_workloads import KernelWorkload, reference_workloads
from podsim.kernels.attention import attention
from podsim.kernels.config import AttentionConfig, config_for
from podsim.kernels.plan import PAGE_SIZES, AttentionPlan, Decode, PrefillChunk
from podsim.measure_clock import SmClock
from podsim.measure_sequences import captured

FLUSH_BYTES = 1 << 30
"""Read between launches, so that none finds its keys in the L2 and none has to write back what
another left there; long enough for the host to queue the next."""
BURST_SECONDS = 0.012
"""Of launches in one round of one kernel."""
SUSTAINED_SECONDS = 0.6
"""Of launches back to back, after as long for the clock to settle."""

Launch = Callable[[], Any]
Row = dict[str, object]


class Problem:
    """A workload's tensors with random contents, every request in a slot of its own."""

    def __init__(self, workload: KernelWorkload) -> None:
        self.workload = workload
        batch = workload.batch
        self.chunks = [PrefillChunk(*chunk, slot) for slot, chunk in enumerate(batch.prefills)]
        self.decodes = [
            Decode(context, len(self.chunks) + i) for i, context in enumerate(batch.decode_contexts)
        ]
        page = max(PAGE_SIZES)
        self.max_len = -(-batch.max_context // page) * page
        torch.manual_seed(0)
        self.q = _random(batch.num_tokens, workload.num_q_heads, workload.head_dim)
        self.out = torch.empty_like(self.q)
        shape = (batch.num_slots, self.max_len, workload.num_kv_heads, workload.head_dim)
        self.k_cache, self.v_cache = _random(*shape), _random(*shape)
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def config(self, strategy: str, kernels: str) -> AttentionConfig:
        return self.workload.config(strategy, kernels)

    def launch(
        self,
        strategy: str,
        config: AttentionConfig,
        *,
        prefill: bool = True,
        decode: bool = True,
        page_size: int = 0,
        prefill_share: float = 0.0,
    ) -> Launch:
        """Attention of the whole batch, or of one side of it, from pages in a random order.

        `prefill_share` of the SMs take prefill in Hopper's POD; 0: as many as the policy says.
        """
        chunks = self.chunks if prefill else []
        decodes = self.decodes if decode else []
        first = 0 if prefill else len(self.q) - len(decodes)
        last = len(self.q) if decode else len(self.q) - len(self.decodes)
        q, out = self.q[first:last], self.out[first:last]
        k_cache, v_cache, table = self.k_cache, self.v_cache, None
        if page_size:
            k_cache, v_cache, table = self._paged(page_size)
        plan = AttentionPlan(
            chunks,
            decodes,
            num_q_heads=self.workload.num_q_heads,
            num_kv_heads=self.workload.num_kv_heads,
            head_dim=self.workload.head_dim,
            num_slots=self.workload.batch.num_slots,
            max_len=self.max_len,
            num_sms=self.num_sms,
            config=config,
            page_size=page_size,
            block_table=table,
            device="cuda",
        )
        if prefill_share:
            plan.counts[3] = round(prefill_share * self.num_sms)
        return lambda: attention(strategy, q, k_cache, v_cache, out, plan)

    def _paged(self, page_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The caches as pages, which are anywhere: their contents are random anyway."""
        num_slots = self.workload.batch.num_slots
        pages = torch.randperm(num_slots * (self.max_len // page_size), device="cuda")
        shape = (len(pages), page_size, *self.k_cache.shape[2:])
        table = pages.view(num_slots, -1).int()
        return self.k_cache.view(shape), self.v_cache.view(shape), table

    def strategies(self, kernels: str) -> dict[str, Launch]:
        """Both sides alone, and the batch by every strategy."""
        serial = self.config("serial", kernels)
        return {
            "prefill": self.launch("serial", serial, decode=False),
            "decode": self.launch("serial", serial, prefill=False),
            "serial": self.launch("serial", serial),
            "streams": self.launch("streams", self.config("streams", kernels)),
            "unified": self.launch("unified", self.config("unified", kernels)),
            "pod": self.launch("pod", self.config("pod", kernels)),
        }

    def flashinfer(self) -> dict[str, Launch]:
        return flashinfer_kernels.launches(
            self.q, self.k_cache, self.v_cache, self.chunks, self.decodes
        )

    def pod_variants(self) -> dict[str, Launch]:
        """Hopper's POD with every tile, cap of SMs and length of splits to choose from."""
        found = {}
        workload = self.workload
        for decode_heavy in (False, True):
            base = config_for(
                "pod",
                num_q_heads=workload.num_q_heads,
                num_kv_heads=workload.num_kv_heads,
                head_dim=workload.head_dim,
                kernels="hopper",
                decode_heavy=decode_heavy,
            )
            tiles = "decode-heavy" if decode_heavy else "balanced"
            for policy in ("adaptive", "proportional"):
                for items in (3, 4, 6, 12):
                    config = replace(base, policy=policy, decode_items_per_sm=items)
                    found[f"{tiles} {policy} {items}"] = self.launch("pod", config)
        return found


class Contest:
    """Launches timed in turn: ours as CUDA graphs, FlashInfer's as they are called.

    A launch waits on the GPU behind the flush of the L2, so the host's time does not show.
    """

    def __init__(self, ours: dict[str, Launch], theirs: dict[str, Launch]) -> None:
        self._launches = ours  # a graph reads tensors that only these refer to
        self._runs: dict[str, Launch] = {
            name: captured(launch).replay for name, launch in ours.items()
        }
        self._runs |= theirs
        for run in theirs.values():
            run()
        self._flushed = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")
        self._clock = SmClock(torch.cuda.get_device_properties(0).multi_processor_count)

    def rounds(self, count: int, burst_seconds: float = BURST_SECONDS) -> Iterator[Row]:
        """Bursts of each launch, every round in another random order.

        What ran before decides how fast the card's clock is, so no launch is to follow the same
        one again and again.
        """
        names = list(self._runs)
        for number in range(count):
            for i in np.random.default_rng(number).permutation(len(names)):
                seconds, hertz = self._burst(self._runs[names[i]], burst_seconds)
                yield {
                    "kernel": names[i],
                    "mode": "burst",
                    "round": number,
                    "seconds": seconds,
                    "sm_clock_hz": hertz,
                }

    def _burst(self, run: Launch, burst_seconds: float) -> tuple[float, float | None]:
        """Median seconds of a launch with a cold L2, and the mean clock of the SMs."""
        once = self._timed(run, 2)[-1]
        repeats = max(3, int(burst_seconds / once))
        self._clock.clear()
        self._clock.start()
        seconds = self._timed(run, repeats)
        self._clock.stop()
        torch.cuda.synchronize()
        return sorted(seconds)[len(seconds) // 2], self._clock.mean_hertz()

    def _timed(self, run: Launch, repeats: int) -> list[float]:
        marks = []
        for _ in range(repeats):
            self._flushed.max()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1000 for start, end in marks]

    def sustained(self, names: Sequence[str], power: GpuPower, rounds: int) -> Iterator[Row]:
        """Launches back to back: seconds, clock, power and joules of each."""
        for number in range(rounds):
            first = number % len(names)
            for name in [*names[first:], *names[:first]]:
                self._run_for(name, SUSTAINED_SECONDS)
                self._clock.clear()
                self._clock.start()
                joules = power.joules()
                started = time.perf_counter()
                count = self._run_for(name, SUSTAINED_SECONDS)
                seconds = time.perf_counter() - started
                joules = power.joules() - joules
                self._clock.stop()
                torch.cuda.synchronize()
                yield {
                    "kernel": name,
                    "mode": "sustained",
                    "round": number,
                    "seconds": seconds / count,
                    "sm_clock_hz": self._clock.mean_hertz(),
                    "watts": joules / seconds,
                    "joules": joules / count,
                    "throttled_by": power.throttle_reasons(),
                }

    def _run_for(self, name: str, seconds: float) -> int:
        run = self._runs[name]
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            for _ in range(20):
                run()
            torch.cuda.synchronize()
            count += 20
        return count


def bench(
    workloads: Sequence[KernelWorkload],
    kernels: str,
    rounds: int,
    sustained: Sequence[str],
    flashinfer: bool,
    on_workload: Callable[[], None],
) -> list[Row]:
    """Time every workload by every strategy; the names in `sustained` also without pauses."""
    found: list[Row] = []
    with ExitStack() as stack:
        power = stack.enter_context(GpuPower()) if sustained else None
        for workload in workloads:
            problem = Problem(workload)
            contest = Contest(
                problem.strategies(kernels), problem.flashinfer() if flashinfer else {}
            )
            rows = list(contest.rounds(rounds))
            if power is not None:
                rows += contest.sustained(sustained, power, 1)
            about: Row = {"workload": workload.name, "group": workload.batch.split}
            found += [about | row for row in rows]
            del problem, contest
            free_memory()
            on_workload()
    return found


def tune(
    workloads: Sequence[KernelWorkload], rounds: int, on_workload: Callable[[], None]
) -> list[Row]:
    """Time the variants of Hopper's POD that its configuration chooses from."""
    found: list[Row] = []
    for workload in workloads:
        problem = Problem(workload)
        serial = problem.strategies("hopper")["serial"]
        contest = Contest({"serial": serial, **problem.pod_variants()}, {})
        found += [{"workload": workload.name} | row for row in contest.rounds(rounds)]
        del problem, contest
        free_memory()
        on_workload()
    return found


def paging(
    workloads: Sequence[KernelWorkload],
    kernels: str,
    rounds: int,
    on_workload: Callable[[], None],
    sides: Sequence[str] = ("prefill", "decode", "pod"),
) -> list[Row]:
    """Time both sides and POD, or some of them, from contiguous keys and from pages of any size."""
    found: list[Row] = []
    for workload in workloads:
        problem = Problem(workload)
        without = {"prefill": {"decode": False}, "decode": {"prefill": False}, "pod": {}}
        launches = {}
        for side in sides:
            strategy = "pod" if side == "pod" else "serial"
            config = problem.config(strategy, kernels)
            for size in (0, *PAGE_SIZES):
                name = f"{side} {size or 'contiguous'}"
                launches[name] = problem.launch(strategy, config, **without[side], page_size=size)
        contest = Contest(launches, {})
        found += [{"workload": workload.name} | row for row in contest.rounds(rounds)]
        del problem, contest, launches
        free_memory()
        on_workload()
    return found


def launch_overhead(kernels: str, repeats: int = 300) -> list[Row]:
    """Median seconds of the host for each launch of a small batch: called, and replayed."""
    problem = Problem(reference_workloads()[7])
    found: list[Row] = []
    for name in ("serial", "unified", "pod"):
        launch = problem.launch(name, problem.config(name, kernels))
        graph = captured(launch)
        for how, run in (("called", launch), ("replayed", graph.replay)):
            found.append({"kernel": name, "how": how, "seconds": _host_seconds(run, repeats)})
    return found


def _host_seconds(run: Launch, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
        torch.cuda.synchronize()
    return sorted(seconds)[repeats // 2]


def free_memory() -> None:
    """Give memory back; launches that call each other are freed by the collector alone."""
    gc.collect()
    torch.cuda.empty_cache()


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_()
