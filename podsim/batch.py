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
    num_prefill_tokens: int
    num_decodes: int
    decode_context_sum: int
    decode_context_max: int
    num_sampled: int
    """Tokens that come out of the step: rows of the LM head."""

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
            num_prefill_tokens=sum(num_tokens for num_tokens, _ in prefills),
            num_decodes=len(decode_contexts),
            decode_context_sum=sum(decode_contexts),
            decode_context_max=max(decode_contexts, default=0),
            num_sampled=len(prefills) + len(decode_contexts),
        )

    @classmethod
    def of_decodes(cls, num_decodes: int, context_sum: int, context_max: int) -> BatchShape:
        """The shape of a batch of decodes alone."""
        return cls((), 0, num_decodes, context_sum, context_max, num_decodes)


class Chunk(NamedTuple):
    """Tokens of one prompt computed in a step."""

    request: Request
    num_tokens: int


@dataclass(slots=True)
class Batch:
    """The work of a step: chunks of prompts, and one token of each decoding request, or of none."""

    prefills: list[Chunk] = field(default_factory=list)
    num_decodes: int = 0
    """All members of the scheduler's group of decodes, or 0."""
    decode_context_sum: int = 0
    decode_context_max: int = 0
    preempted: list[tuple[Request, bool]] = field(default_factory=list)
    """Requests that lost their blocks when this batch was built, and whether they decoded."""

    def __bool__(self) -> bool:
        return bool(self.prefills or self.num_decodes)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.prefills) + self.num_decodes

    def shape(self) -> BatchShape:
        """The lengths of this batch; call it before `Scheduler.complete` moves the counters."""
        if not self.prefills:
            n = self.num_decodes
            return BatchShape((), 0, n, self.decode_context_sum, self.decode_context_max, n)
        prefills = []
        num_prefill_tokens = 0
        num_sampled = self.num_decodes
        for request, num_tokens in self.prefills:
            num_prefill_tokens += num_tokens
            prefills.append(PrefillShape(num_tokens, request.num_computed_tokens + num_tokens))
            num_sampled += num_tokens == request.num_uncomputed_tokens
        return BatchShape(
            tuple(prefills),
            num_prefill_tokens,
            self.num_decodes,
            self.decode_context_sum,
            self.decode_context_max,
            num_sampled,
        )
