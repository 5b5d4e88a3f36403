"""`podsim validate`: serve a trace on the GPU, simulate the same, and print both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from podsim import config, report, terminal
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
from podsim.latency import ProfiledLatency
from podsim.memory_system import require_memory_costs
from podsim.model import model_named
from podsim.simulation import latency_model_for, require_arrivals, workload_trace
from podsim.validation import (
    LATENCIES,
    MAPPING_COLUMNS,
    TABLE_COLUMN,
    Comparison,
    Recorded,
    compare,
    read_recording,
)

STEADY_STARTS = 0.05
"""By how much kernels may begin closer together or further apart after a run than before it."""

console = Console(width=None if sys.stdout.isatty() else 120)
messages = Console(stderr=True)

FromOption = Annotated[
    Path | None,
    typer.Option(
        "--from",
        help="Compare what this folder's run recorded with what is simulated now; needs no GPU.",
    ),
]


@with_options(lists=False)
def validate_command(
    trace: TraceArgument = None,
    recording: FromOption = None,
    config_file: ConfigOption = None,
    out: OutOption = None,
    as_json: JsonOption = False,
    **options: Any,
) -> None:
    """Serve a trace with real forward passes on this machine's GPU, and compare the simulation.

    The engine runs the same scheduler on the same kernels, with random weights. It records every
    step and token; the simulator then serves the same arrivals. With --tp it shares the model among
    as many of the machine's GPUs. Needs torch, triton and the GPUs, or a recorded run with --from.
    """
    given = given_options(trace, config_file, options)
    if recording is not None and given:
        raise InputError(f"--from takes what was recorded: leave out {', '.join(sorted(given))}")
    if recording is not None:
        recorded = read_recording(recording)
    else:
        with naming_the_line(config_file, given):
            workload = config.options_from(Workload, given)
            deployment = config.options_from(Deployment, given)
        with _folder(out) as folder:
            recorded = _record(given, workload, deployment)
            if folder is not None:  # whatever becomes of the comparison
                recorded.save(folder)
    with _folder(out) as folder:
        comparison = compare(recorded)
        if folder is not None:
            save(comparison, folder)
    if as_json:
        typer.echo(report.to_json(description(comparison)), nl=False)
        return
    console.print(headline_table(comparison))
    console.print(step_table(comparison))
    console.print("\n".join(_lines(comparison)), highlight=False, soft_wrap=True)
    if out is not None:
        console.print(f"Results      {out}", highlight=False, soft_wrap=True)


def _folder(out: Path | None) -> AbstractContextManager[Path | None]:
    return nullcontext() if out is None else report.result_folder(out)


def save(comparison: Comparison, folder: Path) -> None:
    """Write the recording, and what it was compared with."""
    from podsim.validation_figure import plot_comparison  # matplotlib takes half a second to load

    comparison.recorded.save(folder)
    comparison.headline().to_csv(folder / "comparison.csv", float_format="%.9g")
    comparison.steps().to_csv(folder / "step_errors.csv", float_format="%.6g")
    comparison.requests().to_csv(folder / "request_pairs.csv", index=False, float_format="%.9f")
    (folder / "comparison.json").write_text(
        report.to_json(description(comparison)), encoding="utf-8"
    )
    with (folder / "comparison.png").open("wb") as file:
        plot_comparison(comparison, file)


def description(comparison: Comparison) -> dict[str, object]:
    """Everything that the tables show, and what it was measured on."""
    return {
        "name": comparison.recorded.name,
        "engine": dict(comparison.recorded.engine),
        "metrics": comparison.headline().to_dict(orient="index"),
        "steps": comparison.steps().to_dict(orient="index"),
    }


def _record(given: dict[str, object], workload: Workload, deployment: Deployment) -> Recorded:
    for name in given:
        if name.startswith("host_overhead") or name == "graph_padding":
            raise InputError(f"{name} is the engine's own here: it is measured")
    if workload.replay != "open":
        raise InputError(f"the engine serves with replay 'open', not '{workload.replay}'")
    model = model_named(deployment.model)
    latency_model = latency_model_for(deployment, model)
    require_memory_costs(deployment, model, latency_model)  # now, and not after serving
    trace = workload_trace(workload)
    require_arrivals(trace, deployment)
    try:
        from podsim import serving, shared_server
    except ModuleNotFoundError as error:
        raise InputError(
            f"podsim validate needs {error.name}: pip install 'podsim[gpu]' on the GPU's machine, "
            "or compare a recorded run with --from FOLDER"
        ) from None
    with ExitStack() as stack:
        with _progress() as told:
            server = shared_server.server_for(deployment, serving.longest(trace), told)
        stack.enter_context(closing(server))
        with messages.status(f"serving {len(trace)} requests for {trace.duration:.0f} s and more"):
            served = server.serve(trace, latency_model.step_time, workload.seed)
    name = f"{trace.name}, {trace.qps:.2f} req/s, {deployment.attention} attention"
    if deployment.tensor_parallel_size > 1:
        name += f", {deployment.tensor_parallel_size} GPUs"
    engine = served.engine(given)
    recorded = Recorded.of(served.recording, deployment, engine, name, served.gpu_samples)
    recorded.require_steps()
    return recorded


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    ]
    progress = Progress(*columns, console=messages)
    tasks: dict[str, Any] = {}

    def told(what: str, done: int, total: int) -> None:
        progress.start()  # not before: an empty one leaves a line above what is refused at once
        if what not in tasks:
            tasks[what] = progress.add_task(what, total=total)
        progress.update(tasks[what], completed=done, total=total)

    try:
        yield told
    finally:
        if tasks:
            progress.stop()


# --------------------------------------------------------------------------------- terminal


def headline_table(comparison: Comparison) -> Table:
    """Each metric measured and simulated."""
    title = f"{comparison.recorded.name}: {len(comparison.recorded.requests)} requests"
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in ("", "measured", "simulated", "difference", "error bars"):
        table.add_column(column, justify="left" if not column else "right")
    headline = comparison.headline()
    for name, row in headline.iterrows():
        text = _seconds if str(name).rsplit("_p", 1)[0] in LATENCIES else _number
        interval = "" if pd.isna(row["low"]) else f"{text(row['low'])} to {text(row['high'])}"
        error = "" if pd.isna(row["error"]) else f"{row['error']:+.1%}"
        label = str(name).replace("_p", " P").replace("_", " ")
        cells = (label, text(row["measured"]), text(row["simulated"]), error, interval)
        table.add_row(*cells)
    return table


def _seconds(value: float) -> str:
    return terminal.format_seconds(value)


def _number(value: float) -> str:
    return f"{value:,.2f}"


def step_table(comparison: Comparison) -> Table:
    """How far single steps are predicted."""
    table = Table(
        title="Steps, predicted from their composition",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    for column in ("", "steps", "seconds", "median error", "P90", "bias", "all together"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, row in comparison.steps().iterrows():
        table.add_row(
            str(kind),
            f"{row['steps']:,.0f}",
            f"{row['seconds']:,.1f}",
            f"{row['median']:.1%}",
            f"{row['p90']:.1%}",
            f"{row['bias']:+.1%}",
            f"{row['total']:+.1%}",
        )
    return table


def _profile_lines(comparison: Comparison) -> list[str]:
    model = comparison.simulated.latency_model
    if not isinstance(model, ProfiledLatency):
        return []
    same = model.profile.provenance.get("kernels_sha256") == comparison.recorded.engine.get(
        "kernels_sha256"
    )
    other = "" if same else ", of other kernels than the engine's"
    cards = comparison.recorded.engine.get("card"), model.profile.provenance.get("card")
    card = f", of card {cards[1]}; recorded on {cards[0]}" if None not in cards else ""
    if cards[0] == cards[1]:
        card = ""
    return [f"Profile      {model.profile.source}{other}{card}"]


def _starts_lines(engine: Mapping[str, Any]) -> list[str]:
    """Nothing of recordings from before it was measured."""
    if "kernel_starts" not in engine:
        return []
    before, after = (seconds * 1e6 for seconds in engine["kernel_starts"])
    if abs(after - before) <= STEADY_STARTS * before:
        return []
    why = (
        "another process began or ended on the machine's GPUs, which shortens steps"
        if after < before
        else "the GPU was not in one state"
    )
    return [
        f"Note         small kernels began {before:.2f} us apart when the engine's graphs were "
        f"captured and {after:.2f} after the run: {why} (docs/accuracy.md); serve again"
    ]


def _lines(comparison: Comparison) -> list[str]:
    engine = comparison.recorded.engine
    host, steps = engine["host_time"], comparison.recorded.steps
    waits = []
    if TABLE_COLUMN in steps:
        mean = steps[TABLE_COLUMN].mean() * 1e6
        waits = [f"Block table  {mean:.0f} us of the host a step, beside that"]
    if MAPPING_COLUMNS[0] in steps:
        mean = steps[MAPPING_COLUMNS[0]].mean() * 1e6
        waits = [f"Mapping      {mean:.0f} us of waiting a step, beside that"]
    kernels = f", {engine['kernels']} kernels" if "kernels" in engine else ""
    return [
        f"Engine       {engine['device_name']}, driver {engine['driver']}, torch "
        f"{engine['torch']}, triton {engine['triton']}, {engine['date']}{kernels}",
        *_profile_lines(comparison),
        f"Host time    {host['fixed'] * 1e6:.0f} us a step and "
        f"{host['per_request'] * 1e6:.2f} us a request, "
        f"{host.get('with_prefill', 0.0) * 1e6:.0f} us more with prefill",
        *waits,
        *_starts_lines(engine),
        *(f"Note         {note}" for note in comparison.simulated.notes),
    ]
