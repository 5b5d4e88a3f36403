"""What `podsim profile` runs on a GPU, run on the CPU: kernels interpreted, streams faked.

Graphs are fakes too, and times mean nothing. That every kind of job can be prepared, runs its
operations and gives one time for each of its rows is what is tested.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="measuring needs torch")
pytest.importorskip("triton", reason="measuring needs triton")

from podsim.config import STRATEGIES  # noqa: E402
from podsim.model import Model  # noqa: E402
from podsim.points import AttentionPoint  # noqa: E402
from podsim.profile_plan import CEILINGS, Job  # noqa: E402
from tests.fake_gpu import FakeClock, OnCpu, fake_cuda  # noqa: E402

# The interpreter of Triton before 3.9 converts arrays in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

TINY = Model(
    name="tiny",
    num_layers=2,
    hidden_size=128,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=256,
    vocab_size=512,
    max_model_len=512,
)
MIXED = AttentionPoint(((3, 9), (2, 2)), (7,), "grid")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    from podsim import measure, measure_ceilings, measure_sequences, points

    fake_cuda(monkeypatch)
    monkeypatch.setattr(measure, "SmClock", FakeClock)
    # Zeros: interpreted, a sum of int32 must not overflow.
    zeros = lambda *shape: torch.zeros(*shape, dtype=torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(measure, "_random", zeros)
    monkeypatch.setattr(points, "POOL_BYTES", 4096 * 2 * 64 * 2)
    monkeypatch.setattr(measure, "MAX_CONTEXT", 512)
    for name, size in {
        "READ_BYTES": 2**16, "READ_BLOCK": 1024, "COPY_BYTES": 2**12, "HOST_BYTES": 2**10,
        "MATRIX_SIZE": 64, "PAUSE": 0.0, "DECODE_BYTES": 2**14, "NUM_DECODES": 2, "BURSTS": 4,
    }.items():  # fmt: skip
        monkeypatch.setattr(measure_ceilings, name, size)
    with OnCpu():
        monkeypatch.setattr(measure, "MAX_TOKENS", 4096)
        monkeypatch.setattr(measure, "PROMPT_IN_POOL", 24)
        monkeypatch.setattr(measure_sequences, "REST", 0.0)
        monkeypatch.setattr(measure_sequences, "SUSTAINED_SECONDS", 0.001)
        monkeypatch.setattr(measure, "MOST_DECODES", 1)  # beyond which one prompt is timed
        made = measure.Bench(TINY)
        made._layer.k_pool.zero_()  # what rotations leave of zeros may be negative zeros
        yield made


JOBS = [
    *(Job("ceiling", "", 0, strategy=name) for name in CEILINGS),
    Job("launch", "", 4),
    Job("linear", "grid", 1),
    Job("linear", "grid", 3),
    Job("once", "grid", 5),
    *(Job("attention", "grid", MIXED.num_tokens, MIXED, name) for name in STRATEGIES),
    *(Job("step", "grid", MIXED.num_tokens, MIXED, name) for name in ("pod",)),
    Job("sustained", "sustained", MIXED.num_tokens, MIXED),
    Job("sustained", "pod", MIXED.num_tokens, MIXED),
    Job("duty", "1 in 1", MIXED.num_tokens, MIXED),
    Job("duty", "1 in 3", MIXED.num_tokens, MIXED, decode_steps=2),
    Job("duty", "2 in 3", MIXED.num_tokens, MIXED, mixed_steps=2, decode_steps=1),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="its fakes are for machines without a GPU")
def test_every_kind_of_job_gives_a_time_for_each_of_its_rows(bench: Any) -> None:
    for job in JOBS:
        sequence = bench.prepare(job)
        for first in (True, False):
            measured = sequence.round(first)
            assert set(measured.seconds) == {job.label(key) for key in job.keys}, job
            enough = {"sustained": 2, "duty": 2, "step": 5}.get(job.kind, 11)
            assert all(len(times) >= enough for times in measured.seconds.values())
        assert (sequence.work is None) == (job.kind != "ceiling")
        if job.kind not in ("ceiling", "sustained", "duty"):
            assert measured.sm_clock == 1.7e9
        if job.kind in ("sustained", "duty"):
            assert measured.sm_clocks == {job.label(key): 1.6e9 for key in job.keys}


def test_a_round_of_long_sequences_has_fewer_repeats() -> None:
    from podsim.measure_sequences import FEWEST_REPEATS, repeats_of

    assert [repeats_of(once, 5) for once in (1e-5, 0.05, 0.051, 0.08, 0.1, 0.3, 2.0)] == [
        *(5, 5, 5, 4),
        *(FEWEST_REPEATS,) * 3,
    ]


def test_a_window_has_the_mean_of_the_steps_that_end_in_it() -> None:
    from podsim.measure_sequences import windows
    from podsim.profile_plan import SUSTAINED_ENDS

    # Steps of 20 ms, from 0.05 s on of 30 ms; one of a second stands for the last windows.
    ends = [0.0, 0.02, 0.04, 0.06, 0.09, 0.12, 1.12]
    assert windows(np.diff(ends), ends, SUSTAINED_ENDS) == pytest.approx(
        {
            "0.05 s": 0.02,
            "0.1 s": 0.025,
            "0.2 s": 0.03,
            "0.4 s": 1.0,
            "0.8 s": 1.0,
            "1.6 s": 1.0,
            "2.4 s": 1.0,
        }
    )


def test_the_steps_of_a_duty_have_means_of_their_own() -> None:
    from podsim.measure_sequences import windows

    # A step with prefill of 30 ms, then two of decodes of 10 ms, again and again.
    ends = [0.0, 0.03, 0.04, 0.05, 0.08, 0.09, 0.1, 0.16, 0.17, 0.18]
    steps = np.diff(ends)
    mixed, decodes = (windows(steps, ends, (0.1, 0.2), turns, 3) for turns in ((0,), (1, 2)))
    assert mixed == pytest.approx({"0.1 s": 0.03, "0.2 s": 0.06})
    assert decodes == pytest.approx({"0.1 s": 0.01, "0.2 s": 0.01})


@pytest.mark.skipif(torch.cuda.is_available(), reason="its fakes are for machines without a GPU")
def test_reading_reads_every_value_once(bench: Any) -> None:
    from podsim import measure_ceilings

    block = 1024
    kernel, pool = measure_ceilings._read_kernel, torch.arange(4 * block, dtype=torch.int32)
    sums = torch.empty(4, dtype=torch.int32)
    kernel[(4,)](pool, sums, block, num_warps=8)
    assert torch.equal(sums, pool[: 4 * block].view(4, block).sum(dim=1, dtype=torch.int32))


def test_the_clock_is_the_median_over_the_sms_that_were_seen() -> None:
    from podsim.measure_clock import mean_hertz

    stamps = torch.zeros((2, 1024, 2), dtype=torch.int64)
    stamps[0, :132] = torch.tensor([1_000, 5_000])  # cycles, nanoseconds
    stamps[1, :132] = torch.tensor([1_000 + 17_000, 5_000 + 10_000])
    stamps[1, 3] = torch.tensor([1, 5_001])  # a counter that makes no sense
    stamps[0, 200] = torch.tensor([7, 7])  # ran before the work, not after it
    assert mean_hertz(stamps) == pytest.approx(1.7e9)
    assert mean_hertz(torch.zeros_like(stamps)) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="its fakes are for machines without a GPU")
def test_small_kernels_are_timed_as_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from podsim import kernel_starts

    fake_cuda(monkeypatch)
    monkeypatch.setattr(kernel_starts, "KERNELS", 4)
    with OnCpu():
        seconds = kernel_starts.KernelStarts().seconds()
    assert seconds == pytest.approx(0.5e-3 / 4)  # a replay of the fakes takes half a millisecond


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_small_kernels_start_alike_after_a_rest() -> None:
    from podsim.kernel_starts import KernelStarts
    from podsim.validate_command import STEADY_STARTS

    starts = KernelStarts()
    first = starts.seconds()
    time.sleep(1.0)
    assert starts.seconds() == pytest.approx(first, rel=STEADY_STARTS)
