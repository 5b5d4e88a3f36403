"""`podsim profile`: measure a profile, plan one, check one or fit one again."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

from podsim import calibration, report, terminal
from podsim.command_options import JsonOption
from podsim.errors import InputError
from podsim.hardware import Gpu, gpu_named
from podsim.model import Model, model_named
from podsim.profile import Profile, find_profile
from podsim.profile_checks import Finding, check_profile, require_sound_rows
from podsim.profile_extend import reopen
from podsim.profile_plan import (
    SECONDS_PER_SEQUENCE,
    SECONDS_TO_FIT,
    SECONDS_TO_START,
    Plan,
    plan_profile,
)
from podsim.profile_run import is_started, require_place, run_profile
from podsim.vidur_export import export_vidur

console = Console(width=None if sys.stdout.isatty() else 120)
messages = Console(stderr=True)


MODEL, GPU = "llama-3-8b", "h200"
"""Where none is named."""


def profile_command(
    model: Annotated[
        str,
        typer.Option(help="Model whose layers are timed: a name, or a Hugging Face config.json."),
    ] = MODEL,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "--tp",
            min=1,
            help="GPUs that share the model: times the share of one, on one GPU.",
        ),
    ] = 1,
    gpu: Annotated[str, typer.Option(help="The GPU of this machine.")] = GPU,
    out: Annotated[Path | None, typer.Option(help="Folder to leave the profile in.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Time one point in ten.")] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be timed and how long it takes; needs no GPU."
        ),
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend", help="Keep the rows of the profile in the folder; time what it lacks."
        ),
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(help="Check this profile folder: is it possible, whole, of its rows? No GPU."),
    ] = None,
    refit: Annotated[
        Path | None,
        typer.Option(help="Fit the rows of this profile folder again; needs no GPU."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time the kernels and layers on this machine's GPU, fit the cost models, leave a profile.

    The folder gets measurements.csv (every timed row) and profile.json (the fitted models, their
    error on held-out points, and what they were measured on). Needs torch and triton. Interrupted,
    the same command goes on where it was.
    """
    _require_one(
        quick=quick,
        dry_run=dry_run,
        extend=extend,
        check=check,
        refit=refit,
        out=out,
        model=model != MODEL,
        gpu=gpu != GPU,
        tp=tensor_parallel_size > 1,
    )
    if check is not None:
        _check(check, as_json)
        return
    if refit is not None:
        require_sound_rows(refit)
        _fitted(refit, calibration.refit(refit), as_json)
        return
    shape, machine = model_named(model).shard(tensor_parallel_size), gpu_named(gpu)
    plan = plan_profile(shape, machine, quick)
    if dry_run:
        _show_plan(plan, shape, machine, as_json)
        return
    folder = out or Path("profiles") / gpu / shape.name
    share = f" --tp {tensor_parallel_size}" if tensor_parallel_size > 1 else ""
    command = f"podsim profile --model {model}{share} --gpu {gpu}{' --quick' if quick else ''}"
    _fitted(folder, _measured_profile(shape, machine, plan, folder, command, extend), as_json)


def _require_one(**given: object) -> None:
    """InputError for options that would be ignored."""
    for alone in ("check", "refit"):
        others = [name for name, value in given.items() if value and name != alone]
        if given[alone] is not None and others:
            other = others[0].replace("_", "-")
            raise InputError(f"--{alone} works on a folder alone: leave out --{other}")
    if given["dry_run"] and given["extend"]:
        raise InputError("--dry-run tells of whole plans: leave out --extend")


def _fitted(folder: Path, profile: Profile, as_json: bool) -> None:
    calibration.write_plots(folder, profile)
    _show(profile, as_json)


def _show(profile: Profile, as_json: bool) -> None:
    if as_json:
        typer.echo(report.to_json(profile.description()), nl=False)
        return
    console.print(terminal.error_table(profile))
    refused = profile.provenance.get("refused_rows")
    if refused:
        console.print(f"{refused} rows were refused; measurements.csv says why", highlight=False)


def profile_export_command(
    folder: Annotated[Path, typer.Argument(help="Profile folder, with its measurements.csv.")],
    to: Annotated[str, typer.Option(help="Whose format: vidur.")],
    out: Annotated[Path, typer.Option(help="Folder to leave the files in.")],
    as_json: JsonOption = False,
) -> None:
    """Write a profile's rows as the profiling data of another simulator.

    vidur: attention.csv and mlp.csv, with the columns that its execution-time predictor reads.
    """
    if to != "vidur":
        raise InputError(f"--to is '{to}', expected vidur")
    with report.result_folder(out) as scratch:
        counts = export_vidur(folder, scratch)
    if as_json:
        typer.echo(report.to_json({"out": str(out), **counts}), nl=False)
        return
    console.print(
        f"{out}: {counts['attention']:,} rows of attention.csv, {counts['mlp']:,} of mlp.csv; "
        f"{counts['left_out']:,} left out, of batches that Vidur has no columns for",
        highlight=False,
        soft_wrap=True,
    )


# ------------------------------------------------------------------------------------ measuring


def _measured_profile(
    model: Model, gpu: Gpu, plan: Plan, folder: Path, command: str, extend: bool
) -> Profile:
    started = time.perf_counter()
    require_place(folder)
    try:
        from podsim import measure
    except ModuleNotFoundError as error:
        raise InputError(
            f"podsim profile needs {error.name}: pip install 'podsim[gpu]' on the GPU's machine"
        ) from None
    measure.require_gpu(gpu)
    provenance = measure.provenance(model)
    if extend:
        reopen(folder, plan, model, gpu.name, provenance)
    if is_started(folder):
        messages.print(f"going on with the measurement in {folder}", highlight=False)
    columns = [*Progress.get_default_columns(), TimeElapsedColumn()]
    try:
        with Progress(*columns, console=messages) as progress:
            task = progress.add_task(f"timing {model.name} on {gpu.name}", total=None)
            bench = measure.Bench(model)
            return run_profile(
                folder,
                plan,
                model,
                gpu,
                provenance,
                bench.prepare,
                lambda done, total: progress.update(task, completed=done, total=total),
                command,
                started,
            )
    except KeyboardInterrupt:
        print(
            f"podsim: interrupted; the same command goes on from the rows kept in {folder}",
            file=sys.stderr,
        )
        raise


# -------------------------------------------------------------------------------------- dry run

ENDS = {"start": SECONDS_TO_START, "fit": SECONDS_TO_FIT}
"""Before and after all sequences, where no profile tells."""


def _show_plan(plan: Plan, model: Model, gpu: Gpu, as_json: bool) -> None:
    measured, source = _measured_seconds(model, gpu)
    counts, seconds = plan.counts(), plan.seconds(measured)
    ends = {name: measured.get(name, each) for name, each in ENDS.items()}
    total = sum(ends.values()) + sum(seconds.values())
    if as_json:
        content = {
            "model": model.name,
            "gpu": gpu.name,
            "quick": plan.quick,
            "kinds": {kind: {**counts[kind], "seconds": seconds[kind]} for kind in counts},
            **{f"{name}_seconds": each for name, each in ends.items()},
            "seconds": total,
            "seconds_from": source,
        }
        typer.echo(report.to_json(content), nl=False)
        return
    table = Table(
        title=f"{model.name} on {gpu.name}{', quick' if plan.quick else ''}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    for name in ("kind", "points", "timed sequences", "rows", "about"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, count in counts.items():
        table.add_row(kind, *(f"{n:,}" for n in count.values()), f"{seconds[kind]:,.0f} s")
    for name, each in ends.items():
        table.add_row(name, "", "", "", f"{each:,.0f} s")
    sums = [sum(count[name] for count in counts.values()) for name in ("points", "sequences")]
    rows = sum(count["rows"] for count in counts.values())
    table.add_row("all", *(f"{n:,}" for n in [*sums, rows]), f"{total / 60:.1f} min")
    console.print(table)
    console.print(f"Times from {source}.", highlight=False)
    console.print(
        "start: loading torch, compiling kernels, filling the KV pool. Figures are drawn after it "
        "all.",
        highlight=False,
    )


def _measured_seconds(model: Model, gpu: Gpu) -> tuple[Mapping[str, float], str]:
    """Seconds a sequence of each kind, and of start and fit if known; where they were measured."""
    first = f"the first H200 profile: {SECONDS_PER_SEQUENCE * 1000:.0f} ms a timed sequence"
    try:
        profile, whose = find_profile(gpu.name, model), ""
    except InputError:
        profile, whose = find_profile(gpu.name, model_named(MODEL)), ", of another model"
    wall = profile.provenance.get("wall_seconds")
    if not isinstance(wall, dict):
        return {}, first
    timed = profile.provenance.get("sequences")
    if not isinstance(timed, dict):
        return {}, first
    each = {kind: wall[kind] / timed[kind] for kind in timed if kind in wall}
    each |= {name: wall[name] for name in ENDS if name in wall}
    date = profile.provenance.get("date", "at some time")
    return each, f"{profile.source}, measured {date}{whose}"


# ---------------------------------------------------------------------------------------- check


def _check(folder: Path, as_json: bool) -> None:
    """Print what is wrong; exit with 1 if anything is."""
    findings = check_profile(folder)
    faults = [finding for finding in findings if finding.fault]
    if as_json:
        content = {"profile": str(folder), "findings": [asdict(f) for f in findings]}
        typer.echo(report.to_json(content), nl=False)
    else:
        for finding in findings:
            console.print(_line(finding), highlight=False, markup=False, soft_wrap=True)
        verdict = "refused" if faults else "nothing wrong found"
        console.print(f"{folder}: {verdict}", highlight=False, markup=False, soft_wrap=True)
    if faults:
        raise typer.Exit(1)


def _line(finding: Finding) -> str:
    return f"{'REFUSED' if finding.fault else 'lacks':<8} {finding.text}"
