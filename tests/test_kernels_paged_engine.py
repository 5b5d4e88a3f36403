"""One small model served through contiguous slots, mapped slots and KV blocks: the same tokens."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import mapping_calls
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the forward pass needs torch")
pytest.importorskip("triton", reason="the kernels need triton")

from podsim import serving  # noqa: E402
from podsim.batch import Chunk  # noqa: E402
from podsim.block_tables import PagedBlocks  # noqa: E402
from podsim.config import Deployment  # noqa: E402
from podsim.decode_group import ListedDecodes  # noqa: E402
from podsim.engine import Engine  # noqa: E402
from podsim.errors import InputError  # noqa: E402
from podsim.kv_cache import PagedKVCache  # noqa: E402
from podsim.llama import Llama  # noqa: E402
from podsim.llama_weights import random_weights  # noqa: E402
from podsim.page_groups import PageGroups  # noqa: E402
from podsim.request import Request  # noqa: E402
from podsim.scheduler import SCHEDULERS  # noqa: E402
from podsim.serving import Server  # noqa: E402
from podsim.step_inputs import StepInputs  # noqa: E402
from podsim.validation import Recorded, read_recording  # noqa: E402
from podsim.vattention import VAttentionCache  # noqa: E402
from podsim.virtual_kv import StepMapping, VirtualKV  # noqa: E402
from podsim.workload import Trace  # noqa: E402
from tests.checked_driver import PAGE, CheckedDriver  # noqa: E402
from tests.test_kernels_llama import MODEL, TOLERANCE, reference_logits  # noqa: E402

# The interpreter of Triton before 3.9 converts arrays in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

ONE_LAYER = replace(MODEL, num_layers=1)
BLOCK = 16
MAX_LEN = 96
SIZES = {"max_tokens": 48, "max_requests": 4, "max_len": MAX_LEN, "num_sms": 4}


def deployment(num_blocks, **options):
    return Deployment(
        token_budget=48,
        max_num_seqs=4,
        max_model_len=MAX_LEN,
        num_blocks=num_blocks,
        block_size=BLOCK,
        watermark=0.0,
        **options,
    )


class SteppedClock:
    """Moves when it is asked, by the same every time: batches do not depend on the machine."""

    def __init__(self):
        self.time = 0.0

    def now(self):
        self.time += 0.01
        return self.time

    def wait_until(self, time):
        self.time = max(self.time, time)


class Checked:
    """A forward pass that keeps what went in and came out, and that checks the table it reads."""

    def __init__(self, llama, kv_cache):
        self.llama, self.kv_cache = llama, kv_cache
        self.steps, self.logits = [], []
        self.num_reused = 0
        self._seen = set()

    @property
    def gpu_seconds(self):
        return self.llama.gpu_seconds

    @property
    def table_seconds(self):
        return self.llama.table_seconds

    def run(self, inputs, foresee):
        if isinstance(self.kv_cache, PagedBlocks):
            self._check_blocks(inputs)
        sampled = self.llama.run(inputs, foresee).copy()
        self.steps.append((inputs.shape, sampled.tolist()))
        self.logits.append(self.llama.logits[: len(sampled)].float().cpu())
        return sampled

    def _check_blocks(self, inputs):
        cache = self.kv_cache
        held = [block for blocks in cache._blocks.values() for block in blocks]
        assert len(held) == len(set(held)) == cache.num_used_blocks, "a block used twice"
        assert set(held) <= set(range(cache.num_blocks))
        new = [block for entry in inputs.new_blocks for block in entry.blocks]
        self.num_reused += len(self._seen.intersection(new))
        self._seen.update(new)


def serve(requests, options, kv_cache, llama, mapping=None):
    """The tokens of each request, and the forward pass with what it kept."""
    forward = Checked(llama, kv_cache)
    scheduler = SCHEDULERS[options.scheduler](
        kv_cache, options, ListedDecodes(kv_cache.block_size), lambda shape: 0.0
    )
    tokens = {}

    class Kept(Engine):
        def _finish(self, request, end):
            tokens[request.request_id] = self._tokens[request].tolist()
            super()._finish(request, end)

    engine = Kept(
        forward,
        scheduler,
        kv_cache,
        num_slots=options.max_num_seqs,
        max_model_len=MAX_LEN,
        vocab_size=MODEL.vocab_size,
        seed=0,
        clock=SteppedClock(),
        mapping=mapping,
    )
    recording = engine.serve([Request(i, *row) for i, row in enumerate(requests)])
    assert len(recording.table_seconds) == len(recording.shapes)
    return tokens, forward, recording


def contiguous(requests, options, weights, model=ONE_LAYER):
    llama = Llama(model, weights, attention=options.attention, **SIZES)
    return serve(requests, options, PagedKVCache(options.num_blocks, BLOCK), llama)


def paged(requests, options, weights, shuffle=None):
    cache = PagedBlocks(options.num_blocks, BLOCK, options.max_num_seqs)
    if shuffle is not None:
        cache._num_used_once = options.num_blocks
        cache._freed.extend(np.random.default_rng(shuffle).permutation(options.num_blocks).tolist())
    llama = Llama(
        ONE_LAYER,
        weights,
        attention=options.attention,
        page_size=BLOCK,
        num_blocks=options.num_blocks,
        **SIZES,
    )
    return serve(requests, options, cache, llama)


def vattention(requests, options, weights, device, model=ONE_LAYER):
    """One page-group of the checked driver in each tensor a block."""
    groups = PageGroups.of(model, PAGE, options.kv_tensors)
    kv = VirtualKV(
        CheckedDriver(),
        model,
        groups,
        num_slots=4,
        min_len=MAX_LEN,
        num_blocks=options.num_blocks,
        device=device,
    )
    cache = VAttentionCache(options.num_blocks, groups, 4)
    llama = Llama(model, weights, attention=options.attention, caches=kv.caches, **SIZES)
    mapping = StepMapping(kv, cache, options)
    served = serve(requests, options, cache, llama, mapping)
    mapping.close()
    return served


REQUESTS = [(0.0, 30, 5), (0.0, 50, 4), (0.01, 17, 3), (0.02, 33, 2)]
"""Prompts of one chunk and of several, and outputs that begin new blocks."""
FEW, ENOUGH = 6, 20


@pytest.fixture(scope="module")
def weights(device):
    return random_weights(ONE_LAYER, 0, device)


@pytest.fixture(scope="module")
def with_few_blocks(weights):
    """Served from contiguous slots, with a preemption."""
    return contiguous(REQUESTS, deployment(FEW), weights)


def require_same(ours, theirs):
    """Tokens, steps and even logits: the same tiles and splits are computed in the same order."""
    (tokens, blocks, again), (others, plain, recording) = ours, theirs
    assert tokens == others
    assert sorted(tokens) == list(range(len(REQUESTS)))
    assert blocks.steps == plain.steps
    for ours, theirs in zip(blocks.logits, plain.logits, strict=True):
        assert torch.equal(ours, theirs)
    assert list(again.log.preempted_id) == list(recording.log.preempted_id)


def test_blocks_give_the_tokens_of_slots_and_freed_ones_are_used_again(with_few_blocks, weights):
    served = paged(REQUESTS, deployment(FEW), weights, shuffle=3)
    require_same(served, with_few_blocks)
    _, blocks, recording = served
    assert len(recording.log.preempted_id)
    assert blocks.num_reused
    assert blocks.kv_cache.num_used_blocks == 0
    assert min(recording.table_seconds) > 0 == max(with_few_blocks[2].table_seconds)
    kinds = {(bool(shape.prefills), bool(shape.num_decodes)) for shape, _ in blocks.steps}
    assert kinds == {(True, False), (False, True), (True, True)}


def test_mapped_slots_give_the_same_tokens(with_few_blocks, weights, device):
    if device == "cuda":
        pytest.skip("the checked driver maps host memory; CUDA's own is in same_tokens.py")
    options = deployment(FEW, kv="vattention", mapping="synchronous")
    require_same(vattention(REQUESTS, options, weights, device), with_few_blocks)


@pytest.mark.parametrize("attention", ["serial", "pod"])
def test_slices_of_tensors_over_all_layers_give_the_same_tokens(attention, device):
    if device == "cuda":
        pytest.skip("the checked driver maps host memory; CUDA's own is in same_tokens.py")
    two_layers = replace(MODEL, num_layers=2)
    weights = random_weights(two_layers, 1, device)
    requests = [(0.0, 30, 3), (0.0, 17, 2)]
    options = deployment(2 * ENOUGH, attention=attention, mapping="synchronous")
    sliced = replace(options, kv="vattention", kv_tensors="sliced")
    theirs = contiguous(requests, options, weights, two_layers)
    ours = vattention(requests, sliced, weights, device, two_layers)
    assert ours[0] == theirs[0]
    for one, other in zip(ours[1].logits, theirs[1].logits, strict=True):
        assert torch.equal(one, other)


def test_pod_over_blocks_gives_the_tokens_of_slots(weights):
    options = deployment(ENOUGH, attention="pod")
    require_same(
        paged(REQUESTS, options, weights, shuffle=5), contiguous(REQUESTS, options, weights)
    )


class Stepped:
    """Requests with known tokens in shuffled blocks, step by step, against float32."""

    def __init__(self, weights, lengths, page_size=BLOCK, captured=False, **sizes):
        self.weights = weights
        num_blocks = 4 * MAX_LEN // min(page_size, 32)
        per_slot = -(-MAX_LEN // page_size)
        self.llama = Llama(
            ONE_LAYER,
            weights,
            page_size=page_size,
            num_blocks=num_blocks,
            **(SIZES | {"attention": "serial", "max_len": per_slot * page_size} | sizes),
        )
        self.cache = PagedBlocks(num_blocks, page_size, 4)
        self.cache._num_used_once = num_blocks
        order = np.random.default_rng(7).permutation(num_blocks)
        self.cache._freed.extend(order.tolist())
        if captured:
            self.llama.capture()
        rng = np.random.default_rng(0)
        self.requests = [Request(i, 0.0, n, 10) for i, n in enumerate(lengths)]
        self.tokens = {r: rng.integers(300, size=120).astype(np.int32) for r in self.requests}
        for request in self.requests:
            assert self.cache.start(request, request.num_prompt_tokens, 0)

    def step(self, chunks=(), decodes=()):
        chunks = [Chunk(self.requests[i], n) for i, n in chunks]
        decodes = [self.requests[i] for i in decodes]
        for request in decodes:
            if request.num_computed_tokens % self.cache.block_size == 0:
                assert self.cache.take(1)
        new_blocks = self.cache.allot(chunks, decodes)
        slot = {r: self.cache.slot_of(r) for r in self.requests}
        latest = {r: self.tokens[r][r.num_computed_tokens] for r in decodes}
        inputs = StepInputs.of(chunks, decodes, self.tokens, latest, slot, new_blocks)
        sampled = self.llama.run(inputs).copy()
        logits = self.llama.logits[: len(sampled)].float()
        done = [r for r, n in chunks if n == r.num_uncomputed_tokens] + decodes
        for request, n in [*chunks, *((r, 1) for r in decodes)]:
            request.num_computed_tokens += n
        for request, row in zip(done, logits, strict=True):
            known = self.tokens[request][: request.num_computed_tokens]
            expected = reference_logits(self.weights, known)[-1]
            assert (row - expected).norm() / expected.norm() < TOLERANCE
            request.num_emitted_tokens += 1

    def every_kind_of_step(self):
        self.step(chunks=[(0, 37)])  # a part of a prompt
        self.step(chunks=[(0, 13), (1, 29)])  # the rest of it, and a whole one
        self.step(chunks=[(2, 30)], decodes=[0, 1])
        self.step(chunks=[(2, 31)], decodes=[1, 0])  # then decodes begin blocks
        for _ in range(2):
            self.step(decodes=[2, 0, 1])


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_logits_from_shuffled_blocks_of_any_size(page_size, weights):
    Stepped(weights, [50, 29, 61], page_size).every_kind_of_step()


@pytest.mark.parametrize("attention", ["streams", "unified", "pod"])
def test_logits_of_every_strategy(attention, weights):
    Stepped(weights, [50, 29, 61], attention=attention).every_kind_of_step()


def test_graphs_follow_the_table_that_changes_under_them(weights, device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    for attention in ("serial", "pod"):
        stepped = Stepped(weights, [50, 29, 61], attention=attention, captured=True)
        stepped.every_kind_of_step()


def test_plans_of_graphs_read_the_one_table_of_the_inputs(weights):
    """What a captured graph holds: addresses. Steps change what is there, never where it is."""
    stepped = Stepped(weights, [50, 29, 61])
    plans = [plan for plan, _ in stepped.llama._steps.values()]
    table = stepped.llama.inputs.block_table
    addresses = [plan.block_table.data_ptr() for plan in plans]
    before = table.clone()
    stepped.every_kind_of_step()
    assert {table.data_ptr(), *addresses} == {table.data_ptr()}
    assert [plan.block_table.data_ptr() for plan, _ in stepped.llama._steps.values()] == addresses
    assert not torch.equal(before, table)
    for request in stepped.requests:
        blocks = stepped.cache.blocks_of(request)
        row = table[stepped.cache.slot_of(request), : len(blocks)]
        assert row.tolist() == list(blocks)


def test_blocks_that_the_kernels_do_not_have_are_refused():
    with pytest.raises(InputError, match=r"block_size is 24.* blocks of 16, 32, 64, 128, 256 "):
        Server(Deployment(kv="paged", block_size=24), 100)


def test_slots_longer_than_all_blocks_are_refused(weights):
    with pytest.raises(ValueError, match="max_len 96 is more than 5 blocks hold"):
        Llama(ONE_LAYER, weights, attention="serial", page_size=BLOCK, num_blocks=5, **SIZES)


def pretend(monkeypatch):
    """A server of ONE_LAYER on the CPU."""
    monkeypatch.setattr(serving, "HOST_STEPS", 3)
    monkeypatch.setattr(serving, "PREFILL_REQUESTS", 1)
    monkeypatch.setattr(serving, "PREFILL_OUTPUTS", 1)
    monkeypatch.setattr(serving, "require_gpu", lambda gpu: None)
    monkeypatch.setattr(serving, "model_named", lambda name: ONE_LAYER)
    monkeypatch.setattr(
        serving, "random_weights", lambda *args, **named: random_weights(ONE_LAYER, 0, "cpu")
    )
    machine = dict.fromkeys(("device_name", "driver", "torch", "triton"), "made up")
    monkeypatch.setattr(serving, "provenance", lambda model: machine)
    monkeypatch.setattr(serving, "gpu_samples", lambda now: nullcontext([]))
    monkeypatch.setattr(Llama, "capture", lambda self, told: None)
    monkeypatch.setattr(serving, "KernelStarts", lambda: SimpleNamespace(seconds=starts.pop))
    starts = [0.9e-6, 1.1e-6] * 10
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(multi_processor_count=4)
    )


def test_a_server_over_blocks_records_what_the_simulator_takes(monkeypatch, tmp_path, device):
    """Set-up, host time, serving and recording, as `podsim validate --kv paged` has them."""
    if device == "cuda":
        pytest.skip("`podsim validate` itself runs there")
    pretend(monkeypatch)
    options = replace(deployment(num_blocks=5), kv="paged", max_num_seqs=2)
    server = Server(options, 200)
    assert server.llama.max_len == 5 * BLOCK, "no longer than all blocks together"
    served = server.serve(Trace.of((0.0, 30, 4), (0.0, 40, 3), (0.0, 90, 3)), lambda shape: 0.0)
    assert list(served.recording.log.refused) == [2]
    recorded = Recorded.of(served.recording, options, served.engine({}), "made up")
    recorded.save(tmp_path)
    again = read_recording(tmp_path)
    assert (again.steps["table_seconds"] > 0).all()
    assert (again.steps["table_seconds"] < again.steps["duration"]).all()
    assert again.deployment.num_blocks == 5
    assert again.engine["kernel_starts"] == [1.1e-6, 0.9e-6]
    assert [size for size, _ in served.host_time.rows] == [1, 2]


def test_every_mapping_call_of_a_server_is_timed(monkeypatch, device):
    """Two requests, which begin a block each in both tensors: the calls of each way of sampling."""
    if device == "cuda":
        pytest.skip("benchmarks/same_tokens.py itself runs there")
    pretend(monkeypatch)
    monkeypatch.setattr(serving, "CudaDriver", CheckedDriver)
    monkeypatch.setattr(
        serving, "VirtualKV", lambda *args, **named: VirtualKV(*args, device="cpu", **named)
    )
    asked = []
    for name in mapping_calls.SAMPLINGS:
        monkeypatch.setitem(
            mapping_calls.SAMPLINGS,
            name,
            lambda now, name=name: asked.append(name) or nullcontext([]),
        )
    options = replace(deployment(num_blocks=2), kv="vattention", max_num_seqs=2)
    server = Server(options, 60)
    driver = server.virtual_kv.memory.driver
    trace = Trace.of((0.0, 20, 3), (0.0, 15, 2))
    others = SimpleNamespace(virtual_kv=None)
    calls = mapping_calls.timed_calls({"paged": others, "vattention": server}, trace, rounds=2)
    assert asked == [*mapping_calls.SAMPLINGS] * 2
    assert server.virtual_kv.memory.driver is driver, "and it is timed no more"
    of_one = calls[(calls["sampling"] == "none") & (calls["round"] == 1)]
    counts = of_one.groupby(["thread", "api"]).size().to_dict()
    steps = counts.pop(("main", "step"))
    assert counts == {("main", "map"): 4, ("main", "set_access"): 4, ("main", "unmap"): 4}
    assert (calls["seconds"] >= 0).all()
    summary = mapping_calls.calls_summary(calls)
    assert summary.loc[("vattention", "none", "main", "map"), "calls"] == 4
    assert summary.loc[("vattention", "steady", "main", "step"), "calls"] == steps
    server.close()
