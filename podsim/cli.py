"""The command line: each command parses its options, calls the library and prints."""

from __future__ import annotations

import itertools
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from podsim import config, report, terminal
from podsim.collectives_command import profile_collectives_command
from podsim.command_options import (
    ConfigOption,
    JsonOption,
    ListsCommand,
    OutOption,
    TraceArgument,
    given_options,
    naming_the_line,
    with_options,
)
from podsim.config import Deployment, Workload
from podsim.errors import InputError
from podsim.kernels_command import kernels_app
from podsim.memory_command import profile_memory_command
from podsim.profile_command import profile_command, profile_export_command
from podsim.questions_command import questions_command
from podsim.report import Outputs
from podsim.request_records import AIPERF_FILE
from podsim.search_command import capacity_command, sweep_command
from podsim.simulation import Result, simulate, simulate_with_error_bars, workload_trace
from podsim.trace_command import trace_app
from podsim.validate_command import validate_command
from podsim.variants import variants_of
from podsim.workload import Trace


class Commands(TyperGroup):
    """`podsim profile export` is `podsim profile-export`, and so on."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if "-".join(args[:2]) in self.commands:
            args = ["-".join(args[:2]), *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(cls=Commands, no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(trace_app, name="trace")
app.add_typer(kernels_app, name="kernels")
kernels_app.command("questions")(questions_command)
app.command("capacity", cls=ListsCommand)(capacity_command)
app.command("sweep")(sweep_command)
app.command("validate")(validate_command)
app.command("profile")(profile_command)
app.command("profile-export")(profile_export_command)
app.command("profile-collectives")(profile_collectives_command)
app.command("profile-memory")(profile_memory_command)
console = Console(width=None if sys.stdout.isatty() else 120)
messages = Console(stderr=True)

UsageError: Any = typer.BadParameter.__base__
"""Of a command line that cannot be parsed. Some versions of typer have a click of their own."""

FILES = "Further files in the folder of --out"

Stream = Annotated[
    bool,
    typer.Option(
        "--stream",
        help="For runs that would fill the memory: keep no steps, and write requests.csv as the "
        "requests finish.",
    ),
]
ErrorBars = Annotated[
    bool | None,
    typer.Option(
        "--error-bars/--no-error-bars",
        help="Simulate three times: as predicted, and with every step as long as P10 and P90 of "
        "the profile's held-out error say.",
        show_default="on, unless --stream",
    ),
]
TraceEvents = Annotated[
    int | None,
    typer.Option(
        help="Leave trace.json, for ui.perfetto.dev and chrome://tracing, with at most N events.",
        metavar="N",
        rich_help_panel=FILES,
    ),
]
Parquet = Annotated[
    bool,
    typer.Option(
        "--parquet", help="Leave requests and steps as Parquet too.", rich_help_panel=FILES
    ),
]
AiPerf = Annotated[
    bool,
    typer.Option(
        "--aiperf", help=f"Leave {AIPERF_FILE}, records as AIPerf's.", rich_help_panel=FILES
    ),
]
SaveDetailed = Annotated[
    bool,
    typer.Option(
        "--save-detailed",
        help="Put every request's latencies and gaps into summary.json, as vLLM's option does.",
        rich_help_panel=FILES,
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"podsim {version_of('podsim')}")
        raise typer.Exit


@app.callback()
def podsim_command(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """What TTFT, TBT and throughput will this model, GPU and traffic give?"""


@app.command("simulate")
@with_options(lists=False)
def simulate_command(
    trace: TraceArgument = None,
    config_file: ConfigOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    error_bars: ErrorBars = None,
    stream: Stream = False,
    trace_events: TraceEvents = None,
    parquet: Parquet = False,
    aiperf: AiPerf = False,
    save_detailed: SaveDetailed = False,
    **options: Any,
) -> None:
    """Serve a trace on a simulated deployment; report TTFT, TBT, TPOT and throughput."""
    if stream and (error_bars or trace_events or parquet or aiperf or save_detailed):
        raise InputError("--stream keeps nothing to make other files or error bars from")
    given = given_options(trace, config_file, options)
    with naming_the_line(config_file, given):
        workload = config.options_from(Workload, given)
        deployment = config.options_from(Deployment, given)
    outputs = _outputs(out, trace_events, parquet, aiperf, save_detailed)
    with ExitStack() as stack:
        folder = stack.enter_context(report.result_folder(out)) if out else None
        loaded = _loaded(workload)
        if stream:
            result = _streamed(loaded, deployment, workload, folder)
        else:
            result = _run(loaded, deployment, workload, error_bars is not False)
        notes = report.save(result, workload, folder, outputs) if folder is not None else []
    if as_json:
        typer.echo(report.to_json(report.full_summary(result, workload)), nl=False)
        return
    console.print(terminal.summary_table(result))
    console.print("\n".join(terminal.summary_lines(result)), highlight=False, soft_wrap=True)
    _print_results(out, notes)


@app.command("compare", cls=ListsCommand)
@with_options(lists=True)
def compare_command(
    trace: TraceArgument = None,
    config_file: ConfigOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    error_bars: ErrorBars = None,
    trace_events: TraceEvents = None,
    parquet: Parquet = False,
    aiperf: AiPerf = False,
    save_detailed: SaveDetailed = False,
    **options: Any,
) -> None:
    """Serve the same requests under each variant: give any deployment option a comma list.

    Example: podsim compare azure-conv-like --attention serial,pod --token-budget 512,1024
    """
    given = given_options(trace, config_file, options)
    with naming_the_line(config_file, given):
        workload = config.options_from(Workload, given)
        variants = variants_of(given)
    if len(variants) == 1:
        raise InputError("nothing to compare: give an option a comma list: --attention serial,pod")
    outputs = _outputs(out, trace_events, parquet, aiperf, save_detailed)
    with ExitStack() as stack:
        folder = stack.enter_context(report.result_folder(out)) if out else None
        loaded = _loaded(workload)
        results = {
            name: _run(loaded, variant, workload, error_bars is not False, name)
            for name, variant in variants.items()
        }
        compared = terminal.comparison(results)
        notes: list[str] = []
        if folder is not None:
            report.save_comparison(compared, results, workload, folder)
            for name, result in results.items():
                (folder / name).mkdir()
                found = report.save(result, workload, folder / name, outputs, name)
                notes += [f"{name}/{note}" for note in found]
    if as_json:
        summaries = {name: report.full_summary(r, workload) for name, r in results.items()}
        typer.echo(report.to_json(summaries), nl=False)
        return
    title = f"{loaded.name}: {len(loaded)} requests, {loaded.qps:.2f} req/s"
    unclear = terminal.unclear_differences(results)
    for table in terminal.comparison_tables(compared, title, console, unclear):
        console.print(table)
    if unclear:
        console.print("~ the error bars of the two overlap", highlight=False)
    for line in terminal.error_lines(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    notes = [
        *terminal.note_lines(results),
        *terminal.memory_comparison(results),
        *notes,
    ]
    _print_results(out, notes)


@app.command("doctor")
def doctor_command(as_json: JsonOption = False) -> None:
    """Show versions, GPU, profiles and traces, and run a small simulation; exit 1 on a fault."""
    from podsim.doctor import examine

    if as_json:
        findings = list(examine())
        typer.echo(report.to_json({"findings": [asdict(f) for f in findings]}), nl=False)
        raise typer.Exit(any(finding.ok is False for finding in findings))
    marks = {None: "[dim]-[/dim]", True: "[green]ok[/green]", False: "[red]FAULT[/red]"}
    faults = 0
    for finding in examine():
        faults += finding.ok is False
        console.print(f"{finding.subject:<12}", marks[finding.ok], end=" ", highlight=False)
        console.print(finding.text, markup=False, highlight=False, soft_wrap=True)
    if faults:
        raise typer.Exit(1)


def _loaded(workload: Workload) -> Trace:
    with terminal.progress_bar("reading", None, messages):
        return workload_trace(workload)


def _run(
    trace: Trace,
    deployment: Deployment,
    workload: Workload,
    error_bars: bool,
    label: str = "simulating",
) -> Result:
    run, times = (simulate_with_error_bars, 3) if error_bars else (simulate, 1)
    with terminal.progress_bar(label, times * len(trace), messages) as arrived:
        closed_loop = workload.replay == "closed"
        return run(trace, deployment, closed_loop=closed_loop, on_progress=arrived)


def _streamed(
    trace: Trace, deployment: Deployment, workload: Workload, folder: Path | None
) -> Result:
    with terminal.progress_bar("simulating", len(trace), messages) as arrived:
        return simulate(
            trace,
            deployment,
            closed_loop=workload.replay == "closed",
            keep_steps=False,
            request_sink=report.request_writer(folder),
            on_progress=arrived,
        )


def _outputs(out: Path | None, *asked: Any) -> Outputs:
    names = ("trace_events", "parquet", "aiperf", "save_detailed")
    outputs = Outputs(**dict(zip(names, asked, strict=True)))
    outputs.require_folder(out)
    return outputs


def _print_results(out: Path | None, notes: list[str]) -> None:
    for note in notes:
        console.print(f"Note         {note}", highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        console.print(f"Results      {out}", highlight=False, soft_wrap=True)


def _command_of(arguments: list[str]) -> str:
    """The command that arguments begin with."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    depth = 2 if words[:1] in [[group.name] for group in app.registered_groups] else 1
    return " ".join(["podsim", *words[:depth]])


def main() -> None:
    """Run the command line: user errors are one line on stderr and exit code 2."""
    try:
        try:
            code = app(prog_name="podsim", standalone_mode=False)
        finally:
            sys.stdout.flush()
        sys.exit(code or 0)
    except InputError as error:
        print(f"podsim: {error}", file=sys.stderr)
        sys.exit(2)
    except UsageError as error:
        message = " ".join(error.format_message().split()).rstrip(".")
        if message:  # none where a command without arguments has shown its help
            path = error.ctx.command_path if error.ctx else _command_of(sys.argv[1:])
            print(f"podsim: {message} (see {path} --help)", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            where = error.filename or "cannot print"  # what is printed has no file's name
            print(f"podsim: {where}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(1)  # what is left in the buffer would fail again
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
