"""Serve the same requests with several kinds of KV cache: compare every token, and the times.

All requests are there from the beginning, so that every kind forms the same batches whatever its
steps take, and the kinds serve in turn, several times, so that a warmer card is no difference
between them. What the second kind and those after it differ from the first by is then simulated.
The memory costs of each kind have to be there (`podsim profile-memory mapping`, `paged`). A kind
is one of --kv, or `sliced`: vattention whose layers are slices of one tensor. Exits with 1 if a
token differs.

    python benchmarks/same_tokens.py --kv vattention,paged --memory-costs my-memory --out tokens.csv
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from podsim.config import Deployment
from podsim.engine import Engine
from podsim.kv_cache import page_groups_for
from podsim.model import model_named
from podsim.serving import Served, Server
from podsim.simulation import latency_model_for
from podsim.validation import Recorded, compare
from podsim.workload import Trace

MAX_NUM_SEQS = 48
SHORTEST, LONGEST_OUTPUT = 8, 192

Tokens = dict[int, list[int]]


class KeptTokens(Engine):
    """Keeps the tokens of finished requests."""

    tokens: Tokens

    def _finish(self, request, end):
        self.tokens[request.request_id] = self._tokens[request].tolist()
        super()._finish(request, end)


class KeepingServer(Server):
    """Keeps the tokens of the latest trace."""

    tokens: Tokens

    def _engine(self, step_time, seed, clock=None):
        engine = super()._engine(step_time, seed, clock)
        engine.__class__ = KeptTokens
        self.tokens = engine.tokens = {}
        return engine


@dataclass
class Kind:
    """A kind of KV cache, ready to serve, and what it did."""

    deployment: Deployment
    server: KeepingServer
    tokens: Tokens = field(default_factory=dict)
    served: list[Served] = field(default_factory=list)
    num_changed: int = 0
    """Tokens that another round had otherwise."""

    def serve(self, trace: Trace) -> None:
        latency_model = latency_model_for(self.deployment, model_named(self.deployment.model))
        self.served.append(self.server.serve(trace, latency_model.step_time))
        self.tokens = self.tokens or self.server.tokens
        self.num_changed += differing(self.tokens, self.server.tokens)[1]

    def rounds(self) -> pd.DataFrame:
        """Of each round: output tokens/s, seconds of a step, and of the GPU in it."""
        rounds = []
        for served in self.served:
            steps, gpu = served.recording.log.steps, served.recording.gpu_seconds
            seconds = sum(steps["duration"])
            tokens = len(served.recording.token_request)
            rounds.append((tokens / seconds, seconds / len(gpu), sum(gpu) / len(gpu)))
        return pd.DataFrame(rounds, columns=RATES)

    def measured(self) -> pd.Series:
        return self.rounds().median()

    def simulated(self) -> pd.Series:
        """The same of a simulation of what was served."""
        recorded = Recorded.of(
            self.served[0].recording,
            self.deployment,
            self.served[0].engine({}),
            self.deployment.kv,
        )
        result = compare(recorded, error_bars=False).simulated
        durations = np.asarray(result.steps["duration"])
        tokens = int(recorded.trace.num_output_tokens.sum())
        return pd.Series((tokens / durations.sum(), durations.mean()), RATES[:2])


RATES = ["tokens_per_s", "step_s", "gpu_s"]


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


def table(kinds: dict[str, Kind]) -> pd.DataFrame:
    """Differences from the first kind in percent, measured and simulated, and of tokens."""
    (first, base), *others = kinds.items()
    was, expected = base.measured(), base.simulated()
    rows = []
    for name, kind in others:
        measured = (kind.measured() / was - 1) * 100
        simulated = (kind.simulated() / expected - 1) * 100
        num_requests, num_tokens = differing(base.tokens, kind.tokens)
        points = simulated["tokens_per_s"] - measured["tokens_per_s"]
        same_sign = measured["tokens_per_s"] * simulated["tokens_per_s"] > 0
        rows.append(
            {
                "kv": f"{name} over {first}",
                "throughput measured %": measured["tokens_per_s"],
                "simulated %": simulated["tokens_per_s"],
                "step measured %": measured["step_s"],
                "step simulated %": simulated["step_s"],
                "gpu measured %": measured["gpu_s"],
                "points off": points,
                "same sign": "yes" if same_sign else "no",
                "same tokens": "no" if num_tokens else "yes",
                "tokens differing": num_tokens,
                "requests differing": num_requests,
            }
        )
    return pd.DataFrame(rows)


def report(found: pd.DataFrame, out: Path | None) -> None:
    """Leave the table as CSV, if so asked, and print it with the kinds as columns."""
    if out:
        found.to_csv(out, index=False, float_format="%.6f")
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
    parser.add_argument("--memory-costs", help="default: those shipped for the GPU")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.kv.split(",")
    if len(names) < 2:
        parser.error("--kv needs at least two kinds of KV cache to compare")
    deployments = {kv: deployment(kv, options) for kv in names}
    kinds = {kv: Kind(own, KeepingServer(own, options.longest)) for kv, own in deployments.items()}
    trace = requests(options.requests, options.longest)
    for number in range(options.rounds):
        for i in np.random.default_rng(number).permutation(len(names)):
            kinds[names[i]].serve(trace)
    found = table(kinds)
    for kv, kind in kinds.items():
        speed, step, gpu = kind.measured()
        every = kind.rounds()["tokens_per_s"]
        steps = len(kind.served[0].recording.shapes)
        print(
            f"{kv}: {len(kind.tokens)} requests, {steps} steps of {step * 1e3:.3f} ms ("
            f"{gpu * 1e3:.3f} of the GPU), {speed:.1f} output tokens/s ({every.min():.1f} to "
            f"{every.max():.1f}); {kind.num_changed} tokens changed from round to round"
        )
        kind.server.close()
    report(found, options.out)
    if found["tokens differing"].sum():
        sys.exit(1)


if __name__ == "__main__":
    main()
