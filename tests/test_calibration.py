"""The shipped profile is what its rows say, its rows are possible, and its models behave."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from podsim import calibration
from podsim.attention_features import (
    DECODE_FEATURES,
    PREFILL_FEATURES,
    Geometry,
    TileWork,
    decode_seconds,
    decode_seconds_of_run,
    matrix_load,
    prefill_features,
    row_tiles,
    tile_work,
)
from podsim.attention_model import AttentionModel
from podsim.batch import BatchShape, PrefillShape
from podsim.cli import app
from podsim.config import STRATEGIES
from podsim.errors import InputError
from podsim.hardware import gpu_named
from podsim.held_out import has_several_chunks, is_heavy_tailed
from podsim.latency import USUAL_SENSITIVITY, ProfiledLatency
from podsim.model import Model, model_named
from podsim.op_tables import LAYER_OPS, MATRIX_OPS, fit_roofline, op_seconds, roofline_seconds
from podsim.overlap import BUSY, SHARES, WAVES, Overlap, place, table_weights, tables
from podsim.points import AttentionPoint, attention_points, step_points
from podsim.profile import find_profile, kernels_hash, read_profile
from podsim.roofline import op_traffic
from podsim.sensitivity import Sensitivity
from podsim.unified_features import decode_tile_blocks, decode_tiles, drawn

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
    for kernel, overlap in shipped.attention["overlap"].items():
        for name, table in overlap.items():
            again = refitted.attention["overlap"][kernel][name]
            assert np.array(again) == pytest.approx(np.array(table), abs=1e-4)
    falls = [profile.sustained["products_at"] for profile in (refitted, shipped)]
    assert falls[0] == pytest.approx(falls[1], rel=1e-3)
    rest = [{**profile.sustained, "products_at": 0.0} for profile in (refitted, shipped)]
    assert rest[0] == pytest.approx(rest[1], rel=1e-3)
    for kernel, error in shipped.errors.items():
        assert refitted.errors[kernel].pop("worst_batch")
        expected = {name: value for name, value in error.items() if name != "worst_batch"}
        assert refitted.errors[kernel] == pytest.approx(expected, abs=2e-4)


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
    table = {"num_tokens": [1, 16, 17, 32, 33], "seconds": [1.0, 16.0, 5.0, 32.0, 7.0]}
    assert op_seconds(table, [1, 16, 17, 32, 33]).tolist() == [1.0, 16.0, 5.0, 32.0, 7.0]
    assert op_seconds(table, [9, 24, 25]).tolist() == [3.0, 5.875, 6.0]  # of 1, 17, 33: not aligned


def test_what_was_measured_beside_the_roofline_is_straight_between_its_points() -> None:
    line = {"fixed": 10.0, "per_token": 1.0, "turn": 100.0, "per_token_beyond": 2.0}
    roofline = roofline_seconds(line, np.array([1, 100, 150]))
    assert roofline.tolist() == [11.0, 110.0, 260.0]
    measured = [16.0, 31.0, 428.0, 449.0]  # two points 5 above the line, two 15 above it
    table = {"num_tokens": [1, 16, 201, 208], "seconds": measured, "roofline": line}
    assert op_seconds(table, [1, 16, 201, 208]).tolist() == measured
    assert op_seconds(table, [101]).tolist() == [113.0 + 10.0]  # halfway from 1 to 201
    assert op_seconds(table, [112]).tolist() == [146.0 + 10.0]  # halfway from 16 to 208


@pytest.mark.parametrize("op", ["gate_up", "rmsnorm"])
def test_a_roofline_finds_the_shares_of_the_peaks_that_an_operation_reaches(op: str) -> None:
    """Times are made: 3 us of launch, 2/3 of the bandwidth, 3/4 of the FLOP/s."""
    gpu, num_tokens = gpu_named("h200"), [1, 8, 64, 200, 240, 512, 2048, 8192]
    works = [op_traffic(LLAMA, op, n) for n in num_tokens]
    moving = np.array([work.bytes for work in works]) / gpu.peak_bandwidth
    computing = np.array([work.flops for work in works]) / gpu.peak_flops
    seconds = 3e-6 + 1.5 * moving + np.maximum(computing - moving, 0.0) / 0.75
    line = fit_roofline(LLAMA, gpu, op, num_tokens, seconds)
    assert roofline_seconds(line, np.array(num_tokens)) == pytest.approx(seconds, rel=1e-6)
    if op == "rmsnorm":
        assert set(line) == {"fixed", "per_token"}
        assert line["fixed"] == pytest.approx(3e-6)
    else:
        weights = op_traffic(LLAMA, op, 0).bytes / gpu.peak_bandwidth
        assert line["fixed"] == pytest.approx(3e-6 + 1.5 * weights)
        assert 200 < line["turn"] < 240  # 206 FLOPs a byte on an H200, and the activations


TWO_SMS = Geometry(
    num_sms=2, num_kv_heads=1, group=1, pack=1, block_m=64, block_n=64, decode_block_n=64,
    decode_items_per_sm=6, min_split_len=256,
)  # fmt: skip


def work(*chunks: tuple[int, int], geometry: Geometry, beside: int = 0) -> TileWork:
    """Of chunks as blocks of queries at blocks of keys."""
    prefills = [PrefillShape(64 * queries, 64 * keys) for queries, keys in chunks]
    return tile_work(row_tiles(prefills, geometry), geometry, beside=beside)


def test_tiles_go_to_the_sm_that_is_free() -> None:
    # Four tiles of a prompt, 1 to 4 blocks each: 4 + 1 and 3 + 2 on two SMs.
    assert work((4, 4), geometry=TWO_SMS).makespan == 5.0
    assert work((4, 4), geometry=TWO_SMS).blocks == 10.0
    # Three equal tiles take two turns.
    assert work((1, 4), (1, 4), (1, 4), geometry=TWO_SMS).makespan == 8.0


def test_a_tile_walks_whole_blocks_of_the_keys_that_it_sees() -> None:
    packed = replace(TWO_SMS, group=4, pack=4, num_sms=1)  # tiles of 16 tokens
    # Tiles that end at keys 56, 72, 88 and 100: 1, 2, 2 and 2 blocks.
    tiles = row_tiles([PrefillShape(60, 100)], packed)
    assert tile_work(tiles, packed).blocks == 7.0
    large = replace(TWO_SMS, block_m=128, num_sms=1)  # tiles of two blocks of tokens
    assert work((4, 5), geometry=large).blocks == 3.0 + 5.0


def test_beside_decode_prefill_has_fewer_sms_and_a_tile_costs_less() -> None:
    costly = replace(TWO_SMS, tile_overhead=1.0)
    assert work((4, 4), geometry=costly).makespan == 7.0
    assert work((4, 4), geometry=costly, beside=1).makespan == 10.0 + 4 * 0.5


def test_long_tiles_come_first_of_all_heads() -> None:
    two_heads = replace(TWO_SMS, num_kv_heads=2, group=1)
    long_first = replace(two_heads, resident_keys=1)
    # One tile of 9 blocks and two of 1 for each head: 9 + 1 + 1 twice, or 9 late on top of 1 + 1.
    chunks = ((1, 9), (1, 1), (1, 1))
    assert work(*chunks, geometry=long_first).makespan == 11.0
    assert work(*chunks, geometry=two_heads).makespan == 11.0
    three_sms = replace(long_first, num_sms=3)
    assert work(*chunks, geometry=three_sms).makespan == 9.0
    assert work(*chunks, geometry=replace(three_sms, resident_keys=0)).makespan == 10.0


def test_the_longest_tiles_come_first_where_the_l2_holds_the_keys() -> None:
    heads = replace(TWO_SMS, num_kv_heads=3, group=1)
    resident = replace(heads, resident_keys=10**6)
    # Tiles of 2 and 1 blocks for each of three heads, on two SMs: 2 1 2 1 2 1, or 2 2 2 1 1 1.
    assert work((2, 2), geometry=heads).makespan == 5.0
    assert work((2, 2), geometry=resident).makespan == 5.0
    assert work((1, 3), (1, 1), geometry=heads).makespan == 7.0
    assert work((1, 3), (1, 1), geometry=resident).makespan == 6.0
    # Exactly as many keys as fit, and one more.
    fitting = replace(heads, resident_keys=3 * 64 * 4)
    assert work((1, 3), (1, 1), geometry=fitting).makespan == 6.0
    assert work((1, 3), (1, 1), geometry=replace(fitting, resident_keys=767)).makespan == 7.0
    # Beside a decode, only those that are longer than an SM's share.
    assert work((1, 3), (1, 1), geometry=resident, beside=2).makespan == 7.0


def test_heads_that_do_not_pack_are_tiles_of_their_own() -> None:
    five = replace(TWO_SMS, group=5, pack=1, num_sms=5)
    assert work((1, 4), geometry=five).tiles == 5
    assert work((1, 4), geometry=five).makespan == 4.0


@given(contexts.filter(len))
def test_decodes_as_tiles_keep_their_longest_and_nearly_their_sum(decodes: list[int]) -> None:
    geometry = AttentionModel.of(LLAMA, PROFILE.attention).geometry
    tiles = decode_tiles(BatchShape.of((), decodes), geometry)
    blocks = decode_tile_blocks(tiles)
    assert len(blocks) == len(decodes)
    assert max(blocks) == blocks[0] == -(-max(decodes) // geometry.block_n)
    assert blocks == sorted(blocks, reverse=True)
    # Each mean is rounded to whole blocks, and no tile is longer than the longest decode.
    assert sum(blocks) <= sum(decodes) / geometry.block_n + len(decodes) / 2 + 1
    assert sum(blocks) >= 0.8 * (sum(decodes) / geometry.block_n - len(decodes) / 2)


def test_decodes_as_tiles_are_the_quantiles_of_a_lognormal_law() -> None:
    assert decode_tile_blocks((9, 0, 0)) == [9]
    assert decode_tile_blocks((9, 3, 9)) == [9, 9, 9, 9]
    # e^(0.8 z) at Blom's positions, scaled so that the longest of 99 has 200 blocks.
    normal = NormalDist()
    law = [math.exp(0.8 * normal.inv_cdf((k - 0.375) / 99.25)) for k in range(99, 0, -1)]
    lengths = [200 * f / law[0] for f in law]
    mean = round(sum(lengths[1:]) / 98)
    found = decode_tile_blocks((200, 98, mean))
    assert sum(found[1:]) == pytest.approx(98 * mean)
    assert found == pytest.approx(lengths, rel=0.05)


def test_the_clock_falls_with_the_share_of_time_in_which_all_sms_work() -> None:
    geometry = replace(TWO_SMS, linear_token_seconds=1e-6, quiet_layer_seconds=1e-4)
    full = TileWork(10.0, 20.0, 10.0, 2, 2, 0.0)
    lone = replace(full, blocks=10.0)  # one of the two SMs works
    assert drawn(0, 1e-4, full, geometry) == pytest.approx(0.5**2)
    assert drawn(100, 1e-4, full, geometry) == pytest.approx((2 / 3) ** 2)
    assert drawn(100, 1e-4, lone, geometry) == pytest.approx((1.5 / 3) ** 2)
    assert drawn(0, 1e-4, lone, geometry) == pytest.approx(0.25**2)


def decode_feature(name: str, contexts: Sequence[int], geometry: Geometry) -> float:
    """One of those whose coefficients decodes have."""
    unit = [float(name == feature) for feature in DECODE_FEATURES]
    assert sum(unit) == 1
    return decode_seconds(unit, len(contexts), sum(contexts), max(contexts), geometry)[0]


def test_every_turn_of_items_waits_for_its_first_keys() -> None:
    turns = [decode_feature("turns", [256] * count, TWO_SMS) for count in range(1, 7)]
    assert turns == [1, 1, 2, 2, 3, 3]


def test_few_short_items_are_bound_by_their_turns_and_many_keys_by_the_memory() -> None:
    # Three items on two SMs: two turns, each of 1.5 blocks and what an item costs beside them.
    assert decode_feature("bottleneck", [64] * 3, TWO_SMS) == pytest.approx(0.4 * 2 * (1.5 + 1))
    assert decode_feature("bottleneck", [65536] * 64, TWO_SMS) == 65536 * 64 / 64 / 2


def test_a_combine_reads_the_partials_of_the_longest_in_rounds() -> None:
    many = replace(TWO_SMS, num_sms=200)  # items of no more than 256 keys
    for longest, rounds in ((256, 0), (257, 1), (4096, 1), (4097, 2), (8192, 2), (8193, 3)):
        assert decode_feature("combine_rounds", [longest, 100], many) == rounds
        assert decode_feature("has_combine", [longest, 100], many) == (rounds > 0)


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("num_kv_heads", [1, 8])
def test_how_decodes_are_cut_is_told_by_their_number_sum_and_longest(
    sigma: float, num_kv_heads: int
) -> None:
    """Lengths that spread lognormally, cut as the kernels' plan does."""
    rng = np.random.default_rng(0)
    geometry = Geometry(
        num_sms=132, num_kv_heads=num_kv_heads, group=8, pack=8, block_m=128, block_n=128,
        decode_block_n=64, decode_items_per_sm=3, min_split_len=256,
    )  # fmt: skip
    cuts, items = [], []
    for _ in range(200):
        count, middle = int(rng.integers(8, 256)), np.exp(rng.uniform(5, 9))
        lengths = np.clip(middle * np.exp(sigma * rng.standard_normal(count)), 16, 32768)
        contexts = lengths.astype(int).tolist()
        filling = sum(contexts) * num_kv_heads / (132 * 3)
        longest = math.ceil(max(filling, 256) / 64) * 64
        splits = [math.ceil(context / longest) for context in contexts]
        heads = num_kv_heads / 132
        work = (count, sum(contexts), max(contexts), geometry)
        items.append(decode_seconds([0.0] * len(DECODE_FEATURES), *work)[1] / (sum(splits) * heads))
        num_cut = sum(split > 1 for split in splits)
        if num_cut:
            told = decode_feature("combines", contexts, geometry) / (8 * heads)
            cuts.append((told - num_cut) / count)
    assert np.mean(items) == pytest.approx(1, abs=0.06)
    assert np.std(items) < 0.1
    assert np.mean(cuts) == pytest.approx(0, abs=0.1)
    assert np.std(cuts) < 0.25  # of nearly equal lengths, all or none


def test_a_profile_fitted_by_another_version_says_so(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(SHIPPED, tmp_path / "profile"))
    content = json.loads((folder / "profile.json").read_text())
    content["attention"]["features"]["decode"][1] = "blocks"
    (folder / "profile.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=r"attention 'decode' was fitted by another version.*--refit"
    ):
        find_profile("h200", LLAMA, folder)
    calibration.refit(folder)
    assert find_profile("h200", LLAMA, folder).attention == PROFILE.attention


@given(
    st.lists(st.floats(0, 1e-5), min_size=len(DECODE_FEATURES), max_size=len(DECODE_FEATURES)),
    st.integers(1, 300),
    st.lists(st.tuples(st.integers(1, 200_000), st.integers(0, 100)), min_size=1, max_size=20),
)
def test_many_batches_of_decodes_take_to_the_last_bit_what_each_takes(
    coefficients: list[float], n: int, batches: list[tuple[int, int]]
) -> None:
    geometry = AttentionModel.of(LLAMA, PROFILE.attention).geometry
    longest = [most for most, _ in batches]
    keys = [most + (n - 1) * most * part // 100 for most, part in batches]
    together = decode_seconds_of_run(
        coefficients, n, np.array(keys), np.array(longest), geometry
    ).tolist()
    one_by_one = [
        decode_seconds(coefficients, n, k, most, geometry)[0]
        for k, most in zip(keys, longest, strict=True)
    ]
    assert together == one_by_one


def test_matrix_products_slow_prefill_down_the_more_the_larger_their_share() -> None:
    geometry = AttentionModel.of(LLAMA, PROFILE.attention).geometry
    quiet = replace(geometry, quiet_layer_seconds=geometry.linear_token_seconds * 100)
    assert matrix_load(0, quiet) == 0.0
    assert matrix_load(100, quiet) == pytest.approx(0.25)  # half of the time, squared
    assert matrix_load(300, quiet) == pytest.approx(0.75**2)
    assert matrix_load(300, replace(quiet, quiet_layer_seconds=0.0)) == 1.0


def test_tiles_with_a_neighbour_and_busy_sms_slow_prefill_down() -> None:
    geometry = replace(AttentionModel.of(LLAMA, PROFILE.attention).geometry, num_sms=8)
    paired, loaded = map(PREFILL_FEATURES.index, ("paired_makespan", "loaded_blocks"))

    def features(tiles: int, beside_decode: bool = False) -> tuple[float, ...]:
        work = TileWork(10.0, 10.0 * tiles, 10.0, tiles, num_sms=8, decode_share=0.0)
        return prefill_features(work, geometry, 0.5, beside_decode)

    # Tiles of 10 blocks on 8 SMs: up to 4 of them each have a pair of SMs.
    assert [features(n)[paired] for n in (1, 4, 6, 8)] == [0.0, 0.0, 2.5, 10.0]
    # Beside decodes every SM has work.
    assert features(1, beside_decode=True)[paired] == 10.0
    # A quarter, half, all of the SMs busy for as long.
    assert [features(n)[loaded] for n in (2, 4, 8)] == [0.3125, 1.25, 5.0]


@given(st.floats(0.001, 0.999), st.floats(0, 1), st.floats(0, 20), st.integers(0, 2**32 - 1))
def test_an_overlap_is_what_the_weights_of_its_cells_say(
    share: float, busy: float, waves: float, seed: int
) -> None:
    cells = np.random.default_rng(seed).uniform(size=len(SHARES) * (len(BUSY) + len(WAVES)))
    weights = table_weights(np.array([share]), np.array([busy]), np.array([waves]))
    overlap = Overlap.of(tables(cells))
    expected = float((weights @ cells)[0])
    found = overlap.at(share, place(BUSY, busy), place(WAVES, waves))
    assert found == pytest.approx(expected, abs=2e-6)  # tables are rounded


def test_a_side_that_vanishes_leaves_the_time_of_the_other() -> None:
    model = AttentionModel.of(LLAMA, PROFILE.attention)
    long_prefill, one_decode = [(2048, 16384)], [64]
    alone = model.seconds("serial", BatchShape.of(long_prefill))
    for strategy in STRATEGIES:
        both = model.seconds(strategy, BatchShape.of(long_prefill, one_decode))
        # Streams keep an eighth of the SMs for the decode, and POD has less room for the prefill.
        assert alone * 0.95 < both < alone * 1.2


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
    model = AttentionModel.of(LLAMA, PROFILE.attention)
    fewer, more = BatchShape.of((), decodes), BatchShape.of((), [*decodes, context])
    # Splits are chosen anew for each batch: a little slack for where their length jumps, and half
    # of the 2 us within which a timing repeats.
    assert model.seconds("serial", more) > 0.93 * model.seconds("serial", fewer) - 1e-6


def test_what_lies_outside_the_measured_range_is_counted() -> None:
    latency = ProfiledLatency(PROFILE, LLAMA, "serial")
    latency.step_time(BatchShape.of([(1024, 1024)], [100]))
    assert latency.notes() == []
    latency.step_time(BatchShape.of([(100_000, 100_000)]))
    (note,) = latency.notes()
    assert "beyond what was measured" in note


def test_layer_times_follow_the_table() -> None:
    nothing_more = {"layer_gap": 0.0}
    at_rest = replace(PROFILE, sustained=nothing_more)
    latency = ProfiledLatency(at_rest, LLAMA, "serial")
    expected = sum(
        count * float(op_seconds(PROFILE.ops[op], 512)) for op, count in LAYER_OPS.items()
    )
    layers = latency.breakdown(BatchShape.of([(512, 512)])).layers
    assert layers == pytest.approx(LLAMA.num_layers * expected)


def copy_of(name: str, folder: Path) -> pd.DataFrame:
    """A shipped profile in a folder; its rows."""
    for file in ("measurements.csv", "profile.json"):
        shutil.copy(SHIPPED.parent / name / file, folder / file)
    return pd.read_csv(folder / "measurements.csv", keep_default_na=False)


def test_decodes_of_whole_steps_tell_how_much_later_their_kernels_start(tmp_path: Path) -> None:
    table = copy_of("llama-3-8b", tmp_path)
    steps = (table["op"] == "step") & (table["prefills"] == "")
    table[~steps].to_csv(tmp_path / "measurements.csv", index=False)
    without = calibration.refit(tmp_path)
    assert (without.sustained["layer_gap"], without.sustained["steps"]) == (0.0, 0)

    # Each takes what its parts take, and 5 us a layer times the square of what is not products.
    latency = ProfiledLatency(without, LLAMA, "serial")
    for index, row in table[steps].iterrows():
        parts = latency.parts(AttentionPoint.from_text("", row["decodes"], "").shape)
        layers = parts.attention + parts.layers
        gaps = 5e-6 * LLAMA.num_layers * (1 - parts.products / layers) ** 2
        table.loc[index, "time_us"] = (layers + gaps + parts.once) * 1e6
    table.to_csv(tmp_path / "measurements.csv", index=False)
    fitted = calibration.refit(tmp_path)
    assert fitted.sustained["layer_gap"] == pytest.approx(5e-6, rel=1e-3)
    assert fitted.sustained["steps"] >= 3
    decodes = BatchShape.of((), [2048] * 16)
    slower, faster = (ProfiledLatency(profile, LLAMA, "pod") for profile in (fitted, without))
    longer = faster.step_time(decodes) + 5e-6 * LLAMA.num_layers
    assert slower.step_time(decodes) == pytest.approx(longer, rel=5e-3)


def test_what_draws_power_is_told_of_attention_under_every_strategy() -> None:
    mixed = BatchShape.of([(512, 4096)], [4096] * 64)
    for name in STRATEGIES:
        time = ProfiledLatency(PROFILE, LLAMA, name).attention_time
        alone = time(BatchShape.of([(512, 4096)]))
        assert 0.9 * alone.seconds < alone.drawing <= alone.seconds  # its tiles fill the SMs
        assert alone.reading == 0.0
        decodes = time(BatchShape.of([], [4096] * 64))
        assert decodes[1:] == (0.0, 0.0, 0.0, 0.0)
        both = time(mixed)
        assert both.reading == decodes.seconds
        if name == "unified":  # its decodes are tiles too
            assert both[3:] == (0.0, 0.0)
            assert 0.6 * both.seconds < both.drawing < both.seconds
            continue
        saved = both.drawing + both.reading - both.seconds
        assert both[3:] == (max(0.0, saved), 0.0)  # 64 decodes make POD's tiles decode-heavy
        assert (saved > 0.1 * both.seconds) == (name != "serial")
        # The same work in less time draws more.
        assert both.drawing == pytest.approx(alone.drawing, rel=0.1)
    balanced = time(BatchShape.of([(512, 4096)], [4096] * 8))
    saved = balanced.drawing + balanced.reading - balanced.seconds
    assert balanced[3:] == (0.0, saved)
    few = BatchShape.of([(16, 4096)])  # 4 tiles of queries for each of 8 heads, 132 SMs
    assert time(few).drawing < 0.3 * time(few).seconds


def test_products_and_attention_go_with_the_clock_as_passes_over_one_point_do() -> None:
    latency = ProfiledLatency(PROFILE, LLAMA, "pod")
    known = PROFILE.clock_sensitivity["pod"]
    serial = PROFILE.clock_sensitivity["serial"]  # whose kernels run one side
    assert latency.attention_follows(BatchShape.of([(512, 4096)])) == serial["high"]
    assert latency.attention_follows(BatchShape.of([], [4096] * 64)) == serial["low"]
    mixed = [BatchShape.of([(512, 4096)], [4096] * n) for n in (1, 16, 256)]
    follows = [latency.attention_follows(shape) for shape in mixed]
    assert known["high"] > follows[0] > follows[1] > follows[2] > known["low"]
    for num_tokens in (8, 512, 4096):
        seconds = {op: float(op_seconds(PROFILE.ops[op], num_tokens)) for op in MATRIX_OPS}
        work = {op: op_traffic(LLAMA, op, num_tokens) for op in MATRIX_OPS}
        products = Sensitivity(**PROFILE.clock_sensitivity["products"])
        expected = sum(seconds[op] * products.share(w.flops / w.bytes) for op, w in work.items())
        assert latency.clocked_products(num_tokens) == pytest.approx(LLAMA.num_layers * expected)
    most = latency.clocked_products(8192)
    assert latency.clocked_products(16384) == pytest.approx(2 * most)
    untold = ProfiledLatency(replace(PROFILE, clock_sensitivity={}), LLAMA, "pod")
    assert untold.attention_follows(mixed[0]) < USUAL_SENSITIVITY["pod"].high
    many = np.array([0.5, 100.0, np.inf])
    assert products.at(many).tolist() == pytest.approx([products.share(x) for x in many.tolist()])


def test_heavy_tails_and_several_chunks_have_rows_of_their_own() -> None:
    assert is_heavy_tailed(AttentionPoint((), (8000, *[1000] * 9), "held_out")) is False
    assert is_heavy_tailed(AttentionPoint((), (*[9000] * 2, *[1000] * 8), "held_out")) is True
    assert is_heavy_tailed(AttentionPoint(((64, 64),), (), "held_out")) is False
    numbers = {n: has_several_chunks(AttentionPoint(((64, 64),) * n, (), "")) for n in range(1, 6)}
    assert numbers == {1: False, 2: True, 3: True, 4: True, 5: False}
    for name in (*STRATEGIES, "decode"):
        whole = PROFILE.errors[f"attention {name}"]
        subset = PROFILE.errors[f"attention {name}, heavy tail"]
        assert 0 < subset["points"] < whole["points"]
        assert subset["worst"] <= whole["worst"]
    for name in (*STRATEGIES, "prefill"):
        assert PROFILE.errors[f"attention {name}, several chunks"]["points"] >= 5
    assert "decode" in PROFILE.errors["attention decode"]["worst_batch"]


def test_a_batch_in_a_few_words() -> None:
    point = AttentionPoint(((1024, 8192), (7, 7)), (500, 500, 20), "grid")
    assert point.summary == "1024@8192 7@7 + 3 decodes at 20 to 500"
    assert AttentionPoint((), (77,), "grid").summary == "1 decode at 77"


def test_points_are_fitted_on_as_on_what_judges_them() -> None:
    points = attention_points(np.random.default_rng(0), LLAMA, gpu_named("h200"))
    assert len({(point.prefills, point.decode_contexts) for point in points}) == len(points)
    for split, least in (("grid", 30), ("held_out", 15)):
        some = [point for point in points if point.split == split]
        assert sum(is_heavy_tailed(point) for point in some) >= least
        assert sum(has_several_chunks(point) for point in some) >= 2 * least
    steps = step_points(points)
    assert [point.split for point in steps] == ["grid"] * 24 + ["held_out"] * 24
    assert sum(point.is_mixed for point in step_points(points, each=4)) == 8


def test_a_refit_draws_every_kernel(tmp_path: Path) -> None:
    copy_of("llama-3-8b", tmp_path)
    result = CliRunner().invoke(app, ["profile", "--refit", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "worst batch" in result.output
    drawn = {path.stem for path in (tmp_path / "plots").iterdir()}
    assert {"attention-pod", "attention-decode", "gate-up", "step-pod"} <= drawn
    assert (tmp_path / "plots" / "attention-pod.png").read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.parametrize("lost", ["mixed", "decode"])
def test_a_duty_of_which_rows_were_refused_is_left_out(lost: str, tmp_path: Path) -> None:
    table = copy_of("llama-3-8b", tmp_path)
    refused = (table["split"] == "1 in 4") & table["strategy"].str.startswith(lost)
    assert refused.sum() == 12
    table[~refused].to_csv(tmp_path / "measurements.csv", index=False)
    found = calibration.refit(tmp_path).sustained
    assert found["rest"] == pytest.approx(PROFILE.sustained["rest"], rel=0.2)


@pytest.mark.parametrize("schema", [2, 3, 4, 5, 6])
def test_a_profile_of_a_schema_before_is_fitted_again(schema: int, tmp_path: Path) -> None:
    copy_of("llama-3-8b", tmp_path)
    content = json.loads((tmp_path / "profile.json").read_text())
    old = {**content, "schema": schema, "sustained": {"slow_share": 0.1, "slow_seconds": 0.6}}
    (tmp_path / "profile.json").write_text(json.dumps(old))
    with pytest.raises(InputError, match=rf"schema {schema}, this podsim reads 7; fit .* --refit`"):
        read_profile(tmp_path, str(tmp_path))
    assert calibration.refit(tmp_path).to_json() == PROFILE.to_json()
    assert read_profile(tmp_path, str(tmp_path)).provenance == PROFILE.provenance


def test_rows_of_one_pass_stay_as_timed(tmp_path: Path) -> None:
    table = copy_of("llama-3-8b", tmp_path)
    table[table["pass"] == 0].to_csv(tmp_path / "measurements.csv", index=False)
    assert calibration.refit(tmp_path).clock_sensitivity == {}
