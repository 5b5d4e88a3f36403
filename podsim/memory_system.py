"""A replica's KV cache and what it adds to the steps, as a deployment describes them."""

from __future__ import annotations

from pathlib import Path

from podsim.config import Deployment
from podsim.kv_cache import PagedKVCache, page_groups_for
from podsim.mapping_time import MappingTime
from podsim.memory_costs import MemoryCosts, find_memory_costs
from podsim.model import Model
from podsim.page_groups import PageGroups
from podsim.prefix_cache import PrefixCache
from podsim.step_memory import StepMemory
from podsim.vattention import VAttentionCache


def memory_costs_for(deployment: Deployment) -> MemoryCosts:
    """The memory costs a deployment names, or the shipped ones; InputError if there are none."""
    folder = None if deployment.memory_costs is None else Path(deployment.memory_costs)
    return find_memory_costs(deployment.gpu, folder)


def kv_cache_for(
    deployment: Deployment, model: Model, num_blocks: int, prefixes: PrefixCache | None = None
) -> PagedKVCache:
    """An empty KV cache of a replica."""
    if deployment.kv == "vattention":
        return VAttentionCache(
            num_blocks,
            page_groups_for(deployment, model),
            deployment.max_num_seqs,
            deferred=deployment.deferred_reclamation,
            eager_blocks=deployment.eager_blocks,
        )
    return PagedKVCache(num_blocks, deployment.block_size, prefixes)


def step_memory_for(deployment: Deployment, kv_cache: PagedKVCache) -> StepMemory | None:
    """What the KV cache adds to the steps; None if nothing. InputError if its costs are unknown."""
    if isinstance(kv_cache, VAttentionCache):
        return _mapping_time(deployment, kv_cache)
    return None


def _mapping_time(deployment: Deployment, cache: VAttentionCache) -> MappingTime:
    costs, page_group = memory_costs_for(deployment), cache.page_groups.page_group
    waiting = costs.mapping_costs(page_group, "idle")
    if deployment.mapping == "synchronous":
        return MappingTime(cache, waiting)
    return MappingTime(
        cache,
        waiting,
        costs.mapping_costs(page_group, "busy"),
        deployment.look_ahead,
        costs.interference.get(str(page_group), 0.0),
    )


def growth_seconds(costs: MemoryCosts, page_groups: PageGroups, gpu_state: str = "idle") -> float:
    """What it takes to map one more block of a request."""
    mapping = costs.mapping_costs(page_groups.page_group, gpu_state)
    return mapping.map_seconds(page_groups.num_tensors, 1)
