"""Compute the same steps on several numbers of GPUs, and compare the logits.

    python benchmarks/same_logits.py --tp 1,2,4 --out same-logits.csv

The steps are prefills in chunks, mixed ones and decodes of tokens that are given, replayed from
CUDA graphs with the same weights. Prints, and writes as CSV with --out, how far the logits are from
those of the first number of GPUs, as a share of their norm; wrong shares of weights or a missing
all-reduce make it about 1.4, the other order of sums in bfloat16 some 0.01 to 0.05. The exit code
is 1 if a step is further off than `TOLERANCE`. With --backend gloo on CPUs, a small config.json and
TRITON_INTERPRET=1 it tests itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from podsim.batch import Chunk
from podsim.errors import InputError
from podsim.llama import Llama
from podsim.llama_weights import random_weights
from podsim.model import Model, model_named
from podsim.ranks import Rank, Ranks
from podsim.request import Request
from podsim.step_inputs import StepInputs
from podsim.tensor_parallel import Group, join_group, require_gpus

TOLERANCE = 0.1
OUTPUTS = 8
PROMPTS = (0.7, 0.3, 0.9, 0.05)
"""Of the longest."""

Computed = tuple[list[np.ndarray], list[float]]
"""The logits of each step, [sampled, vocabulary], and the GPU's seconds."""


def steps(model: Model, longest: int, budget: int) -> Iterator[StepInputs]:
    """One request prefills, up to a budget; all that have prefilled decode."""
    rng = np.random.default_rng(0)
    prompts = [max(1, int(share * (longest - OUTPUTS))) for share in PROMPTS]
    requests = [Request(i, 0.0, prompt, OUTPUTS) for i, prompt in enumerate(prompts)]
    tokens = {r: rng.integers(model.vocab_size, size=longest).astype(np.int32) for r in requests}
    slot = {request: len(requests) - 1 - i for i, request in enumerate(requests)}
    while any(not request.is_finished for request in requests):
        decodes = [r for r in requests if r.num_emitted_tokens and not r.is_finished]
        waiting = [r for r in requests if not r.num_emitted_tokens]
        chunks = [Chunk(r, min(r.num_uncomputed_tokens, budget - 8)) for r in waiting[:1]]
        latest = {r: tokens[r][r.num_computed_tokens] for r in decodes}
        inputs = StepInputs.of(chunks, decodes, tokens, latest, slot)
        for request, n in chunks:
            request.num_emitted_tokens += n == request.num_uncomputed_tokens
            request.num_computed_tokens += n
        for request in decodes:
            request.num_computed_tokens += 1
            request.num_emitted_tokens += 1
        yield inputs


def compute(rank: Rank, meeting: str, options: argparse.Namespace) -> None:
    """In each process; the first one answers."""
    model = model_named(options.model)
    device = torch.device("cpu" if options.backend == "gloo" else "cuda:0")
    group: Group | None = None
    if rank.size > 1:
        group = join_group(rank, model, meeting, options.backend)
        device = group.device
    llama = Llama(
        model if group is None else group.part.share,
        random_weights(model, 0, device, part=None if group is None else group.part),
        attention=options.attention,
        max_tokens=options.budget,
        max_requests=8,
        max_len=options.longest,
        num_sms=_num_sms(device),
        group=group,
    )
    if device.type == "cuda":
        llama.capture()
    if rank.number:
        llama.follow()
    logits, seconds = [], []
    for inputs in steps(model, options.longest, options.budget):
        num_sampled = len(llama.run(inputs))
        logits.append(llama.logits[:num_sampled].float().cpu().numpy())
        seconds.append(llama.gpu_seconds)
    if group is not None:
        seconds = list(group.least_seconds(seconds))
    rank.answer((logits, seconds))


def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def computed(num_gpus: int, options: argparse.Namespace) -> Computed:
    if options.backend == "nccl":
        require_gpus(num_gpus)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (Path(folder, "meeting").as_uri(), options)
        with Ranks(compute, num_gpus, arguments) as ranks:
            found: Computed = ranks.answer()
            return found


def compared(num_gpus: int, own: Computed, first: Computed) -> dict[str, object]:
    """How far one is from the other."""
    pairs = [(a, b) for a, b in zip(own[0], first[0], strict=True) if len(b)]
    errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
    same = np.concatenate([a.argmax(1) == b.argmax(1) for a, b in pairs])
    return {
        "gpus": num_gpus,
        "steps": len(own[0]),
        "error_median": statistics.median(errors),
        "error_worst": max(errors),
        "tokens": len(same),
        "same_tokens": int(same.sum()),
        "gpu_ms_of_a_step": statistics.median(own[1]) * 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tp", default="1,2", help="numbers of GPUs; the first is compared with")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--attention", default="pod")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--longest", type=int, default=2048)
    parser.add_argument("--backend", default="nccl", choices=("nccl", "gloo"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    first: Computed | None = None
    rows = []
    for num_gpus in map(int, options.tp.split(",")):
        started = time.monotonic()
        own = computed(num_gpus, options)
        print(f"{num_gpus} GPUs: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        first = first or own
        rows.append(compared(num_gpus, own, first))
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    if options.out:
        table.to_csv(options.out, index=False, float_format="%.6f")
    if table["error_worst"].max() > TOLERANCE:
        sys.exit(f"logits differ by more than {TOLERANCE}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
