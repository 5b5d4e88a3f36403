"""The block of memory, on the host and on the device, by which a step's inputs reach its graph.

    token_ids, positions, slots  [max_tokens] int32: each token, and where its k and v go
    sample_rows                  [max_requests] int32: the tokens whose successor comes out
    the lists of the attention plan
    the block table of a paged KV cache, as far as its rows are in use

Padding tokens write to a KV slot, or block, that no request has.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from numpy.typing import NDArray

from podsim.block_tables import BlockTable
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
        self._prepared_lists = np.zeros_like(self._host_parts[-1])
        self._prepared: tuple[CapturedPlan, Lengths] | None = None
        self.table_seconds = 0.0

    def fill(
        self, step: StepInputs, plan: CapturedPlan, num_tokens: int, padding_slot: int
    ) -> None:
        """Put a step into the host's block, padded to `num_tokens`; padding goes to this slot."""
        token_ids, positions, slots, sample_rows, lists = self._host_parts
        n, m = len(step.token_ids), len(step.sample_rows)
        token_ids[:n], token_ids[n:num_tokens] = step.token_ids, 0
        positions[:n], positions[n:num_tokens] = step.positions, 0
        slots[:n], slots[n:num_tokens] = self.slots_of(step), padding_slot
        sample_rows[:m], sample_rows[m:] = step.sample_rows, 0
        if self._prepared == (plan, step.lengths):
            lists[:] = self._prepared_lists
        else:
            _write(lists, plan, step.lengths)

    def prepare(self, plan: CapturedPlan, lengths: Lengths) -> None:
        """Make the lists of a step that may be filled in next, while another one is computed.

        Apart from the host's block, which the GPU may still be reading.
        """
        self._prepared = None
        _write(self._prepared_lists, plan, lengths)
        self._prepared = plan, lengths

    def slots_of(self, step: StepInputs) -> NDArray[np.int32]:
        """Where k and v of each token go, after the step's new blocks are in the table.

        In a paged cache the slots of one row each that begin at every row (`Llama._written`): there
        a token is at its position in the slot that begins so many rows before its own.
        """
        if self._table is None:
            return step.slots
        started = time.perf_counter()
        self._table.enter(step.new_blocks)
        slots = self._table.rows(step.slots, step.positions) - step.positions
        rows_in_use = int(step.slots.max()) + 1
        self._copied = self._before_table + rows_in_use * self._table.entries.shape[1]
        self.table_seconds = time.perf_counter() - started
        return slots

    def copy(self) -> None:
        """Queue the copy of what a step reads to the device; all of it where nobody fills."""
        used = self._copied
        self.device[:used].copy_(self.host[:used], non_blocking=True)


def _write(lists: NDArray[np.int32], plan: CapturedPlan, lengths: Lengths) -> None:
    chunks = [PrefillChunk(*chunk) for chunk in lengths.chunks]
    plan.write(lists, chunks, [Decode(*decode) for decode in lengths.decodes])
