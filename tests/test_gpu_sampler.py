"""Samples of clock and power, from a stand-in for nvidia-smi."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from podsim import gpu_sampler
from podsim.gpu_sampler import gpu_samples


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(gpu_sampler, "current_gpu", lambda: "GPU-0")


def test_the_context_opens_when_sampling_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first line takes 0.2 s; it is none of the samples, the others are."""
    lines = "sleep 0.2; echo 1, 2; sleep 0.2; echo '[N/A], 3'; echo 1980, 650.5; exec sleep 60"
    stand_in(tmp_path, monkeypatch, lines)
    begin = time.perf_counter()
    with gpu_samples(lambda: 7.0) as samples:
        assert 0.2 <= time.perf_counter() - begin < 5
        assert samples == []
        while not samples and time.perf_counter() - begin < 10:
            time.sleep(0.01)
    assert samples == [(7.0, 1980.0, 650.5)]


def test_one_need_not_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(tmp_path, monkeypatch, "exec sleep 60")
    begin = time.perf_counter()
    with gpu_samples(lambda: 0.0, steady=False) as samples:
        pass
    assert time.perf_counter() - begin < 5
    assert samples == []


def test_a_card_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling has ended before it began: there are no samples."""
    stand_in(tmp_path, monkeypatch, "exit 1")
    begin = time.perf_counter()
    with gpu_samples(lambda: 0.0) as samples:
        pass
    assert time.perf_counter() - begin < 5
    assert samples == []
