"""From rows of memory systems to their costs: made-up rows whose costs are known."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from podsim.cli import app
from podsim.config import Deployment
from podsim.errors import InputError
from podsim.layer_predictions import (
    RESIDENT,
    as_good,
    predicted_layer,
    predicted_split,
    split_error,
)
from podsim.memory_calibration import fit_folder, fit_line, write_rows
from podsim.memory_costs import APIS, Curve, Line, MemoryCosts, find_memory_costs, read_memory_costs
from podsim.offloaded_shapes import SHAPES
from podsim.simulation import simulate
from podsim.workload import Trace

MB = 2**20
PASSES = (0, 1, 2)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1e-4), st.floats(1e-12, 1e-9))
def test_a_line_is_found_again(fixed: float, per_unit: float) -> None:
    units = 4.0 ** np.arange(7, 15)
    line = fit_line(units, fixed + per_unit * units)
    assert line.fixed == pytest.approx(fixed, rel=1e-3, abs=1e-9)
    assert line.per_unit == pytest.approx(per_unit, rel=1e-6)


def mapping_rows() -> list[dict[str, object]]:
    """A call of n page-groups takes 10 + 30 n us on an idle GPU, twice that on a busy one."""
    rows: list[dict[str, object]] = []
    states = [("idle", "main", 1.0), ("idle", "background", 5.0), ("busy", "background", 2.0)]
    for number, (gpu, thread, slower) in product(PASSES, states):
        labels = {"page_group": 2 * MB, "gpu": gpu, "thread": thread, "pass": number, "share": ""}
        for api in APIS:
            counts = (1, 8, 64) if api in ("set_access", "unmap") else (1,)
            for n in counts:
                time = slower * (10 + 30 * n)
                rows.append(labels | {"api": api, "page_groups": n, "time_us": time})
    for thread, time in (("none", 1000.0), ("background", 1250.0)):
        labels = {"page_group": 2 * MB, "gpu": "busy", "thread": thread, "pass": 0}
        rows.append(labels | {"api": "step", "page_groups": 0, "time_us": time, "share": 0.8})
    return rows


def transfer_rows() -> list[dict[str, object]]:
    """5 us, and 50 GB/s; 40 GB/s beside matrix products."""
    rows: list[dict[str, object]] = []
    for number, direction, beside in product(PASSES, ("h2d", "d2h"), ("nothing", "matrix")):
        for size, split in ((2**14, "grid"), (2**20, "grid"), (2**30, "grid"), (2**25, "held_out")):
            time = 5 + size / (50e3 if beside == "nothing" else 40e3)
            labels = {"direction": direction, "memory": "pinned", "beside": beside}
            rows.append(labels | {"bytes": size, "split": split, "pass": number, "time_us": time})
    return rows


def recompute_rows() -> list[dict[str, object]]:
    """600 TFLOP/s."""
    rows: list[dict[str, object]] = []
    for shape, number in product(SHAPES.values(), PASSES):
        for tokens, split in ((64, "grid"), (4096, "grid"), (65536, "grid"), (5000, "held_out")):
            time = 4 * tokens * shape.hidden_size**2 / 600e6
            labels = {"hidden": shape.hidden_size, "outputs": shape.num_outputs}
            labels |= {"rotated": int(shape.rotary), "tokens": tokens}
            rows.append(labels | {"split": split, "pass": number, "time_us": time})
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_rows(tmp_path, "mapping", mapping_rows())
    write_rows(tmp_path, "transfer", transfer_rows())
    write_rows(tmp_path, "recompute", recompute_rows())
    return tmp_path


@pytest.fixture
def costs(folder: Path) -> MemoryCosts:
    fit_folder(folder, "h200", {"mapping": {"date": "2026-01-01"}})
    return read_memory_costs(folder, "costs")


def test_what_is_written_is_read(folder: Path, costs: MemoryCosts) -> None:
    assert costs.gpu == "h200"
    assert costs.provenance == {"mapping": {"date": "2026-01-01"}}
    assert costs.to_json() == (folder / "memory.json").read_text()


def test_calls_of_virtual_memory(costs: MemoryCosts) -> None:
    idle, busy = (costs.mapping_costs(2 * MB, state) for state in ("idle", "busy"))
    assert idle.set_access.at(4) == pytest.approx(130e-6)
    assert idle.map_seconds(64, 2) == pytest.approx(64 * (2 * 40e-6 + 70e-6))
    assert idle.unmap_seconds(64, 3) == pytest.approx(64 * 100e-6)
    assert busy.map_seconds(64, 2) == pytest.approx(2 * idle.map_seconds(64, 2))
    # A step of 1250 us took 250 us longer, beside mapping for 0.8 of it.
    assert costs.interference[str(2 * MB)] == pytest.approx(250 / 1000)


def growth_rows() -> list[dict[str, object]]:
    """Beside sampling, a block takes 100 us and 70 us a page-group, twice that in the background;
    the second pass takes a tenth longer, and whatever is beside nothing half as long.
    """
    rows: list[dict[str, object]] = []
    for number, thread, first in product((0, 1), ("main", "background"), (True, False)):
        for beside, n in product(("nothing", "sampling", "start of sampling"), (16, 64)):
            time = (100 + 70 * n) * (1 + (thread == "background")) * (1.1 if number else 1.0)
            time *= 0.5 if beside == "nothing" else 1.2 if first else 0.8
            labels = {"page_group": 2 * MB, "page_groups": n, "thread": thread}
            labels |= {"beside": beside, "first": first, "pass": number, "time_us": time}
            rows.append(labels)
    return rows


def test_growth_while_serving_takes_the_place_of_calls_in_a_loop(folder: Path) -> None:
    alone = fit_folder(folder, "h200", {})
    write_rows(folder, "growth", growth_rows())
    fit_folder(folder, "h200", {})
    costs = read_memory_costs(folder, "costs")
    assert costs.mapping == alone.mapping
    idle, busy = (costs.mapping_costs(2 * MB, state) for state in ("idle", "busy"))
    assert idle.map_seconds(64, 1) == pytest.approx(100e-6 + 70e-6 * 64)
    assert idle.map_seconds(2, 3) == pytest.approx(100e-6 + 70e-6 * 6)
    assert busy.map_seconds(64, 1) == pytest.approx(2 * idle.map_seconds(64, 1))
    assert idle.unmap_seconds(64, 3) == pytest.approx(64 * 100e-6)
    error = costs.errors["growth by 2 MB, background thread"]
    assert (error["points"], error["bias"]) == (2, pytest.approx(1 / 1.1 - 1, abs=1e-3))


def test_growth_needs_a_pass_to_hold_out(folder: Path) -> None:
    write_rows(folder, "growth", [row for row in growth_rows() if not row["pass"]])
    with pytest.raises(InputError, match=r"growth.csv: under two passes in the main thread"):
        fit_folder(folder, "h200", {})


def test_a_handoff_is_no_copy(folder: Path) -> None:
    rows = transfer_rows()
    labels = {"direction": "handoff", "memory": "pinned", "beside": "nothing", "bytes": 2**14}
    rows += [labels | {"split": "", "pass": n, "time_us": 3.0 + n} for n in PASSES]
    write_rows(folder, "transfer", rows)
    costs = fit_folder(folder, "h200", {})
    assert costs.handoff == pytest.approx(4e-6)
    assert not any("handoff" in name for name in costs.transfer)
    with_it = predicted_layer(costs, SHAPES["opt-6.7b"], 100, 0.0, "row")
    without = with_it._replace(handoff=0.0)
    assert with_it.row_period(40) == pytest.approx(without.row_period(40) + 8e-6)


def test_transfers_and_recomputation(costs: MemoryCosts) -> None:
    line = costs.transfer_costs("h2d pinned beside matrix")
    assert line.at(4e9) == pytest.approx(0.1 + 5e-6, rel=1e-4)
    assert costs.errors["h2d pinned"]["worst"] < 1e-3
    recompute = costs.recompute_costs(5120, 10240, rotated=False)
    assert recompute.at(1000) == pytest.approx(4 * 1000 * 5120**2 / 600e12)
    with pytest.raises(InputError, match="recomputing K and V of shape 5120x10240 rotated"):
        costs.recompute_costs(5120, 10240, rotated=True)


def test_a_curve_is_straight_between_what_was_measured(folder: Path) -> None:
    """From 64 tokens on 4 per microsecond, with a noisy dip at 96; then 2 at 2048 and beyond."""
    rows = [
        {"hidden": 64, "outputs": 128, "rotated": 0, "layers": 6, "tokens": tokens}
        | {"split": split, "pass": 0, "time_us": time}
        for tokens, split, time in (
            *((64, "grid", 16.0), (96, "grid", 15.0), (128, "grid", 32.0), (2048, "grid", 512.0)),
            *((4096, "grid", 1536.0), (100, "held_out", 18.0)),
        )
    ]
    write_rows(folder, "recompute", rows)
    costs = fit_folder(folder, "h200", {})
    again = costs.recompute_costs(64, 128, rotated=False)
    times = {0: 0.0, 1: 16.0, 64: 16.0, 96: 16.0, 112: 24.0, 128: 32.0, 1088: 272.0, 8192: 3584.0}
    for tokens, time in times.items():
        assert again.at(tokens) == pytest.approx(time * 1e-6), tokens
    for begin, (end, line) in zip((0, 64, 96, 128, 2048), again.pieces(), strict=True):
        middle = (begin + min(end, 9000)) / 2
        assert line.fixed + line.per_unit * middle == pytest.approx(again.at(middle))
    assert read_memory_costs(folder, "costs").recompute_costs(64, 128, rotated=False) == again


def test_recomputing_that_was_timed_on_its_own_goes_on_a_line(folder: Path) -> None:
    """The same times, between layers and without: then 10 us and 0.1 us a token."""
    rows = recompute_rows()
    for row in rows:
        row["time_us"] = 10 + 0.1 * int(str(row["tokens"]))
    write_rows(folder, "recompute", rows)
    alone = fit_folder(folder, "h200", {}).recompute_costs(4096, 8192, rotated=True)
    assert isinstance(alone, Line)
    assert (alone.fixed, alone.per_unit) == (pytest.approx(10e-6), pytest.approx(0.1e-6))
    write_rows(folder, "recompute", [row | {"layers": 6} for row in rows])
    between = fit_folder(folder, "h200", {}).recompute_costs(4096, 8192, rotated=True)
    assert isinstance(between, Curve)
    assert between.units == (64, 4096, 65536)
    for tokens in (64, 4096, 10_000, 65536):
        assert between.at(tokens) == pytest.approx(alone.at(tokens))


@pytest.mark.parametrize(
    ("curve", "message"),
    [
        ({"units": [1, 2], "seconds": [1e-6]}, "two or more units"),
        ({"units": [2, 2], "seconds": [1e-6, 2e-6]}, "each larger than the one before"),
        ({"units": [1], "seconds": [1e-6]}, "two or more units"),
        ({"units": [1, 2], "seconds": [2e-6, 1e-6]}, "no times that grow"),
        ({"units": [0, 2], "seconds": [1e-6, 1e-6]}, "no times that grow"),
    ],
)
def test_a_curve_that_is_none(folder: Path, curve: dict[str, object], message: str) -> None:
    content = json.loads(fit_folder(folder, "h200", {}).to_json())
    content["recompute"]["4096x8192"] = curve
    (folder / "memory.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_memory_costs(folder, "costs")


def test_a_relay_is_shorter_than_two_handoffs(folder: Path) -> None:
    """Where copies are what is waited for; one that was not timed is two handoffs."""
    rows = transfer_rows()
    labels = {"memory": "pinned", "beside": "nothing", "bytes": 2**14, "split": "", "pass": 0}
    rows.append(labels | {"direction": "handoff", "time_us": 4.0})
    write_rows(folder, "transfer", rows)
    before = fit_folder(folder, "h200", {})
    assert before.relay is None
    write_rows(folder, "transfer", [*rows, labels | {"direction": "relay", "time_us": 2.5}])
    costs = fit_folder(folder, "h200", {})
    assert costs.relay == pytest.approx(2.5e-6)
    assert read_memory_costs(folder, "costs").relay == costs.relay
    assert costs.transfer == before.transfer
    shape = SHAPES["opt-6.7b"]
    old, new = (predicted_layer(c, shape, 100, 0.0, "row") for c in (before, costs))
    assert old.row_period(0) - new.row_period(0) == pytest.approx(5.5e-6)
    with_compute = (layer._replace(compute=1.0) for layer in (old, new))
    assert len({layer.row_period(50) for layer in with_compute}) == 1


def test_splits_as_good_as_the_best() -> None:
    """Passes differ by 1 %: from half way between 10 and 20 to 50, and no further."""
    times = {0: 120.0, 10: 102.0, 20: 100.0, 40: 100.5, 50: 101.0, 60: 103.0, 80: 100.9, -1: 10.0}
    rows = [
        {"split": split, "time_us": time * factor}
        for split, time in times.items()
        for factor in (0.995, 1.005)
    ]
    assert as_good(pd.DataFrame(rows)) == (15, 50)
    assert as_good(pd.DataFrame(rows[::2])) == (20, 20)
    assert [split_error(wanted, 20) for wanted in (20.4, 22.0)] == [0.0, pytest.approx(0.1)]
    assert [split_error(wanted, 0) for wanted in (0.3, 5.0)] == [0.0, 1.0]


def layer_rows(costs: MemoryCosts, schedule: str, factor: float = 1.0) -> list[dict[str, object]]:
    """Chains that take what is predicted, times a factor; in steps of a 50th of the context."""
    rows: list[dict[str, object]] = []
    for model, batch, context in (("opt-6.7b", 8, 1000), ("opt-13b", 3, 4000)):
        labels = {"model": model, "batch": batch, "context": context, "schedule": schedule}
        labels |= {"layers": 6, "pass": 0}
        compute = 200e-6
        layer = predicted_layer(costs, SHAPES[model], batch * context, compute, schedule)
        rows.append(labels | {"split": RESIDENT, "time_us": 6 * compute * 1e6})
        for split in range(0, context + 1, context // 50):
            seconds = layer.seconds(6, split * batch, schedule) * factor
            rows.append(labels | {"split": split, "time_us": seconds * 1e6})
    return rows


@pytest.mark.parametrize(("schedule", "part"), [("row", "layers"), ("column", "layers-column")])
def test_layers_judge_the_predictions(
    folder: Path, costs: MemoryCosts, schedule: str, part: str
) -> None:
    write_rows(folder, part, layer_rows(costs, schedule, factor=1.25))
    errors = fit_folder(folder, "h200", {}).errors
    for kind in ("full", "kvpr"):
        assert errors[f"layers {schedule}: {kind}"]["bias"] == pytest.approx(-0.2, abs=1e-4)
    assert errors[f"layers {schedule}: best split"]["worst"] < 0.03  # the grid's steps
    assert errors[f"layers {schedule}: regret"]["worst"] < 0.01


def test_the_predicted_split_is_of_each_request(costs: MemoryCosts) -> None:
    one = predicted_split(costs, "opt-6.7b", 1, 4000, "row")
    assert predicted_split(costs, "opt-6.7b", 16, 4000, "row") == pytest.approx(one, rel=5e-3)
    rate = 40e9  # beside matrix products
    assert one / 4000 == pytest.approx(2 * 600e12 / (2 * 4096 * rate + 2 * 600e12), abs=5e-3)


# ---------------------------------------------------------------------------------- paged kernels


def paged_rows() -> str:
    """Prefill 1.1 and decode 1.02 as long; a table takes 20 us, 0.5 a request and 0.01 a block."""
    lines = ["op,block_size,requests,blocks,contiguous_us,paged_us,workload"]
    lines += ["prefill,16,1,64,100,110,32/8 a", "prefill,16,1,256,1000,1100,32/8 b"]
    lines += ["decode,16,8,512,50,51,32/8 a", "decode,16,64,8192,400,408,32/8 b"]
    for requests, blocks in ((1, 8), (8, 4096), (64, 512), (256, 65536)):
        lines.append(f"table,16,{requests},{blocks},,{20 + 0.5 * requests + 0.01 * blocks},")
    return "\n".join(lines) + "\n"


def test_paged_rows_become_costs_of_steps(tmp_path: Path) -> None:
    (tmp_path / "paged.csv").write_text(paged_rows())
    fit_folder(tmp_path, "h200", {})
    paged = find_memory_costs("h200", tmp_path).paged_costs(16)
    assert (paged.prefill, paged.decode) == pytest.approx((1.1, 1.02))
    assert paged.heads == "32/8"
    found = (paged.table_step, paged.table_request, paged.table_block)
    assert found == pytest.approx((20e-6, 0.5e-6, 0.01e-6))


def test_a_step_over_a_block_table_takes_so_much_longer(tmp_path: Path) -> None:
    (tmp_path / "paged.csv").write_text(paged_rows())
    fit_folder(tmp_path, "h200", {})
    trace = Trace.of((0.0, 900, 4), (0.0, 900, 4))
    ideal = simulate(trace, Deployment())
    deployment = Deployment(kv="paged", memory_costs=str(tmp_path))
    paged, again = (simulate(trace, deployment, step_by_step=step) for step in (False, True))
    assert paged.steps.equals(again.steps)
    steps = pd.DataFrame({"ideal": ideal.steps["duration"], "paged": paged.steps["duration"]})
    table = 20e-6 + 2 * 0.5e-6 + (1801 / 16 + 1) * 0.01e-6
    more = steps["paged"] - steps["ideal"]
    assert (more > 20e-6).all()
    assert more.iloc[-1] > table  # and attention is 2 % longer
    assert more.iloc[-1] < table + 0.02 * steps["ideal"].iloc[-1]


# ------------------------------------------------------------------------------------ the command


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["profile-memory", *map(str, arguments)])
    if isinstance(result.exception, InputError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_the_command_fits_what_is_there(folder: Path) -> None:
    code, output = run("fit", "--out", folder)
    assert code == 0
    assert "h2d pinned beside matrix" in output
    assert (folder / "memory.json").exists()
    code, output = run("fit", "--out", folder, "--json")
    assert json.loads(output)["mapping"] == [str(2 * MB)]


def test_what_the_command_refuses(tmp_path: Path) -> None:
    assert run("fit", "--out", tmp_path) == (
        2,
        f"{tmp_path}: no rows of memory systems (mapping, growth, transfer, recompute, layers, "
        "layers-column, paged.csv)",
    )
    code, message = run("speed", "--out", tmp_path)
    assert (code, message[:16]) == (2, "part is 'speed',")
    code, message = run("mapping", "--out", tmp_path)
    assert code == 2
    assert "no CUDA GPU on this machine" in message
    (tmp_path / "transfer.csv").write_text("direction,memory\nh2d,pinned\n")
    assert run("fit", "--out", tmp_path)[1].endswith("transfer.csv: misses the column beside")
    rows = transfer_rows()
    rows[3]["time_us"] = -1.0
    write_rows(tmp_path, "transfer", rows)
    assert "transfer.csv:5: time_us is -1.0, expected a time" in run("fit", "--out", tmp_path)[1]
    assert not (tmp_path / "memory.json").exists()


def test_costs_of_another_gpu_are_refused(folder: Path, costs: MemoryCosts) -> None:
    with pytest.raises(InputError, match="measured on 'h200', not on 'a100'"):
        find_memory_costs("a100", folder)
    code, message = run("fit", "--out", folder, "--gpu", "a100")
    assert (code, "measured on 'h200', not on 'a100'" in message) == (2, True)
