"""Times podsim's kernels and a model's linear layers on this machine's GPU: rows for calibration.

Every operation is timed inside the layer it belongs to, after that layer has run for a while: so
the L2 cache holds what it would in serving (the weights stream 100s of MB through it), and the
card is in the power state that serving such batches puts it in. A timing is a CUDA graph's replay
between two events; the host queues it while the card is still busy, so that it is never waited for.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median, quantiles

import numpy as np
import torch
import triton

from podsim.config import STRATEGIES
from podsim.errors import InputError
from podsim.hardware import Gpu
from podsim.kernels import launch, rmsnorm, rope, silu_mul
from podsim.kernels.attention import attention
from podsim.kernels.config import config_for
from podsim.kernels.plan import AttentionPlan, Decode, PrefillChunk
from podsim.model import Model
from podsim.points import (
    MAX_CONTEXT,
    AttentionPoint,
    attention_points,
    linear_points,
    pool_tokens,
)

PASSES = 2
"""Times the whole list of points is gone through, each time in another order, because what a
point takes drifts with what ran before it."""
REPEATS = 11
WARM_UP = 0.04
"""Seconds that a sequence runs before it is timed: the power limit acts within a few 10 ms."""
STEP_CHECKS = 24
"""Held-out batches that are also timed as whole forward passes."""
MAX_TOKENS = 8192 + 512
MOST_DECODES = 256
MAX_SAMPLED = 512

POD_50_50 = "pod_50_50"
"""POD with tickets that alternate, timed to compare with the proportional ones."""
MIXED_STRATEGIES = (*STRATEGIES, POD_50_50)
HOST_SECONDS_PER_LAUNCH = 20e-6
"""At most, to queue a graph and an event."""
LEAST_LEAD = 2e-3
"""Seconds that the host gets ahead of a card that keeps up with it."""
SLEEP_CYCLES_PER_SECOND = 2e9

Row = dict[str, object]
Launch = Callable[[], object]


def require_gpu(gpu: Gpu) -> None:
    """Raise InputError unless this machine has the GPU that is to be profiled."""
    if not torch.cuda.is_available():
        raise InputError(
            f"no CUDA GPU on this machine: run `podsim profile` where the {gpu.name} is, "
            "or simulate with a shipped profile"
        )
    found = torch.cuda.get_device_name()
    if found != gpu.device_name:
        raise InputError(f"this machine's GPU is '{found}', but a profile of '{gpu.name}' is asked")


def provenance(model: Model) -> dict[str, object]:
    """What the measurements depend on, the kernels' tiles for the model's heads among it."""
    query = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
    output = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    driver, power_limit, sm_clock, memory_clock = (part.strip() for part in output.split(","))
    return {
        "device_name": torch.cuda.get_device_name(),
        "num_sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": driver,
        "power_limit": power_limit,
        "max_sm_clock": sm_clock,
        "max_memory_clock": memory_clock,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "geometry": _geometry(model),
    }


def _geometry(model: Model) -> dict[str, int]:
    """How the serial kernels cut their work: see `podsim.attention_model.Geometry`."""
    config = config_for(
        "serial",
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
    )
    return {
        "num_sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "block_m": config.prefill.block_m,
        "block_n": config.prefill.block_n,
        "decode_items_per_sm": config.decode_items_per_sm,
        "min_split_len": config.min_split_len,
    }


class Timed:
    """An operation captured as a CUDA graph, compiled and warmed up.

    It keeps the operation, because the graph reads tensors that only the operation refers to.
    """

    def __init__(self, name: str, launch_op: Launch) -> None:
        self.name = name
        self.launch_op = launch_op
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                launch_op()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            launch_op()


def time_sequence(ops: Sequence[Timed]) -> dict[str, list[float]]:
    """Seconds of each operation of a sequence that runs REPEATS times, once it has warmed up."""
    _warm_up(ops)
    marks = []
    for _ in range(REPEATS):
        row = [torch.cuda.Event(enable_timing=True)]
        row[0].record()
        for op in ops:
            op.graph.replay()
            row.append(torch.cuda.Event(enable_timing=True))
            row[-1].record()
        marks.append(row)
    torch.cuda.synchronize()
    return {
        op.name: [row[i].elapsed_time(row[i + 1]) / 1000 for row in marks]
        for i, op in enumerate(ops)
    }


def _warm_up(ops: Sequence[Timed]) -> None:
    """Run the sequence for WARM_UP seconds, and leave the card busy while the host goes on."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for op in ops:
        op.graph.replay()
    end.record()
    torch.cuda.synchronize()
    seconds = start.elapsed_time(end) / 1000
    for _ in range(math.ceil(WARM_UP / seconds)):
        for op in ops:
            op.graph.replay()
    host_seconds = HOST_SECONDS_PER_LAUNCH * len(ops)
    if seconds < 2 * host_seconds:  # the card keeps up with the host: hold it back once
        lead = max(REPEATS * host_seconds, LEAST_LEAD)
        torch.cuda._sleep(int(lead * SLEEP_CYCLES_PER_SECOND))


def timing_row(seconds: Sequence[float]) -> Row:
    """The columns of a timing: the median, and the spread around it."""
    low, *_, high = quantiles(seconds, n=10)
    return {
        "time_us": median(seconds) * 1e6,
        "time_p10_us": low * 1e6,
        "time_p90_us": high * 1e6,
        "repeats": len(seconds),
    }


class LayerBench:
    """The weights, buffers and KV pool of one decoder layer with random contents."""

    def __init__(self, model: Model, max_tokens: int) -> None:
        self.model = model
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        torch.manual_seed(0)
        hidden, inter = model.hidden_size, model.intermediate_size
        heads = model.num_q_heads * model.head_dim
        self.weights = {
            "qkv": _random(model.qkv_size, hidden),
            "output": _random(hidden, heads),
            "gate_up": _random(2 * inter, hidden),
            "down": _random(hidden, inter),
        }
        self.lm_head = _random(model.vocab_size, hidden)
        self.embedding = _random(model.vocab_size, hidden)
        self.norm_weight = _random(hidden)
        self.hidden = _random(max_tokens, hidden)
        self.residual = _random(max_tokens, hidden)
        self.normed = torch.empty_like(self.hidden)
        self.qkv = _random(max_tokens, model.qkv_size)
        self.q = _random(max_tokens, model.num_q_heads, model.head_dim)
        self.attended = torch.empty_like(self.q)
        self.gate_up = _random(max_tokens, 2 * inter)
        self.activated = torch.empty(max_tokens, inter, device="cuda", dtype=torch.bfloat16)
        self.token_ids = torch.randint(model.vocab_size, (max_tokens,), device="cuda")
        self.cos_sin = rope.rope_table(MAX_CONTEXT, model.head_dim, 500000.0, "cuda")
        shape = (pool_tokens(model), model.num_kv_heads, model.head_dim)
        self.k_pool, self.v_pool = _random(*shape), _random(*shape)

    def caches(self, num_slots: int, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The KV pool as [num_slots, max_len, num_kv_heads, head_dim]."""
        used = num_slots * max_len
        if used > len(self.k_pool):
            raise ValueError(f"{num_slots} slots of {max_len} tokens exceed the KV pool")
        shape = (num_slots, max_len, self.model.num_kv_heads, self.model.head_dim)
        return self.k_pool[:used].view(shape), self.v_pool[:used].view(shape)

    def before_attention(self, num_tokens: int) -> list[tuple[str, Launch]]:
        n, w = num_tokens, self.weights
        positions = torch.arange(n, device="cuda", dtype=torch.int32)
        slots = torch.zeros(n, device="cuda", dtype=torch.int32)
        k_cache, v_cache = self.caches(1, max(n, 1))
        return [
            ("rmsnorm", lambda: self.norm(n)),
            ("qkv", lambda: torch.mm(self.normed[:n], w["qkv"].t(), out=self.qkv[:n])),
            (
                "rope_and_cache",
                lambda: rope.rope_and_cache(
                    self.qkv[:n], positions, slots, self.cos_sin[:n], k_cache, v_cache, self.q[:n]
                ),
            ),
        ]

    def after_attention(self, num_tokens: int) -> list[tuple[str, Launch]]:
        n, w = num_tokens, self.weights
        attended = self.attended[:n].view(n, -1)
        return [
            ("output", lambda: torch.mm(attended, w["output"].t(), out=self.hidden[:n])),
            ("rmsnorm", lambda: self.norm(n)),
            ("gate_up", lambda: torch.mm(self.normed[:n], w["gate_up"].t(), out=self.gate_up[:n])),
            ("silu_mul", lambda: silu_mul.silu_mul(self.gate_up[:n], self.activated[:n])),
            ("down", lambda: torch.mm(self.activated[:n], w["down"].t(), out=self.hidden[:n])),
        ]

    def norm(self, n: int) -> None:
        rmsnorm.rmsnorm(self.hidden[:n], self.norm_weight, 1e-5, self.normed[:n], self.residual[:n])

    def attention(self, point: AttentionPoint, strategy: str) -> Launch:
        """The attention of a batch, each request in a KV slot of its own."""
        model, n = self.model, point.num_tokens
        kernel = "pod" if strategy == POD_50_50 else strategy
        chunks = [PrefillChunk(*chunk, slot) for slot, chunk in enumerate(point.prefills)]
        decodes = [
            Decode(context, len(chunks) + i) for i, context in enumerate(point.decode_contexts)
        ]
        heads = {
            "num_q_heads": model.num_q_heads,
            "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
        }
        plan = AttentionPlan(
            chunks,
            decodes,
            **heads,
            num_slots=point.num_slots,
            max_len=point.max_context,
            num_sms=self.num_sms,
            config=config_for(kernel, **heads),
            device="cuda",
        )
        k_cache, v_cache = self.caches(point.num_slots, point.max_context)
        q, out = self.q[:n], self.attended[:n]
        policy = "50:50" if strategy == POD_50_50 else "proportional"
        return lambda: attention(kernel, q, k_cache, v_cache, out, plan, policy)

    def around_the_layers(self, num_tokens: int, num_sampled: int) -> list[tuple[str, Launch]]:
        """What a step does once: embedding, LM head and greedy sampling."""
        ids, rows = self.token_ids[:num_tokens], self.normed[:num_sampled]
        logits = torch.empty(num_sampled, self.model.vocab_size, device="cuda", dtype=rows.dtype)
        # Of a share of a model, sampling looks at the logits gathered from all shares.
        shared = self.model.tensor_parallel_size > 1
        gathered = _random(num_sampled, self.model.num_logits) if shared else logits
        return [
            ("embedding", lambda: torch.index_select(self.embedding, 0, ids)),
            ("lm_head", lambda: torch.mm(rows, self.lm_head.t(), out=logits)),
            ("sampling", lambda: torch.argmax(gathered, dim=-1)),
        ]


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_(std=0.5)


def measure_launches() -> Iterator[Row]:
    """An empty kernel alone and in a graph of many: what a launch and what an event costs."""
    for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):

        def run(count: int = count) -> None:
            for _ in range(count):
                launch.empty()

        seconds = time_sequence([Timed("launch", run)])["launch"]
        yield {"op": "launch", "num_tokens": count, **timing_row(seconds)}


def measure_linear(bench: LayerBench, num_tokens: int, split: str) -> Iterator[Row]:
    """Every operation of a layer but attention, at one number of tokens.

    The layer's attention runs too: of as many decodes, or of one prompt of that length.
    """
    n = num_tokens
    point = (
        AttentionPoint((), (1024,) * n, split)
        if n <= MOST_DECODES
        else AttentionPoint(((n, n),), (), split)
    )
    layer = [
        *bench.before_attention(n),
        ("attention", bench.attention(point, "serial")),
        *bench.after_attention(n),
    ]
    seen: set[str] = set()
    ops = []
    for name, run in layer:
        ops.append(Timed(name if name not in seen else f"{name} again", run))
        seen.add(name)
    for name, seconds in time_sequence(ops).items():
        if name in seen - {"attention"}:
            yield {"op": name, "split": split, "num_tokens": num_tokens, **timing_row(seconds)}


def measure_once_per_step(bench: LayerBench, num_tokens: int, split: str) -> Iterator[Row]:
    """Embedding of `num_tokens`; LM head and sampling of as many rows."""
    ops = [Timed(name, run) for name, run in bench.around_the_layers(num_tokens, num_tokens)]
    for name, seconds in time_sequence(ops).items():
        yield {"op": name, "split": split, "num_tokens": num_tokens, **timing_row(seconds)}


def measure_attention(bench: LayerBench, point: AttentionPoint) -> Iterator[Row]:
    """One batch under each strategy, inside the layer's other work."""
    n, strategies = point.num_tokens, strategies_for(point)
    before = [Timed("other", op) for _, op in bench.before_attention(n)]
    after = [Timed("other", op) for _, op in bench.after_attention(n)]
    for name in strategies:
        layer = [*before, Timed("attention", bench.attention(point, name)), *after]
        seconds = time_sequence(layer)["attention"]
        yield {
            "op": "attention",
            "split": point.split,
            "strategy": name,
            "num_tokens": n,
            "prefills": point.prefills_text,
            "decodes": point.decodes_text,
            **timing_row(seconds),
        }


def measure_steps(bench: LayerBench, point: AttentionPoint) -> Iterator[Row]:
    """A whole forward pass as one graph under each strategy, to check the sum of the parts by.

    One layer's weights stand in for all: they are larger than the L2 cache, as 32 layers' are.
    """
    n = point.num_tokens
    before, after = bench.before_attention(n), bench.after_attention(n)
    embedding, lm_head, sampling = bench.around_the_layers(n, point.num_sampled)

    def forward(attend: Launch) -> None:
        embedding[1]()
        for _ in range(bench.model.num_layers):
            for _, op in before:
                op()
            attend()
            for _, op in after:
                op()
        bench.norm(n)
        lm_head[1]()
        sampling[1]()

    for name in strategies_for(point):
        step = Timed("step", partial(forward, bench.attention(point, name)))
        seconds = time_sequence([step])["step"]
        yield {
            "op": "step",
            "split": point.split,
            "strategy": name,
            "num_tokens": n,
            "prefills": point.prefills_text,
            "decodes": point.decodes_text,
            **timing_row(seconds),
        }


def measure_profile(
    model: Model, gpu: Gpu, on_progress: Callable[[int, int], None]
) -> Iterator[Row]:
    """Every row of a profile, in an order that mixes small and large batches.

    `on_progress` is told how many of how many points are done.
    """
    rng = np.random.default_rng(0)
    linear, attention_batches = linear_points(rng), attention_points(rng, model, gpu)
    steps = [point for point in attention_batches if point.split == "held_out"][:STEP_CHECKS]
    bench = LayerBench(model, max_tokens=MAX_TOKENS)
    jobs: list[Callable[[], Iterator[Row]]] = [measure_launches]
    for num_tokens, split in linear:
        jobs.append(partial(measure_linear, bench, num_tokens, split))
        if num_tokens <= MAX_SAMPLED:
            jobs.append(partial(measure_once_per_step, bench, num_tokens, split))
    jobs += [partial(measure_attention, bench, point) for point in attention_batches]
    jobs += [partial(measure_steps, bench, point) for point in steps]
    total = PASSES * len(jobs)
    for done in range(total):
        if done % len(jobs) == 0:
            order = rng.permutation(len(jobs))
        on_progress(done, total)
        for row in jobs[order[done % len(jobs)]]():
            yield {**row, "pass": done // len(jobs)}
    on_progress(total, total)


def strategies_for(point: AttentionPoint) -> tuple[str, ...]:
    """A batch with one side only runs that side's own kernel, whatever the strategy."""
    return MIXED_STRATEGIES if point.is_mixed else ("serial",)
