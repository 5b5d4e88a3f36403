"""Held-out errors of the shipped profiles as the README's table; needs no GPU.

python benchmarks/profile_table.py [--gpu h200]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from podsim.model import model_named
from podsim.profile import find_profile

MODELS = {
    "Llama-3-8B": ("llama-3-8b", 1),
    "Llama-2-7B": ("llama-2-7b", 1),
    "Yi-6B": ("yi-6b", 1),
    "Llama-3-70B, a share of 4": ("llama-3-70b", 4),
    "... of 8": ("llama-3-70b", 8),
}
ROWS = (
    *("step serial", "step streams", "step unified", "step pod"),
    *("attention prefill", "attention decode", "attention serial", "attention streams"),
    *("attention unified", "attention pod", "attention pod, several chunks"),
    *("attention pod, heavy tail", "qkv", "output", "gate_up", "down", "lm_head"),
    *("rmsnorm", "silu_mul"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200")
    gpu = parser.parse_args().gpu
    shares = [model_named(name).shard(gpus) for name, gpus in MODELS.values()]
    errors = [find_profile(gpu, share).errors for share in shares]
    print(f"| median / P90 of the error, bias (as timed) | {' | '.join(MODELS)} |")
    print("|---" * (len(MODELS) + 1) + "|")
    for row in ROWS:
        print(f"| {row} | {' | '.join(cell(e[row]) for e in errors)} |")


def cell(error: Mapping[str, Any]) -> str:
    text = f"{error['median']:.1%} / {error['p90']:.1%}, {error['bias']:+.1%}"
    if "median_as_timed" in error:
        text += f" ({error['median_as_timed']:.1%} / {error['p90_as_timed']:.1%})"
    return text


if __name__ == "__main__":
    main()
