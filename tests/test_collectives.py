"""Collectives: what is measured, what is made of it, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from podsim import collective_calibration as calibration
from podsim.collective_calibration import LARGEST, SMALLEST, CollectivePoint, collective_points
from podsim.collectives import (
    ALL_GATHER,
    ALL_REDUCE,
    COLLECTIVES,
    MessageTimes,
    find_collectives,
    read_collectives,
)
from podsim.errors import InputError
from podsim.hardware import GPUS, gpu_named

H200 = gpu_named("h200")
PROVENANCE = {"NCCL_NVLS_ENABLE": "0", "command": "podsim profile-collectives"}
SHIPPED = sorted((Path(__file__).parent.parent / "profiles").glob("*/collectives"))

Rows = list[dict[str, object]]


def seconds_of(op: str, num_gpus: int, num_bytes: int) -> float:
    """A machine with 12 us of latency and links that are used to 80 %."""
    times = 2 if op == ALL_REDUCE else 1
    return 12e-6 + times * (num_gpus - 1) / num_gpus * num_bytes / (0.8 * 450e9)


def rows_of(*counts: int) -> Rows:
    """Rows as the machine above would give them, a little slower in one pass of three."""
    return [
        {
            **{"op": point.op, "num_gpus": count, "bytes": point.num_bytes, "split": point.split},
            **{"pass": number, "calls": 48, "repeats": 11},
            "time_us": seconds_of(point.op, count, point.num_bytes) * 1e6 * factor,
        }
        for count in counts
        for number, factor in enumerate((1.0, 1.3, 1.0))
        for point in collective_points(count)
    ]


def written(folder: Path, *counts: int) -> Path:
    folder.mkdir(exist_ok=True)
    calibration.write(folder, rows_of(*counts), H200, PROVENANCE)
    return folder


# -------------------------------------------------------------------------------------- points


@pytest.mark.parametrize("num_gpus", [2, 3, 4, 8])
def test_the_points_cover_the_sizes_and_hold_others_out(num_gpus: int) -> None:
    points = collective_points(num_gpus)
    assert points == collective_points(num_gpus)
    for op in COLLECTIVES:
        grid, held_out = (
            [p.num_bytes for p in points if p.op == op and p.split == split]
            for split in ("grid", "held_out")
        )
        assert SMALLEST - 2 * num_gpus < grid[0] <= SMALLEST
        assert LARGEST - 2 * num_gpus < grid[-1] <= LARGEST
        assert grid == sorted(grid)
        assert all(after <= 1.26 * before for before, after in pairwise(grid))
        if num_gpus != 3:
            assert {SMALLEST << octave for octave in range(16)} <= set(grid)
        assert len(held_out) == calibration.NUM_HELD_OUT
        assert not set(held_out) & set(grid)
        assert grid[0] < min(held_out) <= max(held_out) <= grid[-1]
        # Each GPU holds a whole number of bf16 values of a gathered message.
        share = num_gpus if op == ALL_GATHER else 1
        assert all(size % (2 * share) == 0 for size in grid + held_out)


# ----------------------------------------------------------------------------------------- fit


def test_times_are_straight_between_the_measured_sizes() -> None:
    times = MessageTimes([100, 200, 400], [1.0, 3.0, 4.0], latency=0.5, seconds_per_byte=1 / 128)
    sizes = (100, 200, 400, 150, 300)
    assert [times.at(size) for size in sizes] == pytest.approx([1.0, 3.0, 4.0, 2.0, 3.5])
    # Beyond them, the line goes on from there.
    assert times.at(36) == pytest.approx(1.0 - 64 / 128)
    assert times.at(400 + 256) == pytest.approx(4.0 + 256 / 128)


def test_the_fit_finds_latency_and_bandwidth_again(tmp_path: Path) -> None:
    found = read_collectives(written(tmp_path, 2, 4), "here")
    assert found.gpu_counts == [2, 4]
    for op in COLLECTIVES:
        for num_gpus in (2, 4):
            times = found.times(op, num_gpus)
            for size in (SMALLEST, 3 * 12345, 10**6, LARGEST):
                # Rows and times are kept to a tenth of a nanosecond.
                assert times.at(size) == pytest.approx(seconds_of(op, num_gpus, size), rel=1e-5)
            beyond = seconds_of(op, num_gpus, 2 * LARGEST)
            assert times.at(2 * LARGEST) == pytest.approx(beyond, rel=1e-4)
            of_line = seconds_of(op, num_gpus, 0), seconds_of(op, num_gpus, 10**6)
            assert times.latency == pytest.approx(of_line[0], rel=1e-3)
            per_byte = (of_line[1] - of_line[0]) / 10**6
            assert times.seconds_per_byte == pytest.approx(per_byte, rel=1e-3)
            error = found.errors[f"{op}, {num_gpus} GPUs"]
            assert error["points"] == calibration.NUM_HELD_OUT
            assert error["worst"] < 1e-4


def test_held_out_sizes_are_not_fitted_on(tmp_path: Path) -> None:
    rows = rows_of(2)
    for row in rows:
        if row["split"] == "held_out" and row["op"] == ALL_GATHER:
            row["time_us"] = float(str(row["time_us"])) / 0.9
    error = calibration.write(tmp_path, rows, H200, PROVENANCE).errors
    assert error["all_gather, 2 GPUs"]["median"] == pytest.approx(0.1, abs=1e-3)
    assert error["all_gather, 2 GPUs"]["bias"] == pytest.approx(-0.1, abs=1e-3)
    assert error["all_reduce, 2 GPUs"]["worst"] < 1e-4


def test_refitting_gives_the_same_bytes(tmp_path: Path) -> None:
    before = (written(tmp_path, 2, 4) / "collectives.json").read_bytes()
    calibration.refit(tmp_path, GPUS)
    assert (tmp_path / "collectives.json").read_bytes() == before
    assert json.loads(before)["provenance"]["NCCL_NVLS_ENABLE"] == "0"


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_times_are_the_fit_of_possible_rows(folder: Path, tmp_path: Path) -> None:
    for name in ("measurements.csv", "collectives.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    calibration.refit(tmp_path, GPUS)
    assert (tmp_path / "collectives.json").read_bytes() == (
        folder / "collectives.json"
    ).read_bytes()
    shipped = read_collectives(folder, folder.parent.name)
    for fact in ("device_name", "driver", "torch", "nccl", "cuda", "date", "command"):
        assert shipped.provenance[fact]
    for name, error in shipped.errors.items():
        assert error["median"] <= 0.05, name


# ------------------------------------------------------------------------------------ refusals


def tampered(folder: Path, change: str) -> str:
    """What refuses the folder's rows after a change of one of them."""
    path = written(folder, 2) / "measurements.csv"
    table = pd.read_csv(path)
    first = table.index[(table["op"] == ALL_REDUCE) & (table["bytes"] == LARGEST)][0]
    small = table.index[(table["op"] == ALL_REDUCE) & (table["bytes"] == SMALLEST)]
    if change == "large and fast":
        table.loc[first, "time_us"] /= 10
    elif change == "small and fast":
        table.loc[small, "time_us"] /= 10
    elif change == "missing":
        table = table.drop(index=first)
    elif change == "negative":
        table.loc[first, "time_us"] *= -1
    elif change == "unknown":
        table.loc[first, "op"] = "broadcast"
    elif change == "no column":
        table = table.drop(columns="time_us")
    elif change == "no number":
        table["time_us"] = table["time_us"].astype(object)
        table.loc[first, "time_us"] = "soon"
    elif change == "no grid":
        table = table[table["split"] == "held_out"]
    table.to_csv(path, index=False)
    with pytest.raises(InputError) as refusal:
        calibration.refit(folder, GPUS)
    assert str(path) in str(refusal.value)
    return str(refusal.value).removeprefix(f"{path}:").strip()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ("large and fast", "62: all_reduce of 268435456 bytes among 2 GPUs took 75.8 us, but"),
        ("small and fast", "all_reduce, 2 GPUs: 8192 bytes took 1.2 us, but 10240 bytes 12.0 us"),
        ("missing", "all_reduce, 2 GPUs: 2 rows of 268435456 bytes, expected 3"),
        ("negative", "62: a time, size or number of GPUs cannot be"),
        ("unknown", "62: op is 'broadcast', expected all_reduce or all_gather"),
        ("no column", "misses the column time_us"),
        ("no number", "not a table of measurements: could not convert string to float: 'soon'"),
        ("no grid", "all_reduce, 2 GPUs: too few rows of the grid, or none held out"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path: Path, change: str, refusal: str) -> None:
    assert refusal in tampered(tmp_path, change)


def test_times_of_another_gpu_or_number_of_gpus_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "times", 2, 4)
    assert find_collectives("h200", 4, folder).gpu_counts == [2, 4]
    with pytest.raises(InputError, match="measured on 'h200', not on 'a100'"):
        find_collectives("a100", 2, folder)
    with pytest.raises(
        InputError,
        match=r"among 2, 4 GPUs, not 8; measure them with `podsim profile-collectives --gpu h200 "
        r"--gpus 8 --out FOLDER`",
    ):
        find_collectives("h200", 8, folder)
    with pytest.raises(InputError, match="no times of collectives on a100 are shipped; measure"):
        find_collectives("a100", 2)
    with pytest.raises(InputError, match=r"profiles/h200/collectives.*among 2, 4 GPUs, not 8; "):
        find_collectives("h200", 8)


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("{", "not podsim's times"),
        ("[]", "not podsim's times"),
        ('{"schema": 9}', "schema 9, this podsim reads 2"),
        ('{"schema": 2, "gpu": "h200"}', "not podsim's times"),
        (
            '{"schema": 2, "gpu": "h200", "provenance": {}, "errors": {}, '
            '"tables": {"all_reduce": {"2": {}}, "all_gather": {}}}',
            "not podsim's times",
        ),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, refusal: str) -> None:
    (tmp_path / "collectives.json").write_text(text)
    with pytest.raises(InputError, match=refusal) as found:
        find_collectives("h200", 2, tmp_path)
    assert str(tmp_path / "collectives.json") in str(found.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere/collectives\.json: No such file"):
        find_collectives("h200", 2, tmp_path / "nowhere")


# ------------------------------------------------------------------------------------ measuring


def test_processes_measure_every_point_among_every_number_of_them() -> None:
    """On the CPU, where gloo stands in for NCCL; two of three processes are a group too."""
    pytest.importorskip("torch.distributed")
    from podsim import measure_collectives

    points = {
        2: [CollectivePoint(ALL_REDUCE, 1 << 20, "grid"), CollectivePoint(ALL_GATHER, 64, "grid")],
        3: [CollectivePoint(ALL_GATHER, 600, "held_out")],
    }
    progress: list[tuple[int, int]] = []
    rows = measure_collectives.measure(
        points, lambda done, total: progress.append((done, total)), "gloo"
    )
    passes = measure_collectives.PASSES
    found = [(row["num_gpus"], row["op"], row["bytes"], row["pass"]) for row in rows]
    assert sorted(map(str, found)) == sorted(
        str((count, point.op, point.num_bytes, number))
        for count, listed in points.items()
        for point in listed
        for number in range(passes)
    )
    assert progress[-1] == (3 * passes, 3 * passes)
    for row in rows:
        times = [float(str(row[f"time{part}_us"])) for part in ("_p10", "", "_p90")]
        assert 0 < times[0] <= times[1] <= times[2]
        assert row["calls"] == 48
    assert set(calibration.COLUMNS) == set(rows[0])


def test_large_messages_are_called_less_often() -> None:
    torch = pytest.importorskip("torch")
    from podsim.measure_collectives import Message

    class Group:
        def size(self) -> int:
            return 4

    calls = {}
    for num_bytes in (SMALLEST, 4 << 20, LARGEST):
        buffer = torch.empty(num_bytes // 2, dtype=torch.bfloat16)
        point = CollectivePoint(ALL_GATHER, num_bytes, "grid")
        calls[num_bytes] = Message(point, Group(), buffer, buffer).num_calls
    assert calls == {SMALLEST: 48, 4 << 20: 16, LARGEST: 4}


@pytest.mark.parametrize("text", ["two", "1", "1,2", "", "2,,4", "0", "-2"])
def test_numbers_of_gpus_that_cannot_be_are_refused(text: str) -> None:
    pytest.importorskip("torch")
    from podsim.measure_collectives import parsed_counts

    assert parsed_counts("4,2,4") == [2, 4]
    with pytest.raises(InputError, match="expected numbers of at least 2, such as 2,4"):
        parsed_counts(text)
