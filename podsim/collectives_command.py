"""The command `podsim profile-collectives`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from podsim import collective_calibration, report, terminal
from podsim.collectives import FOLDER, Collectives
from podsim.command_options import JsonOption
from podsim.errors import InputError
from podsim.hardware import GPUS, Gpu, gpu_named


def profile_collectives_command(
    gpu: Annotated[str, typer.Option(help="The GPUs of this machine.")] = "h200",
    gpus: Annotated[
        str | None,
        typer.Option(
            help="Among how many GPUs, as a comma list such as 2,4. "
            "Default: 2, 4, 8 as far as this machine has as many."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to leave the times in.")] = None,
    refit: Annotated[
        Path | None,
        typer.Option(help="Check and fit the rows of this folder again; needs no GPU."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time all-reduce and all-gather among this machine's GPUs, for tensor parallelism.

    The folder gets measurements.csv (every timed row) and collectives.json (times by size of the
    message, their error on held-out sizes, and what they were measured on). Needs torch and NCCL.
    """
    if refit is not None:
        found = collective_calibration.refit(refit, GPUS)
    else:
        folder = out or Path("profiles") / gpu / FOLDER
        with report.result_folder(folder) as scratch:
            found = _measured_collectives(gpu_named(gpu), gpus, scratch)
    if as_json:
        typer.echo(report.to_json(found.description()), nl=False)
        return
    Console().print(terminal.collectives_table(found))


def _measured_collectives(gpu: Gpu, gpus: str | None, folder: Path) -> Collectives:
    try:
        from podsim import measure_collectives
    except ModuleNotFoundError as error:
        raise InputError(
            f"podsim profile-collectives needs {error.name}: pip install 'podsim[gpu]' on the "
            "machine with the GPUs"
        ) from None
    counts = measure_collectives.gpu_counts(gpu, gpus)
    command = f"podsim profile-collectives --gpu {gpu.name} --gpus {','.join(map(str, counts))}"
    provenance = measure_collectives.provenance() | {"command": command}
    points = {count: collective_calibration.collective_points(count) for count in counts}
    columns = [*Progress.get_default_columns(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"timing collectives of {gpu.name}", total=None)
        rows = measure_collectives.measure(
            points, lambda done, total: progress.update(task, completed=done, total=total)
        )
    return collective_calibration.write(folder, rows, gpu, provenance)
