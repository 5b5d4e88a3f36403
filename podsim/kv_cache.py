"""The paged KV cache of a replica: how many blocks there are, and who holds how many."""

from __future__ import annotations

from typing import NamedTuple

from podsim.config import PAGE_GROUPS, Deployment
from podsim.errors import InputError
from podsim.hardware import Gpu
from podsim.model import BYTES_PER_VALUE, Model
from podsim.page_groups import PageGroups
from podsim.prefix_cache import PrefixCache
from podsim.request import Request
from podsim.swap_space import SwapSpace


class PagedKVCache:
    """Counts blocks of `block_size` tokens; a request holds enough for its context (vLLM).

    With a prefix cache, requests share the blocks of equal prompt beginnings, and blocks that
    nobody uses any more are as good as free.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefixes: PrefixCache | None = None,
        swap: SwapSpace | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefixes = prefixes
        self.swap = swap
        self._num_empty = num_blocks

    @property
    def num_free_blocks(self) -> int:
        if self.prefixes is None:
            return self._num_empty
        return self._num_empty + self.prefixes.num_unused_blocks

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    @property
    def capacity(self) -> int:
        """Tokens that fit when one request has all blocks."""
        return self.num_blocks * self.block_size

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def take(self, num_blocks: int, keep_free: int = 0) -> bool:
        """Take free blocks; False, and no change, if that would leave fewer than `keep_free`."""
        if num_blocks > self._num_empty - keep_free:
            if num_blocks > self.num_free_blocks - keep_free:
                return False
            if num_blocks > self._num_empty:
                assert self.prefixes is not None
                self._num_empty += self.prefixes.evict(num_blocks - self._num_empty)
        self._num_empty -= num_blocks
        return True

    def cached_tokens(self, request: Request) -> int:
        """Tokens at the start of a request that the prefix cache, or the swap space, holds."""
        if self.swap is not None:
            return self.swap.tokens_of(request)
        if self.prefixes is None:
            return 0
        num_ids = self.prefixes.match(request.hash_ids, request.num_prompt_tokens)
        return num_ids * self.prefixes.hash_block_size

    def start(self, request: Request, num_tokens: int, keep_free: int) -> bool:
        """Give a request blocks for its first `num_tokens`, the cached ones among them shared.

        False, and no change, if too few are free.
        """
        num_blocks = self.blocks_for(num_tokens)
        if self.prefixes is None:
            if not self.take(num_blocks, keep_free):
                return False
        else:
            found = self.prefixes.match(request.hash_ids, request.num_prompt_tokens)
            shared = list(request.hash_ids[:found])
            new_blocks = num_blocks - found * self.prefixes.blocks_per_id
            if new_blocks > self.num_free_blocks - self.prefixes.num_unused(shared) - keep_free:
                return False
            self.prefixes.pin(shared)
            taken = self.take(new_blocks)
            assert taken
            request.shared_ids = shared
        request.num_blocks = num_blocks
        if self.swap is not None:
            self.swap.take_back(request)
        return True

    def swap_out(self, request: Request, num_tokens: int) -> None:
        """A request that is about to lose its blocks has computed so many tokens."""
        if self.swap is not None:
            self.swap.put(request, num_tokens)

    def keep_prompt(self, request: Request) -> None:
        """Offer the blocks of a computed prompt to later requests."""
        if self.prefixes is not None:
            whole = request.num_prompt_tokens // self.prefixes.hash_block_size
            found = len(request.shared_ids)
            request.shared_ids += self.prefixes.insert(request.hash_ids[found:whole])

    def release(self, request: Request, num_blocks: int) -> None:
        """Take back the blocks of a request, which holds so many; shared ones may live on."""
        if self.prefixes is not None:
            num_blocks -= len(request.shared_ids) * self.prefixes.blocks_per_id
            self.prefixes.unpin(request.shared_ids)
            request.shared_ids = []
        self._num_empty += num_blocks
        request.num_blocks = 0
        assert self.num_free_blocks <= self.num_blocks


def activation_bytes(model: Model, token_budget: int, max_num_seqs: int) -> int:
    """Peak activations of a step: the widest live tensors, and float32 logits of all requests.

    While the MLP runs, the residual, the normed input and the gate-up output are alive together.
    """
    per_token = (2 * model.hidden_size + 2 * model.intermediate_size) * BYTES_PER_VALUE
    return token_budget * per_token + max_num_seqs * model.num_logits * 4


class KvSizes(NamedTuple):
    """Blocks of a replica's KV cache."""

    gpu_blocks: int
    host_blocks: int = 0
    """Beside those, in host memory."""

    @property
    def num_blocks(self) -> int:
        return self.gpu_blocks + self.host_blocks


def num_blocks_for(deployment: Deployment, model: Model, gpu: Gpu) -> int:
    """KV blocks a replica has: see `kv_sizes`."""
    return kv_sizes(deployment, model, gpu).num_blocks


def kv_sizes(deployment: Deployment, model: Model, gpu: Gpu) -> KvSizes:
    """KV blocks a replica has: given, or the memory left beside weights and activations.

    A block is spread over the GPUs of a replica, each of which holds its heads' part of it.
    Raises InputError if the model, or a GPU's share of it, does not fit.
    """
    share = model.shard(deployment.tensor_parallel_size)
    if deployment.kv_offload != "none":
        return _offloaded_sizes(deployment, share, gpu)
    if deployment.num_blocks is not None:
        return KvSizes(deployment.num_blocks)
    block_bytes = share.kv_bytes_per_token * deployment.block_size
    if deployment.kv == "vattention":
        block_bytes = page_groups_for(deployment, model).block_bytes
    return KvSizes(
        _free_bytes(deployment, share, gpu, share.weight_bytes, block_bytes) // block_bytes
    )


def _free_bytes(deployment: Deployment, share: Model, gpu: Gpu, weights: int, least: int) -> int:
    """What weights and activations leave of a GPU; InputError if that is less than `least`."""
    usable = int(gpu.memory * deployment.gpu_memory_utilization)
    taken = weights + activation_bytes(share, deployment.token_budget, deployment.max_num_seqs)
    if usable - taken < least:
        raise InputError(
            f"{share.name} needs {taken / 1e9:.1f} GB of a GPU before any KV cache, but {gpu.name} "
            f"offers {usable / 1e9:.1f} GB at gpu_memory_utilization "
            f"{deployment.gpu_memory_utilization}; --tp shares a model among GPUs"
        )
    return usable - taken


def _offloaded_sizes(deployment: Deployment, share: Model, gpu: Gpu) -> KvSizes:
    """With a tier in host memory. Of its tokens, the GPU needs room for two layers' K and V."""
    layers, weights = share.layer_weight_bytes * share.num_layers, share.weight_bytes
    host = int(deployment.host_memory * 1e9)
    if deployment.offload_schedule == "column":
        host -= layers
        weights -= layers - 2 * share.layer_weight_bytes
    token_bytes = share.kv_bytes_per_token
    if deployment.kv_offload == "kvpr" and share.recomputing_pays:
        token_bytes += share.num_layers * share.activation_bytes_per_token
    host_blocks = host // (token_bytes * deployment.block_size)
    if host_blocks < 1:
        raise InputError(
            f"host_memory is {deployment.host_memory:g} GB: too little for a KV block"
            + (" beside the weights" if deployment.offload_schedule == "column" else "")
        )
    block_bytes = share.kv_bytes_per_token * deployment.block_size
    buffers = 2 * block_bytes // share.num_layers  # a block of the host's, in two layers
    if deployment.num_blocks is not None:
        gpu_blocks = deployment.num_blocks
    else:
        free = _free_bytes(deployment, share, gpu, weights, buffers)
        host_blocks = min(host_blocks, free // buffers)
        gpu_blocks = (free - host_blocks * buffers) // block_bytes
    return KvSizes(0 if deployment.kv_on_host else gpu_blocks, host_blocks)


def page_groups_for(deployment: Deployment, model: Model) -> PageGroups:
    """How vAttention cuts the KV cache of a GPU of a deployment."""
    share = model.shard(deployment.tensor_parallel_size)
    return PageGroups.of(share, PAGE_GROUPS[deployment.page_group], deployment.kv_tensors)
