"""Model shapes: everything the cost of a forward pass and the size of the KV cache depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from podsim.errors import InputError

BYTES_PER_VALUE = 2  # bf16 weights, activations and KV cache


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A Llama-family decoder: RMSNorm, grouped-query attention, RoPE, SwiGLU, separate LM head."""

    name: str
    num_layers: int
    hidden_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_model_len: int
    """Longest context the model was trained for, in tokens."""

    @property
    def qkv_size(self) -> int:
        return (self.num_q_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def num_parameters(self) -> int:
        attention = self.hidden_size * (self.qkv_size + self.num_q_heads * self.head_dim)
        mlp = 3 * self.hidden_size * self.intermediate_size
        norms = 2 * self.hidden_size
        embedding_and_head = 2 * self.vocab_size * self.hidden_size
        return self.num_layers * (attention + mlp + norms) + embedding_and_head + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * BYTES_PER_VALUE

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * BYTES_PER_VALUE

    @property
    def shape(self) -> dict[str, int]:
        """What a profile is measured for: models of one shape (Llama 3 and 3.1) share a profile."""
        fields = asdict(self)
        return {k: v for k, v in fields.items() if k not in ("name", "max_model_len")}


_LLAMA_3_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_q_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}

MODELS = {
    model.name: model
    for model in (
        Model(name="llama-3-8b", max_model_len=8192, **_LLAMA_3_8B),
        Model(name="llama-3.1-8b", max_model_len=131072, **_LLAMA_3_8B),
        Model(
            name="llama-2-7b",
            num_layers=32,
            hidden_size=4096,
            num_q_heads=32,
            num_kv_heads=32,
            head_dim=128,
            intermediate_size=11008,
            vocab_size=32000,
            max_model_len=4096,
        ),
        Model(
            name="yi-6b",
            num_layers=32,
            hidden_size=4096,
            num_q_heads=32,
            num_kv_heads=4,
            head_dim=128,
            intermediate_size=11008,
            vocab_size=64000,
            max_model_len=4096,
        ),
    )
}


def model_named(name: str) -> Model:
    """The model of this name, or of a Hugging Face config.json; InputError if there is none."""
    if name.endswith(".json"):
        from podsim.model_config import read_model_config  # which needs Model

        return read_model_config(Path(name))
    if name not in MODELS:
        known = ", ".join(sorted(MODELS))
        raise InputError(f"unknown model '{name}'; known models: {known}, or a config.json")
    return MODELS[name]
