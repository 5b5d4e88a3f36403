"""Random weights of a Llama, and one GPU's part of them under tensor parallelism.

The split is Megatron-LM's (arXiv 1909.08053, section 3): QKV and gate-up by their rows (outputs),
the output projection and down by their columns (inputs), so that two all-reduces a layer add up
what the GPUs have; embedding and LM head by the vocabulary. `Model.shard` has the sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from podsim.model import Model


@dataclass(frozen=True, slots=True)
class ModelPart:
    """The part of a whole model that is GPU `rank`'s, of `size`."""

    model: Model
    rank: int = 0
    size: int = 1

    @property
    def share(self) -> Model:
        """The sizes of the part."""
        return self.model.shard(self.size)

    def qkv(self, weight: torch.Tensor) -> torch.Tensor:
        """[query and KV heads, hidden] to those of this GPU; with more GPUs than KV heads, each
        head is on several.
        """
        whole, share = self.model, self.share
        heads = (whole.num_q_heads, whole.num_kv_heads, whole.num_kv_heads)
        own = (share.num_q_heads, share.num_kv_heads, share.num_kv_heads)
        parts = []
        for matrix, count, kept in zip(
            weight.split([n * whole.head_dim for n in heads]), heads, own, strict=True
        ):
            first = self.rank * count // self.size
            parts.append(matrix[first * whole.head_dim : (first + kept) * whole.head_dim])
        return self._kept(weight, *parts)

    def gate_up(self, weight: torch.Tensor) -> torch.Tensor:
        """[gate and up, hidden] to this GPU's rows of each."""
        gate, up = (matrix.chunk(self.size)[self.rank] for matrix in weight.chunk(2))
        return self._kept(weight, gate, up)

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """[hidden, heads or intermediate] to this GPU's columns."""
        return self._kept(weight, weight.chunk(self.size, dim=1)[self.rank])

    def vocabulary(self, weight: torch.Tensor, num_zeros: int = 0) -> torch.Tensor:
        """[vocabulary, hidden] to this GPU's tokens, zeros for those that only pad the vocabulary,
        and `num_zeros` rows of zeros behind them.
        """
        if self.size == 1:
            return weight
        count = self.share.vocab_size
        own = weight[self.rank * count : (self.rank + 1) * count]
        return torch.cat([own, own.new_zeros(count + num_zeros - len(own), weight.shape[1])])

    def embedding_rows(self, device: torch.device) -> torch.Tensor:
        """[vocabulary] int32: where a token is in this GPU's embedding; one that is another GPU's
        is at the row of zeros behind it.
        """
        count = self.share.vocab_size
        rows = torch.arange(self.model.vocab_size, dtype=torch.int32, device=device)
        rows -= self.rank * count
        rows[(rows < 0) | (rows >= count)] = count
        return rows

    def _kept(self, weight: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        """Parts in memory of their own, so that the whole matrix is given back."""
        return weight if self.size == 1 else torch.cat(parts)


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Of one decoder layer; matrices as [out, in]."""

    attention_norm: torch.Tensor
    qkv: torch.Tensor
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Weights:
    embedding: torch.Tensor
    """[vocab, hidden]"""
    layers: Sequence[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor
    """[vocab, hidden]"""


def random_weights(
    model: Model,
    seed: int,
    device: str | torch.device,
    dtype: torch.dtype = torch.bfloat16,
    part: ModelPart | None = None,
) -> Weights:
    """Normal weights that keep the activations near unit size through every layer.

    With `part`, of the same whole model only these; the embedding then has a row of zeros behind
    its tokens.
    """
    part = part or ModelPart(model)
    generator = torch.Generator(device).manual_seed(seed)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(rows, columns, device=device, dtype=dtype)
        return weight.normal_(std=columns**-0.5, generator=generator)

    def norm() -> torch.Tensor:
        return torch.empty(model.hidden_size, device=device, dtype=dtype).uniform_(
            0.5, 1.5, generator=generator
        )

    hidden, inter = model.hidden_size, model.intermediate_size
    layers = [
        LayerWeights(
            attention_norm=norm(),
            qkv=part.qkv(matrix(model.qkv_size, hidden)),
            output=part.columns(matrix(hidden, model.num_q_heads * model.head_dim)),
            mlp_norm=norm(),
            gate_up=part.gate_up(matrix(2 * inter, hidden)),
            down=part.columns(matrix(hidden, inter)),
        )
        for _ in range(model.num_layers)
    ]
    embedding = part.vocabulary(matrix(model.vocab_size, hidden), num_zeros=1) * hidden**0.5
    return Weights(embedding, layers, norm(), part.vocabulary(matrix(model.vocab_size, hidden)))
