"""Serve the same requests with several kinds of KV cache: compare every token, and the times.

All requests are there from the beginning, so that every kind forms the same batches whatever its
steps take, and the kinds serve in turn, several times, so that a warmer card is no difference
between them. What the second kind and those after it differ from the first by is then simulated.
The memory costs of each kind have to be there (`podsim profile-memory mapping`, `paged`). A kind
is one of --kv, or `sliced`: vattention whose layers are slices of one tensor. Exits with 1 if a
token differs. Every round is kept as a recording of `podsim validate`, from which `--from` prints
the same again, simulated anew, without a GPU. --calls adds rounds in which every call that maps
memory is timed, by the side of several ways of sampling the card; they are no part of the table.

    python benchmarks/same_tokens.py --kv vattention,paged --keep served --out tokens.csv
    python benchmarks/same_tokens.py --from served
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from mapping_calls import calls_summary, timed_calls

from podsim.config import Deployment
from podsim.engine import Engine
from podsim.errors import InputError
from podsim.kv_cache import page_groups_for
from podsim.memory_system import memory_costs_for
from podsim.model import model_named
from podsim.paged_latency import PagedLatency
from podsim.serving import Server
from podsim.simulation import latency_model_for
from podsim.validation import MAPPING_COLUMNS, TABLE_COLUMN, Recorded, compare, read_recording
from podsim.workload import Trace

MAX_NUM_SEQS = 48
SHORTEST, LONGEST_OUTPUT = 8, 192
OUTPUT_FILE = "output.csv.gz"
"""Beside a recording: every token of every answer."""
CALLS_FILE = "calls.csv.gz"
"""Beside the rounds: what --calls timed."""
PARTS = ["step", "gpu", "mapping", "table", "host"]
"""Seconds of a step and what they are: the GPU's work, and the waits for memory to be mapped, for
the block table and for all else of the host."""

Tokens = dict[int, list[int]]


class KeptTokens(Engine):
    """Keeps what finished requests were answered."""

    tokens: Tokens

    def _finish(self, request, end):
        every = self._tokens[request].tolist()
        self.tokens[request.request_id] = every[request.num_prompt_tokens :]
        super()._finish(request, end)


class KeepingServer(Server):
    """Keeps the answers to the latest trace."""

    tokens: Tokens

    def _engine(self, step_time, seed, clock=None):
        engine = super()._engine(step_time, seed, clock)
        engine.__class__ = KeptTokens
        self.tokens = engine.tokens = {}
        return engine


@dataclass
class Kind:
    """What a kind of KV cache did."""

    rounds: list[Recorded] = field(default_factory=list)
    tokens: Tokens = field(default_factory=dict)
    num_changed: int = 0
    """Tokens that another round had otherwise."""

    def add(self, recorded: Recorded, tokens: Tokens) -> None:
        """One more round."""
        self.rounds.append(recorded)
        self.tokens = self.tokens or tokens
        self.num_changed += differing(self.tokens, tokens)[1]

    def each_round(self) -> pd.DataFrame:
        """Output tokens/s, and the mean of each of PARTS."""
        rows = []
        for recorded in self.rounds:
            steps = recorded.steps
            mapping, table = (
                steps[name].mean() if name in steps else 0.0
                for name in (MAPPING_COLUMNS[0], TABLE_COLUMN)
            )
            step, gpu = steps["duration"].mean(), steps["gpu_seconds"].mean()
            speed = len(recorded.tokens) / steps["duration"].sum()
            rows.append((speed, step, gpu, mapping, table, step - gpu - mapping - table))
        return pd.DataFrame(rows, columns=["tokens_per_s", *PARTS])

    def measured(self) -> pd.Series:
        return self.each_round().median()

    def simulated(self) -> pd.Series:
        """The same of a simulation of what was served."""
        recorded = self.rounds[0]
        result = compare(recorded, error_bars=False).simulated
        durations = np.asarray(result.steps["duration"])
        held_up = sum(sum(memory.log.held_up) for memory in result.memory)
        model, shapes = result.latency_model, recorded.shapes
        table = 0.0
        if isinstance(model, PagedLatency):
            table = float(np.mean([model.table_seconds(shape) for shape in shapes]))
        of = recorded.deployment
        host = np.mean(
            [
                of.host_overhead
                + of.host_overhead_per_request * (len(shape.prefills) + shape.num_decodes)
                + of.host_overhead_with_prefill * bool(shape.prefills)
                for shape in shapes
            ]
        )
        step, mapping = durations.mean(), held_up / len(durations)
        speed = recorded.trace.num_output_tokens.sum() / durations.sum()
        parts = (step, step - mapping - table - host, mapping, table, host)
        return pd.Series((speed, *parts), ["tokens_per_s", *PARTS])


def differing(ours: Tokens, theirs: Tokens) -> tuple[int, int]:
    """How many requests, and how many tokens."""
    tokens = [
        sum(a != b for a, b in zip(ours[number], theirs[number], strict=True)) for number in ours
    ]
    return sum(count > 0 for count in tokens), sum(tokens)


def requests(count: int, longest: int) -> Trace:
    """All at once."""
    rng = np.random.default_rng(0)
    most = longest - LONGEST_OUTPUT
    prompts = np.clip(rng.lognormal(6.3, 1.0, count), SHORTEST, most).astype(int)
    outputs = rng.integers(16, LONGEST_OUTPUT, count)
    rows = zip([0.0] * count, prompts.tolist(), outputs.tolist(), strict=True)
    return Trace.of(*rows, name="same tokens")


def deployment(kv: str, options: argparse.Namespace) -> Deployment:
    """With room for MAX_NUM_SEQS of the longest requests, so that no kind waits for memory."""
    base = Deployment(
        model=options.model,
        attention=options.attention,
        kv="vattention" if kv == "sliced" else kv,
        kv_tensors="sliced" if kv == "sliced" else "per_layer",
        page_group="8MB" if kv == "sliced" else "2MB",
        block_size=options.block_size,
        token_budget=512,
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=options.longest,
        watermark=0.0,
        memory_costs=options.memory_costs,
    )
    size = base.block_size
    if base.kv == "vattention":
        size = page_groups_for(base, model_named(base.model)).tokens_per_block
    return replace(base, num_blocks=MAX_NUM_SEQS * -(-options.longest // size))


# ------------------------------------------------------------------------- served and kept


def serve(names: Sequence[str], options: argparse.Namespace) -> dict[str, Kind]:
    """Serve with every kind in turn; each round is in --keep as soon as it is over."""
    deployments = {kv: deployment(kv, options) for kv in names}
    servers = {kv: KeepingServer(own, options.longest) for kv, own in deployments.items()}
    trace = requests(options.requests, options.longest)
    kinds = {kv: Kind() for kv in names}
    for number in range(options.rounds):
        for i in np.random.default_rng(number).permutation(len(names)):
            kv = names[i]
            own, server = deployments[kv], servers[kv]
            latency_model = latency_model_for(own, model_named(own.model))
            served = server.serve(trace, latency_model.step_time)
            recorded = Recorded.of(served.recording, own, served.engine({}), kv, served.gpu_samples)
            if options.keep:
                keep(options.keep / f"{kv}-{number}", recorded, server.tokens)
            kinds[kv].add(recorded, server.tokens)
    if options.calls:
        calls = timed_calls(servers, trace, options.calls)
        if options.keep:
            save(calls, options.keep / CALLS_FILE)
        report_calls(calls)
    for server in servers.values():
        server.close()
    return kinds


def keep(folder: Path, recorded: Recorded, tokens: Tokens) -> None:
    """A recording of `podsim validate`, and the tokens."""
    folder.mkdir(parents=True)
    recorded.save(folder)
    rows = [(number, token) for number, every in tokens.items() for token in every]
    table = pd.DataFrame(rows, columns=["request_id", "token"])
    save(table, folder / OUTPUT_FILE)


def save(table: pd.DataFrame, path: Path) -> None:
    compression = {"method": "gzip", "mtime": 1}
    table.to_csv(path, index=False, float_format="%.7f", compression=compression)


def read_kept(names: Sequence[str], folder: Path, memory_costs: str | None) -> dict[str, Kind]:
    """The rounds that --keep left. InputError if a kind has none, or one cannot be read."""
    kinds = {}
    for kv in names:
        kinds[kv] = Kind()
        for path in sorted(folder.glob(f"{kv}-*")):
            recorded = read_recording(path)
            own = recorded.deployment
            if memory_costs:
                recorded = replace(recorded, deployment=replace(own, memory_costs=memory_costs))
            source = path / OUTPUT_FILE
            try:
                rows = pd.read_csv(source).groupby("request_id", sort=False)["token"]
            except (OSError, ValueError, KeyError) as error:
                raise InputError(f"{source}: not a table of tokens: {error}") from None
            kinds[kv].add(recorded, {int(number): list(tokens) for number, tokens in rows})
        if not kinds[kv].rounds:
            raise InputError(f"{folder}: no rounds of {kv}, which would be {kv}-0 and so on")
    return kinds


# ---------------------------------------------------------------------------- what is reported


def parts(kinds: dict[str, Kind]) -> pd.DataFrame:
    """Of each kind, measured and simulated: output tokens/s, and milliseconds of PARTS."""
    rows = {}
    for kv, kind in kinds.items():
        rows[kv, "measured"], rows[kv, "simulated"] = kind.measured(), kind.simulated()
    found = pd.DataFrame(rows).T.rename_axis(["kv", ""])
    found[PARTS] *= 1e3
    return found.rename(columns={name: f"{name}_ms" for name in PARTS})


def table(kinds: dict[str, Kind], found: pd.DataFrame) -> pd.DataFrame:
    """Differences from the first kind in percent, measured and simulated, and of tokens."""
    (first, base), *others = kinds.items()
    rows = []
    for name, kind in others:
        measured, simulated = (
            (found.loc[name, source] / found.loc[first, source] - 1) * 100
            for source in ("measured", "simulated")
        )
        num_requests, num_tokens = differing(base.tokens, kind.tokens)
        points = simulated["tokens_per_s"] - measured["tokens_per_s"]
        same_sign = measured["tokens_per_s"] * simulated["tokens_per_s"] > 0
        rows.append(
            {
                "kv": f"{name} over {first}",
                "throughput measured %": measured["tokens_per_s"],
                "simulated %": simulated["tokens_per_s"],
                "step measured %": measured["step_ms"],
                "step simulated %": simulated["step_ms"],
                "gpu measured %": measured["gpu_ms"],
                "gpu simulated %": simulated["gpu_ms"],
                "points off": points,
                "same sign": "yes" if same_sign else "no",
                "same tokens": "no" if num_tokens else "yes",
                "tokens differing": num_tokens,
                "requests differing": num_requests,
            }
        )
    return pd.DataFrame(rows)


def summary(kv: str, kind: Kind) -> str:
    """How much was served, how fast in each round, and the host's time."""
    every = kind.each_round()["tokens_per_s"]
    host = kind.rounds[0].engine["host_time"]
    return (
        f"{kv}: {len(kind.tokens)} requests, {len(kind.rounds[0].steps)} steps, "
        f"{every.min():.1f} to {every.max():.1f} output tokens/s; {kind.num_changed} tokens "
        f"changed from round to round; host {host['fixed'] * 1e6:.0f} us a step, "
        f"{host['per_request'] * 1e6:.2f} a request, {host['with_prefill'] * 1e6:.0f} with prefill"
    )


def mapping_summary(kv: str, kind: Kind) -> str:
    """What a page-group took that a step mapped: served, before that, and by the memory costs.

    While the host's time is measured nothing asks the card for its clock and power.
    """
    seconds, page_groups = MAPPING_COLUMNS
    steps = pd.concat([recorded.steps for recorded in kind.rounds])
    steps = steps[steps[page_groups] > 0]
    own = kind.rounds[0].deployment
    groups = page_groups_for(own, model_named(own.model))
    costs = memory_costs_for(own).mapping_costs(groups.page_group, "idle")
    before = np.array(kind.rounds[0].engine["host_time"].get("mapping_rows", [])).reshape(-1, 2)
    times = {
        "served": steps[seconds].sum() / steps[page_groups].sum(),
        "before": before[:, 1].sum() / before[:, 0].sum() if len(before) else np.nan,
        "costs": costs.map_seconds(groups.num_tensors, 1) / groups.num_tensors,
    }
    each = (steps[seconds] / steps[page_groups]).quantile([0.1, 0.5, 0.9]) * 1e6
    return (
        f"{kv}: {len(steps) / len(kind.rounds):.0f} steps a round mapped "
        f"{steps[page_groups].sum() / len(kind.rounds):.0f} page-groups; us of one: "
        f"{times['served'] * 1e6:.1f} (by step: P10 {each[0.1]:.1f}, P50 {each[0.5]:.1f}, P90 "
        f"{each[0.9]:.1f}), {times['before'] * 1e6:.1f} while the host's time was measured, "
        f"{times['costs'] * 1e6:.1f} by the memory costs"
    )


def report_calls(calls: pd.DataFrame) -> None:
    print(calls_summary(calls).to_string(float_format="{:.1f}".format))


def report(found: pd.DataFrame, by_part: pd.DataFrame, out: Path | None) -> None:
    """Leave both tables as CSV, if so asked, and print them; the differences with the kinds as
    columns.
    """
    if out:
        found.to_csv(out, index=False, float_format="%.6f")
        rows = by_part.rename_axis(["kv", "source"])
        rows.to_csv(out.with_name(f"{out.stem}-parts.csv"), float_format="%.6f")
    print(by_part.to_string(float_format="{:.3f}".format))
    # Columns of text and numbers: pandas calls the format of these, and refuses "%.2f".
    print(found.T.to_string(header=False, float_format="{:.2f}".format))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv", default="vattention,paged", help="the first is the base")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--attention", default="serial")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--longest", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=0, help="rounds of timing each mapping call")
    parser.add_argument("--memory-costs", help="default: those shipped for the GPU")
    parser.add_argument("--out", type=Path, help="CSV; the parts of a step go to OUT-parts.csv")
    parser.add_argument("--keep", type=Path, help="folder for a recording of every round")
    parser.add_argument("--from", type=Path, dest="kept", help="what --keep left: serve nothing")
    options = parser.parse_args()
    names = options.kv.split(",")
    if len(names) < 2:
        parser.error("--kv needs at least two kinds of KV cache to compare")
    if options.keep and options.keep.exists():
        parser.error(f"--keep {options.keep} is there already")
    try:
        if options.kept:
            kinds = read_kept(names, options.kept, options.memory_costs)
            if (options.kept / CALLS_FILE).is_file():
                report_calls(pd.read_csv(options.kept / CALLS_FILE))
        else:
            kinds = serve(names, options)
    except InputError as error:
        sys.exit(f"Error: {error}")
    for kv, kind in kinds.items():
        print(summary(kv, kind))
        if kind.rounds[0].deployment.kv == "vattention":
            print(mapping_summary(kv, kind))
    by_part = parts(kinds)
    found = table(kinds, by_part)
    report(found, by_part, options.out)
    if found["tokens differing"].sum():
        sys.exit(1)


if __name__ == "__main__":
    main()
