"""Every option of a simulation, declared once: for Python, the command line and TOML files."""

from __future__ import annotations

import difflib
import tomllib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from podsim.errors import InputError

STRATEGIES = ("serial", "streams", "unified", "pod")
"""How the attention of a mixed batch runs; each is measured for itself."""

ROUTERS = (
    *("round_robin", "random", "least_outstanding_tokens", "join_shortest_queue"),
    *("power_of_two", "session_affinity", "prefix_affinity"),
)
SCHEDULERS = ("sarathi", "vllm-v1", "vllm-v0", "orca", "static")
ORDERS = ("fcfs", "shortest_first", "priority")
KV_CACHES = ("ideal", "paged", "vattention")
"""How the KV cache is kept: in blocks whose table costs nothing, as podsim's kernels are measured
on contiguous keys; in blocks with what a table costs; contiguous, by mapping memory on demand."""
PAGE_GROUPS = {"64KB": 2**16, "128KB": 2**17, "256KB": 2**18, "2MB": 2**21, "8MB": 2**23}
"""Bytes: 2 MB is the driver's own size, of which it maps any multiple as one; the smaller ones are
those of vAttention's modified driver."""
KV_TENSORS = ("per_layer", "sliced")
"""Virtual tensors: K and V of each layer, or one of K and one of V that hold all layers."""
MAPPINGS = ("overlapped", "synchronous")
OFFLOADS = ("none", "full", "kvpr")
OFFLOAD_SCHEDULES = ("row", "column")
PREEMPTIONS = ("recompute", "swap")
ARRIVALS = ("poisson", "gamma", "weibull", "uniform", "static")
ZERO_LENGTH = ("error", "drop")
REPLAYS = ("open", "closed")


def _option(default: Any, help: str, short: str | None = None) -> Any:
    """`short` is a second name on the command line."""
    return field(default=default, metadata={"help": help, "short": short})


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What serves the requests. Raises InputError for values that cannot be."""

    model: str = _option(
        "llama-3-8b", "Model served: a name, or the config.json of one from Hugging Face."
    )
    gpu: str = _option("h200", "GPU of each replica.")
    profile: str | None = _option(
        None, "Profile folder to take costs from, instead of the one shipped for GPU and model."
    )
    tensor_parallel_size: int = _option(
        1, "GPUs that share each layer of a replica's model.", short="--tp"
    )
    collectives: str | None = _option(
        None, "Folder of collective times to take, instead of those shipped for the GPU."
    )
    attention: str = _option("serial", f"Attention of a mixed batch: {', '.join(STRATEGIES)}.")
    replicas: int = _option(1, "Model replicas, of tensor_parallel_size GPUs each.")
    router: str = _option("round_robin", f"Spreads requests over replicas: {', '.join(ROUTERS)}.")
    scheduler: str = _option("sarathi", f"Builds the batch of each step: {', '.join(SCHEDULERS)}.")
    router_seed: int = _option(0, "Seed of the routers that draw replicas.")
    order: str = _option("fcfs", f"Which waiting request is let in next: {', '.join(ORDERS)}.")
    chunk_size: int | None = _option(
        None, "Most tokens of one prompt in a step (sarathi, vllm-v1); default: the budget."
    )
    max_prefills: int | None = _option(
        None, "Most prompts in a step; 1 is POD-Attention's own integration."
    )
    tbt_target: float | None = _option(
        None,
        "Seconds a step may take by prediction: the budget shrinks to it (sarathi).",
    )
    prefix_caching: bool = _option(
        False, "Keep the KV blocks of prompts for later ones with the same hash ids."
    )
    token_budget: int = _option(1024, "Most tokens computed in one step.")
    max_num_seqs: int = _option(256, "Most requests running on a replica.")
    max_model_len: int | None = _option(
        None, "Longest prompt plus output served, in tokens; default: the model's own."
    )
    block_size: int = _option(
        16, "Tokens of a KV block; vattention's holds what a page-group does."
    )
    num_blocks: int | None = _option(
        None, "KV blocks of a replica; default: what the GPU's memory leaves after the weights."
    )
    gpu_memory_utilization: float = _option(
        0.9, "Share of GPU memory for weights, activations and KV cache."
    )
    host_overhead: float = _option(
        0.0, "Seconds of host work that each step waits for, added to the GPU's time."
    )
    host_overhead_per_request: float = _option(
        0.0, "The part of the host's work that grows with the requests of a step, in seconds each."
    )
    host_overhead_with_prefill: float = _option(
        0.0, "Further seconds of host work in a step that has prefill."
    )
    graph_padding: bool = _option(
        False, "Pad the tokens of each step to the next size of CUDA graph, as engines do."
    )
    watermark: float = _option(
        0.01, "Share of the KV blocks that admission leaves free for running requests to grow."
    )

    kv: str = _option(
        "ideal",
        "How the KV cache is kept: ideal (blocks, their table costs nothing), paged (with what the "
        "table costs) or vattention (memory mapped on demand).",
    )
    page_group: str = _option(
        "2MB", f"Memory that vattention maps at a time, in each tensor: {', '.join(PAGE_GROUPS)}."
    )
    kv_tensors: str = _option(
        "per_layer",
        "Virtual tensors of vattention: per_layer, or sliced (one of K and one of V for all).",
    )
    mapping: str = _option(
        "overlapped", "vattention maps beside the steps (overlapped), or before them (synchronous)."
    )
    look_ahead: int = _option(1, "Steps ahead of which vattention maps what decodes will need.")
    deferred_reclamation: bool = _option(
        True, "vattention leaves a finished request's memory mapped, for the next one."
    )
    eager_blocks: int = _option(
        0, "Blocks that vattention keeps mapped in a free slot, for the next request."
    )
    kv_offload: str = _option(
        "none",
        "KV cache in host memory, when the GPU's is full: none, full (a step transfers it) or kvpr "
        "(it recomputes a part of it meanwhile).",
    )
    kv_on_host: bool = _option(
        False, "All of an offloaded KV cache in host memory, none on the GPU."
    )
    offload_schedule: str = _option(
        "row", "Order of an offloaded step: row, or column (weights in host memory too)."
    )
    host_memory: float = _option(0.0, "Host memory of a GPU for KV cache and weights, in GB.")
    preemption: str = _option(
        "recompute", "A preempted request's KV cache is computed again, or swapped to host memory."
    )
    memory_costs: str | None = _option(
        None, "Folder of memory costs to take, instead of those shipped for the GPU."
    )

    def __post_init__(self) -> None:
        _check_choice("attention", self.attention, STRATEGIES)
        self._check_memory()
        _check_choice("router", self.router, ROUTERS)
        _check_choice("scheduler", self.scheduler, SCHEDULERS)
        _check_choice("order", self.order, ORDERS)
        counts = ("replicas", "tensor_parallel_size", "token_budget", "max_num_seqs", "block_size")
        for name in counts:
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_model_len", "num_blocks", "chunk_size", "max_prefills"):
            value = getattr(self, name)
            _check(value is None or value >= 1, name, value, "at least 1")
        utilization = self.gpu_memory_utilization
        _check(0 < utilization <= 1, "gpu_memory_utilization", utilization, "over 0, at most 1")
        for name in ("", "_per_request", "_with_prefill"):
            name = f"host_overhead{name}"
            _check(0 <= getattr(self, name) < inf, name, getattr(self, name), "at least 0, finite")
        _check(self.router_seed >= 0, "router_seed", self.router_seed, "at least 0")
        target = self.tbt_target
        _check(target is None or target > 0, "tbt_target", target, "over 0")
        if target is not None and self.scheduler != "sarathi":
            raise InputError(f"tbt_target is an option of sarathi, not of '{self.scheduler}'")
        if self.chunk_size is not None and self.scheduler not in ("sarathi", "vllm-v1"):
            raise InputError(f"'{self.scheduler}' computes whole prompts: it has no chunk_size")
        if self.router == "prefix_affinity" and not self.prefix_caching:
            raise InputError("router 'prefix_affinity' needs prefix_caching")
        _check(0 <= self.watermark < 1, "watermark", self.watermark, "at least 0, below 1")
        _check(
            self.token_budget >= self.max_num_seqs,
            "token_budget",
            self.token_budget,
            f"at least max_num_seqs ({self.max_num_seqs}): each decode takes one token of it",
        )

    def _check_memory(self) -> None:
        _check_choice("kv", self.kv, KV_CACHES)
        _check_choice("page_group", self.page_group, tuple(PAGE_GROUPS))
        _check_choice("kv_tensors", self.kv_tensors, KV_TENSORS)
        _check_choice("mapping", self.mapping, MAPPINGS)
        _check_choice("kv_offload", self.kv_offload, OFFLOADS)
        _check_choice("offload_schedule", self.offload_schedule, OFFLOAD_SCHEDULES)
        _check_choice("preemption", self.preemption, PREEMPTIONS)
        _check(self.look_ahead >= 0, "look_ahead", self.look_ahead, "at least 0")
        _check(self.eager_blocks >= 0, "eager_blocks", self.eager_blocks, "at least 0")
        _check(self.host_memory >= 0, "host_memory", self.host_memory, "at least 0")
        if self.kv == "vattention" and self.prefix_caching:
            raise InputError("kv 'vattention' has no prefix_caching: slots share no memory")
        offloads, swaps = self.kv_offload != "none", self.preemption == "swap"
        if offloads and self.kv == "vattention":
            raise InputError("kv_offload needs KV blocks: take kv 'ideal' or 'paged'")
        if (offloads or swaps) and self.prefix_caching:
            raise InputError("prefix_caching keeps its blocks on the GPU: no kv_offload, no swap")
        if (offloads or swaps) and not self.host_memory:
            raise InputError(
                "host_memory is 0: kv_offload and preemption 'swap' need some: --host-memory GB"
            )
        if offloads and swaps:
            raise InputError("preemption 'swap' and kv_offload both use host_memory: take one")
        if self.kv_on_host and not offloads:
            raise InputError("kv_on_host needs kv_offload full or kvpr")
        if self.offload_schedule == "column" and not offloads:
            raise InputError("offload_schedule 'column' needs kv_offload full or kvpr")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Which requests arrive, and when. Raises InputError for values that cannot be."""

    trace: str | None = _option(None, "Trace file or shipped trace; none: synthetic requests.")
    arrivals: str | None = _option(
        None, f"Make up the arrival times: {', '.join(ARRIVALS)} (all at once)."
    )
    qps: float | None = _option(
        None, "Mean requests per second: stretches a trace's time, or drives --arrivals."
    )
    rate_scale: float | None = _option(None, "Multiply a trace's rate, by dividing its time.")
    burstiness: float = _option(1.0, "Shape of gamma arrivals: 1 is Poisson, smaller is burstier.")
    prompt_tokens: str = _option(
        "1500", "Synthetic prompt length: N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA."
    )
    output_tokens: str = _option("300", "Synthetic output length, written like the prompt's.")
    requests: int | None = _option(
        None, "Only the first N requests; of synthetic ones, how many (default 1000)."
    )
    duration: float | None = _option(
        None, "Only requests that arrive in the first N seconds, after any change of rate."
    )
    format: str | None = _option(
        None, "Read the trace as this format instead of recognising it; docs/trace-formats.md."
    )
    replay: str = _option(
        "open",
        "open: requests arrive at their recorded times; closed: a later turn of a session arrives "
        "when the turn before is finished and its think time has passed.",
    )
    spread_ties: int | None = _option(
        None, "Spread requests that arrive at once over the clock's tick, with this seed."
    )
    zero_length: str = _option(
        "error", "Rows with zero prompt or output tokens: error, or drop (counted)."
    )
    seed: int = _option(0, "Seed of everything random.")

    def __post_init__(self) -> None:
        if self.arrivals is not None:
            _check_choice("arrivals", self.arrivals, ARRIVALS)
        _check_choice("zero_length", self.zero_length, ZERO_LENGTH)
        _check_choice("replay", self.replay, REPLAYS)
        ties = self.spread_ties
        _check(ties is None or ties >= 0, "spread_ties", ties, "a seed of at least 0")
        for name in ("qps", "rate_scale", "duration", "requests"):
            value = getattr(self, name)
            _check(value is None or value > 0, name, value, "over 0")
        _check(self.burstiness > 0, "burstiness", self.burstiness, "over 0")
        _check(self.seed >= 0, "seed", self.seed, "at least 0")
        _check(
            self.qps is None or self.rate_scale is None,
            "rate_scale",
            self.rate_scale,
            "left out when qps is given: both set the rate",
        )
        if self.trace is None and self.arrivals is None:
            raise InputError(
                "no requests: name a trace, or make some up with --arrivals poisson --qps 8"
            )
        for name in ("prompt_tokens", "output_tokens", "burstiness"):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if self.arrivals is None and value != default:
                raise InputError(f"{name} is {value!r}: of made-up requests; a trace has its own")
        if self.arrivals not in (None, "static") and self.qps is None:
            raise InputError(f"arrivals '{self.arrivals}' need a rate: give --qps")


Options = TypeVar("Options", Deployment, Workload)


def _check(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{name} is {value!r}, expected {expected}")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} is '{value}', expected one of: {', '.join(choices)}")


def option_types(options: type[Deployment] | type[Workload]) -> dict[str, type]:
    """The plain type (int, float, str or bool) of each option."""
    hints = get_type_hints(options)
    return {f.name: _plain_type(hints[f.name]) for f in fields(options)}


def _plain_type(hint: Any) -> type:
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in get_args(hint) if arg is not types.NoneType)
    assert isinstance(hint, type)
    return hint


def options_from(options: type[Options], values: Mapping[str, object]) -> Options:
    """Options from loosely typed values (TOML, command line); names of other options are left.

    Raises InputError if a value is not of its option's type.
    """
    given: dict[str, Any] = {
        name: converted(name, values[name], kind)
        for name, kind in option_types(options).items()
        if values.get(name) is not None
    }
    return options(**given)


def converted(name: str, value: object, kind: type) -> object:
    """A loosely typed value of an option as its type; InputError if it is not one."""
    words = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    wrong = InputError(f"{name} is {value!r}, expected {words[kind]}")
    if kind is bool:
        truth = {"true": True, "false": False}.get(str(value).lower())
        if truth is None:
            raise wrong
        return truth
    if isinstance(value, str) and kind is not str:
        try:
            return kind(value)
        except ValueError:
            raise wrong from None
    if kind is str and name in ("prompt_tokens", "output_tokens") and isinstance(value, int):
        return str(value)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise wrong
    return kind(value)


def read_toml(path: Path) -> dict[str, object]:
    """Options from a TOML file: `name = value` lines, the names of the command-line options.

    Raises InputError, naming file and key, for a file that is missing, broken, has unknown keys or
    values that are not of their option's type; comma lists are of `podsim compare`.
    """
    values = load_toml(path)
    kinds = option_types(Workload) | option_types(Deployment)
    require_known(path, values, list(kinds))
    for name, value in values.items():
        for one in value.split(",") if isinstance(value, str) else [value]:
            try:
                converted(name, one, kinds[name])
            except InputError as error:
                raise InputError(f"{place_of(path, name)}: {error}") from None
    return values


def place_of(path: Path, name: str) -> str:
    """File and line in which an option is set."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    names = [line.partition("=")[0].strip() for line in lines]
    return f"{path}:{names.index(name) + 1}" if name in names else str(path)


def load_toml(path: Path) -> dict[str, object]:
    """What a TOML file holds. Raises InputError if it is missing or broken."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not TOML: {error}") from None


def require_known(path: Path, keys: Iterable[str], known: Sequence[str], where: str = "") -> None:
    """Raises InputError for a key of a file that is not known, with the nearest one that is."""
    for key in keys:
        require_name(f"{path}: unknown key", key, known, where)


def require_name(what: str, name: str, known: Iterable[str], where: str = "") -> None:
    """Raises InputError for a name that is not known, with the nearest one that is."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(known)}"
        raise InputError(f"{what} '{name}'{where}{hint}")


def to_toml(workload: Workload | None, deployment: Deployment) -> str:
    """The options as a TOML file that `read_toml` reads back; unset ones are left out."""
    values = {**(asdict(workload) if workload else {}), **asdict(deployment)}
    return "".join(f"{k} = {_toml(v)}\n" for k, v in values.items() if v is not None)


def _toml(value: object) -> str:
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return str(value).lower() if isinstance(value, bool) else repr(value)
