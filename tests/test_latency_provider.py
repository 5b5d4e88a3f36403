"""A profile used by others: step times for engines, and the tables of another simulator."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import podsim
from podsim.errors import InputError
from podsim.latency import ProfiledLatency
from podsim.model import model_named
from podsim.profile import find_profile

PROFILES = Path(__file__).parent.parent / "profiles" / "h200"
LLAMA = model_named("llama-3-8b")

READ_BY_VIDUR = {
    "mlp.csv": [
        *(f"time_stats.{name}.median" for name in (
            "attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj", "mlp_act",
            "input_layernorm", "post_attention_layernorm", "attn_rope", "add",
        )),
        *("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp", "vocab_size"),
        *("num_tokens", "num_tensor_parallel_workers"),
    ],
    "attention.csv": [
        *(f"time_stats.{n}.median" for n in ("attn_prefill", "attn_decode", "attn_kv_cache_save")),
        *("n_embd", "n_q_head", "n_kv_head", "block_size", "num_tensor_parallel_workers"),
        *("batch_size", "kv_cache_size", "prefill_chunk_size"),
    ],
}  # fmt: skip
"""What its sklearn_execution_time_predictor.py takes from each file."""


def test_a_step_is_the_time_the_simulator_would_take() -> None:
    provider = podsim.LatencyProvider(gpu="h200", model="llama-3-8b", attention="pod")
    batch = podsim.BatchShape.of([(512, 1024), (100, 100)], [300, 4000])
    step = provider.step_time(batch)
    latency = ProfiledLatency(find_profile("h200", LLAMA), LLAMA, "pod")
    assert step.seconds == latency.step_time(batch)
    assert step.seconds == pytest.approx(step.breakdown.total)
    low, high = step.interval
    assert 0.8 * step.seconds < low < high < 1.3 * step.seconds
    assert step.is_measured
    assert not provider.step_time(podsim.BatchShape.of([(512, 10**6)])).is_measured
    scaled = podsim.LatencyProvider(gpu="a100")
    assert not scaled.step_time(podsim.BatchShape.of([(512, 512)])).is_measured


@pytest.mark.parametrize("gpu", ["h200", "a100"])
def test_many_steps_at_once_are_those_of_one_after_another(gpu: str) -> None:
    provider = podsim.LatencyProvider(gpu=gpu, attention="pod")
    rng = np.random.default_rng(8)
    batches = []
    for prefills in 5 * ([], [], [(512, 4096)], [(100, 100), (300, 20_000)]):
        decodes = rng.integers(1, 30_000, 40)[: rng.choice([0, 1, 7, 40]) or not prefills]
        batches.append(podsim.BatchShape.of(prefills, decodes.tolist()))
    batches += [podsim.BatchShape.of([], [500 + i] * 7) for i in range(50)]
    batches.append(podsim.BatchShape.of([], [100, 200, 300])._replace(num_sampled=1))
    batches.append(podsim.BatchShape.of([], [10**6]))
    table = provider.step_times(batches)
    assert list(table.columns) == ["seconds", "low", "high", "is_measured"]
    for batch, row in zip(batches, table.itertuples(index=False), strict=True):
        step = provider.step_time(batch)
        assert tuple(row) == (step.seconds, *step.interval, step.is_measured)
    assert table["is_measured"].any() == (gpu == "h200")
    assert not table["is_measured"].iloc[-1]
    with pytest.raises(InputError, match="the batch is empty"):
        provider.step_times([*batches, podsim.BatchShape.of()])
    assert provider.step_times([]).empty


def test_strategies_differ_and_host_time_is_added() -> None:
    batch = podsim.BatchShape.of([(1024, 8192)], [8192] * 64)
    seconds = {
        attention: podsim.LatencyProvider(attention=attention).step_time(batch).seconds
        for attention in ("serial", "pod")
    }
    assert seconds["pod"] != seconds["serial"]
    slower = podsim.LatencyProvider(host_overhead=0.001).step_time(batch).seconds
    # The host's time is a rest, in which the clock recovers.
    assert seconds["serial"] + 0.0007 < slower < seconds["serial"] + 0.001
    decodes = podsim.BatchShape.of([], [8192] * 64)
    alone, later = (
        podsim.LatencyProvider(host_overhead=host).step_time(decodes).seconds
        for host in (0.0, 0.001)
    )
    assert later == pytest.approx(alone + 0.001)


@pytest.mark.parametrize(
    ("prefills", "decodes", "message"),
    [
        ((), (), "the batch is empty"),
        (((5, 4),), (), "a chunk of 5 tokens at a context of 4"),
        (((0, 4),), (), "a chunk of 0 tokens"),
        ((), (0, 5), "2 decodes with contexts of 5 tokens in all and 5 at most"),
    ],
)
def test_impossible_batches_are_refused(
    prefills: tuple[tuple[int, int], ...], decodes: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        podsim.LatencyProvider().step_time(podsim.BatchShape.of(prefills, decodes))


def export(folder: Path, out: Path, to: str = "vidur") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podsim", "profile", "export"]
    return subprocess.run(
        [*command, str(folder), "--to", to, "--out", str(out)], capture_output=True, text=True
    )


def test_vidur_finds_its_columns_and_the_times_in_milliseconds(tmp_path: Path) -> None:
    run = export(PROFILES / "llama-3-8b", tmp_path / "vidur")
    assert run.returncode == 0, run.stderr
    tables = {name: pd.read_csv(tmp_path / "vidur" / name) for name in READ_BY_VIDUR}
    for name, columns in READ_BY_VIDUR.items():
        assert not set(columns) - set(tables[name].columns)
        assert f"{len(tables[name]):,} " in run.stdout
    mlp, attention = tables["mlp.csv"], tables["attention.csv"]
    profile = find_profile("h200", LLAMA)
    rows = pd.read_csv(PROFILES / "llama-3-8b" / "measurements.csv")
    for theirs, ours in {"mlp_up_proj": "gate_up", "attn_post_proj": "output"}.items():
        timed = rows[(rows["op"] == ours) & (rows["num_tokens"] == 1024)]["time_us"].median()
        times = mlp.set_index("num_tokens")[f"time_stats.{theirs}.median"]
        assert times[1024] == pytest.approx(timed * 1e-3 - profile.launch["graph"] * 1e3, rel=1e-4)
    assert (mlp["n_head"] == 32).all()
    assert mlp[READ_BY_VIDUR["mlp.csv"]].notna().all(axis=None)
    decodes = attention[attention["prefill_chunk_size"] == 0]
    prefills = attention[attention["prefill_chunk_size"] > 0]
    assert decodes["time_stats.attn_decode.median"].notna().all()
    assert decodes["time_stats.attn_prefill.median"].isna().all()
    assert prefills["time_stats.attn_prefill.median"].notna().all()
    assert (prefills["batch_size"] == 1).all()
    # 2048 tokens that are a whole prompt have nothing in the cache before them.
    assert ((prefills["prefill_chunk_size"] == 2048) & (prefills["kv_cache_size"] == 0)).any()
    around = decodes["kv_cache_size"].between(7000, 9500)
    assert ((decodes["batch_size"] == 64) & around).any()
    # A decode's own token is not in the cache yet.
    rows = pd.read_csv(PROFILES / "llama-3-8b" / "measurements.csv", keep_default_na=False)
    alone = rows[(rows["op"] == "attention") & (rows["prefills"] == "")]["decodes"]
    contexts = {int(text[2:]) for text in alone if text.startswith("1x") and " " not in text}
    assert set(decodes[decodes["batch_size"] == 1]["kv_cache_size"]) == {n - 1 for n in contexts}


def test_an_export_to_who_knows_what_is_refused(tmp_path: Path) -> None:
    run = export(PROFILES / "llama-3-8b", tmp_path / "out", to="splitwise")
    assert (run.returncode, run.stderr) == (2, "podsim: --to is 'splitwise', expected vidur\n")
    run = export(tmp_path / "nowhere", tmp_path / "out")
    assert run.returncode == 2
    assert "No such file" in run.stderr
    assert not (tmp_path / "out").exists()
