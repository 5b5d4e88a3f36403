"""What of a step is the host's time: all but the GPU's work, the block table, and mapping."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="the engine needs torch")
pytest.importorskip("triton", reason="the kernels need triton")

import numpy as np

from podsim.config import Deployment
from podsim.decode_group import ListedDecodes
from podsim.engine import Engine
from podsim.kv_cache import PagedKVCache
from podsim.model import MODELS
from podsim.scheduler import SCHEDULERS
from podsim.serving import HOST_ROUNDS, Server

FIXED, PER_REQUEST, WITH_PREFILL, MAPPING = 3e-4, 2e-6, 1e-4, 4e-3


class MadeUpSteps:
    """Steps with known parts, on a clock by hand. For two prompts of three, 64 page-groups are
    mapped, as where some slots are used again.
    """

    max_len = 4096
    gpu_seconds, table_seconds = 5e-3, 0.0

    def __init__(self) -> None:
        self.time = self.seconds = 0.0
        self.page_groups = 0

    def now(self) -> float:
        return self.time

    def wait_until(self, time: float) -> None:
        self.time = time

    def begin(self, batch, decodes) -> None:
        begun = [request for request, _ in batch.prefills if not request.num_computed_tokens]
        num_new = sum(request.request_id % 3 > 0 for request in begun)
        self.page_groups, self.seconds = 64 * num_new, MAPPING * num_new

    def run(self, inputs, foresee):
        shape = inputs.shape
        requests = len(shape.prefills) + shape.num_decodes
        host = FIXED + PER_REQUEST * requests + WITH_PREFILL * bool(shape.prefills)
        self.time += self.gpu_seconds + self.seconds + host
        return np.zeros(len(inputs.sample_rows), np.int64)


class MadeUpServer(Server):
    """Without a GPU."""

    def __init__(self) -> None:
        self.deployment = Deployment(token_budget=512, max_num_seqs=48)
        self.num_blocks = 4000
        self.group = None
        self.llama = MadeUpSteps()  # type: ignore[assignment]
        self.model = MODELS["llama-3-8b"]

    def _engine(self, step_time, seed, clock=None) -> Engine:
        steps, kv_cache = MadeUpSteps(), PagedKVCache(self.num_blocks, 16)
        scheduler = SCHEDULERS["sarathi"](kv_cache, self.deployment, ListedDecodes(16), step_time)
        return Engine(
            steps,
            scheduler,
            kv_cache,
            num_slots=48,
            max_model_len=8192,
            vocab_size=100,
            seed=seed,
            clock=steps,
            mapping=steps,
        )


def test_mapping_is_no_part_of_the_hosts_time() -> None:
    """Two of three prompts wait for mapping, which the simulation has by itself."""
    host = MadeUpServer().measure_host_time(lambda what, done, total: None)
    assert host.fixed == pytest.approx(FIXED)
    assert host.per_request == pytest.approx(PER_REQUEST)
    assert host.with_prefill == pytest.approx(WITH_PREFILL)
    assert len(host.mapping_rows) == 16 * HOST_ROUNDS
    assert {page_groups for page_groups, _ in host.mapping_rows} == {64}
    assert {seconds for _, seconds in host.mapping_rows} == {MAPPING}


def test_a_machine_that_is_slow_for_a_while_does_not_count(monkeypatch) -> None:
    """In the first of three rounds all steps take 1 ms more."""
    plain, served = MadeUpServer._waits, []

    def waits(self, lengths):
        served.append(lengths)
        slow = 1e-3 if len(served) <= 1 + 6 else 0.0  # a warm-up, five sizes and prompts
        for wait in plain(self, lengths):
            yield wait._replace(seconds=wait.seconds + slow)

    monkeypatch.setattr(MadeUpServer, "_waits", waits)
    host = MadeUpServer().measure_host_time(lambda what, done, total: None)
    assert host.fixed == pytest.approx(FIXED)
    assert host.per_request == pytest.approx(PER_REQUEST)
    assert host.with_prefill == pytest.approx(WITH_PREFILL)
