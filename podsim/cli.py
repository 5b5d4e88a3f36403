"""The command line: each command parses its options, calls the library and prints."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from podsim import calibration, config, report
from podsim.command_options import (
    ConfigOption,
    OutOption,
    TraceArgument,
    given_options,
    with_options,
)
from podsim.config import Deployment, Workload
from podsim.errors import InputError
from podsim.hardware import Gpu, gpu_named
from podsim.model import Model, model_named
from podsim.profile import PROFILE_FILE, Profile
from podsim.search_command import capacity_command, sweep_command
from podsim.simulation import Result, simulate, workload_trace
from podsim.trace_command import trace_app
from podsim.variants import variants_of
from podsim.workload import Trace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="What TTFT, TBT and throughput will this model, GPU and traffic give?",
)
app.add_typer(trace_app, name="trace")
app.command("capacity")(capacity_command)
app.command("sweep")(sweep_command)
console = Console(width=None if sys.stdout.isatty() else 120)
messages = Console(stderr=True)


@app.command("simulate")
@with_options(lists=False)
def simulate_command(
    trace: TraceArgument = None,
    config_file: ConfigOption = None,
    out: OutOption = None,
    **options: Any,
) -> None:
    """Serve a trace on a simulated deployment; report TTFT, TBT, TPOT and throughput."""
    given = given_options(trace, config_file, options)
    workload = config.options_from(Workload, given)
    deployment = config.options_from(Deployment, given)
    with ExitStack() as stack:
        folder = stack.enter_context(report.result_folder(out)) if out else None
        result = _run(workload_trace(workload), deployment)
        if folder is not None:
            report.save(result, workload, folder)
    console.print(report.summary_table(result))
    console.print("\n".join(report.summary_lines(result)), highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"Results      {out}", highlight=False, soft_wrap=True)


@app.command("compare")
@with_options(lists=True)
def compare_command(
    trace: TraceArgument = None,
    config_file: ConfigOption = None,
    out: OutOption = None,
    **options: Any,
) -> None:
    """Serve the same requests under each variant: give any deployment option a comma list.

    Example: podsim compare azure-conv-like --attention serial,pod --token-budget 512,1024
    """
    given = given_options(trace, config_file, options)
    workload = config.options_from(Workload, given)
    variants = variants_of(given)
    if len(variants) == 1:
        raise InputError("nothing to compare: give an option a comma list: --attention serial,pod")
    with ExitStack() as stack:
        folder = stack.enter_context(report.result_folder(out)) if out else None
        loaded = workload_trace(workload)
        results = {name: _run(loaded, variant, name) for name, variant in variants.items()}
        compared = report.comparison(results)
        if folder is not None:
            report.save_comparison(compared, results, folder)
            for name, result in results.items():
                (folder / name).mkdir()
                report.save(result, workload, folder / name)
    title = f"{loaded.name}: {len(loaded)} requests, {loaded.qps:.2f} req/s"
    console.print(report.comparison_table(compared, title))
    if out is not None:
        console.print(f"Results      {out}", highlight=False, soft_wrap=True)


@app.command("profile")
def profile_command(
    model: Annotated[str, typer.Option(help="Model whose layers are timed.")] = "llama-3-8b",
    gpu: Annotated[str, typer.Option(help="The GPU of this machine.")] = "h200",
    out: Annotated[Path | None, typer.Option(help="Folder to leave the profile in.")] = None,
    refit: Annotated[
        Path | None,
        typer.Option(help="Fit the rows of this profile folder again; needs no GPU."),
    ] = None,
) -> None:
    """Time the kernels and layers on this machine's GPU, fit the cost models, leave a profile.

    The folder gets measurements.csv (every timed row) and profile.json (the fitted models, their
    error on held-out points, and what they were measured on). Needs torch and triton.
    """
    if refit is not None:
        profile = calibration.refit(refit)
    else:
        folder = out or Path("profiles") / gpu / model
        with report.result_folder(folder, made_by=PROFILE_FILE) as scratch:
            profile = _measured_profile(model_named(model), gpu_named(gpu), scratch)
    console.print(report.error_table(profile))


def _measured_profile(model: Model, gpu: Gpu, folder: Path) -> Profile:
    try:
        from podsim import measure
    except ModuleNotFoundError as error:
        raise InputError(
            f"podsim profile needs {error.name}: pip install 'podsim[gpu]' on the GPU's machine"
        ) from None
    measure.require_gpu(gpu)
    columns = [*Progress.get_default_columns(), TimeElapsedColumn()]
    with Progress(*columns, console=messages) as progress:
        task = progress.add_task(f"timing {model.name} on {gpu.name}", total=None)
        rows = list(
            measure.measure_profile(
                model, lambda done, total: progress.update(task, completed=done, total=total)
            )
        )
    command = "podsim " + " ".join(sys.argv[1:])
    return calibration.write(folder, rows, model, gpu, measure.provenance() | {"command": command})


def _run(trace: Trace, deployment: Deployment, label: str = "simulating") -> Result:
    with Progress(console=messages, transient=True, disable=not messages.is_terminal) as progress:
        task = progress.add_task(label, total=len(trace))
        return simulate(
            trace,
            deployment,
            on_progress=lambda arrived: progress.update(task, completed=arrived),
        )


def main() -> None:
    """Run the command line: user errors are one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        print(f"podsim: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
