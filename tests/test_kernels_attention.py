"""Every attention strategy against float64, on the GPU or interpreted."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch", reason="the kernels need torch")
triton = pytest.importorskip("triton", reason="the kernels need triton")

import triton.language as tl  # noqa: E402
from podsim.kernels.attention import attention, attention_reference  # noqa: E402
from podsim.kernels.config import STRATEGIES, TileConfig, config_for  # noqa: E402
from podsim.kernels.decode import decode_attention  # noqa: E402
from podsim.kernels.plan import (  # noqa: E402
    NUM_COUNTERS,
    AttentionPlan,
    CapturedPlan,
    Decode,
    Plan,
    PrefillChunk,
    Room,
)
from podsim.kernels.pod import pod_attention, take_ticket  # noqa: E402
from podsim.kernels.prefill import prefill_attention  # noqa: E402
from podsim.kernels.unified import unified_attention  # noqa: E402

# The interpreter of Triton before 3.9 converts arrays in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

POLICIES = ("proportional", "50:50")
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}  # relative, of a whole request
NUM_SLOTS, MAX_LEN = 6, 304
NUM_SMS = 4

MIXED = (
    [PrefillChunk(37, 90, slot=2), PrefillChunk(20, 20, slot=5)],
    [Decode(300, slot=1), Decode(1, slot=3), Decode(64, slot=0)],
)
BATCHES = {
    "mixed": MIXED,
    "one query": ([PrefillChunk(1, 130, slot=3)], []),
    "one key": ([PrefillChunk(1, 1, slot=4)], [Decode(1, slot=0)]),
    "prefill only": ([PrefillChunk(65, 129, slot=1), PrefillChunk(3, 70, slot=0)], []),
    "decode only": ([], [Decode(5, slot=4), Decode(304, slot=0), Decode(129, slot=2)]),
}


def plan_for(strategy, batch, device, *, heads=(8, 2), head_dim=64, **changes):
    """Return a plan whose splits are short, so that small batches have several."""
    num_q_heads, num_kv_heads = heads
    config = config_for(
        strategy, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    return AttentionPlan(
        *batch,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_slots=NUM_SLOTS,
        max_len=MAX_LEN,
        num_sms=NUM_SMS,
        config=replace(config, min_split_len=64, **changes),
        device=device,
    )


def tensors_for(plan, batch, dtype, device):
    """Return q, k_cache, v_cache, out: NaN in out, and in the caches past every context."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    q = normal(plan.num_tokens, plan.num_q_heads, plan.head_dim)
    k_cache = normal(NUM_SLOTS, MAX_LEN, plan.num_kv_heads, plan.head_dim)
    v_cache = normal(NUM_SLOTS, MAX_LEN, plan.num_kv_heads, plan.head_dim)
    context = {request.slot: request.context_len for side in batch for request in side}
    for slot in range(NUM_SLOTS):
        k_cache[slot, context.get(slot, 0) :] = float("nan")
        v_cache[slot, context.get(slot, 0) :] = float("nan")
    return q, k_cache, v_cache, torch.full_like(q, float("nan"))


def assert_close(out, expected, batch, tolerance):
    """Compare request by request, so that a small wrong one does not drown in a large right one."""
    chunks, decodes = batch
    sizes = [chunk.num_tokens for chunk in chunks] + [1] * len(decodes)
    requests = (*chunks, *decodes)
    parts = zip(requests, out.double().split(sizes), expected.split(sizes), strict=True)
    for request, got, want in parts:
        assert torch.isfinite(got).all(), request
        assert (got - want).norm() / want.norm() < tolerance, request


def check(strategy, batch, device, dtype=torch.bfloat16, **shape):
    plan = plan_for(strategy, batch, device, **shape)
    q, k_cache, v_cache, out = tensors_for(plan, batch, dtype, device)
    attention(strategy, q, k_cache, v_cache, out, plan)
    expected = attention_reference(q, k_cache, v_cache, *batch)
    assert_close(out, expected, batch, TOLERANCE[dtype])


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_batch(strategy, batch, device):
    check(strategy, batch, device)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_type_and_head_dim(strategy, head_dim, dtype, device):
    check(strategy, MIXED, device, dtype, head_dim=head_dim)


@pytest.mark.parametrize("heads", [(2, 2), (5, 1), (14, 2), (8, 1), (20, 1)], ids=str)
@pytest.mark.parametrize("strategy", ["serial", "unified", "pod"])
def test_every_group_size(strategy, heads, device):
    check(strategy, MIXED, device, heads=heads)


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES.keys())
def test_pod_fifty_fifty(batch, device):
    check("pod", batch, device, policy="50:50")


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pages_in_any_order(strategy, page_size, device):
    max_len = 320
    pages = torch.randperm(NUM_SLOTS * max_len // page_size, generator=seeded())
    table = pages.int().view(NUM_SLOTS, -1).to(device)
    config = config_for(strategy, num_q_heads=8, num_kv_heads=2, head_dim=64)
    plan = AttentionPlan(
        *MIXED,
        num_q_heads=8,
        num_kv_heads=2,
        head_dim=64,
        num_slots=NUM_SLOTS,
        max_len=max_len,
        num_sms=NUM_SMS,
        config=replace(config, min_split_len=64),
        page_size=page_size,
        block_table=table,
        device=device,
    )
    shape = (len(pages), page_size, 2, 64)
    q, k_cache, v_cache = (
        torch.randn(size, generator=seeded()).to(torch.bfloat16).to(device)
        for size in ((plan.num_tokens, 8, 64), shape, shape)
    )
    for request in (*MIXED[0], *MIXED[1]):
        past = torch.arange(request.context_len, max_len, device=device)
        own = table[request.slot].long()[past // page_size]
        k_cache[own, past % page_size] = v_cache[own, past % page_size] = float("nan")
    out = torch.full_like(q, float("nan"))
    attention(strategy, q, k_cache, v_cache, out, plan)
    expected = attention_reference(q, k_cache, v_cache, *MIXED, table)
    assert_close(out, expected, MIXED, TOLERANCE[torch.bfloat16])


def seeded():
    return torch.Generator().manual_seed(0)


def test_small_tiles(device):
    """Tiles that end inside a token's group of heads, with many diagonal blocks."""
    tile = TileConfig(block_m=16, block_n=16, num_warps=1, num_stages=2)
    check("pod", MIXED, device, heads=(5, 1), prefill=tile, decode=tile)


@pytest.mark.parametrize(
    ("launcher", "written"), [(prefill_attention, slice(0, 57)), (decode_attention, slice(57, 60))]
)
def test_each_side_writes_only_its_rows(launcher, written, device):
    plan = plan_for("serial", MIXED, device)
    q, k_cache, v_cache, out = tensors_for(plan, MIXED, torch.bfloat16, device)
    launcher(q, k_cache, v_cache, out, plan)
    finite = torch.isfinite(out).all(dim=-1).all(dim=-1)
    assert finite.nonzero().flatten().tolist() == list(range(60))[written]


@pytest.mark.parametrize("policy", POLICIES)
def test_pod_launches_again_from_clean_counters(policy, device):
    plan = plan_for("pod", MIXED, device, policy=policy)
    q, k_cache, v_cache, first = tensors_for(plan, MIXED, torch.bfloat16, device)
    second = first.clone()
    pod_attention(q, k_cache, v_cache, first, plan)
    assert plan.counters.tolist() == [0] * NUM_COUNTERS
    pod_attention(q, k_cache, v_cache, second, plan)
    assert plan.counters.tolist() == [0] * NUM_COUNTERS
    assert torch.equal(first, second)


@triton.jit
def _record_tickets(counters, taken, num_prefill, num_decode, PROPORTIONAL: tl.constexpr):
    if tl.program_id(0) < num_prefill + num_decode:
        op, item = take_ticket(counters, num_prefill, num_decode, PROPORTIONAL, 4)
        tl.atomic_add(taken + op * 64 + item, 1, mask=op < 2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("num_items", [(3, 17), (17, 3), (8, 8), (0, 5), (5, 0), (1, 1)], ids=str)
def test_tickets_hand_out_every_item_once(num_items, policy, device):
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    taken = torch.zeros(2, 64, dtype=torch.int32, device=device)
    spare = 3  # CTAs beyond the items, as a captured grid has
    for launch in (1, 2):
        _record_tickets[(sum(num_items) + spare,)](
            counters, taken, *num_items, PROPORTIONAL=policy == "proportional"
        )
        assert taken.tolist() == [[launch] * n + [0] * (64 - n) for n in num_items]
        assert counters.tolist() == [0] * NUM_COUNTERS


def test_graph_of_streams_and_pod_replays(device):
    if device != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    for strategy in STRATEGIES:
        plan = plan_for(strategy, MIXED, device)
        q, k_cache, v_cache, out = tensors_for(plan, MIXED, torch.bfloat16, device)
        attention(strategy, q, k_cache, v_cache, out, plan)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            attention(strategy, q, k_cache, v_cache, out, plan)
        expected = attention_reference(q, k_cache, v_cache, *MIXED)
        for _ in range(3):
            out.fill_(float("nan"))
            graph.replay()
            assert_close(out, expected, MIXED, TOLERANCE[torch.bfloat16])


CAPTURED = {"num_tokens": 72, "max_chunks": 2, "max_decodes": 3}


def captured_plan(strategy, device, *, heads=(8, 2), head_dim=64):
    """A plan for any batch of at most 72 tokens, and the host side of its lists."""
    sizes = {
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": head_dim,
        "num_slots": NUM_SLOTS,
        "max_len": MAX_LEN,
        "num_sms": NUM_SMS,
    }
    config = config_for(strategy, num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim)
    sizes["config"] = replace(config, min_split_len=64)
    room = Room.of(Plan(**sizes), *CAPTURED.values())
    room = room.union(Room(40, 40, 8))  # others on the same lists may need more
    host = torch.zeros(room.num_ints, dtype=torch.int32)
    plan = CapturedPlan(torch.zeros_like(host, device=device), room, **CAPTURED, **sizes)
    plan.use(*plan.workspaces())
    return plan, host


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_captured_plan_takes_one_batch_after_another(strategy, device):
    plan, host = captured_plan(strategy, device)
    lists = plan.counts.as_strided((plan.room.num_ints,), (1,))
    replay = None
    for batch in (MIXED, *BATCHES.values(), MIXED):
        single = plan_for(strategy, batch, device)
        q, k_cache, v_cache, out = tensors_for(single, batch, torch.bfloat16, device)
        expected = attention_reference(q, k_cache, v_cache, *batch)
        padding = torch.zeros(CAPTURED["num_tokens"] - len(q), *q.shape[1:]).to(q)
        tensors = torch.cat([q, padding]), k_cache, v_cache, torch.cat([out, out[:1] + padding])
        plan.write(host.numpy(), *batch)
        lists.copy_(host)
        if device == "cpu":
            attention(strategy, *tensors, plan)
            result = tensors[-1]
        else:
            if replay is None:
                static, replay = tensors, torch.cuda.CUDAGraph()
                attention(strategy, *static, plan)
                torch.cuda.synchronize()
                with torch.cuda.graph(replay):
                    attention(strategy, *static, plan)
            for mine, given in zip(static, tensors, strict=True):
                mine.copy_(given)
            replay.replay()
            result = static[-1]
        assert_close(result[: len(q)], expected, batch, TOLERANCE[torch.bfloat16])
        assert torch.isnan(result[len(q) :]).all(), "rows of no request stay as they were"
        assert plan.counters.tolist() == [0] * NUM_COUNTERS


def test_a_captured_plan_refuses_what_its_grid_cannot_hold(device):
    plan, host = captured_plan("serial", device)
    with pytest.raises(ValueError, match=r"200 tokens with .* exceed the plan's 72 with"):
        plan.write(host.numpy(), [PrefillChunk(200, 300, slot=2)], [])
    with pytest.raises(ValueError, match=r"the lists are .*, the plan needs"):
        CapturedPlan(
            plan.counts,
            Room(1, 1, 1),
            **CAPTURED,
            **{
                name: getattr(plan, name)
                for name in (
                    *("num_q_heads", "num_kv_heads", "head_dim", "num_slots", "max_len"),
                    *("num_sms", "config"),
                )
            },
        )


def layer_of(cache, num_layers=3, layer=1):
    """The same cache as a slice of a tensor over all layers, of which the others are NaN."""
    shape = (*cache.shape[:2], num_layers, *cache.shape[2:])
    whole = torch.full(shape, float("nan"), dtype=cache.dtype, device=cache.device)
    whole[:, :, layer] = cache
    return whole[:, :, layer]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_slice_of_a_tensor_over_all_layers_is_a_cache(strategy, device):
    plan = plan_for(strategy, MIXED, device)
    q, k_cache, v_cache, out = tensors_for(plan, MIXED, torch.bfloat16, device)
    attention(strategy, q, layer_of(k_cache), layer_of(v_cache), out, plan)
    expected = torch.full_like(out, float("nan"))
    attention(strategy, q, k_cache, v_cache, expected, plan)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("spoilt", ["keys that overlap", "one sliced", "slots apart"])
def test_refuses_keys_at_unequal_distances(spoilt, device):
    plan = plan_for("serial", MIXED, device)
    q, k_cache, v_cache, out = tensors_for(plan, MIXED, torch.bfloat16, device)
    if spoilt == "keys that overlap":
        strides = (MAX_LEN * 64, 64, 64, 1)
        k_cache, v_cache = (c.as_strided(c.shape, strides) for c in (k_cache, v_cache))
        match = "keys of 128 values overlap: they are 64 apart"
    elif spoilt == "one sliced":
        v_cache, match = layer_of(v_cache), "v_cache has strides"
    else:
        k_cache, v_cache = (c.repeat(1, 2, 1, 1)[:, :MAX_LEN] for c in (k_cache, v_cache))
        match = "k_cache has strides"
    with pytest.raises(ValueError, match=match):
        attention("serial", q, k_cache, v_cache, out, plan)


SPOIL = {
    "dtype": lambda tensor: tensor.float(),
    "shape": lambda tensor: tensor[..., :-1].contiguous(),
    "gaps": lambda tensor: tensor.repeat_interleave(2, dim=-1)[..., ::2],
}


@pytest.mark.parametrize("name", ["q", "k_cache", "v_cache", "out"])
@pytest.mark.parametrize("fault", SPOIL)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_refuses_wrong_tensors(strategy, fault, name, device):
    plan = plan_for(strategy, MIXED, device)
    names = ("q", "k_cache", "v_cache", "out")
    tensors = dict(zip(names, tensors_for(plan, MIXED, torch.bfloat16, device), strict=True))
    tensors[name] = SPOIL[fault](tensors[name])
    with pytest.raises(ValueError, match=f"^{name} "):
        attention(strategy, *tensors.values(), plan)


def test_refuses_names_and_plans_of_others(device):
    split, folded = plan_for("serial", MIXED, device), plan_for("unified", MIXED, device)
    tensors = tensors_for(split, MIXED, torch.bfloat16, device)
    with pytest.raises(ValueError, match=r"strategy must be one of .*'hfuse'"):
        attention("hfuse", *tensors, split)
    with pytest.raises(ValueError, match=r"policy must be one of .*'random'"):
        replace(split.config, policy="random")
    with pytest.raises(ValueError, match=r"this POD has no policy 'adaptive'"):
        pod_attention(*tensors, plan_for("pod", MIXED, device, policy="adaptive"))
    with pytest.raises(ValueError, match=r"needs one num_warps"):
        pod_attention(*tensors, split)
    with pytest.raises(ValueError, match=r"lists decodes as splits"):
        unified_attention(*tensors, split)
    for launcher in (prefill_attention, decode_attention, pod_attention):
        with pytest.raises(ValueError, match=r"lists decodes as chunks"):
            launcher(*tensors, folded)
