"""Fixtures of the kernel tests, which run interpreted on the CPU where there is no CUDA device."""

import importlib.util
import os
import warnings
from pathlib import Path

import pytest

MODULES_WITH_KERNELS = ("test_kernels_*.py",)


def pytest_pycollect_makemodule(module_path: Path) -> None:
    """Choose interpreted or compiled kernels before a test module imports and so decorates them.

    Here, and not at the top, so that a run without kernel tests does not wait for torch.
    """
    if not any(module_path.match(pattern) for pattern in MODULES_WITH_KERNELS):
        return
    if importlib.util.find_spec("torch") is None:
        return
    with warnings.catch_warnings(action="ignore"):  # an installation's own are not our errors
        import torch

        has_cuda = torch.cuda.is_available()
    if not has_cuda:
        os.environ["TRITON_INTERPRET"] = "1"
    # Triton 3.9 warns that this default will change; the kernels want their multiply-adds fused.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run: "cuda", or "cpu" interpreted."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
