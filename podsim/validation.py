"""How far a simulation is from what an engine did on a GPU: step by step, request by request.

A recording is a folder: what was served (requests.csv), each step's composition and seconds
(steps.csv.gz), when each token came out (tokens.csv.gz), the card's clock and power (gpu.csv), the
deployment (config.toml) and the machine (engine.json). It holds all that a later simulation is
compared by; no GPU is needed then.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from podsim import config, metrics, recording_checks
from podsim.batch import BatchShape, PrefillShape
from podsim.collectives import COLLECTIVES_FILE
from podsim.collectives import FOLDER as COLLECTIVES_FOLDER
from podsim.config import Deployment
from podsim.engine import Recording
from podsim.errors import InputError
from podsim.event_log import REQUEST_COLUMNS, STEP_COLUMNS
from podsim.gpu_sampler import Sample
from podsim.hardware import gpu_named
from podsim.latency import LatencyModel
from podsim.model import model_named
from podsim.points import AttentionPoint
from podsim.profile import PROFILE_FILE, read_profile
from podsim.replica_heat import Heat
from podsim.simulation import Result, simulate, simulate_with_error_bars
from podsim.workload import Trace

SCHEMA_VERSION = 1
ENGINE_FILE = "engine.json"
REQUESTS_FILE, STEPS_FILE = "requests.csv", "steps.csv.gz"
TOKENS_FILE, GPU_FILE = "tokens.csv.gz", "gpu.csv"
CONFIG_FILE = "config.toml"
COLUMNS = {
    REQUESTS_FILE: (*REQUEST_COLUMNS, "refused", "queue_time", "ttft", "e2e_latency", "tpot"),
    STEPS_FILE: (*STEP_COLUMNS, "prefills", "decode_context_max", "num_sampled", "gpu_seconds"),
    TOKENS_FILE: ("request_id", "step"),
    GPU_FILE: ("time", "sm_clock_mhz", "power_w"),
}
CLOCK_COLUMN = "sm_clock_mhz"
"""Of the steps, since engines note it: the mean clock of the SMs."""
TABLE_COLUMN = "table_seconds"
"""Of the steps over a paged KV cache: in which the host prepared the block table."""
MAPPING_COLUMNS = ("mapping_seconds", "mapped_page_groups")
"""Of the steps over mapped memory: what each waited for it, and how much it mapped itself."""

PRIORITY_COLUMN = "priority"
"""Of the requests that were let in by it."""

STEP_KINDS = ("decode", "mixed", "prefill", "all")
LATENCIES = {"ttft": "TTFT", "tbt": "TBT", "tpot": "TPOT", "e2e_latency": "End-to-end latency"}
THROUGHPUTS = {"request_throughput": "Requests/s", "output_throughput": "Output tokens/s"}


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """A recording. Tables in seconds and tokens."""

    name: str
    deployment: Deployment
    """As it was served, the host's measured time and the padding of graphs included."""
    requests: pd.DataFrame
    """`metrics.request_table` of the engine, and priority where requests were let in by it."""
    steps: pd.DataFrame
    """`metrics.step_table`, then prefills, decode_context_max, num_sampled, gpu_seconds,
    sm_clock_mhz where the engine noted it, table_seconds where there was a block table,
    mapping_seconds and mapped_page_groups where memory was mapped."""
    tokens: pd.DataFrame
    """request_id of each token that came out, in order, and the index of the step it ended."""
    gpu: pd.DataFrame
    """time, sm_clock_mhz and power_w of the card, now and then."""
    engine: Mapping[str, Any]
    """Machine, versions and host time."""

    @classmethod
    def of(
        cls,
        recording: Recording,
        deployment: Deployment,
        engine: Mapping[str, Any],
        name: str,
        gpu_samples: Sequence[Sample] = (),
    ) -> Recorded:
        """What an engine has served under a deployment."""
        host = engine["host_time"]
        served = dataclasses.replace(
            deployment,
            graph_padding=True,
            host_overhead=host["fixed"],
            host_overhead_per_request=host["per_request"],
            host_overhead_with_prefill=host["with_prefill"],
            num_blocks=engine["num_blocks"],
        )
        steps = metrics.step_table(recording.log)
        shapes = recording.shapes
        steps["prefills"] = [AttentionPoint(s.prefills, (), "").prefills_text for s in shapes]
        steps["decode_context_max"] = [shape.decode_context_max for shape in shapes]
        steps["num_sampled"] = [shape.num_sampled for shape in shapes]
        steps["gpu_seconds"] = np.asarray(recording.gpu_seconds)
        if recording.sm_clock_mhz:
            steps[CLOCK_COLUMN] = np.asarray(recording.sm_clock_mhz)
        if deployment.kv == "paged":
            steps[TABLE_COLUMN] = np.asarray(recording.table_seconds)
        if deployment.kv == "vattention":
            for name in MAPPING_COLUMNS:
                steps[name] = np.asarray(getattr(recording, name))
        tokens = pd.DataFrame(
            {
                "request_id": np.asarray(recording.token_request),
                "step": np.asarray(recording.token_step),
            }
        )
        requests = metrics.request_table(recording.log)
        if deployment.order == "priority":
            requests[PRIORITY_COLUMN] = requests["request_id"].map(recording.priorities)
        gpu = pd.DataFrame(gpu_samples, columns=list(COLUMNS[GPU_FILE]))
        return cls(name, served, requests, steps, tokens, gpu, engine)

    @property
    def trace(self) -> Trace:
        """The requests as they arrived."""
        columns = ("arrival_time", "num_prompt_tokens", "num_output_tokens")
        rows = zip(*(self.requests[name].tolist() for name in columns), strict=True)
        trace = Trace.of(*rows, name=self.name)
        if PRIORITY_COLUMN not in self.requests:
            return trace
        return replace(trace, priority=self.requests[PRIORITY_COLUMN].to_numpy(copy=True))

    @property
    def shapes(self) -> list[BatchShape]:
        """Of each step."""
        numbers = self.steps[
            [
                *("prefills", "num_prefill_tokens", "num_decodes"),
                *("decode_context_sum", "decode_context_max", "num_sampled"),
            ]
        ]
        return [
            BatchShape(_chunks(prefills), *rest)
            for prefills, *rest in numbers.itertuples(index=False)
        ]

    @property
    def gaps(self) -> NDArray[np.float64]:
        """Seconds between one token of a request and its next."""
        ends = (self.steps["start"] + self.steps["duration"]).to_numpy()
        ordered = self.tokens.sort_values(["request_id", "step"], kind="stable")
        gaps = np.diff(ends[ordered["step"]])
        return np.asarray(gaps[np.diff(ordered["request_id"]) == 0])

    def require_steps(self) -> None:
        """InputError if nothing was served."""
        if self.steps.empty:
            reason = self.requests["refused"].iloc[0]
            raise InputError(f"{self.name}: every request was refused: the first is {reason}")

    def save(self, folder: Path) -> None:
        """Write the files of a recording."""
        deployment = config.to_toml(None, self.deployment)
        (folder / CONFIG_FILE).write_text(deployment, encoding="utf-8")
        content = {"schema": SCHEMA_VERSION, "name": self.name, **self.engine}
        (folder / ENGINE_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for file, table in self._tables().items():
            compression = {"method": "gzip", "mtime": 1} if file.endswith(".gz") else None
            table.to_csv(
                folder / file,
                index=False,
                float_format="%.7f",
                compression=compression,
            )

    def _tables(self) -> dict[str, pd.DataFrame]:
        tables = (self.requests, self.steps, self.tokens, self.gpu)
        return dict(zip(COLUMNS, tables, strict=True))


def _chunks(text: str) -> tuple[PrefillShape, ...]:
    return tuple(PrefillShape(*chunk) for chunk in AttentionPoint.from_text(text, "", "").prefills)


def read_recording(folder: Path) -> Recorded:
    """The recording in a folder. InputError, naming the file, if it is not one.

    A folder `profile` beside it is the profile of the recordings that were made with its kernels;
    all others are compared with their deployment's own. A folder `collectives` beside it takes the
    place of the shipped times of collectives.
    """
    try:
        engine = _read_engine(folder / ENGINE_FILE)
        deployment = _read_deployment(folder, engine)
        ordered = (PRIORITY_COLUMN,) if deployment.order == "priority" else ()
        columns = COLUMNS | {REQUESTS_FILE: (*COLUMNS[REQUESTS_FILE], *ordered)}
        tables = [recording_checks.read_table(folder / file, columns[file]) for file in COLUMNS]
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from None
    requests, steps, tokens, gpu = tables
    recording_checks.check_requests(folder / REQUESTS_FILE, requests)
    recording_checks.check_steps(folder / STEPS_FILE, steps)
    recording_checks.check_tokens(folder / TOKENS_FILE, tokens, requests, steps)
    return Recorded(engine.pop("name"), deployment, requests, steps, tokens, gpu, engine)


def _read_engine(source: Path) -> dict[str, Any]:
    """The name of a recording, and the machine's description."""
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{source}: not JSON: {error}") from None
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA_VERSION:
        raise InputError(f"{source}: not of schema {SCHEMA_VERSION}: record it again")
    recording_checks.check_engine(source, content)
    return content


def _read_deployment(folder: Path, engine: Mapping[str, Any]) -> Deployment:
    source = folder / CONFIG_FILE
    values = config.read_toml(source)
    recording_checks.check_options(source, values)
    try:
        deployment = config.options_from(Deployment, values)
        model_named(deployment.model), gpu_named(deployment.gpu)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    beside = folder.resolve().parent / "profile"
    if deployment.profile is None and _same_kernels(beside, engine):
        deployment = replace(deployment, profile=str(beside))
    beside = folder.resolve().parent / COLLECTIVES_FOLDER
    if deployment.collectives is None and (beside / COLLECTIVES_FILE).exists():
        deployment = replace(deployment, collectives=str(beside))
    return deployment


def _same_kernels(profile: Path, engine: Mapping[str, Any]) -> bool:
    """Whether a folder holds the profile of the kernels that an engine ran."""
    if not (profile / PROFILE_FILE).exists():
        return False
    measured = read_profile(profile, str(profile)).provenance
    return bool(measured.get("kernels_sha256") == engine.get("kernels_sha256"))


# ------------------------------------------------------------------------------- comparison


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A recording beside the simulation of the same arrivals."""

    recorded: Recorded
    simulated: Result
    predicted: NDArray[np.float64]
    """Seconds of each recorded step, by its composition."""

    def steps(self) -> pd.DataFrame:
        """By kind of step: how many, and how far the prediction of each is off (predicted over
        measured, minus 1): median and P90 of the size, mean, and of all their seconds together.
        """
        measured = self.recorded.steps["duration"].to_numpy()
        error = self.predicted / measured - 1
        kinds = np.array(metrics.STEP_KINDS)[metrics.step_kinds(self.recorded.steps)]
        rows = []
        for kind in STEP_KINDS:
            chosen = (kinds == kind) | (kind == "all")
            if chosen.any():
                size = np.abs(error[chosen])
                seconds = float(measured[chosen].sum())
                rows.append(
                    {
                        "kind": kind,
                        "steps": int(chosen.sum()),
                        "seconds": seconds,
                        "median": float(np.median(size)),
                        "p90": float(np.percentile(size, 90)),
                        "bias": float(error[chosen].mean()),
                        "total": float(self.predicted[chosen].sum()) / seconds - 1,
                    }
                )
        return pd.DataFrame(rows).set_index("kind")

    def headline(self) -> pd.DataFrame:
        """Of each metric: measured, simulated, the difference over the measured, and the interval
        of the simulation where it has error bars. Seconds, or per second. Refused requests only
        where there are any.
        """
        rows = {}
        measured = self._measured_latencies()
        tables = self.recorded.requests, self.simulated.requests
        simulated = metrics.latencies(self.simulated.log, tables[1])
        for name in LATENCIES:
            for percentile in metrics.PERCENTILES:
                key = f"p{percentile}"
                rows[f"{name}_{key}"] = (measured[name][key], simulated[name][key])
        ours, theirs = self.simulated.summary(), self._measured_throughputs()
        for name in THROUGHPUTS:
            rows[name] = (theirs[name], float(ours[name]))  # type: ignore[arg-type]
        own = ours["podsim"]
        assert isinstance(own, dict)
        rows["batch_size_mean"] = (_mean_batch(self.recorded.steps), own["batch_size_mean"])
        preempted = int(self.recorded.requests["num_preemptions"].sum())
        rows["preemptions"] = (preempted, own["preemptions"])
        refused = [int((table["refused"] != "").sum()) for table in tables]
        if any(refused):
            rows["refused"] = (refused[0], refused[1])
        table = pd.DataFrame.from_dict(rows, orient="index", columns=["measured", "simulated"])
        table["error"] = table["simulated"] / table["measured"].replace(0, np.nan) - 1
        intervals = self.simulated.intervals or {}
        for i, end in enumerate(("low", "high")):
            table[end] = [intervals.get(name, (np.nan, np.nan))[i] for name in table.index]
        return table.rename_axis("metric")

    def requests(self) -> pd.DataFrame:
        """Each served request's latencies, measured and simulated."""
        columns = ["ttft", "tpot", "e2e_latency", "queue_time"]
        lengths = ["request_id", "num_prompt_tokens", "num_output_tokens"]
        measured = self.recorded.requests[lengths + columns]
        simulated = self.simulated.requests[["request_id", *columns]]
        return measured.merge(simulated, on="request_id", suffixes=("", "_simulated"))

    def _measured_latencies(self) -> dict[str, dict[str, float]]:
        found = {
            name: metrics.distribution(self.recorded.requests[name])
            for name in LATENCIES
            if name != "tbt"
        }
        return found | {"tbt": metrics.distribution(self.recorded.gaps)}

    def _measured_throughputs(self) -> dict[str, float]:
        served = self.recorded.requests[self.recorded.requests["refused"] == ""]
        seconds = float(served["finish_time"].max())
        return {
            "request_throughput": len(served) / seconds,
            "output_throughput": float(served["num_output_tokens"].sum()) / seconds,
        }


def _mean_batch(steps: pd.DataFrame) -> float:
    batch = steps["num_prefills"] + steps["num_decodes"]
    return float(np.average(batch, weights=steps["duration"]))


def compare(
    recorded: Recorded, *, error_bars: bool = True, latency_model: LatencyModel | None = None
) -> Comparison:
    """Simulate what was recorded, and predict each of its steps.

    `latency_model` replaces the measured profile (and has no error bars). InputError if every
    request was refused.
    """
    recorded.require_steps()
    trace, deployment = recorded.trace, recorded.deployment
    if latency_model is not None:
        result = simulate(trace, deployment, latency_model=latency_model)
    elif error_bars:
        result = simulate_with_error_bars(trace, deployment)
    else:
        result = simulate(trace, deployment)
    heat = Heat(result.latency_model)
    starts = recorded.steps["start"].tolist()
    predicted = [
        heat.step_time(shape, start) for shape, start in zip(recorded.shapes, starts, strict=True)
    ]
    return Comparison(recorded, result, np.array(predicted))
