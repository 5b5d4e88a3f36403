"""Times podsim's kernels and a model's linear layers on this machine's GPU: sequences of a profile.

Every operation is timed inside the layer it belongs to, after that layer has run for a while: so
the L2 cache holds what it would in serving (the weights stream 100s of MB through it), and the
card is in the power state that serving such batches puts it in. How is in `measure_sequences`.
"""

from __future__ import annotations

import subprocess
from dataclasses import replace

import torch
import triton

from podsim.errors import InputError
from podsim.gpu_sampler import card, current_gpu
from podsim.hardware import Gpu
from podsim.kernels import launch, rmsnorm, rope, silu_mul
from podsim.kernels.attention import attention
from podsim.kernels.config import (
    RESIDENT_KEYS,
    config_for,
    is_decode_heavy,
    kernels_for,
    packed_heads,
)
from podsim.kernels.plan import AttentionPlan, Decode, PrefillChunk
from podsim.measure_ceilings import CeilingSequence
from podsim.measure_clock import SmClock
from podsim.measure_sequences import (
    REPEATS,
    STEP_REPEATS,
    Begin,
    GraphSequence,
    Launch,
    SustainedSequence,
    Timed,
)
from podsim.model import Model
from podsim.points import MAX_CONTEXT, AttentionPoint, pool_tokens
from podsim.profile_plan import Job

MAX_TOKENS = 8192 + 512
PROMPT_IN_POOL = 8192
"""Tokens of the prompt whose keys and values fill the KV pool."""
MOST_DECODES = 256


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
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={current_gpu()}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    driver, power_limit, sm_clock, memory_clock = (part.strip() for part in output.split(","))
    return {
        "device_name": torch.cuda.get_device_name(),
        "card": card(),
        "num_sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "driver": driver,
        "power_limit": power_limit,
        "max_sm_clock": sm_clock,
        "max_memory_clock": memory_clock,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "kernels": machine_kernels(),
        "geometry": _geometry(model),
    }


def machine_kernels() -> str:
    """Which of `podsim.kernels.config.KERNELS` are for this machine's GPU."""
    return str(kernels_for(torch.cuda.get_device_capability()))


def _geometry(model: Model) -> dict[str, int]:
    """How the serial kernels cut their work: see `podsim.attention_features.Geometry`."""
    config = config_for(
        "serial",
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        kernels=machine_kernels(),
    )
    assert config.decode is not None
    return {
        "num_sms": torch.cuda.get_device_properties(0).multi_processor_count,
        "pack": packed_heads(model.num_q_heads // model.num_kv_heads, config.kernels),
        "block_m": config.prefill.block_m,
        "block_n": config.prefill.block_n,
        "decode_block_n": config.decode.block_n,
        "decode_items_per_sm": config.decode_items_per_sm,
        "min_split_len": config.min_split_len,
        "resident_keys": RESIDENT_KEYS if config.kernels == "hopper" else 0,
    }


class LayerBench:
    """The weights, buffers and KV pool of one decoder layer with random contents.

    What the numbers are matters: products of equal numbers, or of NaN, draw less power, the clock
    stays up, and the same kernel is a fifth faster. So they are spread as in the engine
    (`llama.random_weights`), drawn anew for each sequence, and looked at after it. Tokens grow
    alike from layer to layer, so layers begin again with the embedding as often as a model's do,
    and the KV pool holds what layers in the middle make of a prompt.
    """

    def __init__(self, model: Model, max_tokens: int) -> None:
        self.model = model
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        torch.manual_seed(0)
        hidden, inter = model.hidden_size, model.intermediate_size
        heads = model.num_q_heads * model.head_dim
        self.weights = {
            "qkv": _weight(model.qkv_size, hidden),
            "output": _weight(hidden, heads),
            "gate_up": _weight(2 * inter, hidden),
            "down": _weight(hidden, inter),
        }
        self.lm_head = _weight(model.vocab_size, hidden)
        self.embedding = _random(model.vocab_size, hidden)
        self.norm_weight = _random(hidden).uniform_(0.5, 1.5)
        self.hidden = _random(max_tokens, hidden)
        self.residual = _random(max_tokens, hidden)
        self.normed = _random(max_tokens, hidden)
        self.qkv = _random(max_tokens, model.qkv_size)
        self.q = _random(max_tokens, model.num_q_heads, model.head_dim)
        self.attended = torch.empty_like(self.q)
        self.gate_up = _random(max_tokens, 2 * inter)
        self.activated = torch.empty(max_tokens, inter, device="cuda", dtype=torch.bfloat16)
        self.token_ids = torch.randint(model.vocab_size, (max_tokens,), device="cuda")
        self.cos_sin = rope.rope_table(MAX_CONTEXT, model.head_dim, 500000.0, "cuda")
        shape = (pool_tokens(model), model.num_kv_heads, model.head_dim)
        self.k_pool, self.v_pool = _random(*shape), _random(*shape)
        self._fill_pool()
        self._drawn_keys = [keys.clone() for keys in self._written_keys()]

    def _fill_pool(self) -> None:
        """Keys and values as half of the layers make them of a prompt, again and again."""
        n = PROMPT_IN_POOL
        attend = self.attention(AttentionPoint(((n, n),), (), ""), "serial")
        layer = [op for _, op in self.before_attention(n)]
        layer += [attend, *(op for _, op in self.after_attention(n))]
        self.begin(n)
        for _ in range(self.model.num_layers // 2):
            for op in layer:
                op()
        for pool in (self.k_pool, self.v_pool):
            for start in range(n, len(pool), n):
                pool[start : start + n] = pool[: min(n, len(pool) - start)]

    def draw(self) -> None:
        """Draw all anew that operations write and others read."""
        written = (self.hidden, self.residual, self.normed, self.q, self.attended, self.activated)
        for tensor in written:
            tensor.normal_()
        for keys, drawn in zip(self._written_keys(), self._drawn_keys, strict=True):
            keys.copy_(drawn)

    def fault(self) -> str:
        """Why what was timed since `draw` cannot be believed, or nothing."""
        read = (self.hidden, self.residual, self.normed, *self._written_keys())
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in read])
        return "" if bool(finite.all()) else "the activations were not finite afterwards"

    def _written_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        most = len(self.hidden)
        return self.k_pool[:most], self.v_pool[:most]

    def caches(self, num_slots: int, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The KV pool as [num_slots, max_len, num_kv_heads, head_dim]."""
        used = num_slots * max_len
        if used > len(self.k_pool):
            raise ValueError(f"{num_slots} slots of {max_len} tokens exceed the KV pool")
        shape = (num_slots, max_len, self.model.num_kv_heads, self.model.head_dim)
        return self.k_pool[:used].view(shape), self.v_pool[:used].view(shape)

    def begin(self, num_tokens: int) -> None:
        """What the first layer finds."""
        self.embed(num_tokens)
        self.hidden[:num_tokens].zero_()

    def embed(self, n: int) -> None:
        torch.index_select(self.embedding, 0, self.token_ids[:n], out=self.residual[:n])

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
        group = model.num_q_heads // model.num_kv_heads
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
            config=config_for(
                strategy,
                **heads,
                kernels=machine_kernels(),
                decode_heavy=is_decode_heavy(point.prefills, point.decode_contexts, group),
            ),
            device="cuda",
        )
        k_cache, v_cache = self.caches(point.num_slots, point.max_context)
        q, out = self.q[:n], self.attended[:n]
        return lambda: attention(strategy, q, k_cache, v_cache, out, plan)

    def around_the_layers(self, num_tokens: int, num_sampled: int) -> list[tuple[str, Launch]]:
        """What a step does once: embedding, LM head and greedy sampling."""
        rows = self.normed[:num_sampled]
        logits = torch.empty(num_sampled, self.model.vocab_size, device="cuda", dtype=rows.dtype)
        # Of a share of a model, sampling looks at the logits gathered from all shares.
        shared = self.model.tensor_parallel_size > 1
        gathered = _random(num_sampled, self.model.num_logits) if shared else logits
        return [
            ("embedding", lambda: self.embed(num_tokens)),
            ("lm_head", lambda: torch.mm(rows, self.lm_head.t(), out=logits)),
            ("sampling", lambda: torch.argmax(gathered, dim=-1)),
        ]

    def forward(self, point: AttentionPoint, strategy: str) -> Launch:
        """A whole forward pass, to check the sum of the parts by.

        One layer's weights stand in for all: they are larger than the L2 cache, as all layers' are.
        """
        n, attend = point.num_tokens, self.attention(point, strategy)
        norm, *layer = [op for _, op in self.before_attention(n)]
        layer += [attend, *(op for _, op in self.after_attention(n))]
        embedding, lm_head, sampling = self.around_the_layers(n, point.num_sampled)

        def first_norm() -> None:
            rmsnorm.rmsnorm(self.residual[:n], self.norm_weight, 1e-5, self.normed[:n])

        def run() -> None:
            embedding[1]()
            for number in range(self.model.num_layers):
                for op in (norm if number else first_norm, *layer):
                    op()
            self.norm(n)
            lm_head[1]()
            sampling[1]()

        return run


def _random(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, device="cuda", dtype=torch.bfloat16).normal_()


def _weight(rows: int, columns: int) -> torch.Tensor:
    """Keeps the size of what it is multiplied with."""
    return _random(rows, columns).mul_(columns**-0.5)


class Bench:
    """Makes the jobs of a plan ready to run on this machine's GPU: `profile_run.Prepare`."""

    def __init__(self, model: Model) -> None:
        self._layer = LayerBench(model, max_tokens=MAX_TOKENS)
        self._clock = SmClock(self._layer.num_sms)
        self._around: tuple[int, list[Timed], list[Timed]] = (0, [], [])
        """Captured before and after attention, for the number of tokens timed last."""

    def prepare(self, job: Job) -> GraphSequence | CeilingSequence | SustainedSequence:
        """Compile, capture and warm up what a job times."""
        if job.kind == "ceiling":
            return CeilingSequence(job.strategy, self._layer)
        fault = self._layer.fault
        self._layer.draw()
        if job.kind in ("sustained", "duty"):
            assert job.point is not None
            steps = [Timed("step", self._layer.forward(job.point, job.attention))] * job.mixed_steps
            if job.decode_steps:
                decodes = Timed(
                    "step", self._layer.forward(replace(job.point, prefills=()), "serial")
                )
                steps += [decodes] * job.decode_steps
            return SustainedSequence(job, steps, self._clock, fault)
        repeats = STEP_REPEATS if job.kind == "step" else REPEATS
        return GraphSequence(self._ops(job), self._clock, fault, repeats, self._begin(job))

    def _begin(self, job: Job) -> Begin | None:
        """Of a layer alone: whole steps begin by themselves, the others have nothing to go on."""
        if job.kind not in ("linear", "attention"):
            return None
        begin = Timed("", lambda: self._layer.begin(job.num_tokens))
        return Begin(begin, self._layer.model.num_layers)

    def _ops(self, job: Job) -> list[Timed]:
        layer, point = self._layer, job.point
        if job.kind == "launch":
            return [Timed("launch", launches(job.num_tokens))]
        if job.kind == "linear":
            return self._linear(job)
        if job.kind == "once":
            ops = layer.around_the_layers(job.num_tokens, job.num_tokens)
            return [Timed(name, run) for name, run in ops]
        assert point is not None
        if job.kind == "step":
            return [Timed("step", layer.forward(point, job.strategy))]
        before, after = self._layer_around(point.num_tokens)
        return [*before, Timed("attention", layer.attention(point, job.strategy)), *after]

    def _linear(self, job: Job) -> list[Timed]:
        """Every operation of a layer, the second norm and attention unnamed.

        Attention is of as many decodes, or of one prompt of that length.
        """
        n = job.num_tokens
        point = (
            AttentionPoint((), (1024,) * n, job.split)
            if n <= MOST_DECODES
            else AttentionPoint(((n, n),), (), job.split)
        )
        layer = [
            *self._layer.before_attention(n),
            ("", self._layer.attention(point, "serial")),
            *self._layer.after_attention(n),
        ]
        names = [name for name, _ in layer]
        return [
            Timed("" if name in names[:i] else name, run) for i, (name, run) in enumerate(layer)
        ]

    def _layer_around(self, num_tokens: int) -> tuple[list[Timed], list[Timed]]:
        if self._around[0] != num_tokens:
            self._around = (
                num_tokens,
                [Timed("", op) for _, op in self._layer.before_attention(num_tokens)],
                [Timed("", op) for _, op in self._layer.after_attention(num_tokens)],
            )
        return self._around[1:]


def launches(count: int) -> Launch:
    """An empty kernel, so many times."""

    def run() -> None:
        for _ in range(count):
            launch.empty()

    return run
