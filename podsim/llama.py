"""A Llama forward pass on podsim's kernels, captured as CUDA graphs: what the engine serves with.

A step computes the tokens of a batch, the chunks' first, then one a decode, padded to the size of a
graph (`podsim.graph_sizes`). Its graph reads everything that depends on the batch from one block of
device memory (`podsim.step_buffers`), which the host fills and copies before the replay.

Under tensor parallelism a Llama is one GPU's share, and `podsim.tensor_parallel` tells the others
what the first one computes. Each adds up the embedding and the outputs of attention and MLP with
the others, and gathers all logits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from podsim.cuda_graphs import Captured, capture
from podsim.errors import InputError
from podsim.graph_sizes import graph_size, graph_sizes
from podsim.kernels import rmsnorm, rope, silu_mul
from podsim.kernels.attention import attention
from podsim.kernels.config import AttentionConfig, config_for, is_decode_heavy, kernels_for
from podsim.kernels.plan import CapturedPlan, Plan, Room
from podsim.llama_weights import Weights
from podsim.model import Model
from podsim.step_buffers import StepBuffers
from podsim.step_clocks import StepClocks
from podsim.step_inputs import Foresee, Lengths, StepInputs
from podsim.tensor_parallel import Group

NORM_EPS = 1e-5
ROPE_BASE = 500000.0
MAX_CHUNKS = 16
"""Prefill chunks that a captured step has room for; one with more is launched kernel by kernel."""

PREFILL, DECODE, MIXED, DECODE_HEAVY = KINDS = ("prefill", "decode", "mixed", "decode-heavy")


class _Launch(NamedTuple):
    """Which parts of a set-up model compute a step."""

    kind: int
    """Of KINDS."""
    size: int
    is_crowded: int
    """1 if it has more chunks than a graph has room for."""
    num_sampled: int
    """Padded; 0 if no token comes out."""


class Llama:
    """Weights, KV cache, buffers and graphs of a model that serves.

    `max_tokens` bounds the tokens of a step, `max_requests` the requests that hold a KV slot of
    `max_len` tokens. `attention` is the strategy of mixed batches. `caches` are K and V of each
    layer, [max_requests + 1, max_len, num_kv_heads, head_dim], if they are somebody else's. With a
    `page_size`, K and V are in `num_blocks` blocks of so many tokens, which steps name in
    `new_blocks`, and one more for padding; `max_len` is then a multiple of the page size and no
    more than all blocks hold. With a `group`, `model` and `weights` are this GPU's share. Raises
    InputError if the KV cache does not fit into the memory that is free.
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
        group: Group | None = None,
    ) -> None:
        self.model = model
        self.group = group
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
        # Not with a block table, of which as much is copied as is in use, nor from the memory that
        # processes share, which was not tried.
        self._copies_in_graph = not page_size and group is None
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
        self.inputs = StepBuffers(
            max_tokens, max_requests, self._room, self.device, page_size, table, group
        )
        if page_size:
            self._plan_sizes |= {"page_size": page_size, "block_table": self.inputs.block_table}
        self._workspaces: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self._steps = {
            (kind, size): self._step_of(kind, size, MAX_CHUNKS)
            for kind in self._kinds
            for size in graph_sizes(max_requests if kind == DECODE else max_tokens)
        }
        self._crowded: dict[tuple[str, int], tuple[CapturedPlan, Captured]] = {}
        self._heads = {
            size: Captured(partial(self._head, size)) for size in graph_sizes(max_requests)
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
        self.own_logits = buffer(rows, model.vocab_size)
        self.logits = self.own_logits
        if self.group is not None:
            self._embedding_rows = self.group.part.embedding_rows(self.device)
            self._rows = torch.zeros(tokens, dtype=torch.int32, device=self.device)
            self._gathered = buffer(rows, model.num_logits)
            self._padded_logits = buffer(rows, model.num_logits)
            self.logits = self._padded_logits[:, : self.group.part.model.vocab_size]
        self.sampled = torch.zeros(rows, dtype=torch.int64, device=self.device)
        on_gpu = self.device.type == "cuda"
        self._begun = torch.cuda.Event(enable_timing=True, external=True) if on_gpu else None
        self._end = torch.cuda.Event(enable_timing=True) if on_gpu else None
        self.clocks: StepClocks | None = None
        if on_gpu and (self.group is None or self.group.is_first):
            self.clocks = StepClocks(self._plan_sizes["num_sms"])
        self.sampled_host = torch.zeros(rows, dtype=torch.int64, pin_memory=on_gpu)
        self._sampled_rows: NDArray[np.int64] = self.sampled_host.numpy()
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

    def _step_of(self, kind: str, size: int, max_chunks: int) -> tuple[CapturedPlan, Captured]:
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
        return plan, Captured(partial(self._layers, size, strategy, plan))

    # ---- a step

    def run(self, step: StepInputs, foresee: Foresee | None = None) -> NDArray[np.int64]:
        """Compute a step; the token that follows each of its sample rows, once on the host.

        While the GPU computes, the host makes the lists of the step that `foresee` says is next.
        """
        if len(step.token_ids) > self.max_tokens:
            raise InputError(
                f"a step of {len(step.token_ids)} tokens, but this model was set up for at most "
                f"{self.max_tokens}"
            )
        launch = self._launch_of(step.lengths, len(step.sample_rows))
        plan, _ = self._parts(launch)
        self.inputs.fill(step, plan, launch.size, self._padding_slot)
        self.table_seconds = self.inputs.table_seconds
        if self.group is not None:
            self.group.send_step(*launch)
        self._compute(launch, foresee)
        return self._sampled_rows[: len(step.sample_rows)]

    def follow(self) -> NoReturn:
        """Compute the steps of the group's first rank, until this process is ended."""
        assert self.group is not None
        while True:
            self._compute(_Launch(*self.group.receive_step(len(_Launch._fields))))
            self.group.took(self.gpu_seconds)

    def _compute(self, launch: _Launch, foresee: Foresee | None = None) -> None:
        """The step whose inputs are in the host's block; returns when it is done."""
        self._queue(launch)
        if foresee is not None:
            self._prepare_next(foresee)
        if self._begun and self._end:
            self._end.synchronize()
            self.gpu_seconds = self._begun.elapsed_time(self._end) / 1000

    def _prepare_next(self, foresee: Foresee) -> None:
        """Make the next step's lists, anew whenever another is foreseen, until this step ends."""
        while True:
            if lengths := foresee():
                self._prepare(lengths)
            if self._end is None or self._end.query():
                return
            # For other threads of this process: one maps memory. Not time.sleep(0), which takes
            # 50 us, in which a processor grows slow too.
            os.sched_yield()

    def _prepare(self, lengths: Lengths) -> None:
        if not lengths.num_tokens:
            return
        launch = self._launch_of(lengths, 0)
        if not launch.is_crowded:
            plan, _ = self._parts(launch)
            self.inputs.prepare(plan, lengths)

    def _queue(self, launch: _Launch) -> None:
        if not self._copies_in_graph:
            self.inputs.copy()
        _, layers = self._parts(launch)
        layers.run()
        if n := launch.num_sampled:
            self._heads[n].run()
        if n:
            self.sampled_host[:n].copy_(self.sampled[:n], non_blocking=True)
        if self._end:
            self._end.record()
        if self.clocks is not None:
            self.clocks.end()

    def _launch_of(self, lengths: Lengths, num_sampled: int) -> _Launch:
        return _Launch(
            KINDS.index(self._kind(lengths)),
            graph_size(lengths.num_tokens),
            int(len(lengths.chunks) > MAX_CHUNKS),
            graph_size(num_sampled),
        )

    def _parts(self, launch: _Launch) -> tuple[CapturedPlan, Captured]:
        key = (KINDS[launch.kind], launch.size)
        if not launch.is_crowded:
            return self._steps[key]
        if key not in self._crowded:
            self._crowded[key] = self._step_of(*key, self.max_requests)
        return self._crowded[key]

    def _kind(self, lengths: Lengths) -> str:
        if not (lengths.chunks and lengths.decodes):
            return PREFILL if lengths.chunks else DECODE
        if DECODE_HEAVY not in self._kinds:
            return MIXED
        chunks = [(num_tokens, context) for num_tokens, context, _ in lengths.chunks]
        contexts = [context for context, _ in lengths.decodes]
        group = self.model.num_q_heads // self.model.num_kv_heads
        return DECODE_HEAVY if is_decode_heavy(chunks, contexts, group) else MIXED

    def _layers(self, size: int, strategy: str, plan: CapturedPlan) -> None:
        """From the token ids to the final norm of every token."""
        if self._copies_in_graph:
            self.inputs.copy()  # launched with the rest, in a fraction of the time
        if self.clocks is not None:
            self.clocks.begin()
        if self._begun is not None:
            self._begun.record()  # in the graph: launching it is the host's time, not the GPU's
        inputs, n = self.inputs, size
        positions, slots = inputs.positions[:n], inputs.slots[:n]
        residual, hidden, normed = self.residual[:n], self.hidden[:n], self.normed[:n]
        qkv, q, attended = self.qkv[:n], self.q[:n], self.attended[:n]
        gate_up, activated = self.gate_up[:n], self.activated[:n]
        self._embed(inputs.token_ids[:n], residual)
        # With slots of one row each the launcher asks for a table of one row; its kernel
        # reads on, in the table of all positions, as far as these go.
        cos_sin = self.cos_sin[:1] if self.page_size else self.cos_sin
        carried = None  # the first norm finds the embedding in the residual itself
        for layer, (k_cache, v_cache) in zip(self.weights.layers, self.caches, strict=True):
            source = residual if carried is None else hidden
            rmsnorm.rmsnorm(source, layer.attention_norm, NORM_EPS, normed, carried)
            carried = residual
            torch.mm(normed, layer.qkv.t(), out=qkv)
            written = self._written(k_cache), self._written(v_cache)
            rope.rope_and_cache(qkv, positions, slots, cos_sin, *written, q)
            attention(strategy, q, k_cache, v_cache, attended, plan)
            torch.mm(attended.view(n, -1), layer.output.t(), out=hidden)
            self._add_up(hidden)
            rmsnorm.rmsnorm(hidden, layer.mlp_norm, NORM_EPS, normed, residual)
            torch.mm(normed, layer.gate_up.t(), out=gate_up)
            silu_mul.silu_mul(gate_up, activated)
            torch.mm(activated, layer.down.t(), out=hidden)
            self._add_up(hidden)
        rmsnorm.rmsnorm(hidden, self.weights.norm, NORM_EPS, normed, residual)

    def _embed(self, token_ids: torch.Tensor, out: torch.Tensor) -> None:
        rows = token_ids
        if self.group is not None:
            rows = self._rows[: len(token_ids)]
            torch.index_select(self._embedding_rows, 0, token_ids, out=rows)
        torch.index_select(self.weights.embedding, 0, rows, out=out)
        self._add_up(out)

    def _add_up(self, partial_sums: torch.Tensor) -> None:
        if self.group is not None:
            self.group.all_reduce(partial_sums)

    def _written(self, cache: torch.Tensor) -> torch.Tensor:
        """A cache as RoPE's kernel writes to it, at [slot, position] of `StepBuffers.slots_of`."""
        return cache.flatten(0, 1).unsqueeze(1) if self.page_size else cache

    def _head(self, size: int) -> None:
        """From the normed tokens to the most likely successors of the sampled ones."""
        rows, logits = self.sampled_rows[:size], self.own_logits[:size]
        torch.index_select(self.normed, 0, self.inputs.sample_rows[:size], out=rows)
        torch.mm(rows, self.weights.lm_head.t(), out=logits)
        if self.group is not None:
            self._gather_logits(size, self.group)
        torch.argmax(self.logits[:size], dim=-1, out=self.sampled[:size])

    def _gather_logits(self, size: int, group: Group) -> None:
        """From each rank's [size, share] to [size, vocabulary]."""
        ranks, share = group.part.size, self.model.vocab_size
        gathered = self._gathered.view(-1, share)[: ranks * size]
        group.all_gather(gathered, self.own_logits[:size])
        target = self._padded_logits[:size].view(size, ranks, share)
        target.copy_(gathered.view(ranks, size, share).transpose(0, 1))

    # ---- graphs

    def capture(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Capture a CUDA graph of every size; `on_progress` is told how many of how many."""
        parts = [captured for _, captured in self._steps.values()] + list(self._heads.values())
        self.inputs.device.zero_()  # no requests: the warm-up reads and writes nothing of theirs
        # NCCL's own threads may call CUDA meanwhile: only this thread is held to the rules then.
        capture(parts, "global" if self.group is None else "thread_local", on_progress)
