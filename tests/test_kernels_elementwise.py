"""The element-wise kernels of a decoder layer against float64, on the GPU or interpreted."""

import pytest

torch = pytest.importorskip("torch", reason="the kernels need torch")
tl = pytest.importorskip("triton.language", reason="the kernels need triton")

from podsim.kernels.launch import empty  # noqa: E402
from podsim.kernels.rmsnorm import rmsnorm, rmsnorm_reference  # noqa: E402
from podsim.kernels.rope import rope_and_cache, rope_reference, rope_table  # noqa: E402
from podsim.kernels.silu_mul import silu_mul, silu_mul_reference  # noqa: E402

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def normal(*shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def assert_close(out, expected):
    assert torch.isfinite(out).all()
    assert (out.double() - expected).norm() / expected.norm() < TOLERANCE[out.dtype]


@DTYPES
@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize(("num_tokens", "hidden"), [(1, 64), (3, 200), (5, 5120)])
def test_rmsnorm(num_tokens, hidden, with_residual, dtype, device):
    x = normal(num_tokens, hidden, dtype=dtype, device=device)
    weight = normal(hidden, dtype=dtype, device=device, seed=1)
    residual = normal(num_tokens, hidden, dtype=dtype, device=device, seed=2)
    out = torch.full_like(x, float("nan"))
    given = residual if with_residual else None
    expected, total = rmsnorm_reference(x, weight, 1e-5, given)
    rmsnorm(x, weight, 1e-5, out, given)
    assert_close(out, expected)
    if with_residual:
        assert_close(residual, total)


@DTYPES
@pytest.mark.parametrize(("num_tokens", "intermediate"), [(1, 64), (3, 1500)])
def test_silu_mul(num_tokens, intermediate, dtype, device):
    gate_up = normal(num_tokens, 2 * intermediate, dtype=dtype, device=device)
    out = torch.full_like(gate_up[:, :intermediate], float("nan")).contiguous()
    silu_mul(gate_up, out)
    assert_close(out, silu_mul_reference(gate_up))


@DTYPES
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(4, 1), (14, 2), (3, 3)])
def test_rope_and_cache(num_q_heads, num_kv_heads, head_dim, num_layers, dtype, device):
    """Into caches of their own, or into a layer's slices of tensors over all layers."""
    num_slots, max_len, base = 3, 50, 500000.0
    positions = torch.tensor([7, 8, 0, 49], dtype=torch.int32, device=device)
    slots = torch.tensor([2, 2, 0, 1], dtype=torch.int32, device=device)
    width = (num_q_heads + 2 * num_kv_heads) * head_dim
    qkv = normal(len(positions), width, dtype=dtype, device=device)
    shape = (2, num_slots, max_len, num_layers, num_kv_heads, head_dim)
    whole = torch.full(shape, float("nan"), dtype=dtype, device=device)
    k_cache, v_cache = whole[:, :, :, -1]
    q_out = torch.empty(len(positions), num_q_heads, head_dim, dtype=dtype, device=device)
    q_out.fill_(float("nan"))

    cos_sin = rope_table(max_len, head_dim, base, device)
    rope_and_cache(qkv, positions, slots, cos_sin, k_cache, v_cache, q_out)

    q, k, v = rope_reference(qkv, positions, base, num_q_heads, num_kv_heads, head_dim)
    at = (slots.long(), positions.long())
    assert_close(q_out, q)
    assert_close(k_cache[at], k)
    assert torch.equal(v_cache[at].double(), v)
    for kv_cache in (k_cache, v_cache):  # and nothing else was written
        kv_cache[at] = float("nan")
    assert torch.isnan(whole).all()


def test_refuses_wrong_arguments(device):
    x = normal(2, 64, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match=r"weight has shape \(32,\), expected \(64,\)"):
        rmsnorm(x, x[0, :32], 1e-5, x.clone())
    with pytest.raises(ValueError, match=r"x has dtype torch.float32"):
        rmsnorm(x.float(), x[0], 1e-5, x.clone())
    with pytest.raises(ValueError, match=r"gate_up has shape \(2, 64\), expected \(2, 128\)"):
        silu_mul(x, x.clone())
    with pytest.raises(ValueError, match=r"out is torch.float16"):
        silu_mul(x, x[:, :32].half().contiguous())
    kv_cache = torch.zeros(1, 10, 1, 64, dtype=x.dtype, device=device)
    q_out = torch.zeros(2, 2, 64, dtype=x.dtype, device=device)
    index = torch.zeros(2, dtype=torch.int32, device=device)
    cos_sin = rope_table(10, 64, 10000.0, device)
    qkv = normal(2, 256, dtype=x.dtype, device=device)
    with pytest.raises(ValueError, match=r"positions must be contiguous"):
        rope_and_cache(qkv, index.long(), index, cos_sin, kv_cache, kv_cache.clone(), q_out)
    with pytest.raises(ValueError, match=r"cos_sin must be contiguous"):
        rope_and_cache(qkv, index, index, cos_sin[:5], kv_cache, kv_cache.clone(), q_out)
    small = torch.zeros(2, 2, 32, dtype=x.dtype, device=device)
    with pytest.raises(ValueError, match=r"head_dim must be one of .*, got 32"):
        rope_and_cache(qkv, index, index, cos_sin, kv_cache, kv_cache.clone(), small)


def test_refuses_cpu_tensors_when_compiled(monkeypatch):
    monkeypatch.setattr("podsim.kernels.checks.INTERPRETED", tl.constexpr(False))
    x = normal(2, 64, dtype=torch.bfloat16, device="cpu")
    with pytest.raises(ValueError, match=r"kernels run on CUDA tensors, got cpu; set TRITON_INTE"):
        rmsnorm(x, x[0], 1e-5, x.clone())


def test_empty_launches():
    empty()
    empty(num_ctas=3)
