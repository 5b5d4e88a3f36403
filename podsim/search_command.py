"""The commands `podsim capacity` and `podsim sweep`."""

from __future__ import annotations

import itertools
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from podsim import config, report, terminal
from podsim.capacity import (
    NUM_REQUESTS,
    NUM_SEEDS,
    Capacity,
    find_capacities,
    measure_loads,
)
from podsim.capacity_report import (
    capacity_lines,
    capacity_table,
    loads_table,
    save_capacities,
    save_trials,
)
from podsim.capacity_search import PRECISION
from podsim.command_options import (
    ConfigOption,
    JsonOption,
    OutOption,
    TraceArgument,
    given_options,
    naming_the_line,
    with_options,
)
from podsim.config import Deployment, Workload
from podsim.errors import InputError
from podsim.simulation import simulate, uncalibrated_notes, workload_trace
from podsim.slo import RELAXED, STRICT, parse_slo
from podsim.sweep import run_sweep
from podsim.sweep_plan import SweepPlan, read_plan
from podsim.variants import variants_of
from podsim.workers import num_cores

SloOption = Annotated[
    list[str] | None,
    typer.Option(
        "--slo",
        help="METRIC:STATISTIC:SECONDS, of ttft, tbt, tpot, e2e, queue and mean or p99; repeat it. "
        "Default: tbt:p99 of 5 decode iterations (32 requests of 4K tokens) and queue:p50:2.",
    ),
]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", help="Processes; default: one a core.", show_default=False)
]


@with_options(lists=True)
def capacity_command(
    trace: TraceArgument = None,
    slo: SloOption = None,
    relaxed: Annotated[
        bool, typer.Option("--relaxed", help="The default limit on TBT 25 iterations long.")
    ] = False,
    seeds: Annotated[int, typer.Option(help="Searches, each with a seed of its own.")] = NUM_SEEDS,
    precision: Annotated[float, typer.Option(help="Where the bisection ends.")] = PRECISION,
    at: Annotated[
        str | None, typer.Option("--at", help="Measure goodput at these loads instead: 4,8,12.")
    ] = None,
    jobs: JobsOption = None,
    config_file: ConfigOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Find the highest load that meets the SLOs: give any deployment option a comma list.

    The load of synthetic requests is their rate; a trace's time is stretched. --qps is the first
    load that is tried, --requests are those of a trial (default 2048).

    Example: podsim capacity --arrivals poisson --attention serial,pod --slo tbt:p99:0.05
    """
    given = given_options(trace, config_file, options)
    has_start = "qps" in given
    if given.get("trace") is None:
        given.setdefault("arrivals", "poisson")
    if "rate_scale" not in given:
        given.setdefault("qps", 1.0)  # only where the search starts, and it sets that itself
    with naming_the_line(config_file, given):
        workload = config.options_from(Workload, given)
        variants = variants_of(given)
    slos = [parse_slo(text) for text in slo or ()]
    trials: dict[str, Any] = {
        "slos": slos,
        "seeds": seeds,
        "jobs": jobs or num_cores(),
        "iterations": RELAXED if relaxed else STRICT,
    }
    # A replay of a trace has nothing random, so it is searched once.
    num_searches = len(variants) * (seeds if workload.arrivals is not None else 1)
    console = Console(quiet=True) if as_json else _console()
    name = Path(workload.trace).name if workload.trace else "synthetic requests"
    with ExitStack() as stack:
        folder = stack.enter_context(report.result_folder(out)) if out else None
        if at is not None:
            loads = _loads(at)
            total = num_searches * len(loads)
            with _counting("measuring", total, "runs") as one_more:
                measured = measure_loads(workload, variants, loads, on_load=one_more, **trials)
            console.print(loads_table(measured, name))
            described: Mapping[str, object] = {"trials": measured.to_dict("records")}
            if folder is not None:
                save_trials(measured, folder)
        else:
            start = workload.qps if has_start else None
            with _counting("searching", num_searches, "searches") as one_more:
                found = find_capacities(
                    workload,
                    variants,
                    precision=precision,
                    start=start,
                    on_search=one_more,
                    **trials,
                )
            described = {variant: c.description() for variant, c in found.items()}
            console.print(capacity_table(found, name))
            console.print("\n".join(capacity_lines(found)), highlight=False, soft_wrap=True)
            if folder is not None:
                save_capacities(found, folder)
                _save_report(found, workload, variants, folder)
    if as_json:
        typer.echo(report.to_json(described), nl=False)
    for note in uncalibrated_notes(variants.values()):
        (Console(stderr=True) if as_json else console).print(
            f"Note         {note}", highlight=False, soft_wrap=True
        )
    if out is not None:
        console.print(f"Results      {out}", highlight=False, soft_wrap=True)


def _save_report(
    found: Mapping[str, Capacity],
    workload: Workload,
    variants: Mapping[str, Deployment],
    folder: Path,
) -> None:
    """report.html: each variant at the load it was found to hold."""
    results, loads = {}, {}
    for name, capacity in found.items():
        if capacity.mean > 0:
            load = replace(workload, qps=capacity.mean, requests=workload.requests or NUM_REQUESTS)
            label = f"{name} at {capacity.mean:.2f} req/s"
            loads[label] = load
            trace = workload_trace(load)
            with terminal.progress_bar(label, len(trace), Console(stderr=True)) as arrived:
                results[label] = simulate(trace, variants[name], on_progress=arrived)
    if results:
        report.save_comparison(terminal.comparison(results), results, loads, folder)


def sweep_command(
    plan_file: Annotated[
        Path, typer.Argument(help="TOML file of options: values, lists and ranges; docs/sweep.md.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; default: results/ and the file's name.")
    ] = None,
    jobs: JobsOption = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Run on the Ray cluster at this address, or 'local' to start one."),
    ] = None,
    pareto: Annotated[
        str | None, typer.Option(help="Two columns whose front is marked: gpus,ttft_p99_s.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Simulate every combination of options, or a random sample; leave one table.

    Run the same command again to go on with a sweep that was stopped, however it was.
    """
    plan = read_plan(plan_file)
    if pareto is not None:
        plan = replace(plan, pareto=tuple(part.strip() for part in pareto.split(",")))
    folder = out or Path("results") / plan_file.stem
    messages = Console(stderr=True)
    columns = (
        *(TextColumn("simulations"), *Progress.get_default_columns()[1:2], MofNCompleteColumn()),
        *(TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), TextColumn("left")),
        TextColumn("{task.fields[failed]}"),
    )
    with Progress(*columns, console=messages, disable=not messages.is_terminal) as progress:
        task = progress.add_task("", total=len(plan), rate="", failed="")

        def show(done: int, failed: int) -> None:
            speed = progress.tasks[0].speed
            progress.update(
                task,
                completed=done,
                rate=f"{speed:,.1f}/s" if speed else "",
                failed=f"{failed} failed" if failed else "",
            )

        try:
            outcome = run_sweep(plan, folder, jobs=jobs, ray=ray, on_progress=show)
        except KeyboardInterrupt:
            print("podsim: interrupted; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(130) from None
    if plan_file.resolve() != (folder / "sweep.toml").resolve():
        shutil.copyfile(plan_file, folder / "sweep.toml")
    notes = _sweep_notes(plan)
    if as_json:
        described = {
            "simulations": outcome.num_rows,
            "simulated_now": outcome.num_simulated,
            "failed": outcome.num_failed,
            "table": str(outcome.table),
            "notes": notes,
        }
        typer.echo(report.to_json(described), nl=False)
        return
    console = _console()
    earlier = outcome.num_rows - outcome.num_simulated
    lines = [
        f"Simulations  {outcome.num_rows:,}"
        + (f", {earlier:,} of them earlier" if earlier else "")
        + (f", {outcome.num_failed:,} failed (column error)" if outcome.num_failed else ""),
        *(f"Note         {note}" for note in notes),
        f"Results      {outcome.table}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def _sweep_notes(plan: SweepPlan) -> list[str]:
    """What must be said of GPUs of a sweep that nobody measured."""
    names = ("gpu", "model", "profile")
    notes: list[str] = []
    for values in itertools.product(*(plan.values(name) or (None,) for name in names)):
        try:
            deployment = config.options_from(Deployment, dict(zip(names, values, strict=True)))
            notes += uncalibrated_notes([deployment])
        except InputError:  # such simulations have failed: the table says why
            continue
    return list(dict.fromkeys(notes))


def _loads(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--at is '{text}', expected loads such as 4,8,12") from None


@contextmanager
def _counting(label: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """A progress bar that goes on by one each time."""
    done = itertools.count(1)
    with terminal.progress_bar(label, total, Console(stderr=True), unit) as show:
        yield lambda _: show(next(done))
