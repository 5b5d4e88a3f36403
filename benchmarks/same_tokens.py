"""Serve the same requests with several kinds of KV cache, and compare every token.

The clock moves by a fixed time a step, so that all of them form the same batches; then the tokens
must be equal. Prints, and writes as CSV with --out, the GPU's time of the steps of each kind.

    python benchmarks/same_tokens.py --kv ideal,vattention --out tokens.csv
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from podsim.config import Deployment
from podsim.engine import Engine
from podsim.request import Request
from podsim.serving import Server

SECONDS_A_STEP = 0.01


class SteppedClock:
    """Moves when it is asked, by the same every time."""

    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        self.time += SECONDS_A_STEP
        return self.time

    def wait_until(self, time: float) -> None:
        self.time = max(self.time, time)


class KeptTokens(Engine):
    """Keeps the tokens of finished requests."""

    tokens: dict[int, list[int]]

    def _finish(self, request: Request, end: float) -> None:
        self.tokens[request.request_id] = self._tokens[request].tolist()
        super()._finish(request, end)


def requests(count: int, longest: int) -> list[Request]:
    rng = np.random.default_rng(0)
    arrivals = np.cumsum(rng.exponential(2 * SECONDS_A_STEP, count))
    prompts = np.clip(rng.lognormal(6.5, 1.0, count), 8, longest - 256).astype(int)
    outputs = rng.integers(16, 256, count)
    rows = zip(arrivals.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    return [Request(number, *row) for number, row in enumerate(rows)]


def serve(kv: str, options: argparse.Namespace) -> tuple[dict[int, list[int]], pd.DataFrame]:
    """The tokens of every request, and the steps with their GPU seconds."""
    deployment = Deployment(
        model=options.model,
        attention=options.attention,
        kv=kv,
        token_budget=512,
        max_num_seqs=64,
        max_model_len=options.longest,
    )
    server = Server(deployment, options.longest)
    engine = server._engine(lambda shape: 0.0, seed=0)
    engine.__class__ = KeptTokens
    assert isinstance(engine, KeptTokens)
    engine.tokens = {}
    engine.clock = SteppedClock()
    recording = engine.serve(requests(options.requests, options.longest))
    if engine.mapping is not None:
        engine.mapping.close()  # type: ignore[attr-defined]
    steps = pd.DataFrame({name: np.asarray(c) for name, c in recording.log.steps.items()})
    steps = steps.assign(gpu_seconds=np.asarray(recording.gpu_seconds))
    server.close()
    return engine.tokens, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kv", default="ideal,vattention")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--attention", default="serial")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--longest", type=int, default=4096)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    served, rows = {}, []
    for kv in options.kv.split(","):
        served[kv], steps = serve(kv, options)
        gc.collect()
        rows.append(
            {
                "kv": kv,
                "requests": len(served[kv]),
                "steps": len(steps),
                "tokens": sum(map(len, served[kv].values())),
                "gpu_seconds": steps["gpu_seconds"].sum(),
                "median_step_ms": steps["gpu_seconds"].median() * 1e3,
            }
        )
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False, float_format="%.6f")
    first, *others = served.values()
    for kv, tokens in zip(options.kv.split(",")[1:], others, strict=True):
        wrong = sum(tokens[number] != first[number] for number in first)
        print(f"{kv}: {wrong} of {len(first)} requests have other tokens")
        if wrong:
            sys.exit(1)


if __name__ == "__main__":
    main()
