"""The block of memory, on the host and on the device, by which a step's inputs reach its graph.

    token_ids, positions, slots  [max_tokens] int32: each token, and where its k and v go
    sample_rows                  [max_requests] int32: the tokens whose successor comes out
    the lists of the attention plan
    the block table of a paged KV cache, as far as its rows are in use

Padding tokens write to a KV slot, or block, that no request has.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from podsim.block_tables import BlockTable, NewBlocks
from podsim.graph_sizes import graph_size
from podsim.kernels.plan import CapturedPlan, Decode, PrefillChunk, Room
from podsim.step_inputs import Lengths, StepInputs
from podsim.tensor_parallel import Group


class StepBuffers:
    """The block of device memory that a step's inputs are copied to, and its twin on the host.

    `page_size` and `table_shape` (slots, blocks a slot) are those of a paged KV cache. The twin of
    all ranks of a `group` is one.
    """

    def __init__(
        self,
        max_tokens: int,
        max_requests: int,
        room: Room,
        device: torch.device,
        page_size: int = 0,
        table_shape: tuple[int, int] = (0, 0),
        group: Group | None = None,
    ) -> None:
        sizes = [*[graph_size(max_tokens)] * 3, graph_size(max_requests), room.num_ints]
        self._before_table = sum(sizes)
        sizes.append(table_shape[0] * table_shape[1])
        self._copied = sum(sizes)
        on_gpu = device.type == "cuda"
        if group is None:
            self.host = torch.zeros(sum(sizes), dtype=torch.int32, pin_memory=on_gpu)
        else:
            self.host = group.shared_block(sum(sizes))
        self.device = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        *parts, table = self.device.split(sizes)
        self.token_ids, self.positions, self.slots, self.sample_rows, self.lists = parts
        self.block_table = table.view(table_shape) if page_size else None
        *self._host_parts, entries = (part.numpy() for part in self.host.split(sizes))
        self._table = BlockTable(entries.reshape(table_shape), page_size) if page_size else None
        self._prepared: tuple[CapturedPlan, Lengths] | None = None
        """What these are of:"""
        self._positions, self._slots = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self._lists = np.zeros_like(self._host_parts[-1])
        self.table_seconds = 0.0

    def fill(
        self, step: StepInputs, plan: CapturedPlan, num_tokens: int, padding_slot: int
    ) -> None:
        """Put a step into the host's block, padded to `num_tokens`; padding goes to this slot."""
        token_ids, positions, slots, sample_rows, lists = self._host_parts
        n, m = len(step.token_ids), len(step.sample_rows)
        if self._prepared != (plan, step.lengths):
            self.prepare(plan, step.lengths)
        token_ids[:n], token_ids[n:num_tokens] = step.token_ids, 0
        positions[:n], positions[n:num_tokens] = self._positions, 0
        slots[:n] = self.slots_of(self._slots, self._positions, step.new_blocks)
        slots[n:num_tokens] = padding_slot
        sample_rows[:m], sample_rows[m:] = step.sample_rows, 0
        lists[:] = self._lists

    def prepare(self, plan: CapturedPlan, lengths: Lengths) -> None:
        """Make what follows from a step's lengths, while another is computed if it is foreseen.

        Apart from the host's block, which the GPU may still be reading.
        """
        self._prepared = None
        self._positions, self._slots = lengths.positions, lengths.slots
        chunks = [PrefillChunk(*chunk) for chunk in lengths.chunks]
        plan.write(self._lists, chunks, [Decode(*decode) for decode in lengths.decodes])
        self._prepared = plan, lengths

    def slots_of(
        self,
        slots: NDArray[np.int32],
        positions: NDArray[np.int32],
        new_blocks: Sequence[NewBlocks],
    ) -> NDArray[np.int32]:
        """Where k and v of tokens go, after the step's new blocks are in the table.

        In a paged cache the slots of one row each that begin at every row (`Llama._written`): there
        a token is at its position in the slot that begins so many rows before its own.
        """
        if self._table is None:
            return slots
        started = time.perf_counter()
        self._table.enter(new_blocks)
        found = self._table.rows(slots, positions) - positions
        rows_in_use = int(slots.max()) + 1
        self._copied = self._before_table + rows_in_use * self._table.entries.shape[1]
        self.table_seconds = time.perf_counter() - started
        return found

    def copy(self) -> None:
        """Queue the copy of what a step reads to the device; all of it where nobody fills."""
        used = self._copied
        self.device[:used].copy_(self.host[:used], non_blocking=True)
