"""The paged KV cache of a replica: how many blocks there are, and who holds how many."""

from __future__ import annotations

from podsim.config import Deployment
from podsim.errors import InputError
from podsim.hardware import Gpu
from podsim.model import BYTES_PER_VALUE, Model


class PagedKVCache:
    """Counts blocks of `block_size` tokens; a request holds enough for its context (vLLM)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.num_free_blocks = num_blocks

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
        if num_blocks > self.num_free_blocks - keep_free:
            return False
        self.num_free_blocks -= num_blocks
        return True

    def give_back(self, num_blocks: int) -> None:
        self.num_free_blocks += num_blocks
        assert self.num_free_blocks <= self.num_blocks


def activation_bytes(model: Model, token_budget: int, max_num_seqs: int) -> int:
    """Peak activations of a step: the widest live tensors, and float32 logits of all requests.

    While the MLP runs, the residual, the normed input and the gate-up output are alive together.
    """
    per_token = (2 * model.hidden_size + 2 * model.intermediate_size) * BYTES_PER_VALUE
    return token_budget * per_token + max_num_seqs * model.vocab_size * 4


def num_blocks_for(deployment: Deployment, model: Model, gpu: Gpu) -> int:
    """KV blocks a replica has: given, or the memory left beside weights and activations.

    Raises InputError if the model does not fit.
    """
    if deployment.num_blocks is not None:
        return deployment.num_blocks
    usable = int(gpu.memory * deployment.gpu_memory_utilization)
    taken = model.weight_bytes + activation_bytes(
        model, deployment.token_budget, deployment.max_num_seqs
    )
    num_blocks = (usable - taken) // (model.kv_bytes_per_token * deployment.block_size)
    if num_blocks < 1:
        raise InputError(
            f"{model.name} needs {taken / 1e9:.1f} GB before any KV cache, but {gpu.name} offers "
            f"{usable / 1e9:.1f} GB at gpu_memory_utilization {deployment.gpu_memory_utilization}"
        )
    return num_blocks
