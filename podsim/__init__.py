"""Simulate LLM inference clusters with costs measured on a real GPU.

import podsim

trace = podsim.load_trace("azure-conv-like")
result = podsim.simulate(trace, podsim.Deployment(attention="pod", token_budget=1024))
print(result.summary()["median_ttft_ms"], result.requests)
"""

from podsim.batch import Batch, BatchShape, Chunk, PrefillShape
from podsim.capacity import Capacity, find_capacities, find_capacity, measure_loads
from podsim.config import Deployment, Workload
from podsim.errors import InputError
from podsim.kv_cache import PagedKVCache
from podsim.latency import ConstantLatency, LatencyModel, ProfiledLatency
from podsim.latency_provider import LatencyProvider, StepTime
from podsim.request import Request
from podsim.scheduler import SarathiScheduler, Scheduler
from podsim.simulation import Result, simulate
from podsim.slo import Slo
from podsim.sweep import SweepOutcome, run_sweep
from podsim.sweep_plan import SweepPlan, read_plan
from podsim.workload import Trace, load_trace, synthetic_trace

__all__ = [
    "Batch",
    "BatchShape",
    "Capacity",
    "Chunk",
    "ConstantLatency",
    "Deployment",
    "InputError",
    "LatencyModel",
    "LatencyProvider",
    "PagedKVCache",
    "PrefillShape",
    "ProfiledLatency",
    "Request",
    "Result",
    "SarathiScheduler",
    "Scheduler",
    "Slo",
    "StepTime",
    "SweepOutcome",
    "SweepPlan",
    "Trace",
    "Workload",
    "find_capacities",
    "find_capacity",
    "load_trace",
    "measure_loads",
    "read_plan",
    "run_sweep",
    "simulate",
    "synthetic_trace",
]
