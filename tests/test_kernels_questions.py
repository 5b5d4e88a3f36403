"""`podsim kernels questions`: its batches, its tables by hand, and a whole run interpreted."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from podsim import kernel_questions, questions_command, questions_report
from podsim.cli import app
from podsim.errors import InputError
from podsim.kernel_questions import PARTS, fixed_splits
from podsim.kernel_workloads import HEADS, KV_BYTES, LAYERS, uniform_workload

torch = pytest.importorskip("torch", reason="the kernels need torch")
pytest.importorskip("triton", reason="the kernels need triton")
pytest.importorskip("pynvml", reason="the command needs nvidia-ml-py")

# The interpreter of Triton before 3.9 converts arrays in a way that NumPy deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")

ROOT = Path(__file__).parent.parent
MACHINE = {"device_name": "Fake GPU", "driver": "1.2", "kernels_sha256": "abc", "date": "today"}

# ---- the batches


@pytest.mark.parametrize(("part", "kernels"), list(itertools.product(PARTS, ("triton", "hopper"))))
def test_batches_and_variants_have_names_of_their_own(part: str, kernels: str) -> None:
    cases = PARTS[part](kernels)
    names = [case.workload.name for case in cases]
    assert len(set(names)) == len(names)
    for case in cases:
        variants = [variant.name for variant in case.variants]
        assert len(set(variants)) == len(variants)
        assert {variant.config.kernels for variant in case.variants} <= {kernels, "triton"}


def test_the_sweep_is_that_of_fig_11_filled_to_the_kv_memory() -> None:
    cases = PARTS["sweep"]("triton")
    assert {case.about["model"] for case in cases} == {"Llama-3-8B", "Llama-2-7B", "Yi-6B"}
    assert {case.about["context"] for case in cases} == {4096, 8192, 12288, 16384, 20480}
    assert {case.about["chunk"] for case in cases} == {512, 1024, 2048}
    for case in cases:
        used = case.workload.kv_bytes * LAYERS / KV_BYTES
        assert 0.8 < used <= 1  # the shares 0.9, 0.95 and 1, down to whole requests
    prompts = {
        c.about["prompt"] for c in cases if (c.about["context"], c.about["chunk"]) == (4096, 512)
    }
    assert prompts == {3 * 512, 6 * 512, 8 * 512}


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("decodes", [1, 54, 200])
def test_fixed_splits_do_not_depend_on_the_batch(count: int, decodes: int) -> None:
    from podsim.kernels.plan import Decode, work_lists

    config = fixed_splits(
        uniform_workload(HEADS["Yi-6B"], 512, 16384, decodes, 16384).config("serial", "hopper"),
        16384,
        count,
    )
    lists = work_lists(
        [],
        [Decode(16384, slot) for slot in range(decodes)],
        group=8,
        pack=8,
        num_kv_heads=4,
        num_sms=132,
        config=config,
    )
    assert len(lists.splits) == count * decodes


RESOURCES = """
import json, sys
sys.path.insert(0, "tests")
import podsim
podsim.__path__.append(".")
import test_kernels_compile as compile
from podsim.kernel_questions import PARTS
found = {}
for variant in PARTS["tiles"]("hopper")[0].variants:
    name = variant.strategy
    if name != "pod":
        continue
    kernels = variant.config.kernels
    compiled = compile.compile_hopper if kernels == "hopper" else compile.compile_triton
    binary = compiled(name, compile.Kernel(name, kernels), variant.config)
    found[variant.name] = compile.resource_usage(binary.asm["cubin"]) | {
        "smem": binary.metadata.shared, "warps": variant.config.prefill.num_warps
    }
print(json.dumps(found))
"""


def test_pod_tiles_fit_an_sm_without_spills_as_often_as_they_say(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", RESOURCES],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=Path(__file__).parent.parent,
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 9
    for name, usage in found.items():
        assert (usage["stack"], usage["local"]) == (0, 0), name
        assert usage["smem"] <= 227 * 1024, name
        if name.startswith("portable pod: "):
            registers = -(-usage["registers"] // 8) * 8 * 32 * usage["warps"]
            fit = min(65536 // registers, 228 * 1024 // (usage["smem"] + 1024))
            assert name.split()[2] == str(fit), name


# ---- the tables, by hand


def rows_of(part: str, batches: dict[str, tuple[dict[str, Any], dict[str, Any]]]) -> pd.DataFrame:
    """Three rounds of each kernel, too fast, right, too slow; as they are read from a file."""
    rows = [
        {"workload": name, "kernel": kernel, "mode": "burst", "round": i, "sm_clock_hz": 1.5e9}
        | about
        | (seconds if isinstance(seconds, dict) else {"seconds": seconds})
        for name, (about, times) in batches.items()
        for kernel, seconds in times.items()
        for i in range(3)
    ]
    frame = pd.DataFrame(rows)
    frame["seconds"] *= frame["round"].map({0: 0.5, 1: 1.0, 2: 3.0})
    for name in questions_report.OF_PART[part]:
        frame[name] = frame[name].astype(object).fillna("") if name in frame else ""
    return frame


def sweep_rows() -> pd.DataFrame:
    about = {"model": "Yi-6B", "context": 8192, "chunk": 512, "prompt": 512, "decodes": 9}
    even = {"prefill": 5e-4, "decode": 5e-4, "serial": 1e-3, "streams": 8e-4} | {
        "unified": 1.25e-3,
        "pod": 6.25e-4,
    }
    uneven = {"prefill": 1e-4, "decode": 9e-4, "serial": 1e-3, "streams": 1e-3} | {
        "unified": 1e-3,
        "pod": 1.25e-3,
    }
    return rows_of("sweep", {"even": (about, even), "uneven": (about, uneven)})


def test_sweep_says_where_pod_pays() -> None:
    found = questions_report.sweep_results(sweep_rows())
    assert found["prefill share"].tolist() == pytest.approx([0.5, 0.1])
    assert found["pod"].tolist() == pytest.approx([1.6, 0.8])
    assert found["oracle"].tolist() == pytest.approx([2.0, 1 / 0.9])
    speedups, by_share, often = questions_report.sweep_tables(sweep_rows()).values()
    assert speedups[["batches", "number", "pod"]].to_numpy().tolist() == [
        ["Yi-6B", 1, "1.60 (1.60 to 1.60)"],
        ["each side at least 20%", 1, "1.60 (1.60 to 1.60)"],
        ["all", 2, "1.20 (0.80 to 1.60)"],
    ]
    assert by_share["prefill's share"].tolist() == ["10% to 20%", "50% to 60%"]
    assert often.iloc[-1].tolist() == ["all", "50%", "50%", "0%"]


def stairs_rows() -> pd.DataFrame:
    """Whole decodes need another wave at 34 and 67; split ones take a microsecond each."""
    batches = {
        f"{count}x": (
            {"decodes": count},
            {"decode": count * 1e-6, "decode, whole": waves * 3e-5, "serial": 1e-4},
        )
        for count in range(30, 70)
        for waves in [-(-count // 33)]
    }
    return rows_of("quantization", batches)


def test_quantization_finds_the_step() -> None:
    (table,) = questions_report.quantization_tables(stairs_rows()).values()
    split, whole, _ = table.to_dict("records")
    assert whole["largest step"] == "33 to 34: +100.0%"
    assert whole["54 to 55"] == "+0.0%"
    assert split["54 to 55"] == "+1.9%"
    assert split["largest step"] == "30 to 31: +3.3%"
    assert (split["ms at 30"], whole["ms at 69"]) == ("0.030", "0.090")


def tiles_rows() -> pd.DataFrame:
    def tile(name: str, seconds: float) -> dict[str, object]:
        return {"family": "pod", "tile": name, "seconds": seconds}

    return rows_of(
        "tiles",
        {
            "short": (
                {"context": 1024, "decodes": 8},
                {"pod: a": tile("a", 1e-4), "pod: b": tile("b", 2e-4), "serial": 3e-4},
            ),
            "long": (
                {"context": 8192, "decodes": 8},
                {"pod: a": tile("a", 3e-4), "pod: b": tile("b", 2e-4), "serial": 3e-4},
            ),
        },
    )


def test_tiles_are_compared_within_their_kernel() -> None:
    (table,) = questions_report.tiles_tables(tiles_rows()).values()
    assert table.to_numpy().tolist() == [
        ["pod", "a", "1.25 (1.00 to 1.50)", "1.00", "1.50", 1],
        ["pod", "b", "1.50 (1.00 to 2.00)", "2.00", "1.00", 1],
    ]


def policies_rows() -> pd.DataFrame:
    times = {"prefill": 5e-4, "decode": 5e-4, "serial": 1e-3, "unified": 1e-3}
    return rows_of(
        "policies", {"batch": ({}, times | {"pod": 8e-4, "pod, 50:50": 5e-4, "streams": 1e-3})}
    )


def test_policies_are_compared_with_serial_and_with_pod() -> None:
    summary, each = questions_report.policies_tables(policies_rows()).values()
    assert summary.to_numpy().tolist() == [
        ["pod, 50:50", "2.00 (2.00 to 2.00)", "1.60 (1.60 to 1.60)", 1],
        ["pod", "1.25 (1.25 to 1.25)", "1.00 (1.00 to 1.00)", 0],
        ["streams", "1.00 (1.00 to 1.00)", "0.80 (0.80 to 0.80)", 0],
    ]
    assert each.to_numpy().tolist() == [["batch", "2.00", "1.25", "1.00"]]


def split_rows() -> pd.DataFrame:
    def splits(count: int, seconds: float) -> dict[str, object]:
        return {"side": "pod", "knob": "splits a decode", "value": count, "seconds": seconds}

    usual = {"side": "pod", "seconds": 2e-4}
    decode = {"side": "decode", "seconds": 1e-4}
    about = {"context": 4096, "decodes": 8}
    times = {"decode": decode, "pod": usual, "pod, 1": splits(1, 3e-4), "pod, 2": splits(2, 2e-4)}
    return rows_of("split", {"8x4096": (about, times)})


def test_splits_are_compared_with_the_configuration_as_it_is() -> None:
    (table,) = questions_report.split_tables(split_rows()).values()
    assert list(table) == ["knob", "value", "8x4096"]
    assert table.to_numpy().tolist() == [
        ["splits a decode", 1, "1.50"],
        ["splits a decode", 2, "1.00"],
    ]


ROWS = {
    "sweep": sweep_rows,
    "quantization": stairs_rows,
    "tiles": tiles_rows,
    "policies": policies_rows,
    "split": split_rows,
}


def write_rows(folder: Path, parts: tuple[str, ...] = tuple(ROWS)) -> Path:
    folder.mkdir()
    for part in parts:
        ROWS[part]().to_csv(folder / f"{part}.csv", index=False)
        (folder / f"{part}.json").write_text(json.dumps(MACHINE))
    return folder


def podsim(*arguments: object) -> str:
    """What the command prints, or why it refuses."""
    run = CliRunner().invoke(app, ["kernels", "questions", *map(str, arguments)])
    if isinstance(run.exception, InputError):
        return str(run.exception)
    assert run.exception is None, run.exception
    return run.stdout


def test_from_rows_the_same_tables_and_figures_every_time(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    for name in ("once", "again"):
        printed = podsim("--from", rows, "--out", tmp_path / name)
        assert "| Yi-6B | 1 | 1.25 (1.25 to 1.25) | 0.80 (0.80 to 0.80) | 1.60" in printed
        assert "Fake GPU" in printed
    for part in ROWS:
        for suffix in ("txt", "png"):
            file = f"{part}.{suffix}"
            assert (tmp_path / "once" / file).read_bytes() == (
                tmp_path / "again" / file
            ).read_bytes()
    assert len(list((tmp_path / "once").iterdir())) == 2 * len(ROWS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("0.0005,", "fast,"), r"sweep.csv:2: seconds is 'fast', expected a positive number"),
        (("0.0005,", "0.0,"), r"sweep.csv:2: seconds is '0.0', expected a positive number"),
        (("seconds", "minutes"), r"sweep.csv: misses the column seconds"),
        (("uneven,pod", "uneven,podd"), r"sweep.csv: even lacks the kernel 'podd'"),
    ],
)
def test_rows_that_are_not_what_was_written(
    change: tuple[str, str], said: str, tmp_path: Path
) -> None:
    folder = write_rows(tmp_path / "rows", ("sweep",))
    columns = ["workload", "kernel", "seconds", "mode", "round", *questions_report.OF_PART["sweep"]]
    sweep_rows().query("round == 1 or kernel != 'prefill'")[columns].to_csv(
        folder / "sweep.csv", index=False
    )
    text = (folder / "sweep.csv").read_text()
    (folder / "sweep.csv").write_text(text.replace(*change))
    assert said in podsim("--from", folder)
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["sweep.csv", "sweep.json"]


def test_refusals_name_what_is_wrong(tmp_path: Path) -> None:
    assert "--only has 'swep', expected some of sweep" in podsim(
        "--out", tmp_path, "--only", "swep"
    )
    assert "name a folder: --out to measure, or --from" in podsim()
    assert "has no rows of this command" in podsim("--from", tmp_path)
    rows = write_rows(tmp_path / "rows", ("tiles",))
    assert "split.csv: No such file" in podsim("--from", rows, "--only", "split")
    (rows / "tiles.json").write_text("[]")
    assert "tiles.json: expected an object, got list" in podsim("--from", rows)


# ---- a whole run, on the CPU


class Power:
    def __enter__(self) -> Power:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def throttle_reasons(self) -> str:
        return "power cap"


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine of four SMs, and batches of a few tokens."""
    from podsim import measure_kernels, measure_questions
    from tests.fake_gpu import FakeClock, OnCpu, fake_cuda

    heads = dict.fromkeys(HEADS, (4, 2))
    workload = uniform_workload((4, 2), 3, 9, 2, 7)
    for name, value in {
        "HEADS": heads, "SWEEP_MODELS": ("Yi-6B",), "CONTEXTS": (8,), "CHUNK_SIZES": (4,),
        "FILLS": (1.0,), "decodes_that_fit": lambda *_: 2, "STEPPED_CONTEXT": 8,
        "STEPPED_CHUNK": 3, "STEPPED_BATCHES": range(1, 3), "FIXED_SPLITS": (2,),
        "TILE_CONTEXTS": (8,), "TILE_BATCHES": (2,), "SPLIT_BATCHES": ((256, (2,)),),
        "ITEMS_PER_SM": (1,), "SPLITS": (2,), "SHORTEST_SPLITS": (64,),
        "reference_workloads": lambda: [workload],
    }.items():  # fmt: skip
        monkeypatch.setattr(kernel_questions, name, value)
    fake_cuda(monkeypatch)
    monkeypatch.setattr(measure_kernels, "SmClock", FakeClock)
    monkeypatch.setattr(measure_kernels, "FLUSH_BYTES", 64)
    monkeypatch.setattr(measure_questions, "GpuPower", Power)
    monkeypatch.setattr(questions_command, "measuring", lambda: measure_kernels)
    monkeypatch.setattr(questions_command, "provenance", lambda command: MACHINE)
    with OnCpu():
        yield


@pytest.mark.skipif(torch.cuda.is_available(), reason="its fakes are for machines without a GPU")
def test_every_part_is_measured_once_and_answered(tiny: None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = podsim("--out", out, "--kernels", "triton", "--rounds", 2)
    for part in PARTS:
        rows = pd.read_csv(out / f"{part}.csv")
        kernels = {v.name for case in PARTS[part]("triton") for v in case.variants}
        assert set(rows["kernel"]) == kernels
        assert set(rows["round"]) == {0, 1}
        assert set(rows["seconds"]) == {0.0005}, "the events are half a millisecond apart"
        assert set(rows["sm_clock_hz"]) == {1.7e9}
        assert set(rows["throttled_by"]) == {"power cap"}
        assert set(rows["device"]) == {"Fake GPU"}
        assert f"# {part}: triton kernels on Fake GPU" in printed
        assert (out / f"{part}.png").read_bytes().startswith(b"\x89PNG")
    assert podsim("--from", out) == printed

    (out / "split.csv").unlink()
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("*.csv")}
    assert podsim("--out", out, "--kernels", "triton", "--rounds", 2) == printed
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.csv")}
    assert set(after) - set(written) == {"split.csv"}, "only what was missing is measured"
    assert {name: after[name] for name in written} == written


@pytest.mark.skipif(torch.cuda.is_available(), reason="its fakes are for machines without a GPU")
def test_an_interrupted_run_keeps_the_parts_that_are_done(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from podsim import measure_questions

    measure, out = measure_questions.measure, tmp_path / "out"

    def interrupted(cases: Any, *rest: Any) -> Any:
        if cases == PARTS["policies"]("triton"):
            raise InputError("the power is gone")
        return measure(cases, *rest)

    monkeypatch.setattr(measure_questions, "measure", interrupted)
    asked = ("--out", out, "--kernels", "triton", "--rounds", 1)
    assert podsim(*asked, "--only", "policies") == "the power is gone"
    assert not out.exists()
    assert podsim(*asked, "--only", "sweep,policies") == "the power is gone"
    assert sorted(path.name for path in out.glob("[!.]*")) == ["sweep.csv", "sweep.json"]

    monkeypatch.setattr(questions_command, "provenance", lambda _: MACHINE | {"driver": "1.3"})
    assert "sweep.json: driver was 1.2, and is 1.3: name another --out" in podsim(*asked)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its fakes are for machines without a GPU")
def test_another_folder_is_left_alone(tiny: None, tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    said = podsim("--out", tmp_path, "--kernels", "triton")
    assert "not empty, and nothing of this command; name another --out" in said
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


# ---- what is committed


@pytest.mark.parametrize("part", PARTS)
def test_the_page_shows_the_tables_of_the_committed_rows(part: str) -> None:
    folder = ROOT / "benchmarks/kernels/h200/questions"
    page = (ROOT / "docs/pod.md").read_text()
    tables = questions_report.TABLES[part](questions_report.read_rows(folder / f"{part}.csv", part))
    text = (folder / f"{part}.txt").read_text()
    assert text.endswith("\n\n" + questions_report.markdown(tables)), "made from these rows"
    for title, table in tables.items():
        lines = questions_report.markdown({title: table}).split("\n\n", 1)[1]
        assert lines in page or title == "The same, batch by batch", title
