"""vAttention's KV cache as torch tensors, and its mapping in time for each step of the engine."""

from __future__ import annotations

import time

import torch

from podsim.batch import Batch
from podsim.config import Deployment
from podsim.decode_group import Decodes
from podsim.errors import InputError
from podsim.mapping_thread import MappingThread
from podsim.memory_view import tensor_at
from podsim.model import Model
from podsim.page_groups import PageGroups
from podsim.vattention import Change, VAttentionCache
from podsim.virtual_memory import Driver, VirtualMemory

READ_KEYS = 128
"""Keys of the largest block of an attention kernel (`podsim.kernels.config`)."""


class VirtualKV:
    """K and V of each layer as [num_slots, max_len, num_kv_heads, head_dim] over virtual memory.

    `max_len` is `min_len` rounded up to whole blocks. Only what is mapped may be read or written:
    the slots of `podsim.vattention`'s changes. The last slot takes the tokens that pad a step; its
    first block is mapped always.
    """

    def __init__(
        self,
        driver: Driver,
        model: Model,
        page_groups: PageGroups,
        *,
        num_slots: int,
        min_len: int,
        num_blocks: int,
        device: torch.device | str = "cuda:0",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        per_slot = -(-min_len // page_groups.tokens_per_block)
        self.model = model
        self.page_groups = page_groups
        self.max_len = per_slot * page_groups.tokens_per_block
        self.num_slots = num_slots
        physical = min(num_blocks, num_slots * per_slot) + 1
        self.memory = VirtualMemory(driver, page_groups, num_slots + 1, per_slot, physical)
        self.caches = self._tensors(torch.device(device), dtype)
        self.memory.apply([Change(num_slots, 0, 1, maps=True)])

    def _tensors(
        self, device: torch.device, dtype: torch.dtype
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """K and V of each layer: tensors of their own, or slices of the two over all layers."""
        model, memory = self.model, self.memory
        row = model.num_kv_heads * model.head_dim
        layers = model.num_layers if self.page_groups.num_tensors == 2 else 1
        shape = (self.num_slots + 1, self.max_len, model.num_kv_heads, model.head_dim)
        strides = (memory.slot_bytes // dtype.itemsize, layers * row, model.head_dim, 1)

        def tensor(number: int, layer: int) -> torch.Tensor:
            if layers == 1:
                address = memory.tensors[number]
            else:
                address = memory.tensors[number % 2] + layer * row * dtype.itemsize
            return tensor_at(address, shape, strides, dtype, device)

        return [(tensor(2 * i, i), tensor(2 * i + 1, i)) for i in range(model.num_layers)]

    def close(self) -> None:
        self.caches = []
        self.memory.close()


class StepMapping:
    """Has the blocks of each step mapped before it is launched; `MappingTime` simulates this.

    Of the latest step, `seconds` is what it waited for mapping, by itself or by the thread, and
    `page_groups` how many it mapped itself.
    """

    def __init__(self, kv: VirtualKV, cache: VAttentionCache, deployment: Deployment) -> None:
        self.seconds = 0.0
        self.page_groups = 0
        self.kv = kv
        self.cache = cache
        self.look_ahead = deployment.look_ahead
        per_slot = kv.max_len // kv.page_groups.tokens_per_block
        if cache.eager_blocks > per_slot:
            raise InputError(
                f"eager_blocks is {cache.eager_blocks}, but a slot of {kv.max_len} tokens has "
                f"{per_slot}"
            )
        self._thread = None
        if deployment.mapping == "overlapped":
            driver = kv.memory.driver
            prepare = getattr(driver, "use_in_this_thread", lambda: None)
            self._thread = MappingThread(kv.memory.apply, prepare)

    def begin(self, batch: Batch, decodes: Decodes) -> None:
        """Call before the batch is computed: its blocks are mapped when this returns."""
        growing = self.cache.slots_growing(batch, decodes)
        changes = self.cache.map_for(batch, decodes)
        blocks = sum(change.num_blocks for change in changes if change.maps)
        self.page_groups = blocks * self.kv.page_groups.num_tensors
        if self._thread is None:
            changes += self.cache.unmap_idle()
        started = time.perf_counter()
        if self._thread is not None:
            self._thread.wait(None if changes else growing)
        self.kv.memory.apply(changes)
        self.seconds = time.perf_counter() - started
        if self._thread is None:
            return
        ahead = self.cache.map_ahead(decodes, self.look_ahead)
        self._thread.submit([*ahead, *self.cache.unmap_idle()])

    def close(self) -> None:
        """End the thread, and unmap what requests had."""
        if self._thread is not None:
            self._thread.close()
        memory = self.kv.memory
        memory.apply(
            Change(slot, 0, memory.mapped_blocks(slot), maps=False)
            for slot in range(self.kv.num_slots)
            if memory.mapped_blocks(slot)
        )


def require_virtual_memory(deployment: Deployment, page_groups: PageGroups) -> None:
    """InputError for what the kernels cannot read.

    They step from slot to slot by whole tokens, and read up to READ_KEYS keys at once, though not
    all of the last are used: those have to be mapped.
    """
    if page_groups.page_group % page_groups.token_bytes:
        raise InputError(
            f"a token of {page_groups.token_bytes} bytes does not divide page_group "
            f"{deployment.page_group}: the engine's kernels need whole tokens"
        )
    if page_groups.tokens_per_block % READ_KEYS:
        raise InputError(
            f"a page_group of {deployment.page_group} holds {page_groups.tokens_per_block} tokens "
            f"of a {deployment.kv_tensors} tensor: the engine's kernels read {READ_KEYS} at once, "
            "of which a multiple must be mapped; take a larger one"
        )
