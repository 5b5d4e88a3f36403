"""vAttention's memory over a driver that checks every call, as CUDA's would, on the CPU."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from podsim import measure_mapping
from podsim.batch import Batch, Chunk
from podsim.config import Deployment
from podsim.decode_group import ListedDecodes
from podsim.errors import InputError
from podsim.kv_cache import page_groups_for
from podsim.mapping_thread import MappingThread
from podsim.memory_view import tensor_at
from podsim.model import MODELS, Model
from podsim.page_groups import PageGroups
from podsim.request import Request
from podsim.vattention import Change, VAttentionCache
from podsim.virtual_kv import StepMapping, VirtualKV, require_virtual_memory
from podsim.virtual_memory import OutOfDeviceMemory, VirtualMemory
from tests.checked_driver import PAGE, CheckedDriver


class SlowDriver(CheckedDriver):
    """A call that makes memory accessible takes `seconds`."""

    seconds = 0.0

    def set_access(self, address: int, size: int) -> None:
        time.sleep(self.seconds)
        super().set_access(address, size)


GROUPS = PageGroups(page_group=PAGE, num_tensors=4, token_bytes=256)


def memory(driver: CheckedDriver, num_blocks: int = 6) -> VirtualMemory:
    return VirtualMemory(driver, GROUPS, num_slots=3, blocks_per_slot=4, num_blocks=num_blocks)


def test_a_block_is_a_page_group_in_every_tensor() -> None:
    driver = CheckedDriver()
    virtual = memory(driver)
    virtual.apply([Change(1, 0, 2, maps=True)])
    slot = 4 * PAGE
    wanted = {base + slot + block * PAGE for base in virtual.tensors for block in (0, 1)}
    assert set(driver.mapped) == driver.accessible == wanted
    assert virtual.num_free_page_groups == (6 - 2) * 4


def test_everything_is_given_back() -> None:
    driver = CheckedDriver()
    virtual = memory(driver)
    virtual.apply([Change(0, 0, 3, maps=True), Change(2, 0, 1, maps=True)])
    virtual.close()
    assert not driver.holds_anything()


def test_ten_thousand_cycles_leak_nothing() -> None:
    driver = CheckedDriver()
    virtual = memory(driver)
    handles = set(driver.handles)
    for cycle in range(10_000):
        slot = cycle % 3
        grown = [Change(slot, block, block + 1, maps=True) for block in range(cycle % 4 + 1)]
        virtual.apply([*grown, Change(slot, 0, cycle % 4 + 1, maps=False)])
    assert driver.handles == handles
    assert not driver.mapped
    assert virtual.num_free_page_groups == 24


def test_too_little_memory_at_the_start_is_said_and_nothing_is_held() -> None:
    driver = CheckedDriver(pages=10)
    with pytest.raises(InputError, match="6 KV blocks need"):
        memory(driver)
    assert not driver.holds_anything()


def test_out_of_memory_leaves_the_cache_usable() -> None:
    driver = CheckedDriver()
    virtual = memory(driver)
    virtual.apply([Change(0, 0, 4, maps=True)])
    with pytest.raises(OutOfDeviceMemory, match=r"slot 1 is to grow by 3 blocks.*8 are free"):
        virtual.apply([Change(1, 0, 3, maps=True)])
    virtual.apply([Change(1, 0, 2, maps=True), Change(0, 2, 4, maps=False)])
    assert (virtual.mapped_blocks(0), virtual.mapped_blocks(1)) == (2, 2)


@pytest.mark.parametrize("call", ["map", "set_access"])
def test_a_call_that_fails_half_way_is_undone(call: str) -> None:
    driver = CheckedDriver()
    virtual = memory(driver)
    virtual.apply([Change(0, 0, 1, maps=True)])
    before = dict(driver.mapped)
    driver.fail_next = call
    with pytest.raises(OutOfDeviceMemory):
        virtual.apply([Change(0, 1, 3, maps=True)])
    assert driver.mapped == before
    assert driver.accessible == set(before)
    assert virtual.mapped_blocks(0) == 1
    virtual.apply([Change(0, 1, 3, maps=True)])


def test_page_groups_that_the_driver_cannot_map_are_named() -> None:
    groups = PageGroups(page_group=1024, num_tensors=2, token_bytes=64)
    with pytest.raises(InputError, match="page_group is 1 KB, but this driver maps multiples of 4"):
        VirtualMemory(CheckedDriver(), groups, 1, 1, 1)


def test_the_calls_are_timed_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_mapping, "CALLS", 64)
    driver = CheckedDriver()
    rows = measure_mapping._rows(driver, PAGE)  # type: ignore[arg-type]
    assert not driver.holds_anything()
    counts: dict[object, list[object]] = {}
    for row in rows:
        assert row["time_p10_us"] <= row["time_us"] <= row["time_p90_us"]  # type: ignore[operator]
        counts.setdefault(row["api"], []).append(row["page_groups"])
    ranges = list(measure_mapping.RANGES)
    assert counts["set_access"] == counts["unmap"] == ranges
    assert counts["create"] == counts["map"] == counts["release"] == [1]
    assert counts["reserve"] == counts["free_address"] == [1, 64]


# --------------------------------------------------------------------------------- as tensors


def test_a_view_of_memory_is_that_memory() -> None:
    buffer = (ctypes.c_float * 12)(*range(12))
    view = tensor_at(ctypes.addressof(buffer), (3, 2), (4, 1), torch.float32, "cpu")
    assert view.tolist() == [[0, 1], [4, 5], [8, 9]]
    view[1, 1] = 77
    assert buffer[5] == 77


TINY = Model(
    name="tiny",
    num_layers=3,
    hidden_size=64,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    vocab_size=64,
    max_model_len=512,
)


@pytest.fixture(params=["per_layer", "sliced"])
def kv(request: pytest.FixtureRequest) -> Iterator[VirtualKV]:
    groups = PageGroups.of(TINY, PAGE, request.param)
    made = VirtualKV(
        CheckedDriver(), TINY, groups, num_slots=2, min_len=100, num_blocks=20, device="cpu"
    )
    yield made
    made.close()


def test_tensors_of_both_layouts_hold_what_is_written(kv: VirtualKV) -> None:
    """Every value of every layer is its own, and lies in mapped pages."""
    driver, tokens = kv.memory.driver, kv.page_groups.tokens_per_block
    assert isinstance(driver, CheckedDriver)
    kv.memory.apply([Change(1, 0, 1, maps=True)])
    number = 0
    for k, v in kv.caches:
        for part in (k, v):
            assert part.shape == (3, kv.max_len, 2, 16)
            part[1, :tokens] = number
            first, last = part[1, 0, 0, 0].data_ptr(), part[1, tokens - 1, 1, 15].data_ptr()
            assert first // PAGE * PAGE in driver.accessible
            assert last // PAGE * PAGE in driver.accessible
            number += 1
    found = [part[1, :tokens].unique().tolist() for pair in kv.caches for part in pair]
    assert found == [[n] for n in range(6)]


def test_the_padding_slot_is_always_there(kv: VirtualKV) -> None:
    driver = kv.memory.driver
    assert isinstance(driver, CheckedDriver)
    for k, v in kv.caches:
        for part in (k, v):
            assert part[2, 0, 0, 0].data_ptr() // PAGE * PAGE in driver.accessible


# ------------------------------------------------------------------------------ in the background


def test_changes_are_done_in_order_and_waited_for() -> None:
    done: list[Change] = []
    allowed = threading.Event()

    def apply(changes: object) -> None:
        allowed.wait()
        done.extend(changes)  # type: ignore[call-overload]

    thread = MappingThread(apply)
    changes = [Change(0, 0, 1, maps=True), Change(1, 0, 1, maps=True), Change(0, 1, 2, maps=True)]
    thread.submit(changes)
    thread.wait([2])  # of whom nothing is under way
    assert done == []
    allowed.set()
    thread.wait([1])
    assert done[:2] == changes[:2]
    thread.wait()
    assert done == changes
    thread.close()


def test_an_error_of_the_thread_is_raised_where_it_is_waited_for() -> None:
    virtual = memory(CheckedDriver(), num_blocks=1)
    thread = MappingThread(virtual.apply)
    thread.submit([Change(0, 0, 2, maps=True)])
    with pytest.raises(OutOfDeviceMemory):
        thread.wait()
    thread.submit([Change(0, 0, 1, maps=True)])
    thread.wait()
    assert virtual.mapped_blocks(0) == 1
    thread.close()


steps = st.lists(
    st.tuples(st.sampled_from(["arrive", "decode", "decode", "decode"]), st.integers(1, 60)),
    max_size=60,
)


@settings(max_examples=60, deadline=None)
@given(steps, st.sampled_from(["overlapped", "synchronous"]), st.booleans(), st.integers(0, 2))
def test_what_a_step_needs_is_mapped_when_it_begins(
    events: list[tuple[str, int]], mapping: str, deferred: bool, eager: int
) -> None:
    """Requests come, grow and leave; the driver itself checks that nothing is mapped twice."""
    driver = CheckedDriver()
    groups = PageGroups.of(TINY, PAGE, "per_layer")
    kv = VirtualKV(driver, TINY, groups, num_slots=3, min_len=256, num_blocks=5, device="cpu")
    cache = VAttentionCache(5, groups, 3, deferred=deferred, eager_blocks=eager)
    options = {"mapping": mapping, "look_ahead": 3, "max_num_seqs": 3, "kv": "vattention"}
    stepping = StepMapping(kv, cache, Deployment(**options))  # type: ignore[arg-type]
    decodes = ListedDecodes(cache.block_size)
    for number, (event, size) in enumerate(events):
        request = Request(number, 0.0, size * 2, size)
        batch = Batch()
        if event == "arrive" and len(decodes) < 3:
            if not cache.start(request, request.num_prompt_tokens, 0):
                continue
            batch.prefills = [Chunk(request, request.num_prompt_tokens)]
        elif len(decodes) and cache.take(decodes.blocks_needed()):
            batch.num_decodes = len(decodes)
        else:
            continue
        stepping.begin(batch, decodes)
        for slot in range(3):
            for block in range(cache.needed[slot]):
                for base in kv.memory.tensors:
                    address = base + slot * kv.memory.slot_bytes + block * PAGE
                    assert address in driver.accessible
        if batch.prefills:
            request.num_computed_tokens, request.num_emitted_tokens = size * 2, 1
            request.admission = number
            if request.is_finished:
                cache.release(request, request.num_blocks)
            else:
                decodes.add(request)
        else:
            for finished in decodes.advance(1):
                cache.release(finished, cache.blocks_for(finished.num_computed_tokens))
    stepping.close()
    assert all(kv.memory.mapped_blocks(slot) == 0 for slot in range(3))
    kv.close()
    assert not driver.holds_anything()


@pytest.mark.parametrize("mapping", ["overlapped", "synchronous"])
def test_a_step_knows_what_it_mapped_and_how_long_it_waited(mapping: str) -> None:
    """A prompt of three blocks is mapped by its step. The fourth block is mapped by the step that
    writes into it, or before that by the thread, for which the step waits.
    """
    driver = SlowDriver()
    groups = PageGroups.of(TINY, PAGE, "per_layer")
    block, tensors = groups.tokens_per_block, groups.num_tensors
    kv = VirtualKV(driver, TINY, groups, num_slots=1, min_len=4 * block, num_blocks=4, device="cpu")
    cache = VAttentionCache(4, groups, 1)
    options = Deployment(kv="vattention", mapping=mapping, max_num_seqs=1)
    stepping = StepMapping(kv, cache, options)
    request = Request(0, 0.0, 3 * block - 1, 9)
    assert cache.start(request, 3 * block - 1, 0)
    decodes = ListedDecodes(block)
    found = []
    driver.seconds = 0.002
    stepping.begin(Batch(prefills=[Chunk(request, 3 * block - 1)]), decodes)
    found.append((stepping.page_groups, stepping.seconds > 0.002 * tensors))
    request.num_computed_tokens, request.num_emitted_tokens, request.admission = 3 * block - 1, 1, 0
    decodes.add(request)
    for _ in range(2):
        assert cache.take(decodes.blocks_needed())
        stepping.begin(Batch(num_decodes=1), decodes)
        found.append((stepping.page_groups, stepping.seconds > 0.001 * tensors))
        decodes.advance(1)
    stepping.close()
    kv.close()
    by_the_step = 0 if mapping == "overlapped" else tensors
    assert found == [(3 * tensors, True), (0, False), (by_the_step, True)]


@pytest.mark.parametrize(
    ("page_group", "tensors", "fault"),
    [
        ("2MB", "per_layer", None),
        ("8MB", "sliced", None),
        ("2MB", "sliced", "holds 32 tokens of a sliced tensor: the engine's kernels read 128 at"),
    ],
)
def test_page_groups_hold_what_a_kernel_reads_at_once(
    page_group: str, tensors: str, fault: str | None
) -> None:
    deployment = Deployment(kv="vattention", page_group=page_group, kv_tensors=tensors)
    groups = page_groups_for(deployment, MODELS["llama-3-8b"])
    if fault is None:
        require_virtual_memory(deployment, groups)
    else:
        with pytest.raises(InputError, match=fault):
            require_virtual_memory(deployment, groups)
