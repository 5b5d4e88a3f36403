"""Model shapes: everything the cost of a forward pass and the size of the KV cache depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from podsim.errors import InputError

BYTES_PER_VALUE = 2  # bf16 weights, activations and KV cache
VOCAB_PADDING = 64
"""A vocabulary is padded to a multiple of this before it is shared out, as vLLM does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A Llama-family decoder: RMSNorm, grouped-query attention, RoPE, SwiGLU, separate LM head.

    Whole, or one GPU's share of it under tensor parallelism: see `shard`.
    """

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
    tensor_parallel_size: int = 1
    """How many GPUs hold the model together; if more than one, the sizes are those of a share."""

    def shard(self, tensor_parallel_size: int) -> Model:
        """The share of one of so many GPUs: what its kernels see and its memory holds.

        Megatron-LM's split (arXiv 1909.08053, section 3) as vLLM makes it: query and KV heads, the
        MLP's intermediate size and the vocabulary of embedding and LM head are shared out; the
        hidden size and the norms are not. With more GPUs than KV heads, each head is on several.
        Raises InputError if the model cannot be shared out evenly.
        """
        n = tensor_parallel_size
        if n == 1:
            return self
        assert self.tensor_parallel_size == 1, "already a share"
        padded_vocab = -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING
        kv_fits = self.num_kv_heads % n == 0 or n % self.num_kv_heads == 0
        for what, fits in {
            f"{self.num_q_heads} query heads": self.num_q_heads % n == 0,
            f"{self.num_kv_heads} KV heads": kv_fits,
            f"an intermediate size of {self.intermediate_size}": self.intermediate_size % n == 0,
            f"a padded vocabulary of {padded_vocab}": padded_vocab % n == 0,
        }.items():
            if not fits:
                raise InputError(
                    f"tensor_parallel_size is {n}, but {self.name} has {what}: "
                    f"{n} GPUs cannot share them evenly"
                )
        return replace(
            self,
            name=f"{self.name}-tp{n}",
            num_q_heads=self.num_q_heads // n,
            num_kv_heads=max(1, self.num_kv_heads // n),
            intermediate_size=self.intermediate_size // n,
            vocab_size=padded_vocab // n,
            tensor_parallel_size=n,
        )

    @property
    def num_logits(self) -> int:
        """Logits of a token that sampling looks at: the whole vocabulary, gathered."""
        return self.vocab_size * self.tensor_parallel_size

    @property
    def command_options(self) -> str:
        """The options of `podsim profile` that name this model, or this share of one."""
        n = self.tensor_parallel_size
        whole = f"--model {self.name.removesuffix(f'-tp{n}')}"
        return whole if n == 1 else f"{whole} --tp {n}"

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
    def layer_weight_bytes(self) -> int:
        """Of one layer."""
        ends = (2 * self.vocab_size + 1) * self.hidden_size
        return (self.num_parameters - ends) // self.num_layers * BYTES_PER_VALUE

    @property
    def activation_bytes_per_token(self) -> int:
        """What K and V of a token are computed from, in one layer."""
        return self.hidden_size * BYTES_PER_VALUE

    @property
    def recomputing_pays(self) -> bool:
        """Whether these activations are smaller than the K and V (not under most GQA): KVPR."""
        return self.activation_bytes_per_token * self.num_layers < self.kv_bytes_per_token

    @property
    def shape(self) -> dict[str, int]:
        """What a profile is measured for: models of one shape (Llama 3 and 3.1) share a profile.

        A share of a model is another shape than any whole one, by its `tensor_parallel_size`.
        """
        left_out = {"name", "max_model_len"}
        if self.tensor_parallel_size == 1:
            left_out.add("tensor_parallel_size")
        return {k: v for k, v in asdict(self).items() if k not in left_out}


_LLAMA_3_8B = {
    "num_layers": 32,
    "hidden_size": 4096,
    "num_q_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14336,
    "vocab_size": 128256,
}

_LLAMA_3_70B = {
    "num_layers": 80,
    "hidden_size": 8192,
    "num_q_heads": 64,
    "num_kv_heads": 8,
    "head_dim": 128,
    "intermediate_size": 28672,
    "vocab_size": 128256,
}

MODELS = {
    model.name: model
    for model in (
        Model(name="llama-3-8b", max_model_len=8192, **_LLAMA_3_8B),
        Model(name="llama-3.1-8b", max_model_len=131072, **_LLAMA_3_8B),
        Model(name="llama-3-70b", max_model_len=8192, **_LLAMA_3_70B),
        Model(name="llama-3.1-70b", max_model_len=131072, **_LLAMA_3_70B),
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
