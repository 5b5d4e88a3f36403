"""A GPU of four SMs without a GPU: kernels run interpreted, graphs and times are fakes."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class OnCpu(TorchFunctionMode):
    """Tensors that ask for CUDA are made on the CPU, where there is no CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        args = tuple(torch.device("cpu") if _is_cuda(arg) else arg for arg in args)
        return func(*args, **kwargs)


def _is_cuda(value: object) -> bool:
    return value == "cuda" if isinstance(value, str) else value == torch.device("cuda")


class FakeGraph:
    def replay(self) -> None:
        pass


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.now += 0.5
        self.at = FakeEvent.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.at - self.at


class FakeClock:
    """The real one reads registers, which cannot be interpreted."""

    def __init__(self, num_sms: int) -> None:
        assert num_sms == 4
        self.calls: list[str] = []

    def clear(self) -> None:
        self.calls = ["clear"]

    def start(self) -> None:
        self.calls.append("start")

    def stop(self) -> None:
        self.calls.append("stop")

    def mark(self) -> None:
        self.calls.append("mark")

    def hertz_between_marks(self) -> list[float]:
        return [1.6e9] * (self.calls.count("mark") - 1)

    def mean_hertz(self) -> float:
        assert self.calls == ["clear", "start", "stop"]
        return 1.7e9


def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams, graphs and events of torch.cuda that do nothing; an event is 0.5 ms later."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda: stream,
        "current_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": lambda _: contextlib.nullcontext(),
        "CUDAGraph": FakeGraph,
        "Event": FakeEvent,
        "synchronize": lambda: None,
        "_sleep": lambda cycles: None,
        "get_device_properties": lambda _: SimpleNamespace(multi_processor_count=4),
        "get_device_capability": lambda *_: (8, 0),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
