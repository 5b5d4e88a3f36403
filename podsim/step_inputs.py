"""What a forward pass needs of a batch, as arrays on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from podsim.batch import BatchShape, Chunk
from podsim.block_tables import NewBlocks
from podsim.request import Request


class Lengths(NamedTuple):
    """What the attention of a step is planned by."""

    chunks: Sequence[tuple[int, int, int]]
    """num_tokens, context_len and slot of each prefill chunk."""
    decodes: Sequence[tuple[int, int]]
    """context_len and slot of each decode."""

    @property
    def num_tokens(self) -> int:
        return sum(num_tokens for num_tokens, _, _ in self.chunks) + len(self.decodes)

    @property
    def positions(self) -> NDArray[np.int32]:
        """[num_tokens]: of each token, in its request."""
        chunks = [np.arange(context - n, context, dtype=np.int32) for n, context, _ in self.chunks]
        return np.concatenate([*chunks, np.array([c - 1 for c, _ in self.decodes], np.int32)])

    @property
    def slots(self) -> NDArray[np.int32]:
        """[num_tokens]: the KV slot of each token."""
        chunks = [np.full(n, slot, np.int32) for n, _, slot in self.chunks]
        return np.concatenate([*chunks, np.array([slot for _, slot in self.decodes], np.int32)])

    @classmethod
    def after(
        cls,
        chunks: Sequence[Chunk],
        decodes: Sequence[Request],
        slot: Mapping[Request, int],
        waiting: Iterable[tuple[Request, int]],
        token_budget: int,
    ) -> Lengths:
        """Of the step after one of these, which is not computed yet.

        All decodes, then the prompts under way, then those that wait, each with the slot it would
        have, while there is room in the budget. What the scheduler decides may differ.
        """
        on = [(r, r.num_computed_tokens + 2) for r in decodes if r.num_tokens_to_emit > 1]
        prompts = []
        for request, n in chunks:
            if n < request.num_uncomputed_tokens:
                prompts.append((request, request.num_computed_tokens + n, slot[request]))
            elif request.num_tokens_to_emit > 1:
                on.append((request, request.num_known_tokens + 1))
        on.sort(key=lambda member: member[0].admission)
        prompts += [(request, 0, own) for request, own in waiting]
        room, begun = token_budget - len(on), []
        for request, computed, own in prompts:
            n = min(request.num_known_tokens - computed, room)
            if n <= 0:
                break
            begun.append((n, computed + n, own))
            room -= n
        return cls(begun, [(context, slot[request]) for request, context in on])


Foresee = Callable[[], Lengths | None]
"""What the next step will likely be; None if that is as it was when last asked."""


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The tokens of the prefill chunks, in order, then one of each decode."""

    token_ids: NDArray[np.int32]
    """[num_tokens]"""
    sample_rows: NDArray[np.int32]
    """Tokens whose successors come out: the last of each completed prompt, and all decodes."""
    lengths: Lengths
    new_blocks: Sequence[NewBlocks] = ()
    """Of a paged KV cache: what is to be entered into the block table before the step."""

    @classmethod
    def of(
        cls,
        chunks: Sequence[Chunk],
        decodes: Sequence[Request],
        tokens: Mapping[Request, NDArray[np.int32]],
        latest: Mapping[Request, int],
        slot: Mapping[Request, int],
        new_blocks: Sequence[NewBlocks] = (),
    ) -> StepInputs:
        """Of chunks whose prompt and emitted tokens are given, and of decodes whose latest
        token is; each has a KV slot.
        """
        ids, sample_rows, shapes = [], [], []
        row = 0
        for request, n in chunks:
            first = request.num_computed_tokens
            ids.append(tokens[request][first : first + n])
            shapes.append((n, first + n, slot[request]))
            row += n
            if n == request.num_uncomputed_tokens:
                sample_rows.append(row - 1)
        decoded = np.array([latest[request] for request in decodes], np.int32)
        sample_rows += range(row, row + len(decodes))
        return cls(
            np.concatenate([*ids, decoded]),
            np.array(sample_rows, np.int32),
            Lengths(shapes, [(r.num_computed_tokens + 1, slot[r]) for r in decodes]),
            new_blocks,
        )

    @property
    def shape(self) -> BatchShape:
        """What the step costs depends on it."""
        chunks = [(num_tokens, context_len) for num_tokens, context_len, _ in self.lengths.chunks]
        contexts = [context_len for context_len, _ in self.lengths.decodes]
        return BatchShape.of(chunks, contexts)._replace(num_sampled=len(self.sample_rows))
