"""The engine's forward pass against plain PyTorch in float32, on the GPU or interpreted."""

from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the forward pass needs torch")
pytest.importorskip("triton", reason="the kernels need triton")

from podsim.kernels.config import STRATEGIES  # noqa: E402

from podsim import step_buffers  # noqa: E402
from podsim.batch import Chunk  # noqa: E402
from podsim.errors import InputError  # noqa: E402
from podsim.llama import MAX_CHUNKS, NORM_EPS, ROPE_BASE, Llama  # noqa: E402
from podsim.llama_weights import random_weights  # noqa: E402
from podsim.model import Model  # noqa: E402
from podsim.request import Request  # noqa: E402
from podsim.step_inputs import Lengths, StepInputs  # noqa: E402

# The interpreter of Triton before 3.9 converts arrays in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

MODEL = Model(
    name="tiny",
    num_layers=2,
    hidden_size=128,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=192,
    vocab_size=300,
    max_model_len=128,
)
TOLERANCE = 3e-2  # of bf16, relative, of a row of logits


def norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPS) * weight.float()


def rotate(x):
    """RoPE of [tokens, heads, head_dim] at positions 0, 1, ..."""
    exponents = torch.arange(0, MODEL.head_dim, 2).to(x.device) / MODEL.head_dim
    angles = torch.arange(len(x)).to(x.device)[:, None, None] * ROPE_BASE**-exponents
    a, b = x.chunk(2, dim=-1)
    return torch.cat(
        [a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1
    )


def reference_logits(weights, token_ids):
    """[tokens, vocab]: of one request, computed at once, in float32."""
    n, group = len(token_ids), MODEL.num_q_heads // MODEL.num_kv_heads
    x = weights.embedding[torch.as_tensor(token_ids).long()].float()
    mask = torch.full((n, n), float("-inf"), device=x.device).triu(1)
    for layer in weights.layers:
        qkv = (norm(x, layer.attention_norm) @ layer.qkv.float().t()).view(n, -1, MODEL.head_dim)
        q, k, v = qkv.split([MODEL.num_q_heads, MODEL.num_kv_heads, MODEL.num_kv_heads], dim=1)
        q, k = rotate(q), rotate(k).repeat_interleave(group, 1)
        scores = torch.einsum("thd,shd->hts", q, k) / MODEL.head_dim**0.5 + mask
        out = torch.einsum("hts,shd->thd", scores.softmax(-1), v.repeat_interleave(group, 1))
        x = x + out.reshape(n, -1) @ layer.output.float().t()
        gate, up = (norm(x, layer.mlp_norm) @ layer.gate_up.float().t()).chunk(2, dim=-1)
        x = x + (torch.nn.functional.silu(gate) * up) @ layer.down.float().t()
    return norm(x, weights.norm) @ weights.lm_head.float().t()


class Served:
    """Requests whose tokens are known, computed step by step."""

    def __init__(self, lengths, device, attention="serial", **sizes):
        self.weights = random_weights(MODEL, 0, device)
        defaults = {"max_tokens": 96, "max_requests": 4, "max_len": 128, "num_sms": 4}
        self.llama = Llama(MODEL, self.weights, attention=attention, **(defaults | sizes))
        rng = np.random.default_rng(0)
        self.requests = [Request(i, 0.0, n, 10) for i, n in enumerate(lengths)]
        self.tokens = {r: rng.integers(300, size=120).astype(np.int32) for r in self.requests}
        # Slots are not in the order of the requests.
        self.slot = {r: len(lengths) - 1 - i for i, r in enumerate(self.requests)}

    def step(self, chunks=(), decodes=(), waiting=()):
        """Chunks as (request, num_tokens), decodes as requests; then the counters move."""
        waiting = [(self.requests[i], self.slot[self.requests[i]]) for i in waiting]
        chunks = [Chunk(self.requests[i], n) for i, n in chunks]
        decodes = [self.requests[i] for i in decodes]
        latest = {r: self.tokens[r][r.num_computed_tokens] for r in decodes}
        inputs = StepInputs.of(chunks, decodes, self.tokens, latest, self.slot)
        foresee = partial(Lengths.after, chunks, decodes, self.slot, waiting, 96)
        sampled = self.llama.run(inputs, foresee).copy()
        logits = self.llama.logits[: len(sampled)].float()
        done = [r for r, n in chunks if n == r.num_uncomputed_tokens] + decodes
        for request, n in chunks:
            request.num_computed_tokens += n
        for request in decodes:
            request.num_computed_tokens += 1
        assert len(sampled) == len(done)
        for request, token, row in zip(done, sampled.tolist(), logits, strict=True):
            known = self.tokens[request][: request.num_computed_tokens]
            expected = reference_logits(self.weights, known)[-1]
            assert (row - expected).norm() / expected.norm() < TOLERANCE
            assert expected.max() - expected[token] < TOLERANCE * expected.norm()
            request.num_emitted_tokens += 1


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_logits_of_prefill_chunks_decodes_and_mixed_batches(strategy, device):
    served = Served([50, 20, 61], device, strategy)
    served.step(chunks=[(0, 37)])  # a part of a prompt: nothing comes out
    served.step(chunks=[(0, 13), (1, 20)])  # the rest of it, and a whole one
    served.step(decodes=[0, 1])
    served.step(chunks=[(2, 30)], decodes=[0, 1])  # mixed
    served.step(chunks=[(2, 31)], decodes=[1, 0])
    served.step(decodes=[2, 0, 1])


@pytest.fixture
def made(monkeypatch):
    """The lengths of which lists were made, in order."""
    made = []
    prepare = step_buffers.StepBuffers.prepare

    def watched(inputs, plan, lengths):
        made.append(lengths)
        prepare(inputs, plan, lengths)

    monkeypatch.setattr(step_buffers.StepBuffers, "prepare", watched)
    return made


def test_lists_that_were_foreseen_are_not_made_again(device, made):
    served = Served([50, 20, 10], device, "pod")
    served.step(chunks=[(0, 30)])
    assert len(made) == 2, "its own, and those of the next step"
    served.step(chunks=[(0, 20)])
    served.step(decodes=[0])
    assert len(made) == 4, "only the next step's"
    served.step(chunks=[(1, 20)], decodes=[0], waiting=[2])  # the second is let in unforeseen
    assert len(made) == 6
    served.step(chunks=[(2, 10)], decodes=[0, 1])  # and the third was
    assert len(made) == 7


def test_lists_of_a_slot_that_was_not_foreseen_are_made_again(device, made):
    """The lengths are as foreseen: only the slot that a request takes is another."""
    served = Served([50, 20], device, "pod")
    served.slot = {served.requests[0]: 1, served.requests[1]: 0}
    served.step(chunks=[(0, 50)], waiting=[1])
    served.slot[served.requests[1]] = 2
    served.step(chunks=[(1, 20)], decodes=[0])
    foreseen, own = made[1:3]
    assert foreseen.chunks == [(20, 20, 0)]
    assert own.chunks == [(20, 20, 2)]
    assert foreseen.decodes == own.decodes
    served.step(decodes=[0, 1])
    assert len(made) == 5, "of this step they were foreseen"


def test_what_the_gpu_may_still_be_reading_stays_while_the_next_step_is_prepared(
    device, monkeypatch
):
    prepared = []
    prepare = step_buffers.StepBuffers.prepare

    def watched(inputs, plan, lengths):
        before = inputs.host.clone()
        prepare(inputs, plan, lengths)
        assert torch.equal(inputs.host, before)
        prepared.append(lengths)

    monkeypatch.setattr(step_buffers.StepBuffers, "prepare", watched)
    served = Served([50, 20], device, "pod")
    served.step(chunks=[(0, 30)])
    served.step(chunks=[(0, 20)], waiting=[1])
    served.step(chunks=[(1, 20)], decodes=[0])
    served.step(decodes=[0, 1])
    assert len(prepared) == 5, "the first step is not foreseen, but made in the same way"


def test_graphs_give_what_launches_give(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    for strategy in STRATEGIES:
        served = Served([50, 20, 61], device, strategy)
        served.llama.capture()
        served.step(chunks=[(0, 37)])
        served.step(chunks=[(0, 13), (1, 20)])
        served.step(chunks=[(2, 30)], decodes=[0, 1])
        served.step(chunks=[(2, 31)], decodes=[1, 0])
        served.step(decodes=[2, 0, 1])


def test_a_step_of_more_chunks_than_a_graph_has_room_for(device):
    many = MAX_CHUNKS + 3
    served = Served([3] * many, device, max_requests=many)
    served.step(chunks=[(i, 3) for i in range(many)])
    served.step(decodes=list(range(many)))


def test_a_step_that_is_too_large_is_refused(device):
    served = Served([100], device)
    with pytest.raises(InputError, match=r"97 tokens.* at most 96"):
        served.step(chunks=[(0, 97)])
