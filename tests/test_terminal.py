"""What commands print: JSON alone where asked, progress on terminals only, the doctor."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from podsim import doctor, terminal
from podsim.cli import app
from podsim.errors import InputError

TRACE = ("azure-conv-like", "--requests", "50")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_json_is_all_that_is_printed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = run("simulate", *TRACE, "--json", "--out", out, "--trace-events", 100)
    assert printed.exit_code == 0
    assert printed.stderr == ""
    assert json.loads(printed.stdout) == json.loads((out / "summary.json").read_text())
    assert (out / "trace.json").exists()


def test_json_of_a_comparison_has_each_variant() -> None:
    printed = run("compare", *TRACE, "--attention", "serial,pod", "--json")
    found = json.loads(printed.stdout)
    assert list(found) == ["serial", "pod"]
    assert found["pod"]["completed"] == 50 - found["pod"]["failed"]
    alone = json.loads(run("simulate", *TRACE, "--attention", "pod", "--json").stdout)
    assert found["pod"] == alone


def test_further_files_are_left_where_asked(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    further = ("--parquet", "--aiperf", "--trace-events", 500)
    printed = run("compare", *TRACE, "--attention", "serial,pod", *further, "--out", tmp_path / "o")
    assert printed.exit_code == 0, printed.output
    assert {path.name for path in (tmp_path / "o" / "pod").glob("[!.]*")} == {
        *("summary.json", "requests.csv", "steps.csv", "config.toml", "report.html"),
        *("requests.parquet", "steps.parquet", "profile_export.jsonl", "trace.json"),
    }
    assert {path.name for path in (tmp_path / "o").glob("[!.]*")} == {
        *("compare.csv", "report.html", "serial", "pod")
    }
    assert "pod/trace.json holds the first" in printed.stdout


def test_the_same_comparison_is_byte_identical_and_replaces_itself(tmp_path: Path) -> None:
    command = ("compare", *TRACE, "--attention", "serial,pod", "--trace-events", 500, "--parquet")
    found = []
    for _ in range(2):
        assert run(*command, "--out", tmp_path / "o").exit_code == 0
        files = sorted(path for path in (tmp_path / "o").rglob("*") if path.is_file())
        found.append([(path.name, path.read_bytes()) for path in files])
    assert found[0] == found[1]


def test_files_without_a_folder_are_refused() -> None:
    for option in (("--trace-events", 9), ("--parquet",), ("--aiperf",), ("--save-detailed",)):
        error = run("simulate", *TRACE, *option).exception
        assert isinstance(error, InputError)
        assert str(error) == f"{option[0]} needs a folder: give --out FOLDER"


# ---- progress


def bar(seconds: float, *, is_terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
    with terminal.progress_bar("simulating", 1000, console) as arrived:
        for number in range(0, 1000, 50):
            arrived(number)
            time.sleep(seconds / 20)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_progress_shows_rate_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0.05)
    shown = bar(1.2, is_terminal=True)
    for part in ("simulating", "/1000", "req/s", "left"):
        assert part in shown


def test_nothing_is_shown_of_what_is_quick_or_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar(0.1, is_terminal=True) == ""
    monkeypatch.setattr(terminal, "PATIENCE", 0.01)
    assert bar(0.2, is_terminal=False) == ""


# ---- doctor


def test_the_doctor_finds_all_well() -> None:
    printed = run("doctor")
    assert printed.exit_code == 0, printed.output
    for part in ("python", "numpy", "simpy", "GPU", "llama-3-8b on h200", "azure-conv-like"):
        assert part in printed.stdout
    assert "self-test    ok" in printed.stdout
    assert "FAULT" not in printed.stdout


def test_the_doctor_says_what_is_faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("numpy", "no-such-package"))

    def broken(*arguments: object) -> None:
        raise InputError("profiles/h200/llama-3-8b/profile.json: not a podsim profile")

    monkeypatch.setattr(doctor, "read_profile", broken)
    printed = run("doctor")
    assert printed.exit_code == 1
    faults = [line for line in printed.stdout.splitlines() if "FAULT" in line]
    assert len(faults) == 1 + len(
        list(Path(__file__).parent.parent.glob("profiles/*/*/profile.json"))
    )
    assert "no-such-package" in faults[0]
    assert "not a podsim profile" in faults[1]


def test_a_profile_of_other_kernels_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernels_hash", lambda: "0" * 64)
    assert "(not the installed ones)" in run("doctor").stdout


def test_completion_scripts_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    printed = run("--show-completion", "bash")
    assert printed.exit_code == 0
    assert "complete" in printed.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("simulate", *TRACE),
        ("compare", *TRACE, "--attention", "serial,pod"),
        ("capacity", "--requests", "40", "--seeds", "2", "--precision", "0.25", "--jobs", "1"),
        ("doctor",),
        ("trace", "inspect", "azure-conv-like"),
        ("trace", "generate", "--qps", "3", "--requests", "20", "--out", "made.csv"),
        ("trace", "convert", "azure-conv-like", "--to", "vidur", "--out", "vidur.csv"),
        ("trace", "slice", "azure-conv-like", "--rows", "0:9", "--out", "slice.csv"),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_json_is_all_that_a_command_prints(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = run(*command, "--json")
    assert printed.exit_code == 0, printed.output
    assert json.loads(printed.stdout)


def test_json_of_a_profile_and_of_a_sweep(tmp_path: Path) -> None:
    folder = tmp_path / "llama-3-8b"
    shutil.copytree(Path(__file__).parent.parent / "profiles" / "h200" / "llama-3-8b", folder)
    refitted = json.loads(run("profile", "--refit", str(folder), "--json").stdout)
    assert refitted["errors"]["step pod"]["points"] > 0
    plan = tmp_path / "plan.toml"
    plan.write_text('arrivals = "poisson"\nqps = [4, 8]\nrequests = 20\n')
    printed = run("sweep", str(plan), "--jobs", "1", "--out", str(tmp_path / "out"), "--json")
    assert json.loads(printed.stdout)["simulations"] == 2
