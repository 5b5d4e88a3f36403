"""Models from a Hugging Face config.json: the same numbers, or a clear refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from podsim.errors import InputError
from podsim.model import model_named

LLAMA_3_8B: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
"""meta-llama/Meta-Llama-3-8B/config.json."""


def written(folder: Path, **changes: object) -> Path:
    """A config.json; keys whose change is None are left out."""
    content = {k: v for k, v in (LLAMA_3_8B | changes).items() if k not in changes or v is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder / "config.json"


def test_a_config_is_the_model_it_describes(tmp_path: Path) -> None:
    model = model_named(str(written(tmp_path / "Meta-Llama-3-8B")))
    assert model.shape == model_named("llama-3-8b").shape
    assert (model.name, model.max_model_len) == ("Meta-Llama-3-8B", 8192)


def test_what_is_left_out_has_the_meaning_that_it_has_there(tmp_path: Path) -> None:
    model = model_named(str(written(tmp_path / "a", num_key_value_heads=None)))
    assert (model.num_kv_heads, model.head_dim) == (32, 128)
    nemo = written(tmp_path / "b", hidden_size=5120, head_dim=128, model_type="mistral")
    assert model_named(str(nemo)).head_dim == 128
    other_name = nemo.rename(nemo.parent / "nemo.json")
    assert model_named(str(other_name)).name == "nemo"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type is 'mixtral'; podsim's layers are those of: llama"),
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"attention_bias": True}, "attention_bias is true, but in podsim the linear layers have"),
        ({"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
        (
            {"sliding_window": 4096},
            "sliding_window is 4096, but in podsim attention sees",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set, but in podsim weights"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"hidden_size": None}, "hidden_size is missing, expected a whole number over 0"),
        ({"num_hidden_layers": "32"}, "num_hidden_layers is '32', expected a whole number"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_key_value_heads": 5}, "expected a multiple of num_key_value_heads"),
        ({"head_dim": 96}, "head_dim is 96; there are kernels for 64 and 128"),
    ],
)
def test_a_model_of_other_layers_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = written(tmp_path / "model", **changes)
    with pytest.raises(InputError) as error:
        model_named(str(path))
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_what_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"not JSON|not a model's config"):
        model_named(str(path))
    path.unlink()
    with pytest.raises(InputError, match=f"{path}: No such file"):
        model_named(str(path))


def podsim(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podsim", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_simulate_takes_the_shipped_profile_of_that_shape(tmp_path: Path) -> None:
    config = str(written(tmp_path / "Meta-Llama-3-8B"))
    options = ("azure-conv-like", "--requests", "50", "--json")
    ours, theirs = (
        json.loads(podsim("simulate", *options, "--model", model).stdout)
        for model in ("llama-3-8b", config)
    )
    assert theirs["mean_ttft_ms"] == ours["mean_ttft_ms"]
    deeper = str(written(tmp_path / "deeper", num_hidden_layers=33))
    run = podsim("simulate", *options, "--model", deeper)
    assert run.returncode == 2
    assert "no shipped profile of deeper on h200" in run.stderr


def test_profile_plans_it(tmp_path: Path) -> None:
    config = str(written(tmp_path / "small", num_hidden_layers=4))
    plan = json.loads(podsim("profile", "--model", config, "--dry-run", "--json").stdout)
    assert plan["model"] == "small"
    assert plan["kinds"]["attention"]["rows"] > 1000
