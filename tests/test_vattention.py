"""vAttention simulated: timelines by hand, the paper's numbers, and what must always hold."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from podsim.batch import Batch, Chunk
from podsim.cli import app
from podsim.config import PAGE_GROUPS, Deployment
from podsim.decode_group import DecodeGroup, Decodes
from podsim.errors import InputError
from podsim.hardware import gpu_named
from podsim.kv_cache import num_blocks_for, page_groups_for
from podsim.latency import ConstantLatency
from podsim.mapping_time import MappingTime
from podsim.memory_costs import Line, MappingCosts, find_memory_costs
from podsim.memory_system import growth_seconds
from podsim.model import MODELS, Model
from podsim.page_groups import PageGroups
from podsim.request import Request
from podsim.simulation import Result, simulate
from podsim.vattention import VAttentionCache
from podsim.workload import Trace

KB, MB, US = 2**10, 2**20, 1e-6

YI_34B = Model(
    name="yi-34b",
    num_layers=60,
    hidden_size=7168,
    num_q_heads=56,
    num_kv_heads=8,
    head_dim=128,
    intermediate_size=20480,
    vocab_size=64000,
    max_model_len=200_000,
)
LLAMA, YI_6B = MODELS["llama-3-8b"], MODELS["yi-6b"]


def line(seconds: float) -> dict[str, float]:
    """So many seconds a page-group, however many a call."""
    return {"fixed": 0.0, "per_unit": seconds}


def costs_folder(folder: Path, gpu: str, **parts: object) -> str:
    content = {"schema": 1, "gpu": gpu, "provenance": {"source": "arXiv 2405.04437"}, **parts}
    folder.mkdir(exist_ok=True)
    (folder / "memory.json").write_text(json.dumps(content))
    return str(folder)


def apis(create: float, map_: float, access: float, unmap: float, release: float) -> object:
    names = ("create", "map", "set_access", "unmap", "release")
    values = (create, map_, access, unmap, release)
    return {n: line(v * US) for n, v in zip(names, values, strict=True)}


PAPER = {  # Table 3 of the paper, on A100; the small page-groups' map makes them accessible too
    str(2 * MB): apis(29, 2, 38, 34, 23),
    str(256 * KB): apis(2.1, 9, 0, 35, 4),
    str(128 * KB): apis(2, 8.5, 0, 35, 3),
    str(64 * KB): apis(1.7, 8, 0, 35, 2),
}
"""Microseconds. What the paper has no call for costs nothing; small unmaps are its address free."""


@pytest.fixture
def paper(tmp_path: Path) -> str:
    mapping = {size: {"idle": lines, "busy": lines} for size, lines in PAPER.items()}
    return costs_folder(tmp_path / "paper", "a100", mapping=mapping)


# ------------------------------------------------------------------------------ page-groups


@pytest.mark.parametrize(
    ("model", "tp", "page_group", "tokens"),
    [
        (YI_6B, 1, "64KB", 64),
        (LLAMA, 2, "64KB", 64),
        (YI_34B, 2, "64KB", 64),
        (YI_6B, 1, "2MB", 2048),
        (LLAMA, 1, "2MB", 1024),
        (LLAMA, 1, "256KB", 128),
    ],
)
def test_tokens_of_a_page_group_as_in_the_paper(
    model: Model, tp: int, page_group: str, tokens: int
) -> None:
    groups = PageGroups.of(model.shard(tp), PAGE_GROUPS[page_group], "per_layer")
    assert groups.tokens_per_block == tokens
    assert groups.block_bytes == 2 * model.num_layers * PAGE_GROUPS[page_group]


def test_tensor_slicing_cuts_a_block_by_the_number_of_layers() -> None:
    whole = PageGroups.of(LLAMA, 2 * MB, "per_layer")
    sliced = PageGroups.of(LLAMA, 2 * MB, "sliced")
    assert sliced.tokens_per_block * LLAMA.num_layers == whole.tokens_per_block
    assert sliced.block_bytes == 4 * MB
    # The same bytes a token: slicing changes the granularity, not the size of the cache.
    assert sliced.block_bytes / sliced.tokens_per_block == LLAMA.kv_bytes_per_token


def test_a_page_group_that_holds_no_token_is_refused() -> None:
    with pytest.raises(InputError, match="page_group is 64 KB, but a token of yi-34b needs 120 KB"):
        PageGroups.of(YI_34B, 64 * KB, "sliced")


# ------------------------------------------------------------------------- the paper's numbers


def test_growing_one_request_of_yi_34b_takes_120_calls_and_five_milliseconds(paper: str) -> None:
    groups = PageGroups.of(YI_34B.shard(2), 2 * MB, "per_layer")
    costs = find_memory_costs("a100", Path(paper))
    assert groups.num_tensors == 120
    assert growth_seconds(costs, groups) / groups.num_tensors == pytest.approx(40 * US)
    assert growth_seconds(costs, groups) == pytest.approx(5e-3, rel=0.05)


@pytest.mark.parametrize(
    ("model", "tp", "small", "large", "of_small", "predicted"),
    [
        (YI_6B, 1, 240, 187, 3857, 190.9),
        (LLAMA, 2, 258, 203, 3883, 205.8),
        (YI_34B, 2, 68, 56, 4550, 55.9),
    ],
)
def test_the_largest_batch_by_page_group_as_in_the_paper(
    model: Model, tp: int, small: int, large: int, of_small: int, predicted: float
) -> None:
    """The paper gives no context length. What explains its figures: contexts that end anywhere in
    their last page-group, so that half of it is wasted. Its batch with 64 KB then sets a context
    for each model, which must give its batch with 2 MB, in the memory that A100s of 80 GB leave
    beside weights and the activations of whole prompts of up to 64K tokens.
    """
    tokens = {}
    for page_group in ("64KB", "2MB"):
        deployment = Deployment(
            kv="vattention", page_group=page_group, tensor_parallel_size=tp, token_budget=65536
        )
        groups = PageGroups.of(model.shard(tp), PAGE_GROUPS[page_group], "per_layer")
        blocks = blocks_of(deployment, model)
        tokens[page_group] = (blocks * groups.tokens_per_block, groups.tokens_per_block)
    capacity, wasted = tokens["64KB"]
    context = capacity / small - wasted / 2
    assert round(context) == of_small  # not predicted: of each model its own
    capacity, wasted = tokens["2MB"]
    found = capacity / (context + wasted / 2)
    assert round(found, 1) == predicted
    assert found == pytest.approx(large, rel=0.03)


def blocks_of(deployment: Deployment, model: Model) -> int:
    return num_blocks_for(deployment, model, gpu_named("a100"))


# -------------------------------------------------------------------------------- timelines

TEN_TOKENS = PageGroups(page_group=10, num_tensors=2, token_bytes=1)
SECOND = Line(0.0, 1.0)
FREE = Line(0.0, 0.0)
"""A block of ten tokens; a page-group takes as long to map as the test says."""


def costs(map_: float, unmap: float = 0.0) -> MappingCosts:
    """Seconds to map and unmap a block of TEN_TOKENS."""
    return MappingCosts(FREE, Line(0, map_ / 2), FREE, Line(0, unmap / 2), FREE)


class Steps:
    """A cache and its time, driven step by step: each step takes ten seconds without mapping."""

    def __init__(self, num_blocks: int, slots: int = 3, look_ahead: int = 1, **options: object):
        overlapped = options.pop("overlapped", True)
        seconds = options.pop("seconds", 1.0)
        unmap = options.pop("unmap", 0.0)
        self.cache = VAttentionCache(num_blocks, TEN_TOKENS, slots, **options)  # type: ignore[arg-type]
        mapping = costs(seconds, unmap)  # type: ignore[arg-type]
        self.time = MappingTime(self.cache, mapping, mapping if overlapped else None, look_ahead)
        self.decodes = DecodeGroup(10)
        self.now = 0.0
        self.count = 0

    def prompt(self, num_tokens: int, outputs: int = 100) -> Request:
        """Let a request in and compute its prompt in one step."""
        request = Request(self.count, 0.0, num_tokens, outputs)
        request.admission = self.count
        self.count += 1
        assert self.cache.start(request, num_tokens, 0)
        batch = Batch(prefills=[Chunk(request, num_tokens)])
        self.take(batch)
        request.num_computed_tokens = num_tokens
        request.num_emitted_tokens = 1
        self.decodes.add(request)
        return request

    def decode(self) -> float:
        """A step of all decodes; the seconds it stalled."""
        assert self.cache.take(self.decodes.blocks_needed())
        group = self.decodes
        num_decodes, tokens, _ = group.contexts()
        stall = self.take(Batch(num_decodes=num_decodes, decode_context_sum=tokens))
        group.advance(1)
        return stall

    def take(self, batch: Batch) -> float:
        self.time.begin(batch, batch.shape(), self.decodes, self.now)
        seconds = self.time.step_times([10.0])[0]
        self.now += seconds
        return seconds - 10.0

    def leave(self, request: Request) -> None:
        held = self.cache.blocks_for(self.decodes.num_computed(request))
        self.decodes.remove(request)
        self.cache.release(request, held)


def test_a_prompt_waits_for_its_blocks_and_a_decode_does_not() -> None:
    steps = Steps(num_blocks=10)
    steps.prompt(28)
    assert steps.now == 13.0  # three blocks, then the step
    # The 29th and 30th token fit. The 31st needs a fourth block: mapped during the step before.
    assert [steps.decode() for _ in range(4)] == [0.0, 0.0, 0.0, 0.0]
    assert steps.time.summary()["background_time"] == 1.0


def test_without_overlap_the_step_that_grows_waits() -> None:
    steps = Steps(num_blocks=10, overlapped=False)
    steps.prompt(28)
    assert [steps.decode() for _ in range(4)] == [0.0, 0.0, 1.0, 0.0]


def test_mapping_that_takes_longer_than_a_step_is_seen_a_step_later() -> None:
    steps = Steps(num_blocks=10, seconds=15.0)
    steps.prompt(28)
    stalls = [steps.decode() for _ in range(4)]
    assert stalls == [0.0, 0.0, 5.0, 0.0]  # begun with the second step, ready 15 s later


def test_looking_further_ahead_hides_it() -> None:
    steps = Steps(num_blocks=10, seconds=15.0, look_ahead=2)
    steps.prompt(28)
    assert [steps.decode() for _ in range(4)] == [0.0, 0.0, 0.0, 0.0]


def test_a_request_takes_over_the_memory_of_the_one_before() -> None:
    steps = Steps(num_blocks=10)
    steps.leave(steps.prompt(28))
    before = steps.now
    steps.prompt(25)
    assert steps.now - before == 10.0  # three blocks, all mapped
    assert steps.cache.num_mapped == 3


def test_without_deferred_reclamation_it_maps_again() -> None:
    steps = Steps(num_blocks=10, deferred=False, overlapped=False, unmap=0.5)
    steps.leave(steps.prompt(28))
    before = steps.now
    steps.prompt(25)
    # The first slot is still mapped when the new request takes it over; give it another one.
    assert steps.now - before == 10.0
    steps.leave(steps.prompt(5))
    steps.decode()
    assert steps.cache.num_mapped == 3  # the request that decodes


def test_best_fit_takes_the_smallest_slot_that_suffices() -> None:
    steps = Steps(num_blocks=12)
    for request in [steps.prompt(60), steps.prompt(28), steps.prompt(8)]:
        steps.leave(request)
    assert steps.cache.mapped == [6, 3, 1]
    request = steps.prompt(15)
    assert steps.cache.slot_of(request) == 1


def test_when_none_suffices_the_largest_is_extended() -> None:
    steps = Steps(num_blocks=12)
    for request in [steps.prompt(8), steps.prompt(28)]:
        steps.leave(request)
    before = steps.now
    request = steps.prompt(50)
    assert steps.cache.slot_of(request) == 1
    assert steps.now - before == 12.0  # two of five blocks were missing


def test_memory_of_idle_slots_is_unmapped_when_it_runs_out() -> None:
    steps = Steps(num_blocks=4, unmap=0.5)
    steps.leave(steps.prompt(28))
    first = steps.prompt(8)  # takes the idle slot over, with three blocks
    assert steps.cache.slot_of(first) == 0
    before = steps.now
    steps.prompt(28)
    # One block is free. Of the three in the first slot, one is needed: two are unmapped.
    assert steps.now - before == 10.0 + 2 * 0.5 + 3.0
    assert steps.cache.mapped == [1, 3, 0]


def test_a_slot_is_kept_ready_for_the_next_request() -> None:
    steps = Steps(num_blocks=10, eager_blocks=2)
    steps.prompt(8)
    before = steps.now
    steps.prompt(18)
    assert steps.now - before == 10.0
    assert steps.time.summary()["background_time"] == 4.0  # a slot ready for each, and one more


# ----------------------------------------------------------------------------- what always holds

requests = st.lists(
    st.tuples(st.sampled_from([0.0, 0.001, 0.01, 0.3]), st.integers(1, 300), st.integers(1, 120)),
    min_size=1,
    max_size=30,
)
memories = st.fixed_dictionaries(
    {
        "num_blocks": st.sampled_from([7, 8, 12, 40]),
        "max_num_seqs": st.sampled_from([1, 3, 16]),
        "scheduler": st.sampled_from(["sarathi", "vllm-v1"]),
        "mapping": st.sampled_from(["overlapped", "synchronous"]),
        "look_ahead": st.sampled_from([0, 1, 10]),
        "deferred_reclamation": st.booleans(),
        "eager_blocks": st.sampled_from([0, 2]),
        "kv_tensors": st.sampled_from(["per_layer", "sliced"]),
        "preemption": st.sampled_from(["recompute", "swap"]),
    }
)


def trace_of(rows: list[tuple[float, int, int]]) -> Trace:
    arrivals, now = [], 0.0
    for gap, _, _ in rows:
        now += gap
        arrivals.append(now - rows[0][0])
    return Trace.of(*((t, p, o) for t, (_, p, o) in zip(arrivals, rows, strict=True)))


@settings(max_examples=150, deadline=None)
@given(requests, memories)
def test_no_page_is_lost_and_the_waste_is_bounded(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[float, int, int]],
    options: dict[str, object],
) -> None:
    """Under random arrivals, growth, frees and memory pressure, seen from the changes alone: they
    map nothing twice, unmap only what is mapped, and never more than there is; and a request's
    blocks are there when its step is launched. Runs give what single steps give.
    """
    deployment, watched = watched_deployment(options, tmp_path_factory.mktemp("costs"))
    results = []
    for step_by_step in (False, True):
        with watched() as watch:
            results.append(
                simulate(
                    trace_of(rows),
                    deployment,
                    latency_model=ConstantLatency(0.01),
                    step_by_step=step_by_step,
                )
            )
        assert watch.num_checked or all(results[0].requests["refused"] != "")
    fast, plain = results
    assert fast.requests.equals(plain.requests)
    assert fast.memory[0].summary() == pytest.approx(plain.memory[0].summary())
    table = fast.memory_table
    if len(table):
        groups = fast.memory[0].cache.page_groups  # type: ignore[attr-defined]
        running = deployment.max_num_seqs
        waste = table["held_bytes"] - table["token_bytes"]
        assert (waste >= 0).all()
        assert (waste <= running * groups.block_bytes).all()
        assert (table["mapped_bytes"] <= deployment.num_blocks * groups.block_bytes).all()  # type: ignore[operator]
        assert (table["held_bytes"] <= table["mapped_bytes"]).all()


def watched_deployment(options: dict[str, object], folder: Path):  # type: ignore[no-untyped-def]
    """A deployment of Llama-3-8B with blocks of 32 tokens, and a watch over its changes."""
    page_group = "64KB" if options["kv_tensors"] == "per_layer" else "2MB"
    lines = apis(1, 20, 10, 30, 1)
    size = str(PAGE_GROUPS[page_group])
    copies = {name: {"fixed": 1e-5, "per_unit": 2e-11} for name in ("h2d pinned", "d2h pinned")}
    mapping = {size: {"idle": lines, "busy": lines}}
    costs = costs_folder(folder, "h200", mapping=mapping, transfer=copies)
    deployment = Deployment(
        kv="vattention",
        host_memory=0.05,
        page_group=page_group,
        memory_costs=costs,
        token_budget=64,
        watermark=0.0,
        **options,  # type: ignore[arg-type]
    )
    return deployment, Watch


def check_waste(cache: VAttentionCache, batch: Batch, decodes: Decodes) -> None:
    """No request wastes a whole page-group of each virtual tensor."""
    chunks = dict(batch.prefills)
    for request, slot in cache._slot.items():
        if request in decodes:
            tokens = decodes.num_computed(request) + bool(batch.num_decodes)
        else:
            tokens = request.num_computed_tokens + chunks.get(request, 0)
        assert 0 <= cache.needed[slot] * cache.block_size - tokens < cache.block_size


class Watch:
    """Follows the changes of every cache made while it is open, as a driver would."""

    def __enter__(self) -> Watch:
        self.mapped: dict[int, set[tuple[int, int]]] = {}
        self.num_checked = 0
        self._patch = pytest.MonkeyPatch()
        for name in ("map_for", "map_ahead", "unmap_idle"):
            self._patch.setattr(VAttentionCache, name, self._watching(name))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _watching(self, name: str):  # type: ignore[no-untyped-def]
        plain = getattr(VAttentionCache, name)

        def watching(cache: VAttentionCache, *arguments: object):  # type: ignore[no-untyped-def]
            changes = plain(cache, *arguments)
            mapped = self.mapped.setdefault(id(cache), set())
            for change in changes:
                blocks = {(change.slot, block) for block in range(change.first, change.last)}
                assert blocks
                assert mapped.isdisjoint(blocks) if change.maps else blocks <= mapped
                mapped = mapped | blocks if change.maps else mapped - blocks
                assert len(mapped) <= cache.num_blocks
            self.mapped[id(cache)] = mapped
            assert len(mapped) == cache.num_mapped
            if name == "map_for":
                self.num_checked += 1
                for slot, needed in enumerate(cache.needed):
                    assert all((slot, block) in mapped for block in range(needed))
                check_waste(cache, *arguments)  # type: ignore[arg-type]
            return changes

        return watching


# ------------------------------------------------------------------------------ whole simulations


def serve(deployment: Deployment, **changes: object) -> Result:
    trace = Trace.of(*((0.05 * i, 900 + 37 * i % 200, 300) for i in range(40)))
    deployment = replace(deployment, **changes)  # type: ignore[arg-type]
    return simulate(trace, deployment, latency_model=ConstantLatency(0.01))


def test_overlap_hides_what_synchronous_mapping_shows(paper: str) -> None:
    deployment = Deployment(kv="vattention", gpu="a100", memory_costs=paper, max_num_seqs=64)
    overlapped = serve(deployment).memory[0].summary()
    synchronous = serve(deployment, mapping="synchronous").memory[0].summary()
    assert overlapped["background_time"] > 0
    assert synchronous["background_time"] == 0
    assert overlapped["stall_time"] < 0.7 * synchronous["stall_time"]


def swapping(folder: Path, **options: object) -> Deployment:
    """Llama-3-8B, blocks of 32 tokens; 10 us a page-group, copies of 1 us and 50 GB/s."""
    lines = apis(10, 0, 10, 10, 10)
    copies = {name: {"fixed": 1e-6, "per_unit": 2e-11} for name in ("h2d pinned", "d2h pinned")}
    mapping = {str(64 * KB): {"idle": lines, "busy": lines}, str(2 * MB): {"idle": lines}}
    defaults: dict[str, object] = {
        "kv": "vattention",
        "page_group": "64KB",
        "mapping": "synchronous",
        "memory_costs": costs_folder(folder / "costs", "h200", mapping=mapping, transfer=copies),
        "num_blocks": 5,
        "watermark": 0.0,
        "preemption": "swap",
        "host_memory": 1.0,
    }
    return Deployment(**(defaults | options))  # type: ignore[arg-type]


def served_twice(deployment: Deployment) -> Result:
    """Two prompts of 60 tokens that grow by 20: to three blocks each, of five."""
    requests = ((0.0, 60, 20), (0.0, 60, 20))
    return simulate(Trace.of(*requests), deployment, latency_model=ConstantLatency(1.0))


@pytest.mark.parametrize("tensors", ["per_layer", "sliced"])
def test_a_swapped_request_waits_for_copies_and_mapping(tmp_path: Path, tensors: str) -> None:
    """The later one has 64 tokens when the first takes the fifth block. Copies: one a tensor."""
    page_group = "64KB" if tensors == "per_layer" else "2MB"
    deployment = swapping(tmp_path, kv_tensors=tensors, page_group=page_group)
    result = served_twice(deployment)
    assert len(result.preemptions) == 1
    resumed = result.preemptions["resumed_time"][0]
    assert result.steps.set_index("start").loc[resumed]["num_prefill_tokens"] == 1
    memory = result.memory[0].summary()
    moved = 64 * LLAMA.kv_bytes_per_token
    assert memory["d2h_bytes_moved"] == memory["h2d_bytes_moved"] == moved
    assert memory["swapped_requests"] == 1
    num_tensors = 64 if tensors == "per_layer" else 2
    assert memory["swap_time"] == pytest.approx(2 * (num_tensors * 1e-6 + moved * 2e-11))
    calls = num_tensors * (memory["mapped_blocks"] + memory["unmapped_blocks"])
    assert memory["stall_time"] == pytest.approx(memory["swap_time"] + calls * 10e-6)
    durations = result.steps["duration"]
    assert durations.sum() == pytest.approx(len(durations) + memory["stall_time"])


def test_a_request_without_room_on_the_host_computes_again(tmp_path: Path) -> None:
    small = swapping(tmp_path, host_memory=63 * LLAMA.kv_bytes_per_token / 1e9)
    result = served_twice(small)
    assert result.steps["num_prefill_tokens"].max() > 60
    assert result.memory[0].summary()["swapped_requests"] == 0
    assert "1 preempted requests found no host memory" in result.memory[0].notes()[0]


def test_small_page_groups_waste_less(paper: str) -> None:
    deployment = Deployment(kv="vattention", gpu="a100", memory_costs=paper, max_num_seqs=64)
    waste = {
        size: serve(deployment, page_group=size).memory[0].summary()["fragmentation_bytes_max"]
        for size in ("64KB", "128KB", "256KB", "2MB")
    }
    assert waste["64KB"] < waste["128KB"] < waste["256KB"] < waste["2MB"]


def test_the_terminal_names_the_peaks_of_memory_csv(paper: str, tmp_path: Path) -> None:
    """Each of the three is reached at another row. Memory of requests that left stays mapped."""
    out = tmp_path / "out"
    options = ["--kv", "vattention", "--gpu", "a100", "--memory-costs", paper, "--seed", "3"]
    load = ["--arrivals", "gamma", "--burstiness", "0.1", "--qps", "4", "--requests", "60"]
    run = CliRunner().invoke(app, ["simulate", *load, *options, "--out", str(out)])
    assert run.exit_code == 0, run.exception
    rows = pd.read_csv(out / "memory.csv")
    mapped, held, tokens = (rows[f"{name}_bytes"] for name in ("mapped", "held", "token"))
    columns = (mapped, mapped - tokens, held - tokens)
    assert len({column.idxmax() for column in columns}) == 3
    at_most = [column.max() / 1e9 for column in columns]
    assert at_most[0] > at_most[1] > 1.5 * at_most[2]
    assert (
        f"at most {at_most[0]:.2f} GB; at most {at_most[1]:.2f} GB without tokens in it; requests' "
        f"blocks wasted at most {at_most[2]:.2f} GB"
    ) in run.output


def test_a_comparison_says_why_variants_differ(tmp_path: Path) -> None:
    lines = apis(29, 2, 38, 34, 23)
    paged = {"prefill": 1.1, "decode": 1.05, "table_step": 1e-5}
    paged |= {"table_request": 1e-6, "table_block": 1e-8}
    folder = costs_folder(
        tmp_path / "c",
        "h200",
        mapping={str(2 * MB): {"idle": lines, "busy": lines}},
        paged={"16": paged},
    )
    arguments = [
        "--arrivals",
        "poisson",
        "--qps",
        "8",
        "--requests",
        "60",
        "--memory-costs",
        folder,
    ]
    run = CliRunner().invoke(app, ["compare", *arguments, "--kv", "paged,vattention"])
    assert run.exit_code == 0, run.exception
    found = {}
    for name in ("paged", "vattention"):
        pattern = rf"{name}: batch ([\d.]+) mean, attention ([\d.]+) (ms|s), .* work ([\d.]+) ms"
        match = re.search(pattern, run.output)
        assert match, run.output
        found[name] = [float(value) for value in match.group(1, 2, 4)]
    # Mapping holds up steps; over a block table it is the attention kernel that takes longer.
    assert found["paged"][2] == 0.0 < found["vattention"][2]
    assert found["paged"][1] > 1.04 * found["vattention"][1]


def test_page_groups_that_were_not_measured_are_named(tmp_path: Path) -> None:
    lines = apis(1, 1, 1, 1, 1)
    folder = costs_folder(tmp_path / "c", "h200", mapping={str(2 * MB): {"idle": lines}})
    deployment = Deployment(kv="vattention", page_group="64KB", memory_costs=folder)
    with pytest.raises(InputError, match=r"mapping page-groups of 64 KB.*there are: 2048 KB"):
        serve(deployment)


def test_paged_overhead_that_was_not_measured_is_named(tmp_path: Path) -> None:
    folder = costs_folder(tmp_path / "c", "h200")
    deployment = Deployment(kv="paged", memory_costs=folder)
    with pytest.raises(InputError, match=r"no overhead of paged kernels with blocks of 16 tokens"):
        simulate(Trace.of((0.0, 10, 2)), deployment)


def test_blocks_fill_the_memory_that_is_left() -> None:
    deployment = Deployment(kv="vattention")
    groups = page_groups_for(deployment, LLAMA)
    blocks = num_blocks_for(deployment, LLAMA, gpu_named("h200"))
    plain = num_blocks_for(replace(deployment, kv="ideal"), LLAMA, gpu_named("h200"))
    tokens = blocks * groups.tokens_per_block
    assert 0 <= plain * 16 - tokens < groups.tokens_per_block


def test_prefix_caching_is_refused() -> None:
    with pytest.raises(InputError, match="kv 'vattention' has no prefix_caching"):
        Deployment(kv="vattention", prefix_caching=True)
