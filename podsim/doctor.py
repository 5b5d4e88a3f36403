"""`podsim doctor`: what is installed, what is shipped, and whether a simulation runs."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.resources.abc import Traversable

from podsim.collectives import COLLECTIVES_FILE, FOLDER, read_collectives
from podsim.config import Deployment
from podsim.errors import InputError
from podsim.profile import PROFILE_FILE, kernels_hash, read_profile
from podsim.simulation import simulate
from podsim.workload import load_trace, shipped_traces, synthetic_trace

NEEDED = ("numpy", "pandas", "scipy", "simpy", "typer", "rich", "matplotlib")
OPTIONAL = {
    "torch": "podsim profile needs it",
    "triton": "podsim profile needs it",
    "pyarrow": "--parquet needs it",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. `ok` is None for what is neither good nor bad."""

    subject: str
    text: str
    ok: bool | None = None


def examine() -> Iterator[Finding]:
    """Look at everything; what is found faulty has `ok` False."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    yield Finding("podsim", _version("podsim") or "not installed, run from its source")
    for name in NEEDED:
        found = _version(name)
        yield Finding(name, found or "missing: pip install podsim again", found is not None)
    for name, use in OPTIONAL.items():
        yield Finding(name, _version(name) or f"not installed; {use}")
    yield from _gpus()
    yield from _profiles()
    yield from _traces()
    yield _self_test()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpus() -> Iterator[Finding]:
    """What the driver's own tool says: asking it does not load torch."""
    if shutil.which("nvidia-smi") is None:
        yield Finding("GPU", "none (no nvidia-smi); simulations need none, podsim profile does")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield Finding("GPU", f"nvidia-smi does not answer: {error}")
        return
    if run.returncode:
        yield Finding("GPU", f"nvidia-smi fails: {(run.stdout + run.stderr).strip()[:200]}")
    for line in run.stdout.splitlines() if run.returncode == 0 else []:
        name, memory, driver = (part.strip() for part in f"{line},,".split(",")[:3])
        yield Finding("GPU", f"{name}, {memory}, driver {driver}")


def _profiles() -> Iterator[Finding]:
    installed = kernels_hash()
    num_found = 0
    for gpu in sorted(files("podsim.profiles").iterdir(), key=lambda entry: entry.name):
        yield from _collectives(gpu)
        models = sorted(gpu.iterdir(), key=lambda entry: entry.name) if gpu.is_dir() else []
        for folder in models:
            if not folder.joinpath(PROFILE_FILE).is_file():
                continue
            num_found += 1
            try:
                profile = read_profile(folder, f"profiles/{gpu.name}/{folder.name}")
            except InputError as error:
                yield Finding("profile", str(error), ok=False)
                continue
            measured = str(profile.provenance.get("kernels_sha256", "unknown"))
            same = "the installed ones" if measured == installed else "not the installed ones"
            date = profile.provenance.get("date", "unknown date")
            text = f"{profile.model} on {profile.gpu}, {date}, kernels {measured[:12]} ({same})"
            yield Finding("profile", text, ok=True)
    if not num_found:
        yield Finding("profile", "none is shipped: give one with --profile FOLDER", ok=False)


def _collectives(gpu: Traversable) -> Iterator[Finding]:
    folder = gpu.joinpath(FOLDER)
    if not folder.joinpath(COLLECTIVES_FILE).is_file():
        return
    try:
        found = read_collectives(folder, f"profiles/{gpu.name}/{FOLDER}")
    except InputError as error:
        yield Finding("collectives", str(error), ok=False)
        return
    counts = ", ".join(map(str, found.gpu_counts))
    date = found.provenance.get("date", "unknown date")
    yield Finding("collectives", f"among {counts} GPUs of {found.gpu}, {date}", ok=True)


def _traces() -> Iterator[Finding]:
    for name in shipped_traces():
        try:
            trace = load_trace(name)
        except InputError as error:
            yield Finding("trace", str(error), ok=False)
            continue
        yield Finding("trace", f"{name}: {len(trace):,} requests, {trace.qps:.2f} req/s", ok=True)


def _self_test() -> Finding:
    """A small simulation, whose tokens must all come out."""
    trace = synthetic_trace("poisson", 8, 1000, "lognormal:1000:0.7", "100")
    started = time.perf_counter()
    try:
        result = simulate(trace, Deployment(attention="pod"))
    except InputError as error:
        return Finding("self-test", str(error), ok=False)
    seconds = time.perf_counter() - started
    summary = result.summary()
    served = result.requests[result.requests["refused"] == ""]
    expected = int(served["num_output_tokens"].sum())
    # Every request has a first token, and one gap a later token.
    came_out = int(served["first_token_time"].notna().sum()) + sum(result.log.gap_count)
    ok = came_out == expected > 0 and bool(served["finish_time"].notna().all())
    text = (
        f"{summary['completed']} requests, {expected:,} tokens in {seconds:.1f} s, TTFT P50 "
        f"{summary['median_ttft_ms']:.1f} ms"
    )
    return Finding("self-test", text if ok else f"{came_out} of {expected} tokens came out", ok)
