"""The attention kernels compile for an H200 (sm_90), without a GPU, and spill no register."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
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
    **dict.fromkeys(("counts", "tiles", "splits", "counters", "block_table"), "*i32"),
}
NUMBERS = {"slot_rows": "i32", "scale": "fp32"}


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile at its production tile."""

    name: str
    """prefill, decode, unified or pod; "pod, decode-heavy" for the other tiles of Hopper's POD."""
    kernels: str = "triton"
    heads: tuple[int, int] = (NUM_KV_HEADS * GROUP, NUM_KV_HEADS)
    head_dim: int = 128
    dtype: str = "bf16"
    page_size: int = 0

    def __str__(self) -> str:
        page = f" page {self.page_size}" if self.page_size else ""
        return f"{self.kernels} {self.name} {self.heads} d{self.head_dim} {self.dtype}{page}"


def compile_kernel(wanted: Kernel) -> dict[str, int]:
    """Return the registers, stack, local and shared memory of a kernel."""
    from podsim.kernels.config import STRATEGIES, config_for

    strategy = wanted.name.split(",")[0]
    config = config_for(
        strategy if strategy in STRATEGIES else "serial",
        num_q_heads=wanted.heads[0],
        num_kv_heads=wanted.heads[1],
        head_dim=wanted.head_dim,
        kernels=wanted.kernels,
        decode_heavy="decode-heavy" in wanted.name,
    )
    compiled = compile_triton if wanted.kernels == "triton" else compile_hopper
    binary = compiled(strategy, wanted, config)
    return resource_usage(binary.asm["cubin"]) | {
        "smem": binary.metadata.shared,
        "lost_barriers": num_lost_barriers(binary.asm["ptx"]),
    }


def num_lost_barriers(ptx: str) -> int:
    """Barriers whose memory also holds something else.

    The compiler ends the life of a barrier that no warp waits for, and gives its bytes to, say,
    what the specialised warps are told: its initialisation may come later than that.
    """
    addresses = dict(re.findall(r"add\.s32\s+(%r\d+), %r\d+, (\d+);", ptx))
    barriers = {addresses.get(r) for r in re.findall(r"mbarrier\.init\S*\s+\[(%r\d+)\]", ptx)}
    others = re.findall(r"(?:ld|st)\.shared\S*\s[^;]*global_smem\+(\d+)\]", ptx)
    return len(barriers & set(others))


def compile_triton(strategy: str, wanted: Kernel, config):
    from podsim.kernels import decode, pod, prefill
    from triton.compiler import ASTSource

    tiles = {"prefill": config.prefill, "decode": config.decode}
    constants = {
        "KV_HEADS": wanted.heads[1],
        "GROUP": wanted.heads[0] // wanted.heads[1],
        "HEAD_DIM": wanted.head_dim,
        "KV_STRIDE": wanted.heads[1] * wanted.head_dim,
        "PAGE": wanted.page_size,
    }
    if strategy == "pod":
        kernel, tile = pod._pod_kernel, config.prefill
        constants |= {"PROPORTIONAL": True, "NUM_SMS": 132}
        for op, sizes in tiles.items():
            constants[f"{op.upper()}_BLOCK_M"] = sizes.block_m
            constants[f"{op.upper()}_BLOCK_N"] = sizes.block_n
    else:
        kernel = decode._decode_kernel if strategy == "decode" else prefill._prefill_kernel
        tile = tiles.get(strategy, config.prefill)
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    kinds = POINTERS | NUMBERS
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    return compiled_for_sm90(ASTSource, kernel, kinds, constants, wanted.dtype, options)


def compile_hopper(strategy: str, wanted: Kernel, config):
    """With the constants that podsim.kernels.hopper launches the kernels with."""
    from podsim.kernels import hopper_kernels
    from podsim.kernels.config import packed_heads
    from triton.experimental.gluon._runtime import GluonASTSource

    group = wanted.heads[0] // wanted.heads[1]
    pack = packed_heads(group, "hopper")
    prefill, decode = config.prefill, config.decode
    constants = {
        "KV_HEADS": wanted.heads[1],
        "GROUP": group,
        "HEAD_DIM": wanted.head_dim,
        "PAGE": wanted.page_size,
    }
    queries = [64 // pack, pack, wanted.head_dim]
    if strategy == "pod":
        small_pages = 0 < wanted.page_size < 64
        registers = config.registers
        constants |= {
            "PACK": pack,
            "HEADS": decode.block_m,
            "PREFILL_BLOCK_N": prefill.block_n,
            "PREFILL_STAGES": prefill.num_stages,
            "DECODE_BLOCK_N": decode.block_n,
            "DECODE_STAGES": decode.num_stages,
            "PREFILL_REGISTERS": registers[0] - (8 if small_pages else 0),
            "DECODE_REGISTERS": registers[1],
            "LOADER_REGISTERS": registers[2] + (16 if small_pages else 0),
        }
        kernel, tiles = hopper_kernels.pod_kernel, {"p": prefill, "d": decode}
        blocks = {"qp": queries, "qd": [decode.block_m, wanted.head_dim]}
    elif strategy == "decode":
        constants |= {"HEADS": decode.block_m, "BLOCK_N": decode.block_n}
        constants |= {"STAGES": decode.num_stages}
        kernel, tiles = hopper_kernels.decode_kernel, {"": decode}
        blocks = {"q": [decode.block_m, wanted.head_dim]}
    else:
        constants |= {"PACK": pack, "BLOCK_N": prefill.block_n, "STAGES": prefill.num_stages}
        constants |= {"SHARED": False, "Q_BUFFERS": config.query_buffers}
        kernel, tiles = hopper_kernels.prefill_kernel, {"": prefill}
        blocks = {"q": queries}
    for side, tile in tiles.items():
        rows = min(tile.block_n, wanted.page_size or tile.block_n)
        blocks |= {f"{cache}{side}": [rows, wanted.head_dim] for cache in "kv"}
    kinds = POINTERS | NUMBERS | {name: descriptor(b, wanted.dtype) for name, b in blocks.items()}
    options = {"num_warps": 4}
    return compiled_for_sm90(GluonASTSource, kernel, kinds, constants, wanted.dtype, options)


def descriptor(block: list[int], dtype: str) -> str:
    """The type of a TMA descriptor in a kernel's signature."""
    from triton.experimental.gluon import language as gl

    element = {"bf16": gl.bfloat16, "fp16": gl.float16}[dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, element)
    return f"tensordesc<{dtype}{block},{layout!r}>"


def compiled_for_sm90(source, kernel, kinds, constants, dtype, options):
    from triton.backends.compiler import GPUTarget

    kinds = kinds | dict.fromkeys(constants, "constexpr")
    signature = {arg: kinds[arg].replace("{dtype}", dtype) for arg in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, arg in enumerate(kernel.arg_names)
        if arg in POINTERS
    }
    values = {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}
    return triton.compile(
        source(kernel, signature, values, aligned),
        target=GPUTarget("cuda", 90, 32),
        options=options,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return the registers, stack and local memory that cuobjdump reports for a binary."""
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    report = subprocess.run(
        [CUOBJDUMP, "-res-usage", path], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    return dict(zip(("registers", "stack", "local"), map(int, found.groups()), strict=True))


def usage_of(kernels: list[Kernel], tmp_path: Path) -> list[dict[str, int]]:
    """Compile in a process of its own: here the kernels may be decorated to run interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    run = subprocess.run(
        [sys.executable, __file__, json.dumps([asdict(kernel) for kernel in kernels])],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


TRITON = [
    Kernel(name, head_dim=head_dim, dtype=dtype)
    for name in ("prefill", "decode", "unified", "pod")
    for head_dim in (64, 128)
    for dtype in ("bf16", "fp16")
]
HOPPER = [
    *(Kernel(name, "hopper") for name in ("prefill", "decode", "unified")),
    *(Kernel("pod", "hopper", heads) for heads in ((32, 8), (32, 32), (28, 4), (20, 4), (32, 2))),
    Kernel("pod, decode-heavy", "hopper"),
    Kernel("pod, decode-heavy", "hopper", (32, 2)),
    Kernel("pod", "hopper", head_dim=64),
    Kernel("pod", "hopper", dtype="fp16"),
    Kernel("pod", "hopper", page_size=64),
    Kernel("prefill", "hopper", page_size=16),
    Kernel("decode", "hopper", page_size=16),
]


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no cuobjdump")
@pytest.mark.parametrize("kernels", [TRITON, HOPPER], ids=["triton", "hopper"])
def test_compiles_for_sm90_without_spills(kernels, tmp_path):
    for kernel, usage in zip(kernels, usage_of(kernels, tmp_path), strict=True):
        assert usage["registers"] <= 255, kernel
        assert (usage["stack"], usage["local"]) == (0, 0), kernel
        assert usage["lost_barriers"] == 0, kernel
        assert usage["smem"] <= 227 * 1024, kernel


@pytest.mark.skipif(not CUOBJDUMP.exists(), reason="this triton brings no cuobjdump")
def test_small_pages_cost_pod_few_spills(tmp_path):
    """Its loaders hold the rows of up to eight pages: what does not fit is a few numbers."""
    kernels = [Kernel("pod", "hopper", page_size=size) for size in (16, 32)]
    for kernel, usage in zip(kernels, usage_of(kernels, tmp_path), strict=True):
        assert usage["stack"] <= 32, kernel
        assert usage["smem"] <= 227 * 1024, kernel


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    import podsim

    podsim.__path__.append(str(ROOT))  # as in ../conftest.py
    asked = [
        Kernel(**{**kernel, "heads": tuple(kernel["heads"])}) for kernel in json.loads(sys.argv[1])
    ]
    print(json.dumps([compile_kernel(kernel) for kernel in asked]))
