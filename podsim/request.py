"""A request: what a user sends, and how far the cluster has come with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and the tokens generated for it.

    The scheduler moves the counters, the replica stamps the times (seconds). While a request
    decodes, its counters and times stand still in `DecodeGroup`, which knows how far it is. A
    preempted request computes again its prompt and the tokens it had already emitted; it never
    emits a token twice.
    """

    request_id: int
    arrival_time: float
    num_prompt_tokens: int
    num_output_tokens: int
    session_id: int = -1
    """Requests of one conversation share it; -1: none."""
    priority: int = 0
    """The lower, the sooner it is let in, where the order is priority (as vLLM has it)."""
    hash_ids: Sequence[int] = ()
    """Of the blocks of the prompt, where a trace has them."""

    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the KV cache."""
    num_emitted_tokens: int = 0
    """Output tokens the user has received."""
    num_blocks: int = 0
    """KV blocks held while its prompt is computed."""
    shared_ids: list[int] = field(default_factory=list)
    """Hash ids of the blocks it holds in the prefix cache."""
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when it was first let in."""
    num_preemptions: int = 0
    admission: int = -1
    """Counts up with each admission of the replica: the order in which requests lose blocks."""

    replica: int = -1
    scheduled_time: float = -1.0
    """Start of the first step that worked on this request; negative before."""
    first_token_time: float = -1.0
    last_token_time: float = -1.0
    finish_time: float = -1.0

    @property
    def num_known_tokens(self) -> int:
        """Prompt tokens and emitted tokens: what must be in the KV cache before the next token."""
        return self.num_prompt_tokens + self.num_emitted_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to compute before the next token comes out."""
        return self.num_prompt_tokens + self.num_emitted_tokens - self.num_computed_tokens

    @property
    def num_tokens_to_emit(self) -> int:
        """Output tokens the user has not received."""
        return self.num_output_tokens - self.num_emitted_tokens

    @property
    def is_finished(self) -> bool:
        return self.num_emitted_tokens == self.num_output_tokens
