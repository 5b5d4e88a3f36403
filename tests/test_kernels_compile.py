"""The attention kernels compile for an H200 (sm_90), without a GPU, and spill no register."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the kernels need torch")
triton = pytest.importorskip("triton", reason="the kernels need triton")

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
ROOT = Path(__file__).parent.parent

NUM_KV_HEADS, GROUP = 8, 4  # Llama-3-8B

POINTERS = {
    **dict.fromkeys(("q", "k_cache", "v_cache", "out"), "*{dtype}"),
    **dict.fromkeys(("partial_out", "partial_lse"), "*fp32"),
    **dict.fromkeys(("counts", "requests", "tiles", "splits", "counters"), "*i32"),
}
NUMBERS = {"slot_stride": "i64", "scale": "fp32"}


def compile_kernel(name: str, head_dim: int, dtype: str) -> dict[str, int]:
    """Compile one kernel at its production tile; return its registers, stack, local and smem."""
    from podsim.kernels import decode, pod, prefill
    from podsim.kernels.config import STRATEGIES, config_for
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    config = config_for(
        name if name in STRATEGIES else "serial",
        num_q_heads=NUM_KV_HEADS * GROUP,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=head_dim,
    )
    tiles = {"prefill": config.prefill, "decode": config.decode}
    constants = {"KV_HEADS": NUM_KV_HEADS, "GROUP": GROUP, "HEAD_DIM": head_dim}
    if name == "pod":
        kernel, tile = pod._pod_kernel, config.prefill
        constants |= {"PROPORTIONAL": True, "NUM_SMS": 132}
        for op, sizes in tiles.items():
            constants[f"{op.upper()}_BLOCK_M"] = sizes.block_m
            constants[f"{op.upper()}_BLOCK_N"] = sizes.block_n
    else:
        kernel = decode._decode_kernel if name == "decode" else prefill._prefill_kernel
        tile = tiles.get(name, config.prefill)
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}

    kinds = POINTERS | NUMBERS | dict.fromkeys(constants, "constexpr")
    signature = {arg: kinds[arg].format(dtype=dtype) for arg in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, arg in enumerate(kernel.arg_names)
        if arg in POINTERS or arg == "slot_stride"
    }
    values = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    binary = triton.compile(
        ASTSource(kernel, signature, values, aligned),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages},
    )
    return resource_usage(binary.asm["cubin"]) | {"smem": binary.metadata.shared}


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return the registers, stack and local memory that cuobjdump reports for a binary."""
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run(
        [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["prefill", "decode", "unified", "pod"])
def test_compiles_for_sm90_without_spills(name, head_dim, dtype, tmp_path):
    # In a process of its own: here the kernels may already be decorated to run interpreted.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, __file__, name, str(head_dim), dtype],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    usage = json.loads(run.stdout)
    print(f"{name} d{head_dim} {dtype}: {usage}")
    assert usage["registers"] <= 255
    assert usage["stack"] == 0
    assert usage["local"] == 0
    assert usage["smem"] <= 227 * 1024


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import podsim

    podsim.__path__.append(str(ROOT))  # as in ../conftest.py
    print(json.dumps(compile_kernel(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
