"""The engine's forward pass shared by two processes, on the CPU with gloo, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the forward pass needs torch")
pytest.importorskip("triton", reason="the kernels need triton")

from podsim.errors import InputError  # noqa: E402
from podsim.llama_weights import ModelPart, random_weights  # noqa: E402
from podsim.ranks import Ranks  # noqa: E402
from tests import tensor_parallel_ranks  # noqa: E402
from tests.test_kernels_llama import MODEL, TOLERANCE  # noqa: E402

pytestmark = [
    # The interpreter of Triton before 3.9 converts arrays in a way that NumPy deprecates.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="benchmarks/same_logits.py does it there"),
]


NUM_BLOCKS = 12
"""Of 16 tokens: all requests of the trace fit, and none is preempted."""


@pytest.fixture(scope="module")
def alone():
    return tensor_parallel_ranks.tiny_llama(torch.bfloat16)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    meeting = (tmp_path_factory.mktemp("ranks") / "meeting").as_uri()
    with Ranks(tensor_parallel_ranks.serve_questions, 2, (meeting,)) as ranks:
        yield ranks


def test_logits_are_those_of_one_process(alone, shared):
    """Each step is compared with the float32 reference, too, in both."""
    question = tensor_parallel_ranks.logits_of_steps
    of_one, of_two = question(alone), shared.ask(question)
    assert [len(rows) for rows in of_one] == [0, 2, 2, 3, 3]
    assert [len(rows) for rows in of_two] == [0, 2, 2, 3, 3]
    for one, two in zip(of_one, of_two, strict=True):
        assert one.shape == two.shape
        assert (one - two).norm() <= TOLERANCE * one.norm()


def test_a_step_of_more_chunks_than_a_graph_has_room_for(alone, shared):
    question = tensor_parallel_ranks.tokens_of_many_chunks
    assert (question(alone) == shared.ask(question)).all()


def test_served_tokens_are_those_of_one_process_until_a_rank_fails(tmp_path):
    """In float16, whose rounding seldom makes another token the most likely one."""
    question = tensor_parallel_ranks.tokens_of_a_trace
    of_one, num_steps = question(tensor_parallel_ranks.tiny_llama(torch.float16))
    lengths = zip(tensor_parallel_ranks.PROMPTS, tensor_parallel_ranks.OUTPUTS, strict=True)
    assert {i: len(tokens) for i, tokens in of_one.items()} == dict(enumerate(map(sum, lengths)))
    arguments = ((tmp_path / "meeting").as_uri(), torch.float16, num_steps + 3)
    with Ranks(tensor_parallel_ranks.serve_questions, 2, arguments) as ranks:
        assert ranks.ask(question) == (of_one, num_steps)
        # The first rank waits for the second in an all-reduce then.
        message = "^rank 1 of 2 failed: RuntimeError: the GPU has fallen off the bus$"
        with pytest.raises(InputError, match=message):
            ranks.ask(question)


def test_kv_blocks_are_shared_among_ranks(tmp_path):
    """Each rank has its heads' part of a block; the first one's table is that of all."""
    question = tensor_parallel_ranks.tokens_of_a_trace
    of_one = question(tensor_parallel_ranks.tiny_llama(torch.float16))
    arguments = ((tmp_path / "meeting").as_uri(), torch.float16, None, NUM_BLOCKS)
    with Ranks(tensor_parallel_ranks.serve_questions, 2, arguments) as ranks:
        assert ranks.ask(question) == of_one


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_parts_of_the_weights_make_the_whole(size):
    """Of 2 KV heads on 4 GPUs, each is on two."""
    model = replace(MODEL, intermediate_size=256, num_q_heads=8)
    whole = random_weights(model, 0, "cpu", torch.float64)
    parts = [ModelPart(model, rank, size) for rank in range(size)]
    own = [random_weights(model, 0, "cpu", torch.float64, part) for part in parts]
    x = torch.randn(3, model.hidden_size, dtype=torch.float64)
    for layers in zip(whole.layers, *(weights.layers for weights in own), strict=True):
        layer, *shares = layers
        queries, keys, values = (x @ layer.qkv.t()).split([512, 128, 128], dim=1)
        for part, share in zip(parts, shares, strict=True):
            kept = part.share
            sizes = [n * 64 for n in (kept.num_q_heads, kept.num_kv_heads, kept.num_kv_heads)]
            q, k, v = (x @ share.qkv.t()).split(sizes, dim=1)
            assert torch.equal(q, queries.chunk(size, dim=1)[part.rank])
            kv_head = part.rank * 2 // size
            width = k.shape[1]
            assert torch.equal(k, keys[:, 64 * kv_head :][:, :width])
            assert torch.equal(v, values[:, 64 * kv_head :][:, :width])
        attended = queries.chunk(size, dim=1)
        summed = sum(a @ share.output.t() for a, share in zip(attended, shares, strict=True))
        torch.testing.assert_close(summed, queries @ layer.output.t())
        assert all(torch.equal(share.attention_norm, layer.attention_norm) for share in shares)
        summed = sum(_mlp(x, share) for share in shares)
        torch.testing.assert_close(summed, _mlp(x, layer))
    ids = torch.arange(model.vocab_size)
    rows = [part.embedding_rows(torch.device("cpu")) for part in parts]
    found = sum(w.embedding[row[ids]] for w, row in zip(own, rows, strict=True))
    assert torch.equal(found, whole.embedding[ids])
    logits = torch.cat([x @ weights.lm_head.t() for weights in own], dim=1)
    torch.testing.assert_close(logits[:, : model.vocab_size], x @ whole.lm_head.t())
    assert not logits[:, model.vocab_size :].any()


def _mlp(x, layer):
    gate, up = (x @ layer.gate_up.t()).chunk(2, dim=1)
    return (torch.nn.functional.silu(gate) * up) @ layer.down.t()
