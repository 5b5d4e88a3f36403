"""`podsim profile --check` on copies of the shipped profile: sound, tampered with, incomplete."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from podsim import calibration
from podsim.errors import InputError
from podsim.hardware import GPUS, gpu_named
from podsim.model import model_named
from podsim.op_tables import LAYER_OPS
from podsim.profile import find_profile, kernels_hash, read_profile
from podsim.profile_checks import (
    Finding,
    check_profile,
    differing_parts,
    missing_rows,
    require_sound_rows,
)
from podsim.profile_plan import CEILINGS, ONCE_OPS, SUSTAINED_ENDS, Key, rows_sha256
from podsim.roofline import Ceilings, attention_work, layer_weight_bytes, op_work
from podsim.row_checks import ceiling_rates, ceilings_of, fault_of, name_of

SHIPPED = Path(__file__).parent.parent / "profiles" / "h200" / "llama-3-8b"
MODEL, GPU = model_named("llama-3-8b"), gpu_named("h200")
NUM_PARAMETERS_OF_A_LAYER = 4096 * 6144 + 4096 * 4096 + 3 * 4096 * 14336

RATES = {"matrix_rate": 830e12, "layer_matrix_rate": 820e12, "launch_latency": 0.0}


def table_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "measurements.csv", keep_default_na=False, dtype=str)


def write(folder: Path, table: pd.DataFrame) -> None:
    table.to_csv(folder / "measurements.csv", index=False)


def change(folder: Path, edit: Callable[[dict[str, object]], object]) -> None:
    """Edit profile.json."""
    path = folder / "profile.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def ceiling_rows() -> pd.DataFrame:
    """As an H200 gives them: 4.4 TB/s, 830 TFLOP/s, 54 GB/s to the host, 2.8 us a launch."""
    rows = []
    for name in CEILINGS:
        work = 1e12 if "matrix" in name else 0.0 if name == "launch_latency" else 4e9
        rate = {"host_to_device": 54e9, "device_to_host": 54e9, **RATES}.get(name, 4.4e12)
        microseconds = 2.8 if name == "launch_latency" else work / rate * 1e6
        rows.append(
            {
                **dict.fromkeys(("split", "prefills", "decodes", "sm_clock_mhz", "refused"), ""),
                **{"op": "ceiling", "strategy": name, "num_tokens": "0", "pass": "0"},
                **dict.fromkeys(("time_us", "time_p10_us", "time_p90_us"), f"{microseconds:.4f}"),
                **{"repeats": "18", "work": f"{work:.0f}"},
            }
        )
    return pd.DataFrame(rows)


@pytest.fixture
def sound(sound_profile: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    return Path(shutil.copytree(sound_profile, tmp_path / "profile"))


@pytest.fixture(scope="module")
def sound_profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped rows as this version would have left them: all that is checked is there."""
    folder = tmp_path_factory.mktemp("sound")
    table = table_of(SHIPPED)
    if "work" not in table.columns:
        table = table.assign(sm_clock_mhz="1755", work="", refused="")
    if not (table["op"] == "ceiling").any():
        published = Ceilings.published(GPU)
        faults = [fault_of(row, MODEL, GPU, published) for row in table.to_dict("records")]
        table["refused"] = faults
        table = pd.concat([ceiling_rows(), table], ignore_index=True)
    write(folder, table)
    content = json.loads((SHIPPED / "profile.json").read_text())
    keys = table[[*Key._fields, "pass"]].astype({"num_tokens": int, "pass": int})
    rows = {(Key(*row[:-1]), row[-1]) for row in keys.itertuples(index=False, name=None)}
    content["provenance"] |= {
        "kernels_sha256": kernels_hash(),
        "plan": {"rows": len(rows), "sha256": rows_sha256(iter(rows))},
    }
    (folder / "profile.json").write_text(json.dumps(content))
    calibration.refit(folder)
    return folder


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "podsim", "profile", "--check", str(folder)],
        capture_output=True,
        text=True,
    )


def faults(folder: Path) -> list[str]:
    """What a profile is refused for."""
    return [finding.text for finding in check_profile(folder) if finding.fault]


def test_a_sound_profile_passes(sound: Path) -> None:
    run = check(sound)
    assert run.stdout == f"{sound}: nothing wrong found\n"
    assert run.returncode == 0
    assert find_profile("h200", MODEL, sound).gpu == "h200"


@pytest.mark.parametrize(
    ("op", "num_tokens", "because"),
    [("gate_up", "1", "MB at the measured"), ("gate_up", "4096", "GFLOP at the measured"),
     ("rmsnorm", "1", "the shortest launch"), ("lm_head", "512", "GFLOP at the measured")],
)  # fmt: skip
def test_a_row_ten_times_too_fast_is_refused(
    sound: Path, op: str, num_tokens: str, because: str
) -> None:
    table = table_of(sound)
    index = table.index[(table["op"] == op) & (table["num_tokens"] == num_tokens)][0]
    for column in ("time_us", "time_p10_us", "time_p90_us"):
        table.loc[index, column] = f"{float(table.loc[index, column]) / 10:.4f}"
    write(sound, table)
    first, *_ = faults(sound)
    assert first.startswith(f"measurements.csv: line {index + 2}: {op} grid {num_tokens} tokens")
    assert "is faster than" in first
    assert because in first


def test_the_ceilings_alone_catch_nearly_every_row_ten_times_too_fast(sound: Path) -> None:
    rows = table_of(sound).to_dict("records")
    ceilings = ceilings_of(ceiling_rates(rows), GPU)
    timed = [row for row in rows if row["op"] != "ceiling" and not row["refused"]]
    columns = ("time_us", "time_p10_us", "time_p90_us")
    fast = [{**row, **{c: float(row[c]) / 10 for c in columns}} for row in timed]
    assert not any(fault_of(row, MODEL, GPU, ceilings) for row in timed)
    assert sum(bool(fault_of(row, MODEL, GPU, ceilings)) for row in fast) > 0.9 * len(fast)


def test_attention_ten_times_too_fast_is_refused(sound: Path) -> None:
    table = table_of(sound)
    index = table.index[(table["op"] == "attention") & (table["strategy"] == "pod")][0]
    table.loc[index, "time_us"] = f"{float(table.loc[index, 'time_us']) / 10:.4f}"
    write(sound, table)
    assert "attention pod" in faults(sound)[0]
    run = check(sound)
    assert run.returncode == 1
    first, *_, last = run.stdout.splitlines()
    assert first == f"REFUSED  {faults(sound)[0]}"
    assert last == f"{sound}: refused"


def test_a_row_three_times_too_fast_is_refused_for_its_other_pass(sound: Path) -> None:
    table = table_of(sound)
    index = table.index[(table["op"] == "attention") & (table["prefills"] == "512@512")][0]
    for column in ("time_us", "time_p10_us", "time_p90_us"):
        table.loc[index, column] = f"{float(table.loc[index, column]) / 3:.4f}"
    write(sound, table)
    assert any("the passes took" in text for text in faults(sound))


ROWS_TO_MISS = [
    *[(op, "", 0) for op in (*LAYER_OPS, *ONCE_OPS, "attention", "step", "launch", "duty")],
    *[(op, "", -1) for op in ("down", "sampling", "attention", "step", "launch", "duty")],
    *[("ceiling", name, 0) for name in CEILINGS],
    *[("sustained", f"{end:g} s", 0) for end in SUSTAINED_ENDS],
]


@pytest.mark.parametrize(("name", "turn"), [("llama-3-8b", 0), ("llama-3-70b-tp8", 1)])
def test_the_one_row_that_is_missing_is_named(name: str, turn: int) -> None:
    """Of every kind, in profiles whose plan is older than today's; nothing else is said."""
    folder = SHIPPED.parent / name
    profile, model = read_profile(folder, name), model_named("llama-3-8b")
    if name != "llama-3-8b":
        model = model_named("llama-3-70b").shard(8)
    rows = table_of(folder).to_dict("records")
    assert missing_rows(profile, model, GPU, rows) == []
    for op, strategy, which in ROWS_TO_MISS[turn::2]:
        fitting = [row for row in rows if row["op"] == op and strategy in ("", row["strategy"])]
        lost = fitting[which]
        rest = [row for row in rows if row is not lost]
        (finding,) = missing_rows(profile, model, GPU, rest)
        assert finding == Finding(f"measurements.csv: missing: {name_of(lost)}", fault=True)
        (finding,) = missing_rows(profile, model, GPU, [*rows, lost])
        planned = f"measurements.csv: not among what was planned: {name_of(lost)}"
        assert finding == Finding(planned, fault=True)


def test_a_missing_row_is_refused(sound: Path) -> None:
    table = table_of(sound)
    index = table.index[(table["op"] == "down") & (table["num_tokens"] == "1024")][1]
    write(sound, table.drop(index=index))
    run = check(sound)
    assert run.returncode == 1
    assert "REFUSED  measurements.csv: missing: down grid 1024 tokens pass 1\n" in run.stdout
    assert run.stdout.count("missing: ") == 1


def test_a_missing_point_is_missed(sound: Path) -> None:
    table = table_of(sound)
    write(sound, table[~((table["op"] == "down") & (table["num_tokens"] == "704"))])
    missing = [text for text in faults(sound) if "missing" in text]
    assert missing == [
        f"measurements.csv: missing: down grid 704 tokens pass {number}" for number in (0, 1)
    ]


def test_rows_of_a_plan_that_does_not_begin_todays_are_counted(sound: Path) -> None:
    table = table_of(sound)
    kept = table[(table["op"] != "attention") | (table["strategy"] != "streams")]
    write(sound, kept)
    keys = kept[[*Key._fields, "pass"]].astype({"num_tokens": int, "pass": int})
    rows = [(Key(*row[:-1]), row[-1]) for row in keys.itertuples(index=False, name=None)]
    plan = {"rows": len(rows), "sha256": rows_sha256(iter(rows))}
    change(sound, lambda content: content["provenance"].update(plan=plan))  # type: ignore[attr-defined]
    profile, records = read_profile(sound, ""), kept.to_dict("records")
    assert missing_rows(profile, MODEL, GPU, records) == []
    (finding,) = missing_rows(profile, MODEL, GPU, records[1:])
    assert finding.text == (
        f"measurements.csv: {len(rows) - 1} rows are not the {len(rows)} that were measured"
    )


@pytest.mark.parametrize("name", CEILINGS)
def test_a_ceiling_ten_times_too_fast_is_refused(sound: Path, name: str) -> None:
    table = table_of(sound)
    index = table.index[table["strategy"] == name][0]
    for column in ("time_us", "time_p10_us", "time_p90_us"):
        table.loc[index, column] = f"{float(table.loc[index, column]) / 10:.4f}"
    write(sound, table)
    with pytest.raises(InputError, match=rf"measurements\.csv: line {index + 2}: ceiling {name}"):
        require_sound_rows(sound)
    assert any(f"provenance.ceilings.{name} is" in text for text in faults(sound))


def test_a_ceiling_that_its_row_does_not_give_is_refused(sound: Path) -> None:
    ceilings = read_profile(sound, "").provenance["ceilings"]
    assert isinstance(ceilings, dict)

    def edit(content: dict[str, object]) -> None:
        content["provenance"]["ceilings"]["matrix_rate"] *= 10  # type: ignore[index]

    change(sound, edit)
    measured = ceilings["matrix_rate"]
    assert faults(sound) == [
        f"profile.json: provenance.ceilings.matrix_rate is {measured * 10}, "
        f"its rows give {measured:.6g}"
    ]


def test_the_link_to_the_host_is_no_faster_than_published() -> None:
    assert GPU.host_bandwidth == 64e9
    assert {name: gpu.pcie_generation for name, gpu in GPUS.items()} == {
        "h200": 5, "h100": 5, "h100-pcie": 5, "a100": 4, "l40s": 4, "b200": 6
    }  # fmt: skip


def test_another_gpu_is_refused_by_whichever_name_was_changed(sound: Path) -> None:
    change(sound, lambda content: content["provenance"].update(device_name="NVIDIA A100"))  # type: ignore[attr-defined]
    assert faults(sound) == [
        "profile.json: gpu 'h200' is 'NVIDIA H200', but it was measured on 'NVIDIA A100'"
    ]
    change(sound, lambda content: content.update(gpu="mi300x"))
    assert faults(sound)[0].startswith("profile.json: gpu 'mi300x' is not known; known: ")


def test_other_kernels_are_refused(sound: Path) -> None:
    change(sound, lambda content: content["provenance"].update(kernels_sha256="0" * 64))  # type: ignore[attr-defined]
    assert faults(sound)[0].startswith("profile.json: of kernels 000000000000, installed are ")


def test_a_profile_that_is_not_the_fit_of_its_rows_is_refused(sound: Path) -> None:
    def edit(content: dict[str, object]) -> None:
        coefficients = content["attention"]["coefficients"]["pod"]  # type: ignore[index]
        coefficients[coefficients.index(max(coefficients))] *= 1.01

    change(sound, edit)
    assert faults(sound) == [
        "profile.json: attention.coefficients.pod is not what a fit of its rows gives"
    ]


@pytest.mark.parametrize(
    ("path", "by"),
    [("clock_sensitivity.pod.turn", 1.001), ("clock_sensitivity.pod.low", 1.001),
     ("clock_sensitivity.products.steepness", 1.001), ("sustained.rest", 1.001),
     ("sustained.at_limit", 0.999), ("launch.graph", 1.001)],
)  # fmt: skip
def test_a_number_that_was_tampered_with_a_little_is_refused(
    sound: Path, path: str, by: float
) -> None:
    *parts, last = path.split(".")

    def edit(content: dict[str, object]) -> None:
        inner: dict[str, float] = content  # type: ignore[assignment]
        for part in parts:
            inner = inner[part]  # type: ignore[assignment]
        inner[last] *= by

    change(sound, edit)
    assert f"profile.json: {path} is not what a fit of its rows gives" in faults(sound)


def test_a_cell_of_a_table_that_was_tampered_with_is_refused(sound: Path) -> None:
    def edit(content: dict[str, object]) -> None:
        content["attention"]["overlap"]["pod"]["by_waves"][3][2] += 1e-5  # type: ignore[index]
        content["ops"]["down"]["seconds"][7] *= 1.0001  # type: ignore[index]

    change(sound, edit)
    assert faults(sound) == [
        "profile.json: attention.overlap.pod is not what a fit of its rows gives",
        "profile.json: ops.down.seconds is not what a fit of its rows gives",
    ]


@pytest.mark.parametrize("path", ["ops.qkv", "ops.qkv.roofline"])
def test_a_number_in_the_place_of_a_table_is_one_line(sound: Path, path: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            content = content[name]
        content[last] = 5

    change(sound, edit)
    where = f"{sound / 'profile.json'}: {path} is 5, expected a table"
    with pytest.raises(InputError, match=f"^{re.escape(where)}$"):
        read_profile(sound, str(sound))


@pytest.mark.parametrize("model", ["llama-2-7b", "llama-3-70b-tp8"])
def test_a_fit_on_another_machine_is_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose arithmetic rounds otherwise: by far less than a part in 10^12."""
    read = calibration._read_passes
    rng = np.random.default_rng(0)

    def rounded_otherwise(path: Path) -> pd.DataFrame:
        rows = read(path)
        return rows.assign(time_us=rows["time_us"] * (1 + 1e-12 * rng.standard_normal(len(rows))))

    folder = SHIPPED.parent / model
    old = read_profile(folder, str(folder))
    shape = calibration.model_of(old)
    here = calibration.fit(folder, old.gpu, shape, old.provenance)
    monkeypatch.setattr(calibration, "_read_passes", rounded_otherwise)
    there = calibration.fit(folder, old.gpu, shape, old.provenance)
    assert here.clock_sensitivity != there.clock_sensitivity
    assert differing_parts(here, there) == []


def test_a_broken_table_in_the_profile_is_named(sound: Path) -> None:
    def edit(content: dict[str, object]) -> None:
        content["ops"]["down"]["seconds"][0] = -1.0  # type: ignore[index]

    change(sound, edit)
    assert faults(sound) == ["profile.json: ops.down: a time is not over 0"]


def test_a_median_outside_its_own_spread_is_refused(sound: Path) -> None:
    table = table_of(sound)
    index = table.index[table["op"] == "down"][0]
    table.loc[index, "time_us"] = f"{float(table.loc[index, 'time_p90_us']) * 1.2:.4f}"
    write(sound, table)
    assert any("does not lie between its P10 and P90" in text for text in faults(sound))


def test_what_an_older_profile_lacks_is_said(sound: Path) -> None:
    table = table_of(sound)
    table = table[(table["op"] != "ceiling") & (table["refused"] == "")]
    write(sound, table.drop(columns=["sm_clock_mhz", "work", "refused"]))
    change(sound, lambda content: content["provenance"].pop("plan"))  # type: ignore[attr-defined]
    lines = check(sound).stdout.splitlines()
    lacking = [line.removeprefix("lacks").strip() for line in lines if line.startswith("lacks")]
    assert lacking == [
        "no measured ceilings: checked against the published peaks",
        "no clock of its rows",
        "no record of its plan: checked against the plan of this version",
    ]


def refit(folder: Path, file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """`podsim profile --refit`, on a disk on which no file can grow beyond so many bytes."""

    def limit() -> None:
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    command = [sys.executable, "-m", "podsim", "profile", "--refit", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("file_bytes", "stops_at"), [(40_000, "profile.json"), (None, "plots")])
def test_a_refit_that_cannot_be_written_leaves_every_file_whole(
    sound: Path, file_bytes: int | None, stops_at: str
) -> None:
    if stops_at == "plots":
        (sound / "plots").write_text("in the way of the folder")
    before = bytes_of(sound)
    run = refit(sound, file_bytes)
    assert run.returncode == 2
    assert run.stderr.startswith(f"podsim: {sound}/{stops_at}: cannot be written: ")
    assert run.stderr.count("\n") == 1
    assert bytes_of(sound) == before


def test_a_refit_refuses_rows_that_the_check_refuses(sound: Path) -> None:
    table = table_of(sound)
    index = table.index[table["op"] == "qkv"][0]
    for column in ("time_us", "time_p10_us", "time_p90_us"):
        table.loc[index, column] = f"{float(table.loc[index, column]) / 10:.4f}"
    write(sound, table)
    before = bytes_of(sound)
    run = refit(sound)
    assert run.returncode == 2
    found = next(text for text in faults(sound) if "is faster than" in text)
    assert run.stderr.startswith(f"podsim: {sound}/{found}")
    assert run.stderr.count("\n") == 1
    assert bytes_of(sound) == before


@pytest.mark.parametrize("column", ["num_tokens", "pass", "time_p10_us"])
def test_a_cell_that_is_no_number_is_one_line(sound: Path, column: str) -> None:
    table = table_of(sound)
    table.loc[40, column] = "many"
    write(sound, table)
    run = check(sound)
    assert run.returncode == 2
    where = f"{sound}/measurements.csv: line 42"
    assert run.stderr == f"podsim: {where}: {column} is 'many', expected a number\n"


def test_a_record_of_the_plan_that_says_nothing_is_refused(sound: Path) -> None:
    change(sound, lambda content: content["provenance"].update(plan={"rows": "all"}))  # type: ignore[attr-defined]
    (text,) = faults(sound)
    assert text.endswith("rows are not the all that were measured")


def test_a_folder_without_a_profile_is_one_line(tmp_path: Path) -> None:
    run = check(tmp_path)
    assert run.returncode == 2
    assert run.stderr == f"podsim: {tmp_path}/profile.json: No such file or directory\n"


def test_least_times_are_what_one_works_out_by_hand() -> None:
    assert layer_weight_bytes(MODEL) == 2 * NUM_PARAMETERS_OF_A_LAYER
    kept = 1 - GPU.l2_bytes / layer_weight_bytes(MODEL)
    gate_up = op_work(MODEL, GPU, "gate_up", 1)
    assert gate_up.flops == 2 * 4096 * 2 * 14336
    assert gate_up.bytes == pytest.approx(2 * 4096 * 2 * 14336 * kept)
    # 64 decodes of 8192: 2 GiB of keys and values but what the L2 keeps; 32 heads of 128.
    decode = attention_work(MODEL, GPU, (), [8192] * 64)
    keys_and_values = 64 * 8192 * 2 * 2 * 8 * 128
    assert keys_and_values * 0.96 < decode.bytes < keys_and_values
    assert decode.flops == 4 * 32 * 128 * 64 * 8192
    # A causal prompt sees half of the square, and its diagonal.
    assert attention_work(MODEL, GPU, [(4, 4)], []).flops == 4 * 32 * 128 * (4 + 3 + 2 + 1)
    assert attention_work(MODEL, GPU, [(2, 5)], []).flops == 4 * 32 * 128 * (5 + 4)
    # An activation that fits the L2 costs no device memory.
    assert op_work(MODEL, GPU, "rmsnorm", 1000).bytes == 0.0
    assert op_work(MODEL, GPU, "rmsnorm", 8192).bytes == 8 * 4096 * 8192 - GPU.l2_bytes
    least = Ceilings(flops=1e15, bandwidth=1e12, launch=1e-6, measured=True)
    assert least.least_seconds(gate_up) == gate_up.bytes / 1e12


def test_every_gpu_of_a_shipped_profile_is_known() -> None:
    for folder in SHIPPED.parent.parent.iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            assert folder.name in GPUS
