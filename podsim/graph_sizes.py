"""Sizes of CUDA graphs: the numbers of tokens that an engine pads its steps to.

A captured graph has one size, so an engine captures some and pads each step to the next: multiples
of 8 up to 256, then of 1/32 to 1/16 of the number itself.
"""

from __future__ import annotations

SMALLEST = 8


def graph_size(num_tokens: int) -> int:
    """The smallest size of at least `num_tokens`; 0 for nothing."""
    if num_tokens <= 0:
        return 0
    step = max(SMALLEST, 1 << max((num_tokens - 1).bit_length() - 5, 0))
    return -(-num_tokens // step) * step


def graph_sizes(most: int) -> list[int]:
    """Every size up to that of `most` tokens, from the smallest on."""
    sizes = []
    size = 0
    while size < most:
        size = graph_size(size + 1)
        sizes.append(size)
    return sizes
