"""Statistics of traces: by hand on small ones, and the published ones of real files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from podsim.errors import InputError
from podsim.trace_prefix import hit_blocks, lru_hit_blocks, prefix_statistics, regrouped, unshared
from podsim.trace_report import statistics_lines
from podsim.trace_statistics import (
    arrival_statistics,
    inspect_trace,
    length_statistics,
    session_statistics,
)
from podsim.workload import Trace, load_trace, synthetic_trace

REAL = Path(__file__).parents[2] / "shared" / "traces"


def make(
    times: list[float],
    prompts: list[int] | None = None,
    hash_ids: list[list[int]] | None = None,
    block_size: int | None = None,
    sessions: list[int] | None = None,
    thinks: list[float] | None = None,
) -> Trace:
    return Trace(
        name="made",
        arrival_time=np.array(times, dtype=np.float64),
        num_prompt_tokens=np.array(prompts or [10] * len(times), dtype=np.int64),
        num_output_tokens=np.full(len(times), 5, dtype=np.int64),
        rows_read=len(times),
        dropped={},
        notes=(),
        sha256="",
        hash_ids=None if hash_ids is None else tuple(np.array(i, dtype=np.int64) for i in hash_ids),
        hash_block_size=block_size,
        session_id=None if sessions is None else np.array(sessions),
        think_time=None if thinks is None else np.array(thinks),
    )


# ---- arrivals


def test_arrivals_by_hand() -> None:
    statistics = arrival_statistics(make([0.0, 0.5, 0.5, 3.5]))
    assert statistics["duration"] == 3.5
    assert statistics["rate"] == pytest.approx(4 / 3.5)
    gaps = [0.5, 0.0, 3.0]
    assert statistics["iat_cv"] == pytest.approx(np.std(gaps) / np.mean(gaps))
    counts = [3, 0, 0, 1]  # in each whole second
    assert statistics["idc_1s"] == pytest.approx(np.var(counts) / np.mean(counts))
    assert statistics["max_in_1s"] == 3
    assert (statistics["per_minute_min"], statistics["per_minute_max"]) == (4, 4)
    assert statistics["longest_gap"] == 3.0
    assert statistics["distinct_times"] == 3


@pytest.mark.parametrize(("kind", "expected"), [("poisson", 1.0), ("uniform", 0.0)])
def test_dispersion_of_known_arrivals(kind: str, expected: float) -> None:
    statistics = arrival_statistics(synthetic_trace(kind, 20, 40_000, 1, 1))
    assert statistics["iat_cv"] == pytest.approx(expected, abs=0.02)
    assert statistics["idc_1s"] == pytest.approx(expected, abs=0.06)


def test_minutes_count_from_the_first_arrival() -> None:
    statistics = arrival_statistics(make([0.0, 59.0, 60.0, 190.0]))
    names = ("per_minute_min", "per_minute_max", "empty_minutes")
    assert [statistics[name] for name in names] == [0, 2, 1]


def test_arrivals_all_at_once() -> None:
    statistics = arrival_statistics(make([0.0, 0.0]))
    assert (statistics["rate"], statistics["iat_cv"]) == (None, None)
    assert arrival_statistics(make([0.0]))["longest_gap"] is None


def test_a_hundred_years_of_empty_seconds_take_no_memory() -> None:
    assert arrival_statistics(make([0.0, 3e9]))["idc_1s"] == pytest.approx(1.0)


def test_lengths_by_hand() -> None:
    assert length_statistics(np.array([1, 2, 3, 4, 10])) == {
        **{"mean": 4.0, "min": 1, "p50": 3.0, "p90": pytest.approx(7.6)},
        **{"p99": pytest.approx(9.76), "max": 10, "sum": 20},
    }


# ---- prefixes


def test_prefix_hits_by_hand() -> None:
    ids = [[1, 2, 3], [1, 2, 4], [5, 2], [1, 2, 4], []]
    trace = make([0.0] * 5, [48, 40, 32, 40, 8], ids, 16)
    assert trace.hash_ids is not None
    # Of the third request block 2 is known, but not after block 5.
    hits, _ = hit_blocks(trace.hash_ids)
    assert hits.tolist() == [0, 2, 0, 3, 0]
    statistics = prefix_statistics(trace)
    assert statistics is not None
    assert (statistics["blocks"], statistics["unique_blocks"]) == (11, 5)
    assert statistics["hit_blocks"] == pytest.approx(5 / 11)
    # The last block is partial, and the last token is always computed: 32 and 39 tokens.
    assert statistics["hit_tokens"] == pytest.approx((32 + 39) / 168)
    assert statistics["hit_tokens_mean_of_requests"] == pytest.approx((32 / 40 + 39 / 40) / 5)
    assert statistics["requests_with_hit"] == 0.4


def test_lru_hits_by_hand() -> None:
    ids = tuple(np.array(blocks) for blocks in ([1, 2, 3], [4], [1, 2, 3], [4, 1]))
    # Two blocks: 1 and 2 stay of the first, then 4 and 1, whose 2 is gone; 4 goes for 1 and 2.
    assert lru_hit_blocks(ids, 2) == pytest.approx((0 + 0 + 1 + 0) / 9)
    assert lru_hit_blocks(ids, 4) == pytest.approx((0 + 0 + 3 + 2) / 9)
    assert lru_hit_blocks(ids, 99) == hit_blocks(ids)[0].sum() / 9


@given(st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=12))
def test_a_hit_is_a_run_of_blocks_that_earlier_requests_had(ids: list[list[int]]) -> None:
    arrays = tuple(np.array(blocks, dtype=np.int64) for blocks in ids)
    hits, unique = hit_blocks(arrays)
    assert unique == len({block for blocks in ids for block in blocks})
    for i, (blocks, hit) in enumerate(zip(ids, hits.tolist(), strict=True)):
        earlier = {block for before in ids[:i] for block in before}
        assert earlier.issuperset(blocks[:hit])
        assert hit == len(blocks) or blocks[hit] not in earlier


def test_blocks_divide_into_smaller_ones() -> None:
    trace = make([0.0, 1.0], [70, 64], [[900, 7], [900]], 64)
    columns = regrouped(trace, 16)
    assert columns is not None
    first, second = (ids.tolist() for ids in columns)
    assert len(first) == 5  # 70 tokens: 4 blocks of the first, 1 of the second
    assert first[:4] == second
    assert len({*first}) == 5


def test_blocks_join_into_larger_ones_only_in_full_runs() -> None:
    trace = make([0.0, 1.0, 2.0], [64, 40, 64], [[1, 2, 3, 4], [1, 2, 9], [1, 2, 3, 5]], 16)
    columns = regrouped(trace, 32)
    assert columns is not None
    first, second, third = (ids.tolist() for ids in columns)
    assert [len(first), len(second), len(third)] == [2, 2, 2]
    assert first[0] == second[0] == third[0]
    assert len({first[1], second[1], third[1]}) == 3


def test_floored_ids_are_completed_with_unshared_blocks() -> None:
    columns = regrouped(make([0.0, 1.0], [70, 70], [[4], [4]], 64), 64)
    assert columns is not None
    assert [ids.tolist() for ids in columns] == [[4, 5], [4, 6]]
    assert [ids.tolist() for ids in unshared(make([0.0, 1.0], [20, 16]), 16)] == [[0, 1], [2]]


def test_sizes_must_divide() -> None:
    with pytest.raises(InputError) as error:
        regrouped(make([0.0], [70], [[1, 2]], 48), 64)
    assert str(error.value) == (
        "made: blocks of 48 tokens cannot become blocks of 64, expected a multiple or a divisor"
    )
    assert regrouped(make([0.0]), 16) is None


# ---- sessions and text


def test_sessions_by_hand() -> None:
    nan = math.nan
    trace = make([0.0, 1.0, 2.0, 3.0], sessions=[4, -1, 4, 7], thinks=[nan, nan, 1.5, nan])
    statistics = session_statistics(trace)
    assert statistics == {
        **{"sessions": 2, "requests_without": 1, "turns_mean": 1.5, "turns_max": 2},
        **{"think_mean": 1.5, "think_p50": 1.5, "think_p99": 1.5},
    }
    assert session_statistics(make([0.0])) is None


def test_lines() -> None:
    nan = math.nan
    trace = make([0.0, 2.0], [32, 40], [[1, 2], [1, 2, 3]], 16, [0, 0], [nan, 1.5])
    assert statistics_lines(inspect_trace(trace)) == [
        "Requests     2 of 2 rows (made)",
        "Arrivals     1 requests/s over 2 s, at most 1 in 1 s, 2 to 2 in a minute, longest gap 2 s",
        "Burstiness   IAT CV 0, IDC-1s 0.3333; 2 different arrival times",
        "Prompt       mean 36, P50 36, P90 39.2, P99 39.92, min 32, max 40 tokens",
        "Output       mean 5, P50 5, P90 5, P99 5, min 5, max 5 tokens",
        "Prefix       ideal hit 40.00% of blocks, 44.44% of tokens, 50.00% of requests have one; "
        "3 different of 5 blocks of 16 tokens",
        "Sessions     1 of 2 turns in the mean, 2 at most; 0 requests without; "
        "think time mean 1.5 s, P50 1.5 s",
    ]


# ---- real files

GOLDEN = {
    "azure2023/AzureLLMInferenceTrace_code.csv": {
        "requests": 8819,
        "arrivals": {
            **{"duration": 3435.948, "rate": 2.5667, "iat_cv": 13.15, "idc_1s": 13.18},
            **{"max_in_1s": 67, "longest_gap": 217.2, "distinct_times": 8819},
            **{"per_minute_min": 0, "per_minute_max": 632, "empty_minutes": 12},
        },
        "length_correlation": pytest.approx(0.001, abs=0.0005),
        "prompt_tokens": {
            "sum": 18_059_974,
            "min": 3,
            "mean": 2047.8,
            "p50": 1469,
            "p90": 5187.6,
            "p99": 7436,
            "max": 7437,
        },
        "output_tokens": {
            "sum": 245_896,
            "min": 6,
            "mean": 27.9,
            "p50": 13,
            "p90": 55,
            "p99": 251.5,
            "max": 1899,
        },
    },
    "mooncake/conversation_trace.jsonl": {
        "requests": 12031,
        "arrivals": {
            **{"duration": 3536.999, "rate": 3.4015, "iat_cv": 3.03, "distinct_times": 1180},
            "max_in_1s": 28,
        },
        "prompt_tokens": {"mean": 12035.1, "p50": 6909, "p90": 27367, "p99": 85400, "max": 126195},
        "output_tokens": {"mean": 342.6, "p50": 350, "p90": 597, "p99": 1118.5, "max": 2000},
        "prefix": {
            **{"blocks": 288_500, "unique_blocks": 182_790, "hit_blocks": 0.3664},
            **{"hit_tokens": 0.3736, "hit_tokens_mean_of_requests": 0.4094},
            "requests_with_hit": 0.9999,
        },
    },
    "llmservingsim/sharegpt-300-sps10.jsonl": {
        "requests": 300,
        "arrivals": {"rate": 10.3, "iat_cv": 0.94},
        "prompt_tokens": {"mean": 857.5, "p50": 731.5, "p90": 1460, "p99": 2765, "max": 3998},
        "output_tokens": {"mean": 652.5, "p50": 632, "p90": 770, "p99": 784, "max": 1021},
    },
    "apex_plus/llama_creation_05.nobody.jsonl": {
        "requests": 512,
        "prompt_tokens": {"mean": 307.7, "p50": 309, "p90": 400, "p99": 566, "max": 1232},
        "output_tokens": {"mean": 1144, "p50": 1106.5, "p90": 1707.5, "p99": 2341, "max": 3501},
    },
    "vidur/arxiv_summarization_first2000.csv": {
        "requests": 2000,
        "prompt_tokens": {"mean": 2539.88, "max": 4017},
        "output_tokens": {"mean": 312.59, "max": 3931},
    },
    "burstgpt/BurstGPT_1.first3rows_quoted.csv": {
        "requests": 3,
        "arrivals": {"duration": 113},
        "prompt_tokens": {"sum": 472 + 1087 + 417},
    },
    "burstgpt/BurstGPT_3.first4rows_quoted.csv": {
        "requests": 4,
        "arrivals": {"duration": 144},
        "sessions": {"sessions": 4, "requests_without": 0},
    },
    "qwen-bailian/README_quoted_record.jsonl": {
        "requests": 1,
        "prompt_tokens": {"sum": 502},
        "prefix": {"blocks": 32, "block_size": 16},
    },
}


@pytest.mark.skipif(not REAL.exists(), reason="no real traces here")
@pytest.mark.parametrize("name", GOLDEN)
def test_published_statistics(name: str) -> None:
    statistics = inspect_trace(load_trace(REAL / name))
    for part, expected in GOLDEN[name].items():
        if isinstance(expected, dict):
            found = statistics[part]
            assert isinstance(found, dict)
            assert {key: found[key] for key in expected} == pytest.approx(expected, rel=2e-3)
        else:
            assert statistics[part] == expected


@pytest.mark.skipif(not REAL.exists(), reason="no real traces here")
def test_published_prefix_hits_to_four_digits() -> None:
    trace = load_trace(REAL / "mooncake" / "conversation_trace.jsonl")
    lru = {1000: 0.0445, 5000: 0.1118, 10_000: 0.2116, 30_000: 0.3257, 50_000: 0.3546}
    found = inspect_trace(trace, [*lru, 100_000])["lru"]
    assert isinstance(found, dict)
    assert [round(hit, 4) for hit in found.values()] == [*lru.values(), 0.3637]
    statistics = prefix_statistics(trace)
    assert statistics is not None
    assert round(statistics["hit_blocks"], 4) == 0.3664
    assert round(statistics["hit_tokens"], 4) == 0.3736


@pytest.mark.skipif(not REAL.exists(), reason="no real traces here")
def test_a_git_lfs_pointer_is_not_data() -> None:
    with pytest.raises(InputError, match=r":1: is a git-lfs pointer, not the data: fetch it with"):
        load_trace(REAL / "burstgpt" / "BurstGPT_1.csv.lfs-pointer.txt")
