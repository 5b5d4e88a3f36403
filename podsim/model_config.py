"""Models from a Hugging Face config.json: those whose layers are the ones that are measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from podsim.errors import InputError
from podsim.model import Model

MODEL_TYPES = ("llama", "mistral")
"""Decoders of RMSNorm, grouped-query attention with RoPE and no bias, and SwiGLU."""
HEAD_DIMS = (64, 128)
"""For which there are attention kernels."""

SAME_MATHS: Mapping[str, tuple[tuple[object, ...], str]] = {
    "hidden_act": (("silu",), "the MLP's kernel is SiLU"),
    "attention_bias": ((False,), "the linear layers have no bias"),
    "mlp_bias": ((False,), "the linear layers have no bias"),
    "sliding_window": ((None,), "attention sees the whole context"),
    "quantization_config": ((None,), "weights are bf16"),
    "tie_word_embeddings": ((False,), "embedding and LM head are separate weights"),
    "partial_rotary_factor": ((None, 1, 1.0), "every dimension of a head is rotated"),
}
"""Keys that change what is computed: their values that do not, which absence counts as, and why."""


def read_model_config(path: Path) -> Model:
    """The model of a config.json, named after its folder (or after the file, if named otherwise).

    Raises InputError, naming file and key, for a file that is missing or broken, a model of another
    kind, or sizes that cannot be.
    """
    content = _load(path)
    _require_same_maths(path, content)
    hidden, heads = _size(path, content, "hidden_size"), _size(path, content, "num_attention_heads")
    kv_heads = _size(path, content, "num_key_value_heads", heads)
    head_dim = _size(path, content, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise InputError(
            f"{path}: num_attention_heads is {heads}, expected a multiple of "
            f"num_key_value_heads ({kv_heads})"
        )
    if head_dim not in HEAD_DIMS:
        raise InputError(f"{path}: head_dim is {head_dim}; there are kernels for 64 and 128")
    return Model(
        name=path.resolve().parent.name if path.name == "config.json" else path.stem,
        num_layers=_size(path, content, "num_hidden_layers"),
        hidden_size=hidden,
        num_q_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_size(path, content, "intermediate_size"),
        vocab_size=_size(path, content, "vocab_size"),
        max_model_len=_size(path, content, "max_position_embeddings"),
    )


def _load(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: not a model's config: expected an object")
    return content


def _require_same_maths(path: Path, content: Mapping[str, object]) -> None:
    kind = content.get("model_type")
    if kind not in MODEL_TYPES:
        known = ", ".join(MODEL_TYPES)
        raise InputError(f"{path}: model_type is {kind!r}; podsim's layers are those of: {known}")
    for key, (same, why) in SAME_MATHS.items():
        value = content.get(key, same[0])
        if value not in same:
            shown = json.dumps(value) if not isinstance(value, dict) else "set"
            raise InputError(f"{path}: {key} is {shown}, but in podsim {why}")


def _size(path: Path, content: Mapping[str, object], key: str, default: int | None = None) -> int:
    value = content.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = "missing" if key not in content else f"{value!r}"
        raise InputError(f"{path}: {key} is {found}, expected a whole number over 0")
    return value
