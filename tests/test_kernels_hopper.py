"""The Hopper kernels: their configuration anywhere, their results where such a GPU is."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the kernels need torch")
pytest.importorskip("triton", reason="the kernels need triton")

from podsim.kernels import config as configs  # noqa: E402
from podsim.kernels.attention import attention  # noqa: E402
from podsim.kernels.config import balance, config_for, is_decode_heavy, sm_shares  # noqa: E402
from podsim.kernels.plan import Decode, Plan, PrefillChunk, work_lists  # noqa: E402

LLAMA = {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128}


@pytest.mark.parametrize("group", [1, 2, 4, 5, 6, 7, 8, 12, 16])
def test_heads_pack_by_the_largest_power_of_two_in_the_group(group):
    pack = configs.packed_heads(group, "hopper")
    assert group % pack == 0
    assert pack & (pack - 1) == 0
    assert (group // pack) % 2 == 1
    assert configs.packed_heads(group, "triton") == group


def test_only_hopper_gets_hopper_kernels():
    assert configs.kernels_for((9, 0)) == "hopper"
    for capability in ((8, 0), (8, 9), (10, 0), None):
        assert configs.kernels_for(capability) == "triton"


def test_balance_is_the_time_of_prefill_over_that_of_decode():
    chunk = (1024, 8192)
    pairs = sum(range(8192 - 1023, 8193))  # keys that each of the 1024 tokens sees
    expected = 4 * pairs / (configs.PREFILL_PER_DECODE * 64 * 8192)
    assert balance([chunk], [8192] * 64, group=4) == pytest.approx(expected)
    assert balance([chunk, chunk], [8192] * 64, group=4) == pytest.approx(2 * expected)
    assert balance([chunk], [], group=4) == math.inf
    assert balance([], [100], group=4) == 0


def test_the_tiles_follow_the_balance_and_multi_head_attention_keeps_large_prefill_blocks():
    few, many = [8192] * 8, [8192] * 64
    assert is_decode_heavy([(1024, 8192)], many, group=4)
    assert not is_decode_heavy([(1024, 8192)], few, group=4)
    assert not is_decode_heavy([(1024, 8192)], many, group=1)
    heavy, even = (
        config_for("pod", **LLAMA, kernels="hopper", decode_heavy=heavy) for heavy in (True, False)
    )
    assert heavy.decode.block_n > even.decode.block_n
    assert heavy.prefill.block_n < even.prefill.block_n


@pytest.mark.parametrize("heads", [(32, 32), (32, 8), (28, 4), (32, 2), (32, 1)])
@pytest.mark.parametrize("decode_heavy", [False, True])
def test_the_warps_of_pod_share_the_registers_of_an_sm(heads, decode_heavy):
    config = config_for(
        "pod",
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=128,
        kernels="hopper",
        decode_heavy=decode_heavy,
    )
    prefill, decode, loader = config.registers
    assert 2 * prefill + decode + loader == 512
    assert all(count % 8 == 0 for count in config.registers)


def test_streams_leave_decode_the_sms_that_saturate_the_memory():
    config = config_for("streams", **LLAMA, kernels="hopper")
    shares = [sm_shares(config, ratio, 132)[0] for ratio in (0.01, 0.42, 1.0, 3.0, math.inf)]
    assert shares == sorted(shares)
    assert shares[1] == 66  # both sides end together when they get half each
    assert shares[-1] == 132
    assert sm_shares(config_for("pod", **LLAMA, kernels="hopper"), 1.0, 132) == (0, 0)


@pytest.mark.parametrize("heads", [(32, 8), (20, 4), (8, 8)])
def test_tiles_cover_every_token_and_head_once(heads):
    """The items that hopper_prefill.py takes: a tile, and the heads whose rows it packs."""
    rng = np.random.default_rng(0)
    chunks = [PrefillChunk(int(n), int(n) + 50, i) for i, n in enumerate(rng.integers(1, 700, 4))]
    plan = Plan(
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=128,
        num_slots=4,
        max_len=1024,
        num_sms=132,
        config=config_for(
            "serial", num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=128, kernels="hopper"
        ),
    )
    work = work_lists(
        chunks,
        [],
        group=plan.group,
        pack=plan.pack,
        num_kv_heads=heads[1],
        num_sms=132,
        config=plan.config,
    )
    seen = np.zeros((work.num_tokens, heads[0]), int)
    tokens = plan.config.prefill.block_m // plan.pack
    for query_start, num_tokens, _, _, tile in work.tiles[:, :5]:
        last = min(num_tokens, (tile + 1) * tokens)
        for first_head in range(0, heads[0], plan.pack):
            seen[
                query_start + tile * tokens : query_start + last,
                first_head : first_head + plan.pack,
            ] += 1
    assert (seen == 1).all()


def test_pages_are_refused_unless_the_table_fits():
    sizes = LLAMA | {"num_slots": 3, "max_len": 128, "num_sms": 4}
    sizes["config"] = config_for("serial", **LLAMA)
    with pytest.raises(ValueError, match=r"page_size must be one of .*, got 24"):
        Plan(**sizes, page_size=24)
    with pytest.raises(ValueError, match=r"max_len must be a multiple of page_size 256, got 128"):
        Plan(**sizes, page_size=256)
    with pytest.raises(ValueError, match=r"block_table must have shape \(3, 8\), got None"):
        Plan(**sizes, page_size=16)
    with pytest.raises(ValueError, match=r"block_table must have shape \(3, 8\), got \(3, 4\)"):
        Plan(**sizes, page_size=16, block_table=torch.zeros(3, 4, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"block_table must be contiguous int32, got torch.int64"):
        Plan(**sizes, page_size=16, block_table=torch.zeros(3, 8, dtype=torch.int64))


def test_refuses_other_gpus(device):
    if device == "cuda" and torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("this GPU has the Hopper kernels")
    from podsim.kernels.plan import AttentionPlan

    plan = AttentionPlan(
        [],
        [Decode(5, 0)],
        **LLAMA,
        num_slots=1,
        max_len=16,
        num_sms=4,
        config=config_for("serial", **LLAMA, kernels="hopper"),
        device=device,
    )
    q = torch.zeros(1, 32, 128, dtype=torch.bfloat16, device=device)
    cache = torch.zeros(1, 16, 8, 128, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"the Hopper kernels need compute capability 9.0"):
        attention("serial", q, cache, cache, torch.empty_like(q), plan)


def test_random_batches_against_float64():
    if not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("needs a Hopper GPU")
    from podsim import check_kernels

    rng = np.random.default_rng(5)
    for case in check_kernels.cases(seed=5)[:12]:
        for _ in range(3):
            assert check_kernels.faults("hopper", case, rng, check_kernels.MAX_LEN) == []
