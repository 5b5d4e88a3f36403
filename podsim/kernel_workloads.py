"""Batches to compare attention kernels on: of the evaluation of POD-Attention, and random ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.random import Generator

from podsim.kernels.config import AttentionConfig, config_for, is_decode_heavy
from podsim.points import AttentionPoint

HEADS = {"Llama-3-8B": (32, 8), "Llama-2-7B": (32, 32), "Yi-6B": (32, 4), "64/8 heads": (64, 8)}
"""Query heads and KV heads, all of 128 elements."""

CONTEXTS = (4096, 8192, 12288, 16384, 20480)
CHUNK_SIZES = (512, 1024, 2048)
FILLS = (0.9, 0.95, 1.0)
"""The sweep of POD-Attention, Fig. 11: context, chunk size, share of the KV memory in use."""
KV_BYTES = 0.9 * 141e9 - 16e9
"""KV memory of an H200 beside the weights of a model of 8 billion parameters."""
LAYERS = 32
LEAST_SHARE = 0.15
"""Of the serial time that the shorter side has at least."""
POOL_BYTES = 80e9
"""Of K and V in one layer, every request in a slot of the longest one's length."""


@dataclass(frozen=True, slots=True)
class KernelWorkload:
    """A batch for a model's heads."""

    name: str
    num_q_heads: int
    num_kv_heads: int
    batch: AttentionPoint
    head_dim: int = 128

    @property
    def flops(self) -> float:
        """Of the prefill: 4 head_dim for each query head and pair of a token and a key it sees."""
        pairs = sum(n * context - n * (n - 1) / 2 for n, context in self.batch.prefills)
        return 4 * self.head_dim * self.num_q_heads * pairs

    @property
    def kv_bytes(self) -> float:
        """That the decodes read: K and V, 16 bits each."""
        return 4 * self.head_dim * self.num_kv_heads * sum(self.batch.decode_contexts)

    def config(self, strategy: str, kernels: str) -> AttentionConfig:
        """What the engine would choose for this batch."""
        group = self.num_q_heads // self.num_kv_heads
        return config_for(
            strategy,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            kernels=kernels,
            decode_heavy=is_decode_heavy(self.batch.prefills, self.batch.decode_contexts, group),
        )


def uniform_workload(
    heads: tuple[int, int], chunk: int, context: int, decodes: int, decode_context: int
) -> KernelWorkload:
    """A chunk at the end of `context` keys, and decodes of one length."""
    point = AttentionPoint(((chunk, context),), (decode_context,) * decodes, "reference")
    return KernelWorkload(
        f"{heads[0]}/{heads[1]} {chunk}@{context} + {decodes}x{decode_context}", *heads, point
    )


def reference_workloads() -> list[KernelWorkload]:
    """Sixteen batches from decode-heavy to prefill-heavy."""
    sizes = [
        ((32, 8), 1024, 8192, 64, 8192),
        ((32, 8), 2048, 16384, 64, 16384),
        ((32, 8), 1024, 16384, 128, 8192),
        ((32, 8), 512, 4096, 64, 4096),
        ((32, 4), 1024, 8192, 128, 8192),
        ((32, 32), 1024, 8192, 32, 4096),
        ((32, 8), 512, 8192, 32, 8192),
        ((32, 8), 1024, 1024, 64, 2048),
        ((32, 8), 2048, 8192, 32, 8192),
        ((32, 8), 4096, 4096, 64, 4096),
        ((32, 8), 2048, 16384, 48, 16384),
        ((32, 8), 2048, 16384, 16, 16384),
        ((32, 8), 1024, 16384, 16, 16384),
        ((32, 8), 512, 2048, 256, 2048),
        ((64, 8), 1024, 8192, 64, 8192),
    ]
    contexts = np.random.default_rng(1).integers(4096, 12289, size=96)
    uneven = AttentionPoint(((1024, 12288),), tuple(contexts.tolist()), "reference")
    named = KernelWorkload("32/8 1024@12288 + 96x(4096 to 12288)", 32, 8, uneven)
    return [*(uniform_workload(*size) for size in sizes), named]


def serving_workloads() -> list[KernelWorkload]:
    """Batches that an engine forms of Llama-3-8B's requests: chunks and decodes of many sizes."""
    sizes = [
        (512, 512, 8, 1024),
        (512, 2048, 32, 1024),
        (1024, 1024, 64, 1024),
        (256, 4096, 128, 1024),
        (512, 4096, 64, 4096),
        (1024, 8192, 128, 2048),
        (2048, 2048, 256, 1024),
        (2048, 16384, 32, 8192),
    ]
    contexts = np.random.default_rng(5).lognormal(7.0, 0.8, size=96).clip(16, 8192).astype(int)
    chunks = ((300, 300), (150, 150), (574, 2622))
    uneven = AttentionPoint(chunks, tuple(contexts.tolist()), "serving")
    named = KernelWorkload(f"32/8 {uneven.prefills_text} + 96 uneven", 32, 8, uneven)
    return [*(uniform_workload((32, 8), *size) for size in sizes), named]


def sweep_workloads(count: int, seed: int) -> list[KernelWorkload]:
    """Random points of the sweep of POD-Attention, Fig. 11, for four kinds of heads.

    The decode batch fills the KV memory of one H200 to that share, at most 512 requests; points
    where a side would be less than LEAST_SHARE of the serial time are drawn again.
    """
    rng = np.random.default_rng(seed)
    found = [_sweep_point(rng, list(HEADS.values())[i % len(HEADS)]) for i in range(count)]
    return sorted(found, key=lambda workload: workload.name)


def decodes_that_fit(num_kv_heads: int, context: int, fill: float) -> int:
    """Requests whose keys fill that share of the KV memory of one H200; at most 512."""
    token_bytes = 4 * 128 * num_kv_heads * LAYERS
    return min(512, int(KV_BYTES * fill / token_bytes // context))


def _sweep_point(rng: Generator, heads: tuple[int, int]) -> KernelWorkload:
    while True:
        context, chunk = int(rng.choice(CONTEXTS)), int(rng.choice(CHUNK_SIZES))
        decodes = decodes_that_fit(heads[1], context, float(rng.choice(FILLS)))
        prompt = int(rng.integers(1, context // chunk + 1)) * chunk
        workload = uniform_workload(heads, chunk, prompt, decodes, context)
        prefill, decode = workload.flops / 600e12, workload.kv_bytes / 4.35e12
        if min(prefill, decode) >= LEAST_SHARE * (prefill + decode):
            return replace(workload, batch=replace(workload.batch, split="sweep"))


def uneven_workloads(count: int, seed: int) -> list[KernelWorkload]:
    """Batches of 2 to 4 chunks and decodes of heavy-tailed lengths (P99 / P50 of 8 and more)."""
    rng = np.random.default_rng(seed)
    found: list[KernelWorkload] = []
    while len(found) < count:
        heads = list(HEADS.values())[len(found) % len(HEADS)]
        chunks = []
        for _ in range(int(rng.integers(2, 5))):
            tokens = int(rng.integers(100, 1024))
            chunks.append((tokens, tokens + int(rng.integers(0, 12000))))
        median = 2 ** rng.uniform(10, 12)
        lengths = median * rng.lognormal(0, 1.0, size=int(rng.integers(48, 160)))
        contexts = tuple(np.clip(lengths, 1, 65536).astype(int).tolist())
        batch = AttentionPoint(tuple(chunks), contexts, "uneven")
        name = f"{heads[0]}/{heads[1]} {batch.prefills_text} + {len(contexts)} uneven"
        workload = KernelWorkload(name, *heads, batch)
        prefill, decode = workload.flops / 600e12, workload.kv_bytes / 4.35e12
        tail = np.percentile(contexts, 99) / np.percentile(contexts, 50)
        pool = 4 * 128 * heads[1] * batch.num_slots * batch.max_context
        shared = min(prefill, decode) >= LEAST_SHARE * (prefill + decode)
        if tail >= 8 and shared and pool <= POOL_BYTES:
            found.append(workload)
    return found
