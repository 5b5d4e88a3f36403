"""A batch: the work of one step, as the scheduler built it and as the latency model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from podsim.request import Request


class PrefillShape(NamedTuple):
    """A chunk of one prompt: `num_tokens` queries at the end of `context_len` keys."""

    num_tokens: int
    context_len: int


class BatchShape(NamedTuple):
    """What the cost of a step depends on. Lengths in tokens; a context includes the new token."""

    prefills: tuple[PrefillShape, ...]
    num_decodes: int
    decode_context_sum: int
    decode_context_max: int
    num_sampled: int
    """Tokens that come out of the step: rows of the LM head."""

    @property
    def num_prefill_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.prefills)

    @property
    def num_tokens(self) -> int:
        return self.num_prefill_tokens + self.num_decodes

    @classmethod
    def of(
        cls, prefills: Sequence[tuple[int, int]] = (), decode_contexts: Sequence[int] = ()
    ) -> BatchShape:
        """The shape of a batch given by its lengths, each chunk the last of its prompt."""
        return cls(
            prefills=tuple(PrefillShape(*chunk) for chunk in prefills),
            num_decodes=len(decode_contexts),
            decode_context_sum=sum(decode_contexts),
            decode_context_max=max(decode_contexts, default=0),
            num_sampled=len(prefills) + len(decode_contexts),
        )


class Chunk(NamedTuple):
    """Tokens of one prompt computed in a step."""

    request: Request
    num_tokens: int


@dataclass(slots=True)
class Batch:
    """The requests a step works on: chunks of prompts, and requests that each decode one token."""

    prefills: list[Chunk] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.prefills or self.decodes)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.prefills) + len(self.decodes)

    def shape(self) -> BatchShape:
        """The lengths of this batch; call it before `Scheduler.complete` moves the counters."""
        prefills = []
        num_sampled = len(self.decodes)
        for request, num_tokens in self.prefills:
            prefills.append(PrefillShape(num_tokens, request.num_computed_tokens + num_tokens))
            num_sampled += num_tokens == request.num_uncomputed_tokens
        contexts = [request.num_computed_tokens + 1 for request in self.decodes]
        return BatchShape(
            prefills=tuple(prefills),
            num_decodes=len(contexts),
            decode_context_sum=sum(contexts),
            decode_context_max=max(contexts, default=0),
            num_sampled=num_sampled,
        )
