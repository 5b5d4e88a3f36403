"""The command `podsim kernels questions`."""

from __future__ import annotations

import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from rich.console import Console

from podsim import questions_report
from podsim.errors import InputError
from podsim.kernel_questions import PARTS
from podsim.kernels_command import (
    KernelsOption,
    kernel_set,
    measuring,
    progress_bar,
    provenance,
)
from podsim.trace_writers import atomic_file

SAME = ("device_name", "driver", "kernels", "kernels_sha256")
"""What the parts of one folder must agree in."""
messages = Console(stderr=True)


def questions_command(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for rows, tables and figures. Default with --from: that one."),
    ] = None,
    only: Annotated[
        str | None, typer.Option(help=f"Comma list of {', '.join(PARTS)}. Default: all.")
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Tables and figures again from this folder's rows; needs no GPU."
        ),
    ] = None,
    kernels: KernelsOption = "auto",
    rounds: Annotated[int, typer.Option(help="Bursts of each kernel.", min=1)] = 3,
) -> None:
    """Answer what the evaluation of POD-Attention asks, on this GPU.

    Each part leaves its rows when it is done, in sweep.csv and so on, with what they were measured
    on in sweep.json; a part whose rows are there is not measured again. Its tables, as Markdown in
    sweep.txt, and its figure, sweep.png, are made from the rows.
    """
    if source is not None:
        parts = (
            _parts(only) if only else [part for part in PARTS if _rows_file(source, part).exists()]
        )
        if not parts:
            raise InputError(f"{source}: has no rows of this command, such as sweep.csv")
    elif out is not None:
        parts, source = _parts(only or ",".join(PARTS)), out
        _measure(out, parts, kernels, rounds)
    else:
        raise InputError("name a folder: --out to measure, or --from for earlier rows")
    _report(source, out or source, parts)


def _parts(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in PARTS:
            raise InputError(f"--only has '{name}', expected some of {', '.join(PARTS)}")
    return [name for name in PARTS if name in names]


# ---- measuring


def _measure(out: Path, parts: list[str], kernels: str, rounds: int) -> None:
    measuring()
    measure = importlib.import_module("podsim.measure_questions").measure
    chosen = kernel_set(kernels)
    machine = {"kernels": chosen} | provenance(f"podsim kernels questions --rounds {rounds}")
    _take(out)
    try:
        missing = [part for part in parts if not _is_done(out, part, machine)]
        for part in missing:
            cases = PARTS[part](chosen)
            with progress_bar(cases, f"{part}: timing") as done:
                rows = pd.DataFrame(measure(cases, rounds, done))
            rows = rows.assign(device=str(machine["device_name"]), driver=str(machine["driver"]))
            with atomic_file(_provenance_file(out, part)) as file:
                file.write((json.dumps(machine, indent=2) + "\n").encode())
            with atomic_file(_rows_file(out, part)) as file:
                rows.to_csv(file, index=False, float_format="%.6g")
    finally:
        with suppress(OSError):  # it holds something: keep it
            out.rmdir()


def _take(out: Path) -> None:
    """Make the folder, or go on in one of this command; InputError for any other."""
    try:
        known = any(_provenance_file(out, part).exists() for part in PARTS)
        if out.is_dir() and any(out.iterdir()) and not known:
            raise InputError(f"{out}: not empty, and nothing of this command; name another --out")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot write results here: {error.strerror}") from None


def _is_done(out: Path, part: str, machine: dict[str, object]) -> bool:
    """Whether a part's rows are there; InputError if they are of other kernels or another GPU."""
    if not _rows_file(out, part).exists():
        return False
    before = _read_provenance(out, part)
    for name in SAME:
        if before.get(name) != machine[name]:
            raise InputError(
                f"{_provenance_file(out, part)}: {name} was {before.get(name)}, and is "
                f"{machine[name]}: name another --out, or remove {part}.csv"
            )
    messages.print(f"{part}: measured before")
    return True


def _rows_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.csv"


def _provenance_file(folder: Path, part: str) -> Path:
    return folder / f"{part}.json"


def _read_provenance(folder: Path, part: str) -> dict[str, object]:
    path = _provenance_file(folder, part)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object, got {type(found).__name__}")
    return found


# ---- reporting


def _report(source: Path, out: Path, parts: list[str]) -> None:
    """Tables and figures of the parts; all rows are read before anything is written."""
    from podsim import questions_figures  # loads matplotlib, which takes a while

    rows = {part: questions_report.read_rows(_rows_file(source, part), part) for part in parts}
    texts = {}
    for part in parts:
        tables = questions_report.markdown(questions_report.TABLES[part](rows[part]))
        texts[part] = f"{_about(_read_provenance(source, part))}\n\n{tables}"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot write results here: {error.strerror}") from None
    for part in parts:
        with atomic_file(out / f"{part}.png") as file:
            questions_figures.write_figure(part, rows[part], file)
        with atomic_file(out / f"{part}.txt") as file:
            file.write(texts[part].encode())
        print(f"# {part}: {texts[part]}")


def _about(machine: dict[str, object]) -> str:
    """Such as NVIDIA H200 (700.00 W), driver 580.159.04, torch 2.11.0, triton 3.6.0, 2026-11-21."""
    software = ", ".join(f"{name} {machine.get(name)}" for name in ("driver", "torch", "triton"))
    return (
        f"{machine.get('kernels')} kernels on {machine.get('device_name')} "
        f"({machine.get('power_limit')}), {software}, {machine.get('date')}"
    )
