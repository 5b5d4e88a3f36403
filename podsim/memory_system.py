"""A replica's KV cache and what it adds to the steps, as a deployment describes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from podsim.batch import BatchShape
from podsim.block_tables import PagedBlocks
from podsim.config import Deployment
from podsim.hardware import gpu_named
from podsim.kv_cache import PagedKVCache, kv_sizes, page_groups_for
from podsim.latency import LatencyModel, ProfiledLatency
from podsim.mapping_time import MappingTime
from podsim.memory_costs import MemoryCosts, find_memory_costs
from podsim.model import Model
from podsim.offload_time import OffloadCosts, OffloadTime
from podsim.page_groups import PageGroups
from podsim.prefix_cache import PrefixCache
from podsim.step_memory import StepMemory
from podsim.swap_space import SwapSpace
from podsim.swap_time import SwapCopies, SwapTime
from podsim.vattention import VAttentionCache


def memory_costs_for(deployment: Deployment) -> MemoryCosts:
    """The memory costs a deployment names, or the shipped ones; InputError if there are none."""
    folder = None if deployment.memory_costs is None else Path(deployment.memory_costs)
    return find_memory_costs(deployment.gpu, folder)


def kv_cache_for(
    deployment: Deployment, model: Model, num_blocks: int, prefixes: PrefixCache | None = None
) -> PagedKVCache:
    """An empty KV cache of a replica."""
    swap = None
    if deployment.preemption == "swap":
        share = model.shard(deployment.tensor_parallel_size)
        swap = SwapSpace(int(deployment.host_memory * 1e9) // share.kv_bytes_per_token)
    if deployment.kv == "vattention":
        return VAttentionCache(
            num_blocks,
            page_groups_for(deployment, model),
            deployment.max_num_seqs,
            deferred=deployment.deferred_reclamation,
            eager_blocks=deployment.eager_blocks,
            swap=swap,
        )
    if deployment.kv == "paged":
        slots = deployment.max_num_seqs
        return PagedBlocks(num_blocks, deployment.block_size, slots, prefixes, swap)
    return PagedKVCache(num_blocks, deployment.block_size, prefixes, swap)


def step_memory_for(
    deployment: Deployment,
    model: Model,
    kv_cache: PagedKVCache,
    latency_model: LatencyModel,
    *,
    keep_log: bool = True,
) -> StepMemory | None:
    """What the KV cache adds to the steps; None if nothing. InputError if its costs are unknown."""
    memory = _step_memory(deployment, model, kv_cache, latency_model)
    if memory is not None:
        memory.log.keep = keep_log
    return memory


def _step_memory(
    deployment: Deployment, model: Model, kv_cache: PagedKVCache, latency_model: LatencyModel
) -> StepMemory | None:
    share = model.shard(deployment.tensor_parallel_size)
    if deployment.kv_offload != "none":
        return _offload_time(deployment, model, share, latency_model)
    copies = None if kv_cache.swap is None else _swap_copies(deployment, share, kv_cache)
    if isinstance(kv_cache, VAttentionCache):
        return _mapping_time(deployment, kv_cache, copies)
    return None if copies is None else SwapTime(copies)


def _swap_copies(deployment: Deployment, share: Model, kv_cache: PagedKVCache) -> SwapCopies:
    """Contiguous in each tensor, but for blocks that lie anywhere."""
    assert kv_cache.swap is not None
    costs = memory_costs_for(deployment)
    num_tensors = 2 * share.num_layers
    if isinstance(kv_cache, VAttentionCache):
        num_tensors = kv_cache.page_groups.num_tensors
    return SwapCopies(
        kv_cache.swap,
        costs.transfer_costs("h2d pinned"),
        costs.transfer_costs("d2h pinned"),
        num_tensors=num_tensors,
        token_bytes=share.kv_bytes_per_token // num_tensors,
        block_size=deployment.block_size if deployment.kv == "paged" else None,
    )


def require_memory_costs(deployment: Deployment, model: Model, latency_model: LatencyModel) -> None:
    """InputError if a simulation of this deployment would lack memory costs."""
    step_memory_for(deployment, model, kv_cache_for(deployment, model, 1), latency_model)


def _offload_time(
    deployment: Deployment, model: Model, share: Model, latency_model: LatencyModel
) -> OffloadTime:
    costs = memory_costs_for(deployment)
    recompute, kvpr = None, deployment.kv_offload == "kvpr"
    if kvpr and share.recomputing_pays:
        outputs = 2 * share.num_kv_heads * share.head_dim
        recompute = costs.recompute_costs(share.hidden_size, outputs, rotated=True)
    sizes = kv_sizes(deployment, model, gpu_named(deployment.gpu))
    return OffloadTime(
        share,
        sizes.gpu_blocks * deployment.block_size,
        OffloadCosts(
            load=costs.transfer_costs("h2d pinned beside matrix"),
            store=costs.transfer_costs("d2h pinned"),
            recompute=recompute,
            handoff=costs.handoff,
            relay=costs.relay,
            never_pays=kvpr and not share.recomputing_pays,
        ),
        deployment.offload_schedule,
        _seconds_once(latency_model),
    )


def _seconds_once(latency_model: LatencyModel) -> Callable[[BatchShape], float]:
    """The part of a step outside its layers; a model that does not tell has none."""
    if not isinstance(latency_model, ProfiledLatency):
        return lambda shape: 0.0
    scale = latency_model.scale
    return lambda shape: latency_model.breakdown(shape).once * scale


def _mapping_time(
    deployment: Deployment, cache: VAttentionCache, swap: SwapCopies | None
) -> MappingTime:
    costs, page_group = memory_costs_for(deployment), cache.page_groups.page_group
    waiting = costs.mapping_costs(page_group, "idle")
    if deployment.mapping == "synchronous":
        return MappingTime(cache, waiting, swap=swap)
    return MappingTime(
        cache,
        waiting,
        costs.mapping_costs(page_group, "busy"),
        deployment.look_ahead,
        costs.interference.get(str(page_group), 0.0),
        swap,
    )


def growth_seconds(costs: MemoryCosts, page_groups: PageGroups, gpu_state: str = "idle") -> float:
    """What it takes to map one more block of a request."""
    mapping = costs.mapping_costs(page_groups.page_group, gpu_state)
    return mapping.map_seconds(page_groups.num_tensors, 1)
