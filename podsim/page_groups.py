"""Page-groups: how vAttention cuts the KV cache (arXiv 2405.04437, sections 5 and 6).

Each request has a slot in virtual tensors, long enough for the longest context. Physical memory is
mapped into a slot from its beginning on, one page-group at a time and in every virtual tensor
alike; what one such row of page-groups holds is a KV block here.
"""

from __future__ import annotations

from dataclasses import dataclass

from podsim.errors import InputError
from podsim.model import BYTES_PER_VALUE, Model


@dataclass(frozen=True, slots=True)
class PageGroups:
    """Sizes in bytes and tokens, of one GPU."""

    page_group: int
    num_tensors: int
    """Virtual tensors, in each of which a block has one page-group."""
    token_bytes: int
    """Of one token in one virtual tensor."""

    @classmethod
    def of(cls, share: Model, page_group: int, tensors: str) -> PageGroups:
        """For a model, or a GPU's share of it. InputError if a page-group holds no whole token."""
        token_bytes = share.num_kv_heads * share.head_dim * BYTES_PER_VALUE
        num_tensors = 2 * share.num_layers
        if tensors == "sliced":
            token_bytes, num_tensors = token_bytes * share.num_layers, 2
        if token_bytes > page_group:
            raise InputError(
                f"page_group is {page_group // 1024} KB, but a token of {share.name} needs "
                f"{token_bytes / 1024:g} KB of a {tensors} tensor: take a larger one"
            )
        return cls(page_group, num_tensors, token_bytes)

    @property
    def tokens_per_block(self) -> int:
        """Whole tokens of a page-group."""
        return self.page_group // self.token_bytes

    @property
    def block_bytes(self) -> int:
        """Of a block's page-groups in all virtual tensors: the most that a request wastes."""
        return self.num_tensors * self.page_group
