"""The shipped profile is what its rows say, its rows are possible, and its models behave."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podsim import calibration
from podsim.attention_model import AttentionModel, Geometry, tile_work
from podsim.batch import BatchShape
from podsim.config import STRATEGIES
from podsim.errors import InputError
from podsim.hardware import gpu_named
from podsim.latency import LAYER_OPS, ProfiledLatency, op_seconds
from podsim.model import Model, model_named
from podsim.points import AttentionPoint
from podsim.profile import find_profile, kernels_hash, read_profile

SHIPPED = Path(__file__).parent.parent / "profiles" / "h200" / "llama-3-8b"
LLAMA = model_named("llama-3-8b")
PROFILE = find_profile("h200", LLAMA)

chunks = st.lists(
    st.tuples(st.integers(1, 2048), st.integers(0, 16384)).map(lambda c: (c[0], c[0] + c[1])),
    max_size=4,
)
contexts = st.lists(st.integers(1, 16384), max_size=64)


ALL_SHIPPED = sorted(path.parent.name for path in SHIPPED.parent.glob("*/profile.json"))


def shape_of(name: str) -> Model:
    """The model, or the share of one ("llama-3-70b-tp4"), that a shipped profile is of."""
    whole, _, num_gpus = name.partition("-tp")
    return model_named(whole).shard(int(num_gpus or 1))


def rows(model: str = "llama-3-8b") -> pd.DataFrame:
    table = pd.read_csv(SHIPPED.parent / model / "measurements.csv", keep_default_na=False)
    table["seconds"] = table["time_us"].astype(float) * 1e-6
    return table


@pytest.mark.parametrize("name", ALL_SHIPPED)
def test_a_shipped_profile_is_the_fit_of_its_rows(name: str, tmp_path: Path) -> None:
    for file in ("measurements.csv", "profile.json"):
        shutil.copy(SHIPPED.parent / name / file, tmp_path / file)
    shipped = read_profile(SHIPPED.parent / name, name)
    refitted = calibration.refit(tmp_path)
    assert refitted.ops == shipped.ops
    for kernel, coefficients in shipped.attention["coefficients"].items():
        assert refitted.attention["coefficients"][kernel] == pytest.approx(coefficients, rel=1e-6)
    for kernel, error in shipped.errors.items():
        assert refitted.errors[kernel] == pytest.approx(error, abs=2e-4)


@pytest.mark.parametrize("name", ALL_SHIPPED)
def test_a_shipped_profile_is_of_its_model_and_of_the_shipped_kernels(name: str) -> None:
    profile = find_profile("h200", shape_of(name))
    assert profile.model == name
    assert profile.provenance["kernels_sha256"] == kernels_hash()
    for fact in ("device_name", "driver", "torch", "triton", "cuda", "date", "command"):
        assert profile.provenance[fact]


@pytest.mark.parametrize("name", ALL_SHIPPED)
def test_no_linear_layer_is_faster_than_the_hardware(name: str) -> None:
    gpu, table, model = gpu_named("h200"), rows(name), shape_of(name)
    outputs = {
        "qkv": (model.qkv_size, model.hidden_size),
        "output": (model.hidden_size, model.num_q_heads * model.head_dim),
        "gate_up": (2 * model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
        "lm_head": (model.vocab_size, model.hidden_size),
    }
    for op, (n, k) in outputs.items():
        timed = table[table["op"] == op]
        flops = 2 * timed["num_tokens"] * n * k / timed["seconds"]
        bandwidth = 2 * n * k / timed["seconds"]
        assert flops.max() < gpu.peak_flops
        assert bandwidth.max() < gpu.peak_bandwidth
        assert max(flops.max() / gpu.peak_flops, bandwidth.max() / gpu.peak_bandwidth) > 0.5


@pytest.mark.parametrize("name", ALL_SHIPPED)
def test_no_attention_is_faster_than_the_hardware(name: str) -> None:
    gpu, table, model = gpu_named("h200"), rows(name), shape_of(name)
    timed = table[table["op"] == "attention"]
    for prefills, decodes, seconds in zip(
        timed["prefills"], timed["decodes"], timed["seconds"], strict=True
    ):
        point = AttentionPoint.from_text(prefills, decodes, "")
        flops = sum(
            4 * model.num_q_heads * model.head_dim * n * (context - n / 2)
            for n, context in point.prefills
        )
        read = 4 * model.num_kv_heads * model.head_dim * sum(point.decode_contexts)
        assert flops / seconds < gpu.peak_flops
        if read > 200e6:  # smaller caches may still lie in the L2
            assert read / seconds < gpu.peak_bandwidth


def test_points_survive_being_text() -> None:
    point = AttentionPoint(((1024, 8192), (7, 7)), (500, 500, 20, 20, 20, 1), "grid")
    assert point.prefills_text == "1024@8192 7@7"
    assert point.decodes_text == "2x500 3x20 1x1"
    assert AttentionPoint.from_text(point.prefills_text, point.decodes_text, "grid") == point


def test_operations_are_exact_at_measured_points_and_straight_between_them() -> None:
    table = {"num_tokens": [1, 8, 9, 16, 17], "seconds": [1.0, 8.0, 5.0, 16.0, 7.0]}
    assert op_seconds(table, [1, 8, 9, 16, 17]).tolist() == [1.0, 8.0, 5.0, 16.0, 7.0]
    assert op_seconds(table, [5, 13]).tolist() == [3.0, 6.0]  # between 1, 9 and 17: not aligned


def test_tiles_go_to_the_sm_that_is_free() -> None:
    geometry = Geometry(
        num_sms=2, num_kv_heads=1, group=1, block_m=64, block_n=64,
        decode_items_per_sm=6, min_split_len=256,
    )  # fmt: skip
    # Four tiles of a prompt, 1 to 4 blocks each: 4 + 1 and 3 + 2 on two SMs.
    assert tile_work(((4, 4),), geometry).makespan == 5.0
    assert tile_work(((4, 4),), geometry).blocks == 10.0
    # Three equal tiles take two turns.
    assert tile_work(((1, 4), (1, 4), (1, 4)), geometry).makespan == 8.0


@given(chunks, contexts)
def test_a_step_costs_the_sum_of_its_parts_and_a_batch_of_one_side_its_own_kernel(
    prefills: list[tuple[int, int]], decodes: list[int]
) -> None:
    if not prefills and not decodes:
        return
    shape = BatchShape.of(prefills, decodes)
    times = {}
    for strategy in STRATEGIES:
        latency = ProfiledLatency(PROFILE, LLAMA, strategy, host_overhead=0.001)
        parts = latency.breakdown(shape)
        assert latency.step_time(shape) == parts.attention + parts.layers + parts.once
        assert min(parts.attention, parts.layers, parts.once - 0.001) > 0
        times[strategy] = parts.attention
    if not prefills or not decodes:
        assert len(set(times.values())) == 1


@given(contexts.filter(len), st.integers(1, 16384))
def test_another_decode_never_makes_attention_faster(decodes: list[int], context: int) -> None:
    model = AttentionModel(
        Geometry.of(LLAMA, PROFILE.attention["geometry"]), PROFILE.attention["coefficients"]
    )
    fewer, more = BatchShape.of((), decodes), BatchShape.of((), [*decodes, context])
    # Splits are chosen anew for each batch: a little slack for where their length jumps.
    assert model.seconds("serial", more) > 0.93 * model.seconds("serial", fewer)


def test_what_lies_outside_the_measured_range_is_counted() -> None:
    latency = ProfiledLatency(PROFILE, LLAMA, "serial")
    latency.step_time(BatchShape.of([(1024, 1024)], [100]))
    assert latency.notes() == []
    latency.step_time(BatchShape.of([(100_000, 100_000)]))
    (note,) = latency.notes()
    assert "beyond what was measured" in note


def test_layer_times_follow_the_table() -> None:
    latency = ProfiledLatency(PROFILE, LLAMA, "serial")
    expected = sum(
        count * float(op_seconds(PROFILE.ops[op], 512)) for op, count in LAYER_OPS.items()
    )
    layers = latency.breakdown(BatchShape.of([(512, 512)])).layers
    assert layers == pytest.approx(LLAMA.num_layers * expected)


def test_rows_that_are_missing_are_named(tmp_path: Path) -> None:
    for name in ("measurements.csv", "profile.json"):
        shutil.copy(SHIPPED / name, tmp_path / name)
    table = rows().drop(columns="seconds")
    table[table["op"] != "down"].to_csv(tmp_path / "measurements.csv", index=False)
    with pytest.raises(InputError, match="0 rows of 'down'"):
        calibration.refit(tmp_path)
    table.drop(columns="time_us").to_csv(tmp_path / "measurements.csv", index=False)
    with pytest.raises(InputError, match="misses the column time_us"):
        calibration.refit(tmp_path)


def test_a_model_without_a_profile_is_told_how_to_get_one() -> None:
    with pytest.raises(InputError, match=r"no shipped profile of deeper on h200 .*llama-3-8b.*"):
        find_profile("h200", replace(LLAMA, name="deeper", num_layers=33))


def test_held_out_errors_are_recorded_for_every_kernel() -> None:
    for name in (*LAYER_OPS, *(f"attention {s}" for s in STRATEGIES), "step serial", "step pod"):
        error = PROFILE.errors[name]
        assert error["points"] >= 10
        assert 0 <= error["median"] <= error["p90"] <= error["worst"]
        assert np.isfinite(error["bias"])
