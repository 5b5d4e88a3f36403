"""Layers with which offloading is measured: shapes of OPT and Llama-2, multi-head attention."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Of one decoder layer."""

    name: str
    hidden_size: int
    num_heads: int
    ffn_size: int
    gated: bool
    """SwiGLU and RMSNorm (Llama); else ReLU and LayerNorm (OPT)."""
    rotary: bool

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def num_outputs(self) -> int:
        """Of the projection to K and V."""
        return 2 * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return 2 * sum(rows * columns for rows, columns in matrix_sizes(self).values())


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("opt-6.7b", 4096, 32, 16384, gated=False, rotary=False),
        LayerShape("opt-13b", 5120, 40, 20480, gated=False, rotary=False),
        LayerShape("llama-2-7b", 4096, 32, 11008, gated=True, rotary=True),
    )
}


def matrix_sizes(shape: LayerShape) -> dict[str, tuple[int, int]]:
    """K and V come last of the first projection's rows."""
    size, ffn = shape.hidden_size, shape.ffn_size
    return {
        "qkv": (3 * size, size),
        "output": (size, size),
        "up": (2 * ffn if shape.gated else ffn, size),
        "down": (size, ffn),
    }
