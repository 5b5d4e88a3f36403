"""Held-out errors of the shipped profiles as the README's table, and against the bars; no GPU.

python benchmarks/profile_table.py [--gpu h200]
python benchmarks/profile_table.py validation/h200/*/profile

Other profiles, a column each under the name of the card that they were measured on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from podsim.collectives import COLLECTIVES_FILE, read_collectives
from podsim.config import STRATEGIES
from podsim.errors import InputError
from podsim.model import model_named
from podsim.op_tables import MATRIX_OPS
from podsim.profile import Profile, find_profile, read_profile

MODELS = {
    "Llama-3-8B": ("llama-3-8b", 1),
    "Llama-2-7B": ("llama-2-7b", 1),
    "Yi-6B": ("yi-6b", 1),
    "Llama-3-70B, a share of 4": ("llama-3-70b", 4),
    "Llama-3-70B, a share of 8": ("llama-3-70b", 8),
}
ATTENTION_KERNELS = ("prefill", "decode", *STRATEGIES)
ATTENTION = {"median": 0.03, "p90": 0.08, "bias": 0.01}
LINEAR = {"median": 0.02, "p90": 0.06}
OTHERS = {"median": 0.05}
"""Bars: no error may be larger. Steps have none."""
ROWS = {
    **{f"step {name}": {} for name in STRATEGIES},
    **{f"attention {name}": ATTENTION for name in ATTENTION_KERNELS},
    **{f"attention {name}, several chunks": ATTENTION for name in ("prefill", *STRATEGIES)},
    **{f"attention {name}, heavy tail": ATTENTION for name in ("decode", *STRATEGIES)},
    **{name: LINEAR for name in (*MATRIX_OPS, "lm_head")},
    **{name: OTHERS for name in ("rmsnorm", "silu_mul", "rope_and_cache", "embedding", "sampling")},
}

Errors = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h200")
    parser.add_argument("profiles", nargs="*", type=Path, help="instead of those that are shipped")
    options = parser.parse_args()
    if options.profiles:
        try:
            kernels([read_profile(path, str(path)) for path in options.profiles])
        except InputError as error:
            sys.exit(f"Error: {error}")
        return
    shares = [model_named(name).shard(gpus) for name, gpus in MODELS.values()]
    kernels([find_profile(options.gpu, share) for share in shares], list(MODELS))
    print()
    collectives(options.gpu)


def kernels(profiles: Sequence[Profile], names: Sequence[str] | None = None) -> None:
    """A row for each kernel model, a column for each profile; by their cards without names."""
    names = names or [profile.provenance["card"] for profile in profiles]
    errors = [profile.errors for profile in profiles]
    table("median / P90 of the error, bias (all three as timed)", names, ROWS, errors)


def collectives(gpu: str) -> None:
    """A row for each collective, a column for each number of GPUs."""
    folder = files("podsim.profiles").joinpath(gpu, "collectives")
    errors = read_collectives(folder, COLLECTIVES_FILE).errors
    numbers = list(dict.fromkeys(name.split(", ")[1] for name in errors))
    bars = dict.fromkeys(dict.fromkeys(name.split(", ")[0] for name in errors), OTHERS)
    columns = [{name: errors[f"{name}, {number}"] for name in bars} for number in numbers]
    table("median / P90 of the error, bias", numbers, bars, columns)


def table(
    title: str,
    columns: Sequence[str],
    bars: Mapping[str, Mapping[str, float]],
    errors: Sequence[Mapping[str, Errors]],
) -> None:
    """One row for each kernel model; last, whether its errors are within the bars."""
    print(f"| {title} | {' | '.join(columns)} | bar | met |")
    print("|---" * (len(columns) + 3) + "|")
    for row, bar in bars.items():
        cells = [cell(e[row]) for e in errors]
        over = {c: ", ".join(missed(e[row], bar)) for c, e in zip(columns, errors, strict=True)}
        found = "; ".join(f"{column}: {names}" for column, names in over.items() if names)
        met = f"miss: {found}" if found else "pass" if bar else ""
        print(f"| {row} | {' | '.join(cells)} | {bar_text(bar)} | {met} |")


def cell(error: Errors) -> str:
    text = f"{error['median']:.1%} / {error['p90']:.1%}, {error['bias']:+.1%}"
    if "median_as_timed" in error:
        timed = [error[f"{name}_as_timed"] for name in ("median", "p90", "bias")]
        text += " ({:.1%} / {:.1%}, {:+.1%})".format(*timed)
    return text


def bar_text(bar: Mapping[str, float]) -> str:
    return " / ".join(f"{most:.0%}" for most in bar.values())


def missed(error: Errors, bar: Mapping[str, float]) -> Iterator[str]:
    """Which errors are over their bar: the fit's, and those against the times as timed."""
    for name, most in bar.items():
        label = name.replace("p90", "P90")
        if abs(error[name]) > most:
            yield label
        if abs(error.get(f"{name}_as_timed", 0.0)) > most:
            yield f"{label} as timed"


if __name__ == "__main__":
    main()
