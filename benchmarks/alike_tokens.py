"""How alike tokens become as layers go on from each other's activations; needs torch, no GPU.

    python benchmarks/alike_tokens.py

A small Llama of random weights on random tokens. With weights of its own in each layer, from an
embedding, as in an engine; and with one layer's weights again and again, as `podsim profile` runs
them: so it begins again with the embedding as often as a model has layers. Printed is the mean
cosine between the normed activations of two tokens: products of numbers that are alike draw less
power.
"""

from __future__ import annotations

import torch

HIDDEN, INTERMEDIATE, HEAD_DIM, TOKENS = 512, 1792, 64, 256
LAYERS = 32
SHOWN = (1, 8, 32, 100, 320)

Weights = dict[str, torch.Tensor]


def layer_weights() -> Weights:
    shapes = {
        "qkv": (3 * HIDDEN, HIDDEN),
        "output": (HIDDEN, HIDDEN),
        "gate_up": (2 * INTERMEDIATE, HIDDEN),
        "down": (HIDDEN, INTERMEDIATE),
    }
    found = {name: torch.randn(*shape) * shape[1] ** -0.5 for name, shape in shapes.items()}
    return found | {"norm": torch.empty(HIDDEN).uniform_(0.5, 1.5)}


def norm(residual: torch.Tensor, weights: Weights) -> torch.Tensor:
    return torch.nn.functional.rms_norm(residual, (HIDDEN,), weights["norm"], 1e-5)


def layer(residual: torch.Tensor, weights: Weights) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual behind a layer, kept in bfloat16, and the normed activations of its MLP."""
    heads = (norm(residual, weights) @ weights["qkv"].t()).view(TOKENS, 3, -1, HEAD_DIM)
    q, k, v = heads.permute(1, 2, 0, 3)
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = attended.transpose(0, 1).reshape(TOKENS, HIDDEN)
    residual = (residual + rows @ weights["output"].t()).bfloat16().float()
    normed = norm(residual, weights)
    gate, up = (normed @ weights["gate_up"].t()).split(INTERMEDIATE, dim=1)
    activated = torch.nn.functional.silu(gate) * up
    return (residual + activated @ weights["down"].t()).bfloat16().float(), normed


def mean_cosine(rows: torch.Tensor) -> float:
    """Between two different rows."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    together = float((unit @ unit.t()).sum())
    return (together - TOKENS) / (TOKENS * TOKENS - TOKENS)


def main() -> None:
    torch.manual_seed(0)
    same = layer_weights()
    for label, count, weights_of in (
        ("weights of its own in each layer", LAYERS, layer_weights),
        ("one layer's weights again and again", SHOWN[-1], lambda: same),
    ):
        residual = torch.randn(TOKENS, HIDDEN)
        print(label)
        for number in range(1, count + 1):
            residual, normed = layer(residual, weights_of())
            if number in SHOWN:
                print(f"  after {number:3} layers {mean_cosine(normed):6.2f}")


if __name__ == "__main__":
    main()
