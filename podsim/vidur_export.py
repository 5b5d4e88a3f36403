"""A profile as the profiling data of Vidur (github.com/microsoft/vidur): attention.csv, mlp.csv.

Columns and meanings are those of its `vidur/profiling` and of what its execution-time predictor
reads: milliseconds, medians only, whole model's sizes. Its `kv_cache_size` is the context before
the new tokens. What podsim fuses into another kernel is 0 there: the residual's addition is in the
norms, the cache write in the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd

from podsim import calibration
from podsim.errors import InputError
from podsim.points import AttentionPoint
from podsim.profile import MEASUREMENTS_FILE, Profile, read_profile

BLOCK_SIZE = 16
"""Vidur's default, by which it picks rows; podsim's kernels read contiguous slots."""

MOST_UNEVEN = 2.0
"""Longest over shortest context of decodes that their mean describes."""

MLP_COLUMNS = {
    "emb": "embedding",
    "input_layernorm": "rmsnorm",
    "attn_pre_proj": "qkv",
    "attn_rope": "rope_and_cache",
    "attn_post_proj": "output",
    "post_attention_layernorm": "rmsnorm",
    "mlp_up_proj": "gate_up",
    "mlp_act": "silu_mul",
    "mlp_down_proj": "down",
}
"""Vidur's name of an operation, and podsim's."""
FUSED_MLP = ("add",)
FUSED_ATTENTION = ("attn_input_reshape", "attn_output_reshape", "attn_kv_cache_save")


def export_vidur(folder: Path, out: Path) -> dict[str, int]:
    """Write attention.csv and mlp.csv into `out`; how many rows each has, and how many are left.

    Vidur has no columns for batches of several chunks, of very uneven decodes, or of both sides.
    Raises InputError if the folder is no profile.
    """
    profile = read_profile(folder, str(folder))
    if profile.shape.get("tensor_parallel_size", 1) != 1:
        raise InputError(f"{folder}: of one GPU's share of a model; Vidur's tables name whole ones")
    rows = calibration.read_measurements(folder / MEASUREMENTS_FILE)
    rows["ms"] = rows["time_us"] * 1e-3 - profile.launch["graph"] * 1e3
    attention = list(_attention_rows(rows, profile))
    mlp = _mlp_table(rows, profile)
    mlp.to_csv(out / "mlp.csv", index=False, float_format="%.6f")
    pd.DataFrame(attention).to_csv(out / "attention.csv", index=False, float_format="%.6f")
    timed = int((rows["op"] == "attention").sum())
    return {"attention": len(attention), "mlp": len(mlp), "left_out": timed - len(attention)}


def _sizes(profile: Profile) -> dict[str, int]:
    return {"n_kv_head": profile.shape["num_kv_heads"], "n_embd": profile.shape["hidden_size"]}


def _mlp_table(rows: pd.DataFrame, profile: Profile) -> pd.DataFrame:
    """One row a number of tokens; empty where an operation was not timed."""
    times = {
        f"time_stats.{theirs}.median": _by_tokens(rows, ours)
        for theirs, ours in MLP_COLUMNS.items()
    }
    table = pd.DataFrame(times).rename_axis("num_tokens").reset_index()
    table = table[table["time_stats.attn_pre_proj.median"].notna()]
    shape = profile.shape
    return table.assign(
        **{f"time_stats.{name}.median": 0.0 for name in FUSED_MLP},
        **_sizes(profile),
        n_head=shape["num_q_heads"],
        n_expanded_embd=shape["intermediate_size"],
        vocab_size=shape["vocab_size"],
        use_gated_mlp=True,
        num_tensor_parallel_workers=1,
    )


def _by_tokens(rows: pd.DataFrame, op: str) -> pd.Series[float]:
    return rows[rows["op"] == op].groupby("num_tokens")["ms"].median()


def _attention_rows(rows: pd.DataFrame, profile: Profile) -> Iterator[Mapping[str, object]]:
    """Single chunks, and decodes of about one context: Vidur takes their mean."""
    alone = rows[(rows["op"] == "attention") & (rows["strategy"] == "serial")]
    for prefills, decodes, ms in zip(alone["prefills"], alone["decodes"], alone["ms"], strict=True):
        point = AttentionPoint.from_text(prefills, decodes, "")
        contexts = point.decode_contexts
        if contexts:
            is_one = not point.prefills and max(contexts) <= MOST_UNEVEN * min(contexts)
            chunk, context = 0, sum(contexts) // len(contexts)
        else:
            is_one = len(point.prefills) == 1
            chunk, context = point.prefills[0]
        if not is_one:
            continue
        yield {
            **{f"time_stats.{name}.median": 0.0 for name in FUSED_ATTENTION},
            "time_stats.attn_prefill.median": ms if chunk else None,
            "time_stats.attn_decode.median": None if chunk else ms,
            **_sizes(profile),
            "n_q_head": profile.shape["num_q_heads"],
            "block_size": BLOCK_SIZE,
            "num_tensor_parallel_workers": 1,
            "max_model_len": profile.hull["context_len"],
            "batch_size": 1 if chunk else len(point.decode_contexts),
            "prefill_chunk_size": chunk,
            "kv_cache_size": context - max(chunk, 1),
            "is_prefill": bool(chunk),
            "attention_backend": "podsim",
        }
