"""A Llama forward pass on podsim's kernels, captured as CUDA graphs: what the engine serves with.

A step computes the tokens of a batch, the chunks' first, then one a decode, padded to the size of a
graph (`podsim.graph_sizes`). Its graph reads everything that depends on the batch from one block of
device memory, which the host fills and copies before the replay:

    token_ids, positions, slots  [max_tokens] int32: each token, and where its k and v go
    sample_rows                  [max_requests] int32: the tokens whose successor comes out
    the lists of the attention plan
    the block table of a paged KV cache, as far as its rows are in use

Padding tokens write to a KV slot, or block, that no request has.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from podsim.block_tables import BlockTable
from podsim.errors import InputError
from podsim.graph_sizes import graph_size, graph_sizes
from podsim.kernels import rmsnorm, rope, silu_mul
from podsim.kernels.attention import attention
from podsim.kernels.config import AttentionConfig, config_for, is_decode_heavy, kernels_for
from podsim.kernels.plan import CapturedPlan, Decode, Plan, PrefillChunk, Room
from podsim.model import Model
from podsim.step_inputs import StepInputs

NORM_EPS = 1e-5
ROPE_BASE = 500000.0
MAX_CHUNKS = 16
"""Prefill chunks that a captured step has room for; one with more is launched kernel by kernel."""

PREFILL, DECODE, MIXED, DECODE_HEAVY = KINDS = ("prefill", "decode", "mixed", "decode-heavy")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Of one decoder layer; matrices as [out, in]."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: torch.Tensor
    """[vocab, hidden]"""
    layers: Sequence[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor
    """[vocab, hidden]"""


def random_weights(
    model: Model, seed: int, device: str, dtype: torch.dtype = torch.bfloat16
) -> Weights:
    """Normal weights that keep the activations near unit size through every layer."""
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(rows, columns, device=device, dtype=dtype)
        return weight.normal_(std=columns**-0.5, generator=generator)

    def norm() -> torch.Tensor:
        return torch.empty(model.hidden_size, device=device, dtype=dtype).uniform_(
            0.5, 1.5, generator=generator
        )

    hidden, inter = model.hidden_size, model.intermediate_size
    layers = [
        LayerWeights(
            attention_norm=norm(),
            qkv=matrix(model.qkv_size, hidden),
            output=matrix(hidden, model.num_q_heads * model.head_dim),
            mlp_norm=norm(),
            gate_up=matrix(2 * inter, hidden),
            down=matrix(hidden, inter),
        )
        for _ in range(model.num_layers)
    ]
    embedding = matrix(model.vocab_size, hidden) * hidden**0.5
    return Weights(embedding, layers, norm(), matrix(model.vocab_size, hidden))


class Inputs:
    """The block of device memory that a step's inputs are copied to, and its twin on the host.

    `page_size` and `table_shape` (slots, blocks a slot) are those of a paged KV cache.
    """

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        room: Room,
        device: torch.device,
        page_size: int = 0,
        table_shape: tuple[int, int] = (0, 0),
    ) -> None:
        sizes = [*[graph_size(max_tokens)] * 3, graph_size(max_requests), room.num_ints]
        self._before_table = sum(sizes)
        sizes.append(table_shape[0] * table_shape[1])
        self._copied = sum(sizes)
        on_gpu = device.type == "cuda"
        self.host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=on_gpu)
        self.device = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        *parts, table = self.device.split(sizes)
        self.token_ids, self.positions, self.slots, self.sample_rows, self.lists = parts
        self.block_table = table.view(table_shape) if page_size else None
        *self._host_parts, entries = (part.numpy() for part in self.host.split(sizes))
        self._table = BlockTable(entries.reshape(table_shape), page_size) if page_size else None
        self.table_seconds = 0.0

    def fill(
        self, step: StepInputs, plan: CapturedPlan, num_tokens: int, padding_slot: int
    ) -> None:
        """Put a step into the host's block, padded to `num_tokens`; padding goes to this slot."""
        token_ids, positions, slots, sample_rows, lists = self._host_parts
        n, m = len(step.token_ids), len(step.sample_rows)
        token_ids[:n], token_ids[n:num_tokens] = step.token_ids, 0
        positions[:n], positions[n:num_tokens] = step.positions, 0
        slots[:n], slots[n:num_tokens] = self.slots_of(step), padding_slot
        sample_rows[:m], sample_rows[m:] = step.sample_rows, 0
        chunks = [PrefillChunk(*chunk) for chunk in step.chunks]
        plan.write(lists, chunks, [Decode(*decode) for decode in step.decodes])

    def slots_of(self, step: StepInputs) -> NDArray[np.int32]:
        """Where k and v of each token go, after the step's new blocks are in the table.

        In a paged cache the slots of one row each that begin at every row (`Llama._written`): there
        a token is at its position in the slot that begins so many rows before its own.
        """
        if self._table is None:
            return step.slots
        started = time.perf_counter()
        self._table.enter(step.new_blocks)
        slots = self._table.rows(step.slots, step.positions) - step.positions
        rows_in_use = int(step.slots.max()) + 1
        self._copied = self._before_table + rows_in_use * self._table.entries.shape[1]
        self.table_seconds = time.perf_counter() - started
        return slots

    def copy(self) -> None:
        """Queue the copy of what a step reads to the device."""
        used = self._copied
        self.device[:used].copy_(self.host[:used], non_blocking=True)


@dataclass(slots=True)
class _Captured:
    """A part of a step at one size: launched kernel by kernel, or as a graph."""

    launch: Callable[[], None]
    graph: torch.cuda.CUDAGraph | None = field(default=None)

    def run(self) -> None:
        if self.graph is None:
            self.launch()
        else:
            self.graph.replay()


class Llama:
    """Weights, KV cache, buffers and graphs of a model that serves.

    `max_tokens` bounds the tokens of a step, `max_requests` the requests that hold a KV slot of
    `max_len` tokens. `attention` is the strategy of mixed batches. `caches` are K and V of each
    layer, [max_requests + 1, max_len, num_kv_heads, head_dim], if they are somebody else's. With a
    `page_size`, K and V are in `num_blocks` blocks of so many tokens, which steps name in
    `new_blocks`, and one more for padding; `max_len` is then a multiple of the page size and no
    more than all blocks hold. Raises InputError if the KV cache does not fit into the memory that
    is free.
    """

    def __init__(
        self,
        model: Model,
        weights: Weights,
        *,
        attention: str,
        max_tokens: int,
        max_requests: int,
        max_len: int,
        num_sms: int,
        caches: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        page_size: int = 0,
        num_blocks: int = 0,
    ) -> None:
        self.model = model
        self.weights = weights
        self.strategy = attention
        self.max_tokens = max_tokens
        self.max_requests = max_requests
        self.max_len = max_len
        self.device = weights.embedding.device
        self.gpu_seconds = 0.0
        self.table_seconds = 0.0
        self.page_size = page_size
        self.num_blocks = num_blocks
        if page_size and not max_len <= num_blocks * page_size:
            raise ValueError(f"max_len {max_len} is more than {num_blocks} blocks hold")
        self._padding_slot = num_blocks * page_size if page_size else max_requests
        self._plan_sizes: dict[str, Any] = {
            "num_q_heads": model.num_q_heads,
            "num_kv_heads": model.num_kv_heads,
            "head_dim": model.head_dim,
            "num_slots": max_requests + 1,
            "max_len": max_len,
            "num_sms": num_sms,
        }
        self._allocate(caches)
        self._room = self._room_of_any_step()
        table = (max_requests + 1, max_len // page_size) if page_size else (0, 0)
        self.inputs = Inputs(max_tokens, max_requests, self._room, self.device, page_size, table)
        if page_size:
            self._plan_sizes |= {"page_size": page_size, "block_table": self.inputs.block_table}
        self._workspaces: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._steps = {
            (kind, size): self._step_of(kind, size, MAX_CHUNKS)
            for kind in self._kinds
            for size in graph_sizes(max_requests if kind == DECODE else max_tokens)
        }
        self._crowded: dict[tuple[str, int], tuple[CapturedPlan, _Captured]] = {}
        self._heads = {
            size: _Captured(partial(self._head, size)) for size in graph_sizes(max_requests)
        }

    def _allocate(self, caches: Sequence[tuple[torch.Tensor, torch.Tensor]] | None) -> None:
        model, tokens = self.model, graph_size(self.max_tokens)
        dtype = self.weights.embedding.dtype

        def buffer(*shape: int) -> torch.Tensor:  # zeros: padding rows are computed too
            return torch.zeros(*shape, device=self.device, dtype=dtype)

        slots = (self.max_requests + 1, self.max_len)
        if self.page_size:
            slots = (self.num_blocks + 1, self.page_size)
        cache = (*slots, model.num_kv_heads, model.head_dim)
        try:
            if caches is None:
                caches = [(buffer(*cache), buffer(*cache)) for _ in range(model.num_layers)]
        except torch.OutOfMemoryError:
            gigabytes = model.kv_bytes_per_token * cache[0] * cache[1] / 1e9
            what = f"{self.max_requests} requests of up to {self.max_len} tokens"
            remedy = "max_num_seqs or max_model_len"
            if self.page_size:
                what = f"{self.num_blocks} blocks of {self.page_size} tokens"
                remedy = "num_blocks or gpu_memory_utilization"
            raise InputError(
                f"{what} need {gigabytes:.0f} GB of KV cache, more than is free: lower {remedy}"
            ) from None
        self.caches = caches
        self.residual = buffer(tokens, model.hidden_size)
        self.hidden = buffer(tokens, model.hidden_size)
        self.normed = buffer(tokens, model.hidden_size)
        self.qkv = buffer(tokens, model.qkv_size)
        self.q = buffer(tokens, model.num_q_heads, model.head_dim)
        self.attended = buffer(tokens, model.num_q_heads, model.head_dim)
        self.gate_up = buffer(tokens, 2 * model.intermediate_size)
        self.activated = buffer(tokens, model.intermediate_size)
        rows = graph_size(self.max_requests)
        self.sampled_rows = buffer(rows, model.hidden_size)
        self.logits = buffer(rows, model.vocab_size)
        self.sampled = torch.zeros(rows, dtype=torch.int64, device=self.device)
        on_gpu = self.device.type == "cuda"
        self.sampled_host = torch.zeros(rows, dtype=torch.int64, pin_memory=on_gpu)
        self.cos_sin = rope.rope_table(self.max_len, model.head_dim, ROPE_BASE, self.device)

    def _room_of_any_step(self) -> Room:
        serial, mixed = (
            Room.of(
                Plan(config=self._config(strategy), **self._plan_sizes),
                graph_size(self.max_tokens),
                self.max_requests,
                self.max_requests,
            )
            for strategy in ("serial", self.strategy)
        )
        return serial.union(mixed)

    def _config(self, strategy: str, decode_heavy: bool = False) -> AttentionConfig:
        model, gpu = self.model, self.device.type == "cuda"
        return config_for(
            strategy,
            num_q_heads=model.num_q_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            kernels=kernels_for(torch.cuda.get_device_capability() if gpu else None),
            decode_heavy=decode_heavy,
        )

    @cached_property
    def _kinds(self) -> Sequence[str]:
        """Of graphs: mixed batches have two if the strategy has tiles for decode-heavy ones."""
        one = self._config(self.strategy) == self._config(self.strategy, decode_heavy=True)
        return (PREFILL, DECODE, MIXED) if one else KINDS

    def _step_of(self, kind: str, size: int, max_chunks: int) -> tuple[CapturedPlan, _Captured]:
        """A batch with one side only runs that side's own kernel, whatever the strategy."""
        strategy = self.strategy if kind in (MIXED, DECODE_HEAVY) else "serial"
        plan = CapturedPlan(
            self.inputs.lists,
            self._room,
            num_tokens=size,
            max_chunks=0 if kind == DECODE else min(max_chunks, self.max_requests, size),
            max_decodes=0 if kind == PREFILL else min(self.max_requests, size),
            config=self._config(strategy, kind == DECODE_HEAVY),
            **self._plan_sizes,
        )
        if self._workspaces is None:
            self._workspaces = plan.workspaces()
        plan.use(*self._workspaces)
        return plan, _Captured(partial(self._layers, size, strategy, plan))

    # ---- a step

    def run(self, step: StepInputs) -> NDArray[np.int64]:
        """Compute a step; the token that follows each of its sample rows, once on the host."""
        if self.device.type != "cuda":
            self._launch(step)
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._launch(step, before=start.record)
            end.record()
            end.synchronize()
            self.gpu_seconds = start.elapsed_time(end) / 1000
        return self.sampled_host[: len(step.sample_rows)].numpy()

    def _launch(self, step: StepInputs, before: Callable[[], None] = lambda: None) -> None:
        """Queue a step on the current stream; `before` is called when its inputs are complete."""
        if len(step.token_ids) > self.max_tokens:
            raise InputError(
                f"a step of {len(step.token_ids)} tokens, but this model was set up for at most "
                f"{self.max_tokens}"
            )
        size = graph_size(len(step.token_ids))
        plan, layers = self._step(step, size)
        self.inputs.fill(step, plan, size, self._padding_slot)
        self.table_seconds = self.inputs.table_seconds
        before()
        self.inputs.copy()
        layers.run()
        num_sampled = graph_size(len(step.sample_rows))
        if num_sampled:
            self._heads[num_sampled].run()
            self.sampled_host[:num_sampled].copy_(self.sampled[:num_sampled], non_blocking=True)

    def _step(self, step: StepInputs, size: int) -> tuple[CapturedPlan, _Captured]:
        key = (self._kind(step), size)
        if len(step.chunks) <= MAX_CHUNKS:
            return self._steps[key]
        if key not in self._crowded:
            self._crowded[key] = self._step_of(*key, self.max_requests)
        return self._crowded[key]

    def _kind(self, step: StepInputs) -> str:
        if not (step.chunks and step.decodes):
            return PREFILL if step.chunks else DECODE
        if DECODE_HEAVY not in self._kinds:
            return MIXED
        chunks = [(num_tokens, context) for num_tokens, context, _ in step.chunks]
        contexts = [context for context, _ in step.decodes]
        group = self.model.num_q_heads // self.model.num_kv_heads
        return DECODE_HEAVY if is_decode_heavy(chunks, contexts, group) else MIXED

    def _layers(self, size: int, strategy: str, plan: CapturedPlan) -> None:
        """From the token ids to the final norm of every token."""
        inputs, n = self.inputs, size
        positions, slots = inputs.positions[:n], inputs.slots[:n]
        residual, hidden, normed = self.residual[:n], self.hidden[:n], self.normed[:n]
        qkv, q, attended = self.qkv[:n], self.q[:n], self.attended[:n]
        gate_up, activated = self.gate_up[:n], self.activated[:n]
        torch.index_select(self.weights.embedding, 0, inputs.token_ids[:n], out=residual)
        carried = None  # the first norm finds the embedding in the residual itself
        for layer, (k_cache, v_cache) in zip(self.weights.layers, self.caches, strict=True):
            source = residual if carried is None else hidden
            rmsnorm.rmsnorm(source, layer.attention_norm, NORM_EPS, normed, carried)
            carried = residual
            torch.mm(normed, layer.qkv.t(), out=qkv)
            written = self._written(k_cache), self._written(v_cache)
            rope.rope_and_cache(qkv, positions, slots, self.cos_sin, *written, q)
            attention(strategy, q, k_cache, v_cache, attended, plan)
            torch.mm(attended.view(n, -1), layer.output.t(), out=hidden)
            rmsnorm.rmsnorm(hidden, layer.mlp_norm, NORM_EPS, normed, residual)
            torch.mm(normed, layer.gate_up.t(), out=gate_up)
            silu_mul.silu_mul(gate_up, activated)
            torch.mm(activated, layer.down.t(), out=hidden)
        rmsnorm.rmsnorm(hidden, self.weights.norm, NORM_EPS, normed, residual)

    def _written(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache as RoPE's kernel writes to it, at [slot, position]: see `Inputs.slots_of`."""
        if not self.page_size:
            return cache
        row, *strides = cache.stride()[1:]
        return cache.as_strided((1, self.max_len, *cache.shape[2:]), (row, row, *strides))

    def _head(self, size: int) -> None:
        """From the normed tokens to the most likely successors of the sampled ones."""
        rows, logits = self.sampled_rows[:size], self.logits[:size]
        torch.index_select(self.normed, 0, self.inputs.sample_rows[:size], out=rows)
        torch.mm(rows, self.weights.lm_head.t(), out=logits)
        torch.argmax(logits, dim=-1, out=self.sampled[:size])

    # ---- graphs

    def capture(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture a CUDA graph of every size; `on_progress` is told how many of how many."""
        parts = [captured for _, captured in self._steps.values()] + list(self._heads.values())
        self.inputs.device.zero_()  # no requests: the warm-up reads and writes nothing of theirs
        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        stream.wait_stream(torch.cuda.current_stream())
        for done, part in enumerate(parts):
            on_progress(done, len(parts))
            graph = torch.cuda.CUDAGraph()
            # All on one stream: operations of the same matrix library's workspace must not overlap.
            with torch.cuda.stream(stream):
                part.launch()  # compiles what it needs, which a capture must not do
                stream.synchronize()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    part.launch()
                graph.replay()  # the first replay uploads the graph, which takes a while
                stream.synchronize()
            part.graph = graph
        torch.cuda.synchronize()
        on_progress(len(parts), len(parts))
