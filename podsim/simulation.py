"""One simulation: a trace and a deployment in, a result out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import simpy

from podsim import metrics
from podsim.cluster import Cluster, FollowUp, FollowUps
from podsim.collectives import StepCollectives, find_collectives
from podsim.config import Deployment, Workload
from podsim.decode_group import DecodeGroup, ListedDecodes
from podsim.errors import InputError
from podsim.event_log import EventLog
from podsim.hardware import gpu_named
from podsim.kv_cache import PagedKVCache, num_blocks_for
from podsim.latency import LatencyModel, ProfiledLatency
from podsim.memory_system import kv_cache_for, memory_costs_for, step_memory_for
from podsim.model import Model, model_named
from podsim.paged_latency import PagedLatency
from podsim.prefix_cache import PrefixCache
from podsim.profile import find_profile
from podsim.replica import LONGEST_RUN, Replica
from podsim.request import Request
from podsim.router import ROUTERS
from podsim.scheduler import SCHEDULERS, Scheduler
from podsim.step_memory import StepMemory
from podsim.workload import Trace, load_once, synthetic_trace

MakeScheduler = Callable[[PagedKVCache, Deployment], Scheduler]

DEFAULT_NUM_REQUESTS = 1000  # of a synthetic workload


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What a simulation found. Tables are in seconds and tokens."""

    trace: Trace
    deployment: Deployment
    num_blocks: int
    log: EventLog
    latency_model: LatencyModel
    wall_time: float
    """Seconds the simulation itself took."""
    intervals: metrics.Intervals | None = None
    """Where the headline numbers may lie; see `simulate_with_error_bars`."""
    streamed: metrics.RequestTotals | None = None
    """What is left of requests that went to a sink."""
    memory: Sequence[StepMemory] = ()
    """Of each replica, what its memory system did; none where it costs nothing."""

    @property
    def requests(self) -> pd.DataFrame:
        """One row a request, in order of arrival; times of a refused request are NaN.

        InputError if the requests went to a sink.
        """
        if self.streamed is not None:
            raise InputError("the requests of this simulation went to a sink")
        return metrics.request_table(self.log)

    @property
    def steps(self) -> pd.DataFrame:
        """One row a step of a replica, in order of completion; InputError if none were kept."""
        if not self.log.keep_steps:
            raise InputError("the steps of this simulation were not kept")
        return metrics.step_table(self.log)

    @property
    def preemptions(self) -> pd.DataFrame:
        """One row a preemption: request_id and time."""
        return metrics.preemption_table(self.log)

    @property
    def memory_table(self) -> pd.DataFrame:
        """What the memory systems report over time: replica, time (s), bytes."""
        return metrics.memory_table(self.memory)

    @property
    def uncalibrated(self) -> str | None:
        """Set if nobody measured the costs on this GPU: what must be said of the results."""
        return uncalibrated_note(self.latency_model)

    @property
    def outside_measured_share(self) -> float:
        """Of the simulated step time: predicted beyond what was measured."""
        return float(getattr(self.latency_model, "outside_share", 0.0))

    @property
    def notes(self) -> list[str]:
        """What a reader of the results should know of the costs, each once."""
        told: Sequence[str] = getattr(self.latency_model, "notes", list)()
        of_memory = (note for memory in self.memory for note in memory.notes())
        return list(dict.fromkeys([*told, *of_memory]))

    def summary(self) -> dict[str, object]:
        """The headline numbers, under the keys of `vllm bench serve` and podsim's own."""
        return metrics.summarize(self)


def simulate(
    trace: Trace,
    deployment: Deployment,
    *,
    latency_model: LatencyModel | None = None,
    scheduler: MakeScheduler | None = None,
    closed_loop: bool = False,
    keep_steps: bool = True,
    request_sink: Callable[[pd.DataFrame], None] | None = None,
    step_by_step: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Result:
    """Serve a trace on a deployment.

    `latency_model` replaces the measured profile of the deployment's GPU and model; `scheduler`
    makes a scheduler for each replica from its KV cache. With `closed_loop`, a later turn of a
    session arrives when the turn before, and the sessions that worked for it, are finished and its
    think time (0 if unknown) has passed, instead of at its recorded time. Without `keep_steps`,
    steps are added up and dropped; a `request_sink` is given tables like `Result.requests`, in
    order of leaving, which are dropped then: memory is left to the latencies. `step_by_step` takes
    every step by itself and moves every request's counters in it: slow, equal in result, the
    reference. `on_progress` is told how many requests have arrived, now and then. Raises InputError
    for an unknown model or GPU, or when there is no profile for them.
    """
    require_arrivals(trace, deployment)
    model, gpu = model_named(deployment.model), gpu_named(deployment.gpu)
    num_blocks = num_blocks_for(deployment, model, gpu)
    latency_model = latency_model or latency_model_for(deployment, model)
    max_model_len = deployment.max_model_len or model.max_model_len
    if scheduler is None:
        scheduler = built_in_scheduler(deployment, max_model_len, latency_model, step_by_step)
    env = simpy.Environment()
    log = EventLog(keep_steps=keep_steps)
    streamed = None if request_sink is None else _stream_requests(log, request_sink)
    replicas = []
    for index in range(deployment.replicas):
        prefixes = _prefix_cache(trace, deployment) if deployment.prefix_caching else None
        kv_cache = kv_cache_for(deployment, model, num_blocks, prefixes)
        replicas.append(
            Replica(
                env,
                index,
                scheduler(kv_cache, deployment),
                kv_cache,
                latency_model,
                log,
                1 if step_by_step else LONGEST_RUN,
                step_memory_for(deployment, model, kv_cache, latency_model, keep_log=keep_steps),
            )
        )
    requests = requests_of(trace, on_progress)
    follow_ups: FollowUps = {}
    if closed_loop:
        requests, follow_ups = _closed_loop(trace, requests)
    cluster = Cluster(
        env,
        replicas,
        ROUTERS[deployment.router](deployment.router_seed),
        max_model_len,
        log,
        follow_ups,
    )
    started = time.perf_counter()
    cluster.serve(requests)
    env.run()
    assert all(replica.kv_cache.num_used_blocks == 0 for replica in replicas)
    if log.when_full is not None:
        log.when_full()
    wall_time = time.perf_counter() - started
    memory = [replica.memory for replica in replicas if replica.memory is not None]
    return Result(
        *(trace, deployment, num_blocks, log, latency_model, wall_time),
        streamed=streamed,
        memory=memory,
    )


def _stream_requests(log: EventLog, sink: Callable[[pd.DataFrame], None]) -> metrics.RequestTotals:
    """Hand the log's requests to a sink, chunk by chunk; what is added up of them."""
    totals = metrics.RequestTotals()

    def hand_over() -> None:
        table = metrics.request_table(log)
        totals.add(table)
        sink(table)
        log.drop_requests()

    log.when_full = hand_over
    return totals


def simulate_with_error_bars(
    trace: Trace,
    deployment: Deployment,
    *,
    closed_loop: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Result:
    """Simulate, and again with every step as long as the profile's own error allows.

    The held-out error of whole forward passes says how much longer or shorter than predicted a step
    is likely to be: its P10 and P90, taken for all steps at once, which is the worst case. Each
    interval spans the three runs, and `on_progress` counts the requests of all three. Raises
    InputError as `simulate` does.
    """
    done = 0

    def run(latency_model: LatencyModel | None = None) -> Result:
        nonlocal done
        before, done = done, done + len(trace)
        told = None if on_progress is None else lambda arrived: on_progress(before + arrived)
        return simulate(
            trace,
            deployment,
            latency_model=latency_model,
            closed_loop=closed_loop,
            on_progress=told,
        )

    result = run()
    predicted = result.latency_model
    assert isinstance(predicted, ProfiledLatency)
    summaries = [run(predicted.scaled(scale)).summary() for scale in predicted.likely_scales()]
    return replace(result, intervals=metrics.intervals([result.summary(), *summaries]))


def built_in_scheduler(
    deployment: Deployment, max_model_len: int, latency_model: LatencyModel, step_by_step: bool
) -> MakeScheduler:
    """Makes the deployment's scheduler. InputError if its budget cannot hold a whole prompt."""
    kind = SCHEDULERS[deployment.scheduler]
    if kind.whole_prompts and deployment.token_budget < max_model_len:
        raise InputError(
            f"token_budget is {deployment.token_budget}, but '{deployment.scheduler}' computes "
            f"prompts whole: give at least max_model_len ({max_model_len})"
        )
    decodes = ListedDecodes if step_by_step else DecodeGroup
    return lambda kv_cache, deployment: kind(
        kv_cache, deployment, decodes(kv_cache.block_size), latency_model.step_time
    )


def _prefix_cache(trace: Trace, deployment: Deployment) -> PrefixCache:
    if trace.hash_ids is None or trace.hash_block_size is None:
        raise InputError(f"{trace.name}: prefix_caching needs hash ids, and this trace has none")
    return PrefixCache(trace.hash_block_size, deployment.block_size)


def latency_model_for(deployment: Deployment, model: Model) -> ProfiledLatency:
    """The measured costs of a deployment of a whole model, shared among its GPUs.

    Raises InputError if its model cannot be shared so, or if the share has no profile on its GPU
    or the GPUs no measured collectives.
    """
    share = model.shard(deployment.tensor_parallel_size)
    profile = find_profile(deployment.gpu, share, _folder(deployment.profile))
    options: dict[str, Any] = {
        "host_overhead": deployment.host_overhead,
        "collectives": _step_collectives(deployment, share),
        "host_per_request": deployment.host_overhead_per_request,
        "host_with_prefill": deployment.host_overhead_with_prefill,
        "graph_padding": deployment.graph_padding,
    }
    if deployment.kv == "paged":
        paged = memory_costs_for(deployment).paged_costs(deployment.block_size)
        options |= {"paged": paged, "block_size": deployment.block_size}
        return PagedLatency(profile, share, deployment.attention, **options)
    return ProfiledLatency(profile, share, deployment.attention, **options)


def _step_collectives(deployment: Deployment, share: Model) -> StepCollectives | None:
    num_gpus, folder = deployment.tensor_parallel_size, _folder(deployment.collectives)
    if num_gpus == 1:
        return None
    return StepCollectives(find_collectives(deployment.gpu, num_gpus, folder), share)


def _folder(name: str | None) -> Path | None:
    return Path(name) if name else None


def uncalibrated_notes(deployments: Iterable[Deployment]) -> list[str]:
    """What must be said of deployments on GPUs that nobody measured, once each."""
    by_costs = {(d.gpu, d.model, d.profile, d.tensor_parallel_size): d for d in deployments}
    notes = [
        uncalibrated_note(latency_model_for(d, model_named(d.model))) for d in by_costs.values()
    ]
    return list(dict.fromkeys(note for note in notes if note is not None))


def uncalibrated_note(latency_model: LatencyModel) -> str | None:
    """What must be said of costs that were scaled from another GPU's; None if they were not."""
    if not isinstance(latency_model, ProfiledLatency) or latency_model.profile.scaling is None:
        return None
    return latency_model.profile.scaling.note


def workload_trace(workload: Workload) -> Trace:
    """The trace a workload describes. Raises InputError for a trace that cannot be used."""
    if workload.trace is None:
        assert workload.arrivals is not None
        trace = synthetic_trace(
            arrivals=workload.arrivals,
            qps=workload.qps,
            num_requests=workload.requests or DEFAULT_NUM_REQUESTS,
            prompt_tokens=workload.prompt_tokens,
            output_tokens=workload.output_tokens,
            burstiness=workload.burstiness,
            seed=workload.seed,
        )
    else:
        trace = load_once(
            workload.trace,
            zero_length=workload.zero_length,
            format=workload.format,
            seed=workload.seed,
        )
        if workload.requests is not None:
            trace = trace.head(workload.requests)
        if workload.arrivals is not None:
            trace = trace.with_arrivals(
                workload.arrivals, workload.qps, workload.seed, workload.burstiness
            )
        elif workload.qps is not None:
            trace = trace.at_rate(workload.qps)
        elif workload.rate_scale is not None:
            trace = trace.scaled(workload.rate_scale)
    if workload.spread_ties is not None:
        trace = trace.spread_ties(workload.spread_ties)
    if workload.duration is not None:
        trace = trace.until(workload.duration)
    return trace


def _closed_loop(
    trace: Trace, requests: Iterator[Request]
) -> tuple[Iterator[Request], dict[int, list[FollowUp]]]:
    """The requests that wait for none, and the others by those they wait for.

    InputError without sessions.
    """
    if trace.session_id is None or trace.think_time is None:
        raise InputError(f"{trace.name}: a closed-loop replay needs sessions with think times")
    awaited = [[turn] if turn >= 0 else [] for turn in trace.previous_turn.tolist()]
    for first, last, started_by, after in trace.parent_turns:
        awaited[first].append(started_by)
        if after >= 0:
            awaited[after].append(last)
    think_times = np.nan_to_num(trace.think_time).tolist()
    first_turns = []
    follow_ups: dict[int, list[FollowUp]] = {}
    for request, others in zip(requests, awaited, strict=True):
        if not others:
            first_turns.append(request)
        following = FollowUp(request, think_times[request.request_id], len(others))
        for other in others:
            follow_ups.setdefault(other, []).append(following)
    return iter(first_turns), follow_ups


def require_arrivals(trace: Trace, deployment: Deployment) -> None:
    """InputError if a trace lacks times, or the priorities by which requests are let in."""
    trace.require_times()
    if deployment.order == "priority" and trace.priority is None:
        raise InputError(f"{trace.name}: order 'priority' needs a column 'priority'")


def requests_of(
    trace: Trace, on_progress: Callable[[int], None] | None = None
) -> Iterator[Request]:
    """The requests of a trace, in order of arrival; `on_progress` is told how many so far."""
    nothing: repeat[Any] = repeat(None)
    columns = zip(
        trace.arrival_time.tolist(),
        trace.num_prompt_tokens.tolist(),
        trace.num_output_tokens.tolist(),
        repeat(-1) if trace.session_id is None else trace.session_id.tolist(),
        repeat(0) if trace.priority is None else trace.priority.tolist(),
        nothing if trace.hash_ids is None else trace.hash_ids,
        strict=False,
    )
    for request_id, row in enumerate(columns):
        arrival, prompt, output, session_id, priority, hash_ids = row
        if on_progress is not None and request_id % 100 == 0:
            on_progress(request_id)
        ids = () if hash_ids is None else hash_ids.tolist()
        yield Request(request_id, arrival, prompt, output, session_id, priority, ids)
    if on_progress is not None:
        on_progress(len(trace))
