"""A tiny model shared by processes on the CPU: what tests/test_kernels_tensor_parallel.py asks of
it. Everything here also computes the same with a model in one process.
"""

from __future__ import annotations

from itertools import count
from unittest import mock

import numpy as np
import torch

from podsim.block_tables import PagedBlocks
from podsim.config import Deployment
from podsim.decode_group import ListedDecodes
from podsim.engine import Engine
from podsim.kv_cache import PagedKVCache
from podsim.llama import Llama
from podsim.llama_weights import ModelPart, random_weights
from podsim.ranks import Rank
from podsim.request import Request
from podsim.scheduler import SCHEDULERS
from podsim.tensor_parallel import Group, join_group
from tests.test_kernels_llama import MODEL, Served

SIZES = {"max_tokens": 64, "max_requests": 4, "max_len": 128, "num_sms": 4}
DEPLOYMENT = Deployment(token_budget=48, max_num_seqs=4, max_model_len=128, attention="pod")
PROMPTS, OUTPUTS = (40, 9, 60), (3, 4, 2)


def tiny_llama(dtype: torch.dtype, group: Group | None = None, num_blocks: int = 0) -> Llama:
    """The model, or the share of a rank, of the same weights; with `num_blocks`, KV is paged."""
    part = ModelPart(MODEL) if group is None else group.part
    weights = random_weights(MODEL, 0, "cpu", dtype, part)
    paged = {"page_size": DEPLOYMENT.block_size, "num_blocks": num_blocks} if num_blocks else {}
    return Llama(part.share, weights, attention="pod", group=group, **SIZES, **paged)


def serve_questions(
    rank: Rank,
    meeting: str,
    dtype: torch.dtype = torch.bfloat16,
    failing_step: int | None = None,
    num_blocks: int = 0,
) -> None:
    """The first rank answers what a function of a Llama gives; the others follow it, until their
    step of the number `failing_step`.
    """
    torch.set_num_threads(1)
    group = join_group(rank, MODEL, meeting, backend="gloo")
    llama = tiny_llama(dtype, group, num_blocks)
    if not group.is_first:
        _fail_in_step(llama, failing_step)
        llama.follow()
    for question in rank.questions():
        rank.answer(question(llama))


def _fail_in_step(llama: Llama, number: int | None) -> None:
    steps, queue = count(1), llama._queue

    def queue_or_fail(launch):
        if next(steps) == number:
            raise RuntimeError("the GPU has fallen off the bus")
        queue(launch)

    llama._queue = queue_or_fail  # type: ignore[method-assign]


def logits_of_steps(llama: Llama) -> list[torch.Tensor]:
    """[sampled, vocabulary] of a prefill, a chunked one, mixed steps and decodes; each is compared
    with the float32 reference there.
    """
    served = Served([50, 20, 40], "cpu")
    served.llama = llama
    logits = []
    for num_sampled, chunks, decodes in (
        (0, [(0, 37)], []),
        (2, [(0, 13), (1, 20)], []),
        (2, [(2, 30)], [0, 1]),
        (3, [(2, 10)], [1, 0]),
        (3, [], [2, 0, 1]),
    ):
        served.step(chunks, decodes)
        logits.append(llama.logits[:num_sampled].float())
    if llama.group is not None:
        assert len(llama.group.least_seconds([0.0] * len(logits))) == len(logits)
    return logits


class SteppedClock:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        self.time += 0.01
        return self.time

    def wait_until(self, time: float) -> None:
        self.time = max(self.time, time)


class KeptTokens(Engine):
    """Keeps the tokens of finished requests."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.tokens: dict[int, list[int]] = {}

    def _finish(self, request: Request, end: float) -> None:
        self.tokens[request.request_id] = self._tokens[request].tolist()
        super()._finish(request, end)


def tokens_of_a_trace(llama: Llama) -> tuple[dict[int, list[int]], int]:
    """Of each request, prompt and output, served in continuous batches; and the number of steps."""
    kv_cache = PagedKVCache(1000, DEPLOYMENT.block_size)
    if llama.page_size:
        kv_cache = _shuffled_blocks(llama)
    engine = KeptTokens(
        llama,
        SCHEDULERS[DEPLOYMENT.scheduler](
            kv_cache, DEPLOYMENT, ListedDecodes(kv_cache.block_size), lambda shape: 0.0
        ),
        kv_cache,
        num_slots=DEPLOYMENT.max_num_seqs,
        max_model_len=DEPLOYMENT.max_model_len,
        vocab_size=MODEL.vocab_size,
        seed=0,
        clock=SteppedClock(),
    )
    rows = zip(PROMPTS, OUTPUTS, strict=True)
    requests = [Request(i, 0.02 * i, *lengths) for i, lengths in enumerate(rows)]
    recording = engine.serve(requests)
    kinds = {(bool(s.prefills), bool(s.num_decodes)) for s in recording.shapes}
    assert kinds == {(True, False), (True, True), (False, True)}
    if llama.group is not None:
        seconds = llama.group.least_seconds(recording.gpu_seconds)
        assert len(seconds) == len(recording.shapes)
    return engine.tokens, len(recording.shapes)


def _shuffled_blocks(llama: Llama) -> PagedBlocks:
    kv_cache = PagedBlocks(llama.num_blocks, llama.page_size, DEPLOYMENT.max_num_seqs)
    kv_cache._num_used_once = llama.num_blocks
    order = np.random.default_rng(3).permutation(llama.num_blocks)
    kv_cache._freed.extend(order.tolist())
    return kv_cache


def tokens_of_many_chunks(llama: Llama) -> np.ndarray:
    """A step with more chunks than its graph has room for."""
    served = Served([2, 3, 4], "cpu")
    served.llama = llama
    with mock.patch("podsim.llama.MAX_CHUNKS", 2):
        served.step(chunks=[(0, 2), (1, 3), (2, 4)])
    if llama.group is not None:
        llama.group.least_seconds([0.0])
    return llama.sampled_host[:3].numpy().copy()
