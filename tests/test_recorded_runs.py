"""The recorded runs of a real engine: a change that loses accuracy against them fails here.

The bars are what is reached today, rounded up; docs/accuracy.md says what is missed and why.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from podsim.latency import Heat
from podsim.metrics import STEP_KINDS, step_kinds
from podsim.model import model_named
from podsim.profile import read_profile
from podsim.simulation import latency_model_for
from podsim.validation import Recorded, compare, read_recording

RECORDINGS = Path(__file__).parent.parent / "validation" / "h200"
PROFILE = RECORDINGS / "profile"
FOLDERS = sorted(folder for folder in RECORDINGS.iterdir() if folder != PROFILE)


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def recorded(request: pytest.FixtureRequest) -> Recorded:
    return read_recording(request.param)


def gpu_errors(recorded: Recorded) -> dict[str, np.ndarray]:
    """By kind of step: predicted over measured time of the GPU alone, minus 1."""
    without_host = dataclasses.replace(
        recorded.deployment,
        host_overhead=0.0,
        host_overhead_per_request=0.0,
        host_overhead_with_prefill=0.0,
    )
    heat = Heat(latency_model_for(without_host, model_named(without_host.model)))
    steps = recorded.steps
    timed = zip(recorded.shapes, steps["start"].tolist(), strict=True)
    predicted = np.array([heat.step_time(shape, start) for shape, start in timed])
    error = predicted / steps["gpu_seconds"].to_numpy() - 1
    kinds = step_kinds(steps)
    return {kind: error[kinds == i] for i, kind in enumerate(STEP_KINDS)}


def test_every_recording_is_whole_and_of_its_profiles_kernels(recorded: Recorded) -> None:
    profile = read_profile(PROFILE, "the recordings")
    assert recorded.deployment.profile == str(PROFILE)
    assert recorded.engine["kernels_sha256"] == profile.provenance["kernels_sha256"]
    assert len(recorded.requests) == 300
    served = recorded.requests[recorded.requests["refused"] == ""]
    assert len(recorded.tokens) == served["num_output_tokens"].sum()


def test_steps_on_the_gpu(recorded: Recorded) -> None:
    errors = gpu_errors(recorded)
    assert abs(errors["decode"].mean()) < 0.016
    assert np.median(np.abs(errors["decode"])) < 0.02
    assert abs(errors["mixed"].mean()) < 0.03
    assert np.median(np.abs(errors["mixed"])) < 0.032


def test_whole_runs(recorded: Recorded) -> None:
    error = compare(recorded, error_bars=False).headline()["error"].abs()
    assert error["request_throughput"] < 0.02
    assert error["output_throughput"] < 0.02
    assert error["tbt_p99"] < 0.07
    assert error["e2e_latency_p99"] < 0.11
