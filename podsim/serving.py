"""Serve a trace on this machine's GPUs: sets up the engine, and measures the host's own time."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import count
from typing import NamedTuple

import numpy as np
import torch

from podsim.batch import BatchShape
from podsim.config import Deployment
from podsim.decode_group import ListedDecodes
from podsim.engine import Clock, Engine, Recording, WallClock
from podsim.errors import InputError
from podsim.gpu_sampler import Sample, gpu_samples
from podsim.hardware import gpu_named
from podsim.kernel_starts import KernelStarts
from podsim.kernels.plan import PAGE_SIZES
from podsim.kv_cache import num_blocks_for, page_groups_for
from podsim.llama import Llama
from podsim.llama_weights import random_weights
from podsim.measure import provenance, require_gpu
from podsim.memory_system import kv_cache_for
from podsim.model import model_named
from podsim.profile import kernels_hash
from podsim.request import Request
from podsim.scheduler import SCHEDULERS, StepTime
from podsim.simulation import requests_of
from podsim.tensor_parallel import Group
from podsim.vattention import Change, VAttentionCache
from podsim.virtual_kv import StepMapping, VirtualKV, require_virtual_memory
from podsim.virtual_memory import CudaDriver
from podsim.workload import Trace

HOST_STEPS = 48
"""Decode steps of each batch size by which the host's time is measured."""
HOST_ROUNDS = 3
"""Over all batches by which it is measured."""
PREFILL_REQUESTS, PREFILL_OUTPUTS = 24, 8
"""Requests, each with a prompt of a whole budget, and their outputs: for steps with prefill."""
KV_STEP = 64
"""KV slots hold a multiple of so many tokens."""

Sampling = Callable[[Callable[[], float]], AbstractContextManager[list[Sample]]]
"""Of the card's clock and power while a context is open: see `podsim.gpu_sampler`."""
Progress = Callable[[str, int, int], None]
"""Told what is being done, and how many of how many are."""


@dataclass(frozen=True, slots=True)
class HostTime:
    """Seconds of a step in which the GPU waits for the host.

    Without those of a block table, and of memory being mapped: the simulation has these by itself.
    """

    fixed: float
    per_request: float
    with_prefill: float
    """What comes on top in a step that has prefill."""
    rows: Sequence[tuple[int, float]]
    """What it was fitted to: requests of a step of decodes, and seconds,"""
    prefill_rows: Sequence[tuple[int, float]]
    """and the same of steps with prefill."""
    mapping_rows: Sequence[tuple[int, float]] = ()
    """Of steps before which memory was mapped: page-groups, and the seconds that it took."""

    @classmethod
    def fit(
        cls,
        rows: Sequence[tuple[int, float]],
        prefill_rows: Sequence[tuple[int, float]],
        mapping_rows: Sequence[tuple[int, float]] = (),
    ) -> HostTime:
        """A line through the steps of decodes, and the median of what the others are above it."""
        requests, seconds = np.array(rows, dtype=np.float64).T
        slope = max(float(np.polyfit(requests, seconds, 1)[0]), 0.0)
        fixed = max(float(np.median(seconds - slope * requests)), 0.0)
        above = [seconds - fixed - slope * requests for requests, seconds in prefill_rows]
        with_prefill = max(statistics.median(above), 0.0)
        return cls(fixed, slope, with_prefill, rows, prefill_rows, mapping_rows)


@dataclass(frozen=True, slots=True)
class Served:
    """A trace that was served."""

    recording: Recording
    gpu_samples: Sequence[Sample]
    host_time: HostTime
    num_blocks: int
    machine: dict[str, object]
    kernel_starts: tuple[float, float]
    """Seconds from one small kernel of a graph to the next, when the engine's graphs were captured
    and after the run."""

    def engine(self, options: Mapping[str, object]) -> dict[str, object]:
        """What a recording says of the engine; `options` are those it was made with."""
        return {
            **self.machine,
            "kernels_sha256": kernels_hash(),
            "date": datetime.now(UTC).date().isoformat(),
            "options": dict(options),
            "host_time": asdict(self.host_time),
            "num_blocks": self.num_blocks,
            "kernel_starts": list(self.kernel_starts),
        }


@contextmanager
def _without_collections() -> Iterator[None]:
    """Python collects no garbage meanwhile: that would hold up a step."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Server:
    """A model on this machine's GPU, ready to serve traces under one deployment.

    KV slots hold `max_len` tokens. Of a `group` of GPUs this is the first one: see
    `podsim.shared_server`. Raises InputError if the GPU is not the deployment's, if the deployment
    is one that the engine cannot be, or if the KV cache does not fit.
    """

    def __init__(
        self,
        deployment: Deployment,
        max_len: int,
        on_progress: Progress = lambda what, done, total: None,
        group: Group | None = None,
    ) -> None:
        require_servable(deployment)
        gc.collect()  # an earlier server's buffers, which its graphs keep alive in cycles
        torch.cuda.empty_cache()
        self.deployment = deployment
        self.group = group
        self.model = model_named(deployment.model)
        gpu = gpu_named(deployment.gpu)
        require_gpu(gpu)
        self.num_blocks = num_blocks_for(deployment, self.model, gpu)
        max_len = slot_len(deployment, max_len, self.num_blocks)
        self.virtual_kv = self._virtual_kv(max_len) if deployment.kv == "vattention" else None
        if self.virtual_kv is not None:
            max_len = self.virtual_kv.max_len
        self.max_model_len = deployment.max_model_len or self.model.max_model_len
        caches = None if self.virtual_kv is None else self.virtual_kv.caches
        self.llama = llama_of(deployment, max_len, self.num_blocks, group, caches)
        with self._first_block_mapped():
            self.llama.capture(lambda done, total: on_progress("capturing graphs", done, total))
        self.kernel_starts = KernelStarts()
        self._starts_at_first = self.kernel_starts.seconds()
        self.host_time = self.measure_host_time(on_progress)

    def serve(
        self,
        trace: Trace,
        step_time: StepTime,
        seed: int = 0,
        sampling: Sampling | None = None,
    ) -> Served:
        """Serve a trace from its first arrival to its last token, in real time, beside `sampling`
        of the card: None is `podsim.gpu_sampler`'s, already under way.
        """
        clock, clocks = WallClock(), self.llama.clocks
        engine = self._engine(step_time, seed, clock)
        if clocks is not None:
            clocks.clear()
        with _without_collections():
            try:
                with (sampling or gpu_samples)(clock.now) as samples:
                    clock.start()  # now that all is ready: the first request waits for nothing
                    recording = engine.serve(requests_of(trace))
            finally:
                _end_mapping(engine)
        self._count_from_the_last_start(recording)
        if clocks is not None:
            recording.sm_clock_mhz.extend(clocks.megahertz())
        machine = provenance(self.llama.model)
        if self.group is not None:
            machine |= self.group.provenance()
        starts = self._starts_at_first, self.kernel_starts.seconds()
        return Served(recording, samples, self.host_time, self.num_blocks, machine, starts)

    def _count_from_the_last_start(self, recording: Recording) -> None:
        """A GPU that starts first waits for the others: that is no work, and the host's fault."""
        if self.group is not None:
            recording.gpu_seconds = self.group.least_seconds(recording.gpu_seconds)

    def set_token_budget(self, token_budget: int) -> None:
        """Serve with so many tokens in a step, no more than the engine was made for.

        The host's time is to be measured again then.
        """
        if token_budget > self.llama.max_tokens:
            raise InputError(
                f"token_budget is {token_budget}: this engine was made for at most "
                f"{self.llama.max_tokens}"
            )
        self.deployment = replace(self.deployment, token_budget=token_budget)

    def close(self) -> None:
        """Give back what torch does not know of: memory that was mapped. The server is of no use
        then.
        """
        if self.virtual_kv is not None:
            self.llama.caches = []
            self.virtual_kv.close()

    def _engine(self, step_time: StepTime, seed: int, clock: Clock | None = None) -> Engine:
        kv_cache = kv_cache_for(self.deployment, self.model, self.num_blocks)
        mapping = None
        if self.virtual_kv is not None:
            assert isinstance(kv_cache, VAttentionCache)
            mapping = StepMapping(self.virtual_kv, kv_cache, self.deployment)
        scheduler = SCHEDULERS[self.deployment.scheduler](
            kv_cache, self.deployment, ListedDecodes(kv_cache.block_size), step_time
        )
        return Engine(
            self.llama,
            scheduler,
            kv_cache,
            num_slots=self.deployment.max_num_seqs,
            max_model_len=self.max_model_len,
            vocab_size=self.model.vocab_size,
            seed=seed,
            clock=clock or WallClock(),
            mapping=mapping,
        )

    def _virtual_kv(self, max_len: int) -> VirtualKV:
        groups = page_groups_for(self.deployment, self.model)
        require_virtual_memory(self.deployment, groups)
        return VirtualKV(
            CudaDriver(),
            self.model,
            groups,
            num_slots=self.deployment.max_num_seqs,
            min_len=math.lcm(groups.tokens_per_block, KV_STEP)
            * -(-max_len // math.lcm(groups.tokens_per_block, KV_STEP)),
            num_blocks=self.num_blocks,
        )

    @contextmanager
    def _first_block_mapped(self) -> Iterator[None]:
        """What captured steps write to while they are warmed up: the first tokens of slot 0."""
        if self.virtual_kv is None:
            yield
            return
        memory = self.virtual_kv.memory
        memory.apply([Change(0, 0, 1, maps=True)])
        yield
        memory.apply([Change(0, 0, 1, maps=False)])

    @_without_collections()
    def measure_host_time(self, on_progress: Progress) -> HostTime:
        """Serve batches of short requests, and see how long a step takes beside the GPU's work.

        In rounds over all batches: what else a machine does comes and goes within seconds.
        """
        most = self._most_at_once(self._host_prompt + HOST_STEPS)
        sizes = sorted({1, *(n for n in (8, 16, 32, 64, 128, 256) if n < most), most})
        decodes: dict[int, list[float]] = {size: [] for size in sizes}
        with_prefill: list[_Wait] = []
        total = 1 + HOST_ROUNDS * (len(sizes) + 1)
        done = count()

        def tell() -> None:
            on_progress("measuring host time", next(done), total)

        tell()
        self._decode_waits(most)  # the first batch only warms up
        for _ in range(HOST_ROUNDS):
            for size in sizes:
                tell()
                decodes[size] += self._decode_waits(size)
            tell()
            with_prefill += self._prefill_waits()
        tell()
        rows = [(size, statistics.median(waits)) for size, waits in decodes.items()]
        prefill_rows = [
            (wait.shape.num_decodes + len(wait.shape.prefills), wait.seconds)
            for wait in with_prefill
        ]
        mapping_rows = [(w.page_groups, w.mapping) for w in with_prefill if w.page_groups]
        return HostTime.fit(rows, prefill_rows, mapping_rows)

    @property
    def _host_prompt(self) -> int:
        """Tokens of the prompts whose decodes are timed."""
        return max(1, min(16, self.llama.max_len - HOST_STEPS))

    def _decode_waits(self, size: int) -> list[float]:
        """Of steps of so many decodes alone."""
        return [
            wait.seconds
            for wait in self._waits([(self._host_prompt, HOST_STEPS)] * size)
            if wait.shape.num_decodes == size and not wait.shape.prefills
        ]

    def _prefill_waits(self) -> list[_Wait]:
        """Of steps with prefill."""
        prompt = max(1, min(self.deployment.token_budget, self.llama.max_len - PREFILL_OUTPUTS))
        waits = self._waits([(prompt, PREFILL_OUTPUTS)] * PREFILL_REQUESTS)
        return [wait for wait in waits if wait.shape.prefills]

    def _most_at_once(self, num_tokens: int) -> int:
        """Requests of so many tokens that are let in together."""
        kv_cache = kv_cache_for(self.deployment, self.model, self.num_blocks)
        room = kv_cache.num_blocks - int(self.deployment.watermark * kv_cache.num_blocks)
        fit = room // kv_cache.blocks_for(num_tokens)
        return max(1, min(self.deployment.max_num_seqs, fit))

    def _waits(self, lengths: Sequence[tuple[int, int]]) -> Iterator[_Wait]:
        """Serve requests of (prompt, output) tokens at once: what each step waited for."""
        engine = self._engine(lambda shape: 0.0, seed=1)
        recording = engine.serve(Request(i, 0.0, *length) for i, length in enumerate(lengths))
        _end_mapping(engine)
        self._count_from_the_last_start(recording)
        seconds = np.asarray(recording.log.steps["duration"])
        for others in ("gpu_seconds", "table_seconds", "mapping_seconds"):
            seconds = seconds - np.asarray(getattr(recording, others))
        mapped = recording.mapped_page_groups, recording.mapping_seconds
        columns = (recording.shapes, seconds.tolist(), *mapped)
        yield from (_Wait(*row) for row in zip(*columns, strict=True))


class _Wait(NamedTuple):
    """What a step waited for, in seconds."""

    shape: BatchShape
    seconds: float
    """For the host: not in `podsim.paged_latency` or `podsim.mapping_time`, which have theirs."""
    page_groups: int
    mapping: float
    """For memory to be mapped."""


def _end_mapping(engine: Engine) -> None:
    if isinstance(engine.mapping, StepMapping):
        engine.mapping.close()


def llama_of(
    deployment: Deployment,
    max_len: int,
    num_blocks: int,
    group: Group | None,
    caches: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> Llama:
    """A deployment's model, or this GPU's share of it; `max_len` is a `slot_len`, or longer."""
    model = model_named(deployment.model)
    part = None if group is None else group.part
    return Llama(
        model if part is None else part.share,
        random_weights(model, 0, "cuda" if group is None else group.device, part=part),
        attention=deployment.attention,
        max_tokens=deployment.token_budget,
        max_requests=deployment.max_num_seqs,
        max_len=max_len,
        num_sms=torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count,
        caches=caches,
        page_size=deployment.block_size if deployment.kv == "paged" else 0,
        num_blocks=num_blocks,
        group=group,
    )


def require_servable(deployment: Deployment) -> None:
    """Raise InputError for a deployment that the engine cannot be."""
    if deployment.kv == "paged" and deployment.block_size not in PAGE_SIZES:
        sizes = ", ".join(map(str, PAGE_SIZES))
        raise InputError(
            f"block_size is {deployment.block_size}: the engine's paged kernels have blocks of "
            f"{sizes} tokens"
        )
    if deployment.kv == "vattention" and deployment.tensor_parallel_size > 1:
        raise InputError(
            "the engine serves with kv 'ideal' or 'paged' on several GPUs, not 'vattention'"
        )
    for name, value in (
        *(("replicas", 1), ("prefix_caching", False)),
        *(("kv_offload", "none"), ("preemption", "recompute")),
    ):
        if getattr(deployment, name) != value:
            raise InputError(
                f"the engine serves with {name} {value!r}, not {getattr(deployment, name)!r}"
            )


def slot_len(deployment: Deployment, max_len: int, num_blocks: int) -> int:
    """Tokens that a KV slot holds for requests of up to `max_len`; of blocks, whole ones."""
    model = model_named(deployment.model)
    max_len = min(max_len, deployment.max_model_len or model.max_model_len)
    max_len = -(-max_len // KV_STEP) * KV_STEP
    if deployment.kv != "paged":
        return max_len
    return min(-(-max_len // deployment.block_size), num_blocks) * deployment.block_size


def longest(trace: Trace) -> int:
    """Tokens of the longest request."""
    return int((trace.num_prompt_tokens + trace.num_output_tokens).max())
