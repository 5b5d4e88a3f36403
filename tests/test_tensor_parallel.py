"""Tensor parallelism: one GPU's share of a model, its memory, and the cost of its steps."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from os import environ
from pathlib import Path

import numpy as np
import pytest

import podsim
from podsim import calibration
from podsim.batch import BatchShape
from podsim.collectives import Collectives, StepCollectives, find_collectives
from podsim.config import Deployment
from podsim.errors import InputError
from podsim.hardware import gpu_named
from podsim.kv_cache import num_blocks_for
from podsim.latency import ProfiledLatency, decode_steps
from podsim.model import MODELS, Model, model_named
from podsim.profile import find_profile, read_profile
from podsim.result_row import num_gpus
from podsim.simulation import latency_model_for
from podsim.step_costs import kernel_table, kind_table

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "profiles/h200/collectives"
H200 = gpu_named("h200")
LLAMA, LARGE = model_named("llama-3-8b"), model_named("llama-3-70b")
LATENCY, RATE = 10e-6, 2e-12
"""Of the collectives below: seconds, and seconds a byte; among four GPUs both twice."""


@pytest.fixture
def collectives(tmp_path: Path) -> Path:
    """Times on a straight line, of which all-reduce takes twice as long as all-gather."""

    def table(factor: float) -> dict[str, object]:
        sizes = [8192, 2**28]
        return {
            "latency": factor * LATENCY,
            "seconds_per_byte": factor * RATE,
            "bytes": [*sizes],
            "seconds": [factor * (LATENCY + RATE * n) for n in sizes],
        }

    error = {"median": 0.02, "signed_p10": -0.5, "signed_p90": 0.25}
    names = [f"{op}, {n} GPUs" for op in ("all_reduce", "all_gather") for n in (2, 4)]
    found = Collectives(
        source="",
        gpu="h200",
        provenance={"NCCL_NVLS_ENABLE": "0", "date": "2026-01-01"},
        tables={
            "all_reduce": {"2": table(2.0), "4": table(4.0)},
            "all_gather": {"2": table(1.0), "4": table(2.0)},
        },
        errors=dict.fromkeys(names, error),
    )
    folder = tmp_path / "collectives"
    folder.mkdir()
    (folder / "collectives.json").write_text(found.to_json())
    return folder


@pytest.fixture
def profile_of(tmp_path: Path) -> Callable[[Model], Path]:
    """A folder with the shipped times of another shape, under the name of a share."""

    def write(share: Model) -> Path:
        content = json.loads((ROOT / "profiles/h200/llama-3-8b/profile.json").read_text())
        folder = tmp_path / share.name
        folder.mkdir()
        content |= {"model": share.name, "shape": share.shape}
        (folder / "profile.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.fixture
def deployment(collectives: Path, profile_of: Callable[[Model], Path]) -> Deployment:
    profile = profile_of(LLAMA.shard(2))
    return Deployment(
        tensor_parallel_size=2, profile=str(profile), collectives=str(collectives), attention="pod"
    )


# --------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("num_gpus", "q_heads", "kv_heads", "intermediate", "vocab"),
    [(2, 32, 4, 14336, 64128), (4, 16, 2, 7168, 32064), (8, 8, 1, 3584, 16032),
     (16, 4, 1, 1792, 8016)],
)  # fmt: skip
def test_the_share_of_a_gpu(
    num_gpus: int, q_heads: int, kv_heads: int, intermediate: int, vocab: int
) -> None:
    share = LARGE.shard(num_gpus)
    assert share == Model(
        name=f"llama-3-70b-tp{num_gpus}",
        num_layers=80,
        hidden_size=8192,
        num_q_heads=q_heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_model_len=8192,
        tensor_parallel_size=num_gpus,
    )
    assert share.qkv_size == (q_heads + 2 * kv_heads) * 128
    assert share.num_logits == LARGE.vocab_size


def test_the_parameters_of_llama_3_70b() -> None:
    assert LARGE.num_parameters == 70_553_706_496
    assert model_named("llama-3.1-70b").shape == LARGE.shape


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("num_gpus", [1, 2, 4, 8, 16, 32])
def test_the_shares_add_up_to_the_model(name: str, num_gpus: int) -> None:
    model = model_named(name)
    share = model.shard(num_gpus)
    norms = (2 * model.num_layers + 1) * model.hidden_size
    kv_heads = num_gpus * share.num_kv_heads
    assert kv_heads == max(model.num_kv_heads, num_gpus)
    copies = 2 * (kv_heads - model.num_kv_heads) * model.head_dim * model.hidden_size
    assert num_gpus * share.num_parameters == (
        model.num_parameters + (num_gpus - 1) * norms + copies * model.num_layers
    )
    copied = kv_heads / model.num_kv_heads
    assert num_gpus * share.kv_bytes_per_token == copied * model.kv_bytes_per_token


def test_a_vocabulary_is_padded_before_it_is_shared() -> None:
    odd = replace(LLAMA, vocab_size=50257)
    assert odd.shard(1).num_logits == 50257
    assert odd.shard(4).vocab_size == 50304 // 4
    assert odd.shard(4).num_logits == 50304


@pytest.mark.parametrize(
    ("change", "num_gpus", "refusal"),
    [
        ({}, 3, "32 query heads: 3 GPUs"),
        ({"num_q_heads": 30, "num_kv_heads": 10}, 6, "10 KV heads: 6 GPUs"),
        ({"intermediate_size": 14337}, 2, "an intermediate size of 14337: 2 GPUs"),
        (
            {"num_q_heads": 30, "num_kv_heads": 6, "intermediate_size": 3072, "vocab_size": 31999},
            3,
            "a padded vocabulary of 32000",
        ),
    ],
)
def test_what_cannot_be_shared_evenly_is_refused(
    change: dict[str, int], num_gpus: int, refusal: str
) -> None:
    model = replace(LLAMA, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"tensor_parallel_size is {num_gpus}.*{refusal}"):
        model.shard(num_gpus)


def test_a_share_has_a_shape_and_a_profile_of_its_own() -> None:
    share = LARGE.shard(4)
    assert share.shape["tensor_parallel_size"] == 4
    assert "tensor_parallel_size" not in LARGE.shape
    # Equal sizes do not make a whole model of it: sampling sees the whole vocabulary.
    assert replace(share, tensor_parallel_size=1).shape != share.shape
    assert share.command_options == "--model llama-3-70b --tp 4"
    assert LARGE.command_options == "--model llama-3-70b"
    with pytest.raises(InputError, match="`podsim profile --gpu a100 --model llama-3-70b --tp 2"):
        find_profile("a100", LARGE.shard(2))
    for count in (4, 8):
        share = LARGE.shard(count)
        assert find_profile("h200", share).shape == share.shape


def test_a_profile_of_a_share_is_refitted_as_one(
    profile_of: Callable[[Model], Path],
) -> None:
    share = LARGE.shard(4)
    folder = profile_of(share)
    rows = ROOT / "profiles/h200/llama-3-70b-tp4/measurements.csv"
    (folder / rows.name).write_bytes(rows.read_bytes())
    refitted = calibration.refit(folder)
    assert find_profile("h200", share, folder).ops == refitted.ops
    assert (refitted.model, refitted.shape) == ("llama-3-70b-tp4", share.shape)


# --------------------------------------------------------------------------------------- memory


def test_kv_blocks_are_what_the_shares_leave() -> None:
    for n, model in ((2, LLAMA), (4, LARGE), (8, LARGE)):
        deployment = Deployment(tensor_parallel_size=n, token_budget=1024, max_num_seqs=256)
        share = model.shard(n)
        activations = 1024 * 2 * (2 * model.hidden_size + 2 * model.intermediate_size // n)
        logits = 256 * 4 * model.vocab_size  # of the whole vocabulary, on each GPU
        left = int(H200.memory * 0.9) - share.weight_bytes - activations - logits
        block = 16 * 2 * 2 * model.num_layers * (model.num_kv_heads // n) * 128
        assert num_blocks_for(deployment, model, H200) == left // block


def test_twice_the_gpus_hold_more_than_twice_the_context() -> None:
    blocks = [num_blocks_for(Deployment(tensor_parallel_size=n), LLAMA, H200) for n in (1, 2, 4, 8)]
    assert all(after > 2 * before for before, after in pairwise(blocks))
    # 16 GPUs hold each of 8 KV heads twice.
    sixteen = num_blocks_for(Deployment(tensor_parallel_size=16), LLAMA, H200)
    assert blocks[-1] < sixteen < 1.1 * blocks[-1]


def test_a_model_too_large_for_one_gpu_needs_its_shares() -> None:
    with pytest.raises(InputError, match=r"llama-3-70b needs 141\.\d GB of a GPU.*--tp shares"):
        num_blocks_for(Deployment(), LARGE, H200)
    assert num_blocks_for(Deployment(tensor_parallel_size=2), LARGE, H200) > 10_000


# ----------------------------------------------------------------------------------------- time


def collectives_time(model: Model, num_tokens: int, num_sampled: int) -> float:
    """Two all-reduces a layer, one after the embedding, and a gathering of the logits."""
    all_reduce = 2 * (LATENCY + RATE * 2 * model.hidden_size * num_tokens)
    all_gather = LATENCY + RATE * 2 * model.vocab_size * num_sampled
    return (2 * model.num_layers + 1) * all_reduce + (all_gather if num_sampled else 0.0)


@pytest.mark.parametrize(
    ("prefills", "decodes"),
    [([(512, 512)], []), ([], [700] * 5), ([(1024, 4096), (77, 77)], [3000, 20, 9])],
)
def test_a_step_is_the_kernels_of_a_gpu_and_the_collectives(
    deployment: Deployment, prefills: list[tuple[int, int]], decodes: list[int]
) -> None:
    shape = BatchShape.of(prefills, decodes)
    profile = read_profile(Path(str(deployment.profile)), "here")
    kernels = ProfiledLatency(profile, LLAMA.shard(2), "pod")
    latency = latency_model_for(deployment, LLAMA)
    parts = latency.breakdown(shape)
    expected = collectives_time(LLAMA, shape.num_tokens, shape.num_sampled)
    assert kernels.breakdown(shape) == replace(parts, collectives=0.0)
    assert parts.collectives == pytest.approx(expected)
    assert latency.step_time(shape) == pytest.approx(kernels.step_time(shape) + expected)
    assert parts.total == pytest.approx(latency.step_time(shape))


@pytest.mark.parametrize("num_gpus", [2, 4])
def test_shipped_collectives_are_taken_where_none_are_given(
    num_gpus: int, profile_of: Callable[[Model], Path]
) -> None:
    """All-reduces of two tokens, 16 KiB: a size that is in the file."""
    tables = json.loads((SHIPPED / "collectives.json").read_text())["tables"]
    table = tables["all_reduce"][str(num_gpus)]
    seconds = dict(zip(table["bytes"], table["seconds"], strict=True))
    profile = profile_of(LLAMA.shard(num_gpus))
    deployment = Deployment(tensor_parallel_size=num_gpus, profile=str(profile))
    shape = BatchShape.of([(2, 2)])._replace(num_sampled=0)
    parts = latency_model_for(deployment, LLAMA).breakdown(shape)
    assert parts.collectives == pytest.approx(65 * seconds[2**14])


def test_a_chunk_that_brings_out_no_token_gathers_no_logits(deployment: Deployment) -> None:
    latency = latency_model_for(deployment, LLAMA)
    last = BatchShape.of([(512, 512)])
    parts, first = latency.breakdown(last), latency.breakdown(last._replace(num_sampled=0))
    assert parts.collectives - first.collectives == pytest.approx(
        LATENCY + RATE * 2 * LLAMA.vocab_size
    )


def test_runs_of_decodes_take_what_their_steps_take(deployment: Deployment) -> None:
    shape = BatchShape.of_decodes(9, 9 * 500, 700)
    at_once = latency_model_for(deployment, LLAMA).decode_run_times(shape, 40)
    by_one = latency_model_for(deployment, LLAMA)
    assert at_once == [by_one.step_time(step) for step in decode_steps(shape, 40)]


def test_messages_beyond_the_measured_sizes_are_counted(collectives: Path) -> None:
    profile = find_profile("h200", LLAMA)
    wide = replace(LLAMA.shard(2), hidden_size=2**15, vocab_size=2**20)
    step = StepCollectives(find_collectives("h200", 2, collectives), wide)
    assert step.max_tokens == 2**28 // 2**16
    assert step.max_sampled == 2**28 // 2**22
    latency = ProfiledLatency(profile, wide, "serial", collectives=step)
    assert latency.is_inside(BatchShape.of([(4096, 4096)]))
    assert not latency.is_inside(BatchShape.of([(4097, 4097)]))
    assert latency.is_inside(BatchShape.of((), [10] * 64))
    assert not latency.is_inside(BatchShape.of((), [10] * 65))


def test_a_simulation_equals_its_step_by_step_reference(deployment: Deployment) -> None:
    trace = podsim.synthetic_trace("poisson", 20, 60, "800", "30")
    fast, slow = (
        podsim.simulate(trace, deployment, step_by_step=reference) for reference in (False, True)
    )
    assert fast.summary() == slow.summary()
    assert fast.num_blocks == num_blocks_for(deployment, LLAMA, H200)


def test_error_bars_are_the_wider_of_kernels_and_collectives(deployment: Deployment) -> None:
    latency = latency_model_for(deployment, LLAMA)
    assert latency.likely_scales() == (1 / 1.25, 1 / 0.5)
    kernels = ProfiledLatency(latency.profile, LLAMA.shard(2), "pod").likely_scales()
    assert 1 / 1.25 < kernels[0] < kernels[1] < 1 / 0.5


def test_a_report_shows_the_collectives_and_the_gpus(deployment: Deployment) -> None:
    trace = podsim.synthetic_trace("static", None, 1, "700", "50")
    result = podsim.simulate(trace, deployment)
    table = kernel_table(result, result.steps, result.requests)
    assert table is not None
    np.testing.assert_allclose(table.sum(), kind_table(result.steps)["seconds"], rtol=1e-9)
    assert table["decode"]["collectives"] == pytest.approx(49 * collectives_time(LLAMA, 1, 1))
    assert num_gpus(deployment) == 2
    assert num_gpus(replace(deployment, replicas=3)) == 6


# ------------------------------------------------------------------------------------- mismatches


def test_a_profile_of_another_share_is_refused(
    deployment: Deployment, profile_of: Callable[[Model], Path]
) -> None:
    whole = str(ROOT / "profiles/h200/llama-3-8b")
    with pytest.raises(InputError, match=r"llama-3-8b \(num_q_heads 32\), but llama-3-8b-tp2 has"):
        latency_model_for(replace(deployment, profile=whole), LLAMA)
    four = profile_of(LLAMA.shard(4))
    with pytest.raises(InputError, match=r"llama-3-8b-tp4 \(num_q_heads 8\).*num_q_heads 16"):
        latency_model_for(replace(deployment, profile=str(four)), LLAMA)
    with pytest.raises(InputError, match="llama-3-8b-tp2"):
        latency_model_for(replace(deployment, tensor_parallel_size=1), LLAMA)
    alike = profile_of(replace(LLAMA, name="alike", tensor_parallel_size=2))
    with pytest.raises(InputError, match=r"\(tensor_parallel_size 2\)"):
        latency_model_for(Deployment(profile=str(alike)), LLAMA)


def test_collectives_must_be_of_the_gpu_and_of_as_many(
    deployment: Deployment, collectives: Path, profile_of: Callable[[Model], Path]
) -> None:
    eight = replace(deployment, tensor_parallel_size=8, profile=str(profile_of(LLAMA.shard(8))))
    with pytest.raises(InputError, match=r"among 2, 4 GPUs, not 8.*--gpus 8"):
        latency_model_for(eight, LLAMA)
    path = collectives / "collectives.json"
    path.write_text(path.read_text().replace('"gpu": "h200"', '"gpu": "b300"'))
    with pytest.raises(InputError, match="measured on 'b300', not on 'h200'"):
        latency_model_for(deployment, LLAMA)


# ------------------------------------------------------------------------------------ command line


def run_podsim(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podsim", *map(str, arguments)]
    environment = environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_the_command_line_shares_a_model(deployment: Deployment, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = ("--profile", deployment.profile, "--collectives", deployment.collectives)
    run = run_podsim(
        "simulate", "azure-conv-like", "--requests", 30, "--tp", 2, *files, "--out", out
    )
    assert run.returncode == 0, run.stderr
    assert "llama-3-8b on h200 (tensor parallel over 2)" in run.stdout
    assert "NCCL_NVLS_ENABLE=0" in run.stdout
    assert "tensor_parallel_size = 2" in (out / "config.toml").read_text()
    assert '"collectives"' in (out / "report.html").read_text()
    again = tmp_path / "again"
    assert run_podsim("simulate", "--config", out / "config.toml", "--out", again).returncode == 0
    assert (out / "summary.json").read_bytes() == (again / "summary.json").read_bytes()


def test_the_command_line_takes_shipped_collectives(deployment: Deployment, tmp_path: Path) -> None:
    simulate = ("simulate", "azure-conv-like", "--requests", 30, "--tp", 2)
    for name, files in (("own", ()), ("given", ("--collectives", SHIPPED))):
        out = tmp_path / name
        run = run_podsim(*simulate, "--profile", deployment.profile, *files, "--out", out)
        assert run.returncode == 0, run.stderr
    own, given = (tmp_path / name / "requests.csv" for name in ("own", "given"))
    assert own.read_bytes() == given.read_bytes()


def test_the_command_line_takes_the_shipped_share_and_collectives() -> None:
    simulate = ("simulate", "azure-conv-like", "--requests", 30, "--model", "llama-3-70b")
    run = run_podsim(*simulate, "--tp", 4)
    assert run.returncode == 0, run.stderr
    assert "llama-3-70b on h200 (tensor parallel over 4)" in run.stdout
    run = run_podsim(*simulate, "--tp", 4, "--gpu", "a100")
    assert run.returncode == 2
    assert "no times of collectives on a100 are shipped" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (["--tp", "0"], "tensor_parallel_size is 0, expected at least 1"),
        (["--tp", "3"], "tensor_parallel_size is 3, but llama-3-8b has 32 query heads"),
        (["--tp", "2"], "`podsim profile --gpu h200 --model llama-3-8b --tp 2 --out FOLDER`"),
        (["--model", "llama-3-70b"], "--tp shares a model among GPUs"),
    ],
)
def test_the_command_line_refuses(arguments: list[str], refusal: str) -> None:
    run = run_podsim("simulate", "azure-conv-like", "--requests", 3, *arguments)
    assert (run.returncode, run.stdout) == (2, "")
    assert refusal in run.stderr
    assert run.stderr.count("\n") == 1


def test_collectives_that_are_missing_are_asked_for(deployment: Deployment, tmp_path: Path) -> None:
    run = run_podsim(
        *("simulate", "azure-conv-like", "--requests", 3, "--tp", 2),
        *("--profile", deployment.profile, "--collectives", tmp_path),
    )
    assert run.returncode == 2
    assert run.stderr == f"podsim: {tmp_path}/collectives.json: No such file or directory\n"


def test_the_commands_that_measure_refuse_what_they_cannot_do(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = run_podsim("profile", "--model", "llama-3-8b", "--tp", 5, "--out", out)
    assert "tensor_parallel_size is 5, but llama-3-8b has 32 query heads" in run.stderr
    run = run_podsim("profile-collectives", "--gpu", "tpu", "--out", out)
    assert run.stderr.startswith("podsim: unknown GPU 'tpu'; known GPUs: a100, ")
    run = run_podsim("profile-collectives", "--gpus", "1", "--out", out)
    assert "gpus is '1', expected numbers of at least 2" in run.stderr
    assert not list(tmp_path.iterdir())


def test_validate_needs_the_profile_the_collectives_and_the_gpus(
    deployment: Deployment, tmp_path: Path
) -> None:
    pytest.importorskip("triton", reason="the engine needs torch and triton")
    out = tmp_path / "out"
    profile, collectives = str(deployment.profile), str(deployment.collectives)

    def refusal(*options: str) -> str:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "podsim", "validate", "azure-conv-like", "--requests", "9"),
                *("--tp", "2", "--out", str(out), *options),
            ],
            capture_output=True,
            text=True,
            check=False,
            env=environ | {"CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert not out.exists()
        return done.stderr

    assert "`podsim profile --gpu h200 --model llama-3-8b --tp 2 --out FOLDER`" in refusal()
    assert refusal("--profile", profile, "--collectives", str(tmp_path)) == (
        f"podsim: {tmp_path}/collectives.json: No such file or directory\n"
    )
    both = ("--profile", profile, "--collectives", collectives)
    no_gpus = "podsim: tensor_parallel_size is 2, but this machine has 0 GPU(s)\n"
    assert refusal(*both) == refusal("--profile", profile) == no_gpus


@pytest.mark.parametrize("size", [1, 2])
def test_the_engine_maps_slots_on_one_gpu_only(size: int) -> None:
    pytest.importorskip("triton", reason="the engine needs torch and triton")
    from podsim.serving import require_servable

    for kv in ("ideal", "paged"):
        require_servable(Deployment(tensor_parallel_size=size, kv=kv))
    virtual = Deployment(tensor_parallel_size=size, kv="vattention")
    if size == 1:
        require_servable(virtual)
    else:
        with pytest.raises(InputError, match="'paged' on several GPUs, not 'vattention'"):
            require_servable(virtual)
