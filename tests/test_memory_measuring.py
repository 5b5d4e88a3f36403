"""The commands that measure memory systems, run through on a pretended GPU: the CPU under CUDA's
names. Their numbers mean nothing here; rows, files and checks do.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

from podsim import (
    measure_growth,
    measure_kvpr,
    measure_mapping,
    measure_transfers,
    memory_command,
    memory_view,
)
from podsim.check_mapping import check_out_of_memory
from podsim.cli import app
from podsim.memory_costs import ADDRESS_APIS, APIS, read_memory_costs
from podsim.offloaded_shapes import SHAPES, LayerShape
from podsim.vattention import Change
from podsim.virtual_memory import OutOfDeviceMemory, VirtualMemory
from tests.checked_driver import PAGE, CheckedDriver

TINY = {
    "opt-6.7b": LayerShape("opt-6.7b", 32, 4, 64, gated=False, rotary=False),
    "llama-2-7b": LayerShape("llama-2-7b", 32, 4, 48, gated=True, rotary=True),
}


BESIDE = ("", " beside matrix", " beside attention")


class OnTheCpu(TorchFunctionMode):
    """Tensors of the GPU are the CPU's; what asks to be pinned is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[torch.UntypedStorage] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        pins = kwargs.pop("pin_memory", False)
        if func is torch.Tensor.is_pinned:
            place = args[0].untyped_storage().data_ptr()
            return place in [storage.data_ptr() for storage in self.pinned]
        made = func(*args, **kwargs)
        if pins:
            self.pinned.append(made.untyped_storage())
        return made


class Moment:
    """An event: when it was recorded."""

    def __init__(self, enable_timing: bool = True) -> None:
        self.time = 0.0

    def record(self, stream: object = None) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return False

    def elapsed_time(self, other: Moment) -> float:
        return max(1e-3, 1000 * (other.time - self.time))


class Stream:
    """All is done in order."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> Moment:
        moment = Moment()
        moment.record()
        return moment


class Graph:
    def replay(self) -> None:
        time.sleep(1e-4)


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device: generator("cpu"))

    def nothing(*args: object) -> None: ...

    fakes = {
        "Stream": Stream,
        "Event": Moment,
        "CUDAGraph": Graph,
        "graph": lambda graph: Stream(),
        "stream": lambda stream: stream,
        "current_stream": Stream,
        "is_available": lambda: True,
        "get_device_name": lambda: "NVIDIA H200",
        "mem_get_info": lambda: (10**9, 10**9),
        **dict.fromkeys(("init", "synchronize", "empty_cache", "_sleep"), nothing),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(memory_command, "_machine", lambda command: {"command": command})
    for module in (measure_growth, measure_mapping, measure_transfers, measure_kvpr):
        monkeypatch.setattr(module, "PASSES", 2)
    small = {
        measure_transfers: {"LARGEST": 2**18, "LARGEST_PAGEABLE": 2**16, "SHAPES": TINY},
        measure_kvpr: {
            **{"MOST_TOKENS": 400, "SHAPES": TINY, "POINTS_PER_MODEL": 2},
            **{"REPEATS": 1, "FRACTIONS": (0.9, 1.0, 1.1)},
        },
        measure_mapping: {
            "PAGE_GROUPS": (PAGE, 4 * PAGE),
            "CALLS": 64,
            "CYCLES": 30,
            "STEPS": 20,
            "TENSORS": 4,
        },
        measure_growth: {
            "LAYOUTS": ((PAGE, 8), (PAGE, 2), (4 * PAGE, 2), (4 * PAGE, 4)),
            **{"SLOTS": 3, "BLOCKS": 2, "WEIGHT_BYTES": 8, "STARTS_EVERY": 0.01},
        },
    }
    for module, values in small.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(measure_transfers, "TOKENS", (16, 64, 256))
    monkeypatch.setattr(measure_transfers, "_matrix", lambda: lambda: 1.0)
    monkeypatch.setattr(measure_transfers, "_attention", lambda: lambda: 1.0)
    monkeypatch.setattr(measure_mapping, "CudaDriver", PretendedDriver)
    monkeypatch.setattr(memory_view, "_CUDA", memory_view._CPU)
    for module in (measure_mapping, measure_growth):
        monkeypatch.setattr(module, "small_step", lambda: Graph().replay)
    monkeypatch.setattr(measure_mapping, "_busy_gpu", measure_mapping._nothing)
    for name, shape in TINY.items():
        monkeypatch.setitem(SHAPES, name, shape)
    with OnTheCpu():
        yield


class PretendedDriver(CheckedDriver):
    def __init__(self) -> None:
        super().__init__(pages=2000)

    def use_in_this_thread(self) -> None: ...


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["profile-memory", *map(str, arguments)])
    assert result.exit_code == 0, result.exception
    return result.output


def test_mapping_leaves_rows_and_costs(tmp_path: Path) -> None:
    run("mapping", "--out", tmp_path)
    rows = pd.read_csv(tmp_path / "mapping.csv")
    assert set(rows["api"]) == {*APIS, *ADDRESS_APIS, "step", "cycle"}
    assert rows.loc[rows["api"] == "cycle", "lost_bytes"].tolist() == [0]
    costs = read_memory_costs(tmp_path, "costs")
    for state, size in product(("idle", "busy"), (PAGE, 4 * PAGE)):
        assert costs.mapping_costs(size, state).map_seconds(4, 1) > 0
    assert set(costs.interference) == {str(PAGE), str(4 * PAGE)}
    assert costs.provenance == {"mapping": {"command": "podsim profile-memory mapping --gpu h200"}}


def test_calls_of_mapping_that_are_missing_are_added(tmp_path: Path) -> None:
    """As in rows of before reserving was timed and lost bytes told; the others stay as they are."""
    run("mapping", "--out", tmp_path)
    rows = pd.read_csv(tmp_path / "mapping.csv")
    kept = rows[~rows["api"].isin(ADDRESS_APIS)].drop(columns="lost_bytes")
    kept.to_csv(tmp_path / "mapping.csv", index=False)
    run("fit", "--out", tmp_path)
    before = read_memory_costs(tmp_path, "costs")
    run("mapping", "--more", "--out", tmp_path)
    more = pd.read_csv(tmp_path / "mapping.csv")
    others = kept[kept["api"] != "cycle"].reset_index(drop=True)
    pd.testing.assert_frame_equal(more[: len(others)][others.columns], others)
    added = more[len(others) :]
    assert set(added["api"]) == {"cycle", *ADDRESS_APIS}
    assert added.loc[added["api"] == "cycle", "lost_bytes"].tolist() == [0]
    labels = ["api", "page_group", "page_groups", "gpu", "thread", "pass"]
    assert sorted(more[labels].to_numpy().tolist()) == sorted(rows[labels].to_numpy().tolist())
    costs = read_memory_costs(tmp_path, "costs")
    assert (costs.mapping, costs.interference) == (before.mapping, before.interference)


def test_growth_leaves_rows_and_costs_beside_those_of_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every slot grows to its end, twice, beside each thing that may go on; all is given back."""
    drivers: list[PretendedDriver] = []
    sampled: list[bool] = []

    def made() -> PretendedDriver:
        drivers.append(PretendedDriver())
        return drivers[-1]

    def sampling(now: Any, steady: bool = True) -> Any:
        sampled.append(steady)
        return nullcontext([])

    monkeypatch.setattr(measure_growth, "CudaDriver", made)
    monkeypatch.setattr(measure_growth, "gpu_samples", sampling)
    run("mapping", "--out", tmp_path)
    before = (tmp_path / "mapping.csv").read_bytes()
    calls = read_memory_costs(tmp_path, "costs")
    run("growth", "--out", tmp_path)
    assert not drivers[0].holds_anything()
    assert set(sampled) == {True, False}
    rows = pd.read_csv(tmp_path / "growth.csv")
    sizes = rows.groupby(["page_group", "page_groups", "thread", "beside", "first", "pass"]).size()
    assert sizes.to_dict() == {
        (*layout, thread, beside, first, number): 1
        for layout in measure_growth.LAYOUTS
        for thread in ("main", "background")
        for beside in measure_growth.BESIDE
        for first in (False, True)
        for number in range(2)
    }
    assert (rows["repeats"] == 6).all()
    assert (tmp_path / "mapping.csv").read_bytes() == before
    costs = read_memory_costs(tmp_path, "costs")
    assert set(costs.provenance) == {"mapping", "growth"}
    assert costs.mapping == calls.mapping
    for size, state in product((PAGE, 4 * PAGE), ("idle", "busy")):
        growth = costs.mapping_costs(size, state).growth
        assert growth is not None
        assert costs.mapping_costs(size, state).map_seconds(4, 1) == growth.at(4) > 0
    run("growth", "--more", "--out", tmp_path)
    more = pd.read_csv(tmp_path / "growth.csv")
    pd.testing.assert_frame_equal(more[: len(rows)], rows)
    assert more["pass"].tolist() == [*rows["pass"], *(rows["pass"] + measure_growth.PASSES)]
    assert read_memory_costs(tmp_path, "costs").provenance["growth"] == {
        "command": "podsim profile-memory growth --gpu h200 --more",
        "before": costs.provenance["growth"],
    }


def test_what_passes_cannot_be_added_to(tmp_path: Path) -> None:
    for part, message in (
        ("growth", f"{tmp_path}: no growth that --more could add to"),
        (
            "recompute",
            "--more adds to mapping, growth, transfer, layers, layers-column; recompute is "
            "measured as a whole",
        ),
    ):
        options = ["profile-memory", part, "--more", "--out", str(tmp_path)]
        assert str(CliRunner().invoke(app, options).exception) == message
    assert not list(tmp_path.iterdir())


def test_memory_that_is_lost_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter((10**9, 10**9, 10**9, 10**9 - 4096))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (next(free), 10**9))
    result = CliRunner().invoke(app, ["profile-memory", "mapping", "--out", str(tmp_path)])
    assert str(result.exception) == "4096 bytes of the GPU were lost in 30 cycles"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("mapped all the same", "a cache grew beyond its page-groups"),
        ("data lost", "data in mapped memory is not what was written"),
    ],
)
def test_a_cache_that_does_not_outlive_its_end_is_an_error(
    monkeypatch: pytest.MonkeyPatch, wrong: str, message: str
) -> None:
    """One that says nothing when it cannot grow, and one that then unmaps what it holds."""
    plain = VirtualMemory._map

    def growing(memory: VirtualMemory, change: Change) -> None:
        try:
            plain(memory, change)
        except OutOfDeviceMemory:
            if wrong == "mapped all the same":
                return
            address = memory.tensors[0] + change.slot * memory.slot_bytes
            ctypes.memset(address, 0, PAGE)
            raise

    check_out_of_memory(PretendedDriver(), PAGE)  # type: ignore[arg-type]
    monkeypatch.setattr(VirtualMemory, "_map", growing)
    with pytest.raises(RuntimeError, match=message):
        check_out_of_memory(PretendedDriver(), PAGE)  # type: ignore[arg-type]


def test_parts_are_added_to_a_folder_and_judged(tmp_path: Path) -> None:
    run("transfer", "--out", tmp_path)
    run("recompute", "--out", tmp_path)
    output = run("layers", "--out", tmp_path)
    assert "layers row: regret" in output
    output = run("layers-column", "--out", tmp_path)
    costs = read_memory_costs(tmp_path, "costs")
    kinds = product(("h2d", "d2h"), ("pinned", "pageable"), BESIDE)
    assert set(costs.transfer) == {f"{d} {memory}{beside}" for d, memory, beside in kinds}
    assert set(costs.transfer) < set(costs.errors)
    assert set(costs.recompute) == {"32x64", "32x64 rotated"}
    assert set(costs.provenance) == {"transfer", "recompute", "layers", "layers-column"}
    for schedule in ("row", "column"):
        for kind in ("full", "kvpr", "best split", "regret"):
            points = costs.errors[f"layers {schedule}: {kind}"]["points"]
            assert points >= len(TINY) * measure_kvpr.POINTS_PER_MODEL
    rows = pd.read_csv(tmp_path / "layers.csv")
    assert (rows.groupby(["model", "batch", "context"])["split"].min() == -1).all()
    offloaded = rows["split"] != -1
    assert rows.loc[offloaded, "error"].between(0, 0.02).all()
    assert rows.loc[~offloaded, "error"].isna().all()


def test_kinds_of_transfers_that_are_missing_are_added(tmp_path: Path) -> None:
    """As in rows of before pageable copies were timed beside anything; those stay as they are."""
    run("transfer", "--out", tmp_path)
    rows = pd.read_csv(tmp_path / "transfer.csv")
    missing = (rows["memory"] == "pageable") & (rows["beside"] != "nothing")
    kept = rows[~missing].reset_index(drop=True)
    kept.to_csv(tmp_path / "transfer.csv", index=False)
    run("fit", "--out", tmp_path)
    before = read_memory_costs(tmp_path, "costs").transfer
    run("transfer", "--more", "--out", tmp_path)
    more = pd.read_csv(tmp_path / "transfer.csv")
    pd.testing.assert_frame_equal(more[: len(kept)], kept)
    labels = ["direction", "memory", "beside", "bytes", "split", "pass"]
    added = more[len(kept) :][labels].reset_index(drop=True)
    assert sorted(added.to_numpy().tolist()) == sorted(rows[missing][labels].to_numpy().tolist())
    costs = read_memory_costs(tmp_path, "costs").transfer
    assert {name: costs[name] for name in before} == before
    assert {name for name in costs if name not in before} == {
        f"{direction} pageable{beside}" for direction, beside in product(("h2d", "d2h"), BESIDE[1:])
    }


@pytest.mark.parametrize(("work_ends", "queued"), [([False], 3), ([True, True, False], 3 + 6 + 12)])
def test_what_goes_on_beside_a_pageable_copy_outlasts_it(
    monkeypatch: pytest.MonkeyPatch, work_ends: list[bool], queued: int
) -> None:
    """2 ms and what the copy takes at 5 GB/s, in pieces of 1 ms; twice that while it ends early."""
    done: list[str] = []
    ends = iter(work_ends)
    monkeypatch.setattr(Moment, "query", lambda self: next(ends))
    monkeypatch.setattr(Moment, "record", lambda self, stream=None: done.append("mark"))
    monkeypatch.setattr(Stream, "synchronize", lambda self: done.append("copied"))

    def other() -> float:
        done.append("work")
        return 1e-3

    source, target = torch.arange(4_000_000, dtype=torch.uint8), torch.empty(4_000_000).byte()
    assert measure_transfers._waited(target, source, Stream(), other) > 0
    assert torch.equal(target, source)
    assert done.count("work") == queued
    assert done[:5] == ["work", "work", "work", "mark", "copied"]
    assert done.count("copied") == len(work_ends)


def test_a_pageable_copy_that_waits_for_what_is_beside_it_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Moment, "query", lambda self: True)
    source = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a pageable copy of 8 bytes outlasts whatever is"):
        measure_transfers._waited(source.clone(), source, Stream(), lambda: 1.0)


@pytest.mark.parametrize("part", ["layers", "layers-column"])
def test_layers_that_were_timed_are_checked_without_timing(tmp_path: Path, part: str) -> None:
    """Rows of before there was an error keep their times, and get the error they would have."""
    run("transfer", "--out", tmp_path)
    run("recompute", "--out", tmp_path)
    run(part, "--out", tmp_path)
    before = read_memory_costs(tmp_path, "costs")
    rows = pd.read_csv(tmp_path / f"{part}.csv")
    rows.drop(columns="error").to_csv(tmp_path / f"{part}.csv", index=False)
    run(part, "--more", "--out", tmp_path)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"{part}.csv"), rows)
    costs = read_memory_costs(tmp_path, "costs")
    assert costs.errors == before.errors
    assert costs.provenance[part] == {
        "command": f"podsim profile-memory {part} --gpu h200 --more",
        "before": before.provenance[part],
    }


def test_layers_need_what_they_judge(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["profile-memory", "layers", "--out", str(tmp_path)])
    assert str(result.exception) == (
        "layers needs predictions: measure transfer and recompute first"
    )
    assert not list(tmp_path.iterdir())


def test_block_tables_leave_rows_and_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table is the engine's own; the kernels' times are made up."""
    pytest.importorskip("triton", reason="the kernels need triton")
    from podsim import measure_paged

    slower = {"contiguous": 1.0, "16": 1.25, "32": 1.1, "64": 1.0, "128": 1.0, "256": 1.0}

    def timed(workloads: Any, kernels: str, rounds: int, done: Any, sides: Any) -> list[Any]:
        assert kernels == "hopper"
        rows = []
        for workload in workloads:
            for side in sides:
                for pages, ratio in slower.items():
                    row = {"workload": workload.name, "kernel": f"{side} {pages}", "mode": "burst"}
                    seconds = [1e-4 * ratio * error for error in (0.9, 1.0, 1.5)]
                    rows += [row | {"round": i, "seconds": s} for i, s in enumerate(seconds)]
            done()
        return rows

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(measure_paged, "paging", timed)
    monkeypatch.setattr(measure_paged, "REQUESTS", (1, 4, 32))
    monkeypatch.setattr(measure_paged, "CONTEXTS", (40, 300))
    output = run("paged", "--out", tmp_path)
    assert "memory.json" in output
    rows = pd.read_csv(tmp_path / "paged.csv")
    tables = rows[rows["op"] == "table"]
    assert set(tables.groupby("block_size").size()) == {6}
    assert (tables["blocks"] == tables["requests"] * -(-40 // tables["block_size"])).any()
    costs = read_memory_costs(tmp_path, "costs")
    paged = costs.paged_costs(16)
    assert (paged.prefill, paged.decode) == pytest.approx((1.25, 1.25))
    assert costs.paged_costs(256).decode == pytest.approx(1.0)
    assert paged.table_step + paged.table_request + paged.table_block > 0
    provenance = costs.provenance["paged"]
    assert isinstance(provenance, dict)
    assert len(provenance["kernels_sha256"]) == 64
    assert CliRunner().invoke(app, ["profile-memory", "fit", "--out", str(tmp_path)]).exit_code == 0
    served = ["simulate", "azure-conv-like", "--requests", "20", "--kv", "paged"]
    result = CliRunner().invoke(app, [*served, "--memory-costs", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.exception
