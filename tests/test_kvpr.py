"""KVPR and host memory, simulated: the paper's table, the split against brute force, timelines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podsim.config import Deployment
from podsim.errors import InputError
from podsim.hardware import gpu_named
from podsim.kv_cache import kv_sizes
from podsim.kvpr import OffloadedLayer, closed_form_split, layer_of
from podsim.latency import ConstantLatency
from podsim.memory_costs import Curve, Line
from podsim.model import MODELS
from podsim.simulation import Result, simulate
from podsim.step_costs import kernel_table
from podsim.workload import Trace

H200 = gpu_named("h200")

# ------------------------------------------------------------------------- the paper's formula

TABLE = [  # FLOP/s, bytes/s, hidden size: l*/s, latency and throughput in %, as printed
    (312e12, 32e9, 4096, ".704", "-35.2", "+54"),
    (312e12, 32e9, 5120, ".656", "-32.8", "+48.8"),
    (312e12, 32e9, 7168, ".576", "-28.8", "+40.5"),
    (187e12, 24e9, 4096, ".655", "-32.8", "+48.7"),
    (187e12, 24e9, 5120, ".603", "-30.2", "+43.2"),
    (187e12, 24e9, 7168, ".521", "-26.0", "+35.2"),
    (989e12, 64e9, 4096, ".790", "-39.5", "+65"),
    (989e12, 64e9, 5120, ".751", "-37.6", "+60"),
    (989e12, 64e9, 7168, ".683", "-34.2", "+52"),
]


@pytest.mark.parametrize(("gpu_rate", "link_rate", "hidden", "split", "latency", "more"), TABLE)
def test_the_papers_table_to_its_digits(
    gpu_rate: float, link_rate: float, hidden: int, split: str, latency: str, more: str
) -> None:
    tokens = 1_000_000
    found = closed_form_split(tokens, hidden, 2, gpu_rate, link_rate)
    assert as_printed(found / tokens, split) == f"0{split}"
    layer = layer_of(tokens, hidden, 2, gpu_rate, link_rate)
    ratio = layer.row_period(found) / layer.row_period(0)
    assert ratio == pytest.approx(1 - found / tokens / 2, rel=1e-5)  # never below a half
    assert as_printed(100 * (ratio - 1), latency) == latency
    assert "+" + as_printed(100 * (1 / ratio - 1), more) == more


def as_printed(value: float, printed: str) -> str:
    """With as many digits behind the point."""
    return f"{value:.{len(printed.partition('.')[2])}f}"


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 3000),
    st.sampled_from([1024, 4096, 7168]),
    st.floats(50e12, 1000e12),
    st.floats(8e9, 64e9),
)
def test_closed_form_and_integer_optimum_agree(
    tokens: int, hidden: int, gpu_rate: float, link_rate: float
) -> None:
    layer = layer_of(tokens, hidden, 2, gpu_rate, link_rate)
    best = layer.best_split(1, "row")
    assert abs(best - closed_form_split(tokens, hidden, 2, gpu_rate, link_rate)) <= 1
    brute = min(layer.seconds(1, split, "row") for split in range(tokens + 1))
    assert layer.seconds(1, best, "row") == pytest.approx(brute, rel=1e-12)


seconds = st.floats(0, 2e-3)
layers = st.builds(
    OffloadedLayer,
    num_tokens=st.integers(0, 500),
    kv_bytes=st.sampled_from([2048, 4096, 16384]),
    x_bytes=st.just(8192),
    transfer=st.builds(Line, st.sampled_from([0.0, 5e-6]), st.floats(1e-11, 2e-10)),
    recompute=st.one_of(
        st.builds(Line, st.sampled_from([0.0, 1e-5]), st.floats(1e-8, 1e-5)),
        st.builds(
            Curve,
            st.sampled_from([(1.0, 90.0, 300.0), (20.0, 40.0, 80.0)]),
            st.tuples(*[st.floats(1e-6, 2e-3)] * 3).map(sorted).map(tuple),
        ),
    ),
    compute=seconds,
    weights=st.sampled_from([0.0, 5e-4]),
    store=st.sampled_from([0.0, 1e-4]),
    handoff=st.sampled_from([0.0, 2e-5]),
    relay=st.sampled_from([None, 0.0, 1e-5]),
)


@settings(max_examples=300, deadline=None)
@given(layers, st.integers(1, 40), st.sampled_from(["row", "column"]))
def test_the_split_is_the_best_of_all_integers(
    layer: OffloadedLayer, num_layers: int, schedule: str
) -> None:
    if schedule == "row":
        layer = layer._replace(weights=0.0)
    found = layer.best_split(num_layers, schedule)
    if not layer.pays():
        assert found == 0
    brute = min(layer.seconds(num_layers, s, schedule) for s in range(layer.num_tokens + 1))
    assert layer.seconds(num_layers, found, schedule) <= brute * (1 + 1e-9)


@settings(max_examples=300, deadline=None)
@given(layers, st.integers(1, 12), st.floats(0, 1), st.sampled_from(["row", "column"]))
def test_the_seconds_are_those_of_a_timeline(
    layer: OffloadedLayer, num_layers: int, share: float, schedule: str
) -> None:
    """Copies and kernels one by one, each when what it needs is there."""
    weights = layer.weights if schedule == "column" else 0.0
    hand = layer.handoff if schedule == "row" else 0.0
    layer = layer._replace(weights=weights, store=0.0, handoff=hand)
    relay = 2 * hand if layer.relay is None else min(layer.relay, 2 * hand)
    split = round(share * layer.num_tokens)
    x, kv, again = layer.x_seconds(split), layer.kv_seconds(split), layer.recompute.at(split)
    link = gpu = 0.0
    recomputed, link_free = -hand, -relay  # nothing is waited for at first
    computed = [0.0, 0.0]  # when the two layers before left their buffers
    for _ in range(num_layers):
        # In a row, K and V of the layer before come first; else the buffer of two layers before.
        following = max(recomputed + hand, link_free + relay)
        begin = following if schedule == "row" else max(link, computed[-2])
        x_there = begin + weights + x
        link = link_free = x_there + kv
        recomputed = max(gpu, x_there + hand) + again
        gpu = max(recomputed, link + hand) + layer.compute
        computed.append(gpu)
    exact = layer.seconds(num_layers, split, schedule)
    if schedule == "row":
        in_turn = num_layers * (2 * hand - relay)
        assert gpu == pytest.approx(exact, rel=1e-9, abs=in_turn + 1e-12)
    else:  # the steady state, but for how the first two layers fill the pipe
        assert gpu == pytest.approx(exact, rel=1e-9, abs=2 * layer.column_period(split))


def test_the_split_grows_with_the_context_but_its_share_does_not() -> None:
    splits = [layer_of(32 * s, 4096, 2, 312e12, 32e9).best_split(32, "row") for s in (128, 1024)]
    assert splits[1] == pytest.approx(8 * splits[0], abs=8)


def test_the_column_schedule_recomputes_more() -> None:
    """Recomputing also hides behind the weights."""
    layer = layer_of(8 * 512, 5120, 2, 312e12, 32e9)._replace(weights=0.02)
    column, row = layer.best_split(40, "column"), layer._replace(weights=0.0).best_split(40, "row")
    assert column > row


# ------------------------------------------------------------------------------ whole simulations


def lines(**values: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {name.replace("_", " "): {"fixed": a, "per_unit": b} for name, (a, b) in values.items()}


@pytest.fixture
def memory_costs(tmp_path: Path) -> str:
    """50 GB/s, and 600 TFLOP/s for K and V of Llama-2-7B."""
    content = {
        "schema": 1,
        "gpu": "h200",
        "provenance": {},
        "transfer": lines(
            h2d_pinned=(0.0, 2e-11), h2d_pinned_beside_matrix=(0.0, 2e-11), d2h_pinned=(0.0, 2e-11)
        ),
        "recompute": {"4096x8192 rotated": {"fixed": 0.0, "per_unit": 4 * 4096**2 / 600e12}},
    }
    (tmp_path / "memory.json").write_text(json.dumps(content))
    return str(tmp_path)


def serve(
    deployment: Deployment, *requests: tuple[float, int, int], seconds: float = 0.0
) -> Result:
    return simulate(Trace.of(*requests), deployment, latency_model=ConstantLatency(seconds))


MHA = MODELS["llama-2-7b"]
KV_BYTES = MHA.kv_bytes_per_token


def offloaded(memory_costs: str, **options: object) -> Deployment:
    defaults: dict[str, object] = {
        "model": "llama-2-7b",
        "kv_offload": "full",
        "kv_on_host": True,
        "host_memory": 64.0,
        "memory_costs": memory_costs,
    }
    return Deployment(**(defaults | options))  # type: ignore[arg-type]


def test_a_step_takes_the_transfer_of_its_tokens(memory_costs: str) -> None:
    result = serve(offloaded(memory_costs), (0.0, 1000, 3))
    durations = result.steps["duration"].tolist()
    # Without anything to compute, K and V cross one after the other: the prompt's to the host, then
    # those of all tokens but the new one back.
    assert durations == pytest.approx([n * KV_BYTES * 2e-11 for n in (1000, 1000, 1001)])
    memory = result.summary()["podsim"]["memory"]  # type: ignore[index]
    assert memory["h2d_bytes_moved"] == 2001 * KV_BYTES
    assert memory["d2h_bytes_moved"] == 1002 * KV_BYTES


def test_kvpr_takes_the_papers_share_of_it(memory_costs: str) -> None:
    full = serve(offloaded(memory_costs), (0.0, 1000, 3))
    kvpr = serve(offloaded(memory_costs, kv_offload="kvpr"), (0.0, 1000, 3))
    split = closed_form_split(1000, 4096, 2, 600e12, 50e9) / 1000
    ratio = kvpr.steps["duration"] / full.steps["duration"]
    assert ratio.tolist()[0] == pytest.approx(
        1.5
    )  # the prompt's activations are stored beside K and V
    assert ratio.tolist()[1:] == pytest.approx([1 - split / 2] * 2, rel=2e-3)
    assert kvpr.memory_table["split"].iloc[-1] == pytest.approx(1001 * split, abs=2)


def test_tokens_are_on_the_gpu_first(memory_costs: str) -> None:
    deployment = offloaded(memory_costs, kv_on_host=False, num_blocks=50, block_size=20)
    result = serve(deployment, (0.0, 998, 6), seconds=1e-6)
    durations = result.steps["duration"].tolist()
    assert durations[:3] == pytest.approx([1e-6] * 3)  # 998, 999, 1000 tokens
    tokens = result.memory_table[["gpu_tokens", "host_tokens"]].to_numpy().tolist()
    assert tokens[-3:] == [[1000, 1], [1000, 2], [1000, 3]]
    assert durations[5] - 1e-6 == pytest.approx(3 * KV_BYTES * 2e-11, rel=0.3)


def test_gqa_recomputes_nothing_and_says_so(memory_costs: str) -> None:
    options = {"model": "llama-3-8b", "memory_costs": memory_costs}
    kvpr = serve(offloaded(**options, kv_offload="kvpr"), (0.0, 1000, 3))  # type: ignore[arg-type]
    full = serve(offloaded(**options), (0.0, 1000, 3))  # type: ignore[arg-type]
    assert kvpr.steps.equals(full.steps)
    (note,) = kvpr.memory[0].notes()
    assert "l = 0" in note
    assert "8,192 bytes are no smaller than its K and V of 4,096 bytes" in note
    assert full.memory[0].notes() == []


def test_host_memory_bounds_the_tokens(memory_costs: str) -> None:
    deployment = offloaded(memory_costs, host_memory=10.0)
    sizes = kv_sizes(deployment, MHA, H200)
    assert sizes.gpu_blocks == 0
    assert sizes.host_blocks == 10**10 // (16 * KV_BYTES)
    kvpr = kv_sizes(replace(deployment, kv_offload="kvpr"), MHA, H200)
    assert kvpr.host_blocks == pytest.approx(sizes.host_blocks * 2 / 3, abs=1)  # K, V and X
    refused = serve(deployment, (0.0, 25_000, 2)).requests["refused"][0]
    assert refused.startswith("longer than")


def test_the_column_schedule_keeps_the_weights_on_the_host(memory_costs: str) -> None:
    row = kv_sizes(offloaded(memory_costs, kv_on_host=False), MHA, H200)
    column = kv_sizes(
        offloaded(memory_costs, kv_on_host=False, offload_schedule="column"), MHA, H200
    )
    block = 16 * KV_BYTES
    layers = MHA.layer_weight_bytes * MHA.num_layers
    assert column.host_blocks == pytest.approx(row.host_blocks - layers / block, abs=2)
    saved = layers * 30 / 32 + (row.host_blocks - column.host_blocks) * block * 2 / 32
    assert column.gpu_blocks - row.gpu_blocks == pytest.approx(saved / block, abs=2)
    deployment = offloaded(memory_costs, offload_schedule="column")
    step = serve(deployment, (0.0, 10, 2)).steps["duration"][1]
    assert step == pytest.approx((layers + 10 * KV_BYTES) * 2e-11, rel=1e-6)


def test_options_that_contradict_each_other() -> None:
    for options, message in {
        (("kv_offload", "full"),): "host_memory is 0",
        (("preemption", "swap"),): "host_memory is 0",
        (("kv_on_host", True),): "kv_on_host needs kv_offload",
        (("kv_offload", "kvpr"), ("kv", "vattention"), ("host_memory", 1.0)): "needs KV blocks",
    }.items():
        with pytest.raises(InputError, match=message):
            Deployment(**dict(options))  # type: ignore[arg-type]


def test_transfers_that_were_not_measured_are_named(tmp_path: Path) -> None:
    (tmp_path / "memory.json").write_text(
        json.dumps({"schema": 1, "gpu": "h200", "provenance": {}})
    )
    with pytest.raises(InputError, match="no times of transfers 'h2d pinned beside matrix'"):
        serve(offloaded(str(tmp_path)), (0.0, 10, 2))


# --------------------------------------------------------------------------------------- swapping


def swapping(memory_costs: str, **options: object) -> Deployment:
    defaults: dict[str, object] = {
        "model": "llama-2-7b",
        "token_budget": 100,
        "max_num_seqs": 10,
        "block_size": 10,
        "num_blocks": 10,
        "watermark": 0.0,
        "preemption": "swap",
        "host_memory": 1.0,
        "memory_costs": memory_costs,
    }
    return Deployment(**(defaults | options))  # type: ignore[arg-type]


def test_a_swapped_request_goes_on_where_it_was(memory_costs: str) -> None:
    """Two requests of 45 tokens in ten blocks of ten: the later one is swapped when both grow."""
    requests = ((0.0, 45, 20), (0.0, 45, 20))
    swap = serve(swapping(memory_costs), *requests, seconds=1.0)
    again = serve(swapping(memory_costs, preemption="recompute"), *requests, seconds=1.0)
    assert len(swap.preemptions) == len(again.preemptions) == 1
    assert swap.preemptions["time"].tolist() == again.preemptions["time"].tolist()
    # Swapped, the request computes one token of a step where it computed all of them again.
    resumed = swap.preemptions["resumed_time"][0]
    chunk = {r: s.set_index("start").loc[resumed] for r, s in (("swap", swap.steps),)}["swap"]
    assert chunk["num_prefill_tokens"] == 1
    assert again.steps["num_prefill_tokens"].max() > 50
    moved = swap.summary()["podsim"]["memory"]  # type: ignore[index]
    assert moved["d2h_bytes_moved"] == moved["h2d_bytes_moved"] == 50 * KV_BYTES
    assert moved["stall_time"] == pytest.approx(2 * 50 * KV_BYTES * 2e-11)


def test_without_host_memory_left_it_computes_again_and_says_so(memory_costs: str) -> None:
    requests = ((0.0, 45, 20), (0.0, 45, 20))
    deployment = swapping(memory_costs, host_memory=40 * KV_BYTES / 1e9)
    result = serve(deployment, *requests, seconds=1.0)
    assert result.steps["num_prefill_tokens"].max() > 50
    assert "1 preempted requests found no host memory" in result.memory[0].notes()[0]


rows = st.lists(
    st.tuples(st.sampled_from([0.0, 0.01, 0.3]), st.integers(1, 200), st.integers(1, 100)),
    min_size=1,
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(
    rows,
    st.sampled_from(["swap", "full", "kvpr"]),
    st.sampled_from(["sarathi", "vllm-v1"]),
    st.sampled_from([20, 31, 60]),
)
def test_runs_equal_single_steps(
    tmp_path_factory: pytest.TempPathFactory,
    requests: list[tuple[float, int, int]],
    kind: str,
    scheduler: str,
    num_blocks: int,
) -> None:
    folder = tmp_path_factory.mktemp("costs")
    costs = memory_costs.__wrapped__(folder)  # type: ignore[attr-defined]
    options: dict[str, object] = {"num_blocks": num_blocks, "scheduler": scheduler}
    if kind == "swap":
        deployment = swapping(costs, **options)
    else:
        options |= {"token_budget": 64, "max_num_seqs": 16, "watermark": 0.0}
        deployment = offloaded(costs, kv_on_host=False, kv_offload=kind, host_memory=0.4, **options)
    now, arrivals = 0.0, []
    for gap, prompt, output in requests:
        now += gap
        arrivals.append((now - requests[0][0], prompt, output))
    fast, plain = (
        simulate(
            Trace.of(*arrivals),
            deployment,
            latency_model=ConstantLatency(0.01),
            step_by_step=step_by_step,
        )
        for step_by_step in (False, True)
    )
    assert fast.requests.equals(plain.requests)
    assert fast.steps.equals(plain.steps)
    assert fast.memory[0].summary() == pytest.approx(plain.memory[0].summary())
    if kind == "swap":
        assert fast.memory[0].copies.swap.num_tokens == 0  # type: ignore[attr-defined]


def test_what_host_memory_adds_is_a_kernel_of_its_own(memory_costs: str) -> None:
    """Attention takes what it takes without; the rest of the longer steps is the memory system."""
    requests = tuple((0.002 * i, 100, 100) for i in range(30))
    tables = {}
    for name, options in {"plain": {}, "swap": {}, "offloaded": {"kv_on_host": True}}.items():
        deployment = swapping(memory_costs, num_blocks=60, max_num_seqs=100, token_budget=256)
        if name != "swap":
            deployment = replace(deployment, preemption="recompute", num_blocks=None)
        if options:
            deployment = replace(deployment, kv_offload="full", host_memory=20.0, **options)
        result = simulate(Trace.of(*requests), replace(deployment, replicas=2))
        table = kernel_table(result, result.steps, result.requests)
        assert table is not None
        total = table.sum(axis=1)
        assert total.sum() == pytest.approx(result.steps["duration"].sum())
        assert (total > -1e-9).all()
        tables[name] = total.get("memory system", 0.0)
    assert tables["plain"] == 0.0
    assert tables["offloaded"] > tables["swap"] > 0.0


def test_without_steps_no_log_of_memory_is_kept_either(memory_costs: str) -> None:
    deployment = offloaded(memory_costs)
    kept, dropped = (
        simulate(
            Trace.of((0.0, 100, 50)),
            deployment,
            latency_model=ConstantLatency(0.0),
            keep_steps=keep_steps,
        )
        for keep_steps in (True, False)
    )
    assert len(kept.memory_table) == len(kept.memory[0].log.held_up) == 50
    assert len(dropped.memory_table) == len(dropped.memory[0].log.held_up) == 0
    assert kept.memory[0].summary() == dropped.memory[0].summary()


def test_a_batch_without_host_tokens_is_left_alone(memory_costs: str) -> None:
    result = serve(offloaded(memory_costs, kv_on_host=False), (0.0, 100, 5), seconds=0.01)
    assert result.steps["duration"].tolist() == pytest.approx([0.01] * 5)
