"""The command `podsim profile-memory`."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from podsim import layer_predictions, memory_calibration, report, terminal
from podsim.command_options import JsonOption
from podsim.errors import InputError
from podsim.hardware import Gpu, gpu_named
from podsim.memory_calibration import COLUMNS
from podsim.memory_costs import FOLDER, MEMORY_FILE, MemoryCosts, read_memory_costs
from podsim.profile import kernels_hash

messages = Console(stderr=True)


def profile_memory_command(
    part: Annotated[
        str,
        typer.Argument(help=f"What to time: {', '.join(COLUMNS)}; or fit what is there."),
    ],
    gpu: Annotated[str, typer.Option(help="The GPU of this machine.")] = "h200",
    out: Annotated[
        Path | None, typer.Option(help="Folder of the rows and costs; parts are added to it.")
    ] = None,
    more: Annotated[
        bool, typer.Option("--more", help="Keep the passes of growth that are there, and add some.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Time what memory systems cost on this machine's GPU: mapping, transfers, recomputation, and
    block tables.

    The folder gets PART.csv (every timed row) and memory.json (the costs fitted to all parts that
    are there, their error on held-out rows, and what they were measured on). layers and
    layers-column time whole layers to judge the costs: measure transfer and recompute first.
    paged times attention from blocks of every size, and the host's work for their table. Needs
    torch, cuda-bindings for mapping, and triton for paged.
    """
    folder = out or Path("profiles") / gpu / FOLDER
    known = gpu_named(gpu)
    old = read_memory_costs(folder, str(folder)) if (folder / MEMORY_FILE).is_file() else None
    if old is not None and old.gpu != gpu:
        raise InputError(f"{old.source}: measured on '{old.gpu}', not on '{gpu}'")
    provenance = dict(old.provenance) if old is not None else {}
    if part != "fit":
        if part not in COLUMNS:
            expected = ", ".join((*COLUMNS, "fit"))
            raise InputError(f"part is '{part}', expected one of: {expected}")
        if more and part != "growth":
            raise InputError(f"--more adds passes of growth; {part} is measured as a whole")
        if more and part not in provenance:
            raise InputError(f"{folder}: no growth that --more could add passes to")
        rows = _measured(part, known, old)
        if more:
            rows = memory_calibration.with_more_passes(folder, part, rows)
        memory_calibration.write_rows(folder, part, rows)
        machine = _machine(f"podsim profile-memory {part} --gpu {gpu}{' --more' * more}")
        kernels = {"kernels_sha256": kernels_hash()} if part == "paged" else {}
        before = {"before": provenance[part]} if more else {}
        provenance[part] = machine | kernels | before
    costs = memory_calibration.fit_folder(folder, gpu, provenance)
    if as_json:
        typer.echo(report.to_json(costs.description()), nl=False)
        return
    console = Console(width=None if messages.is_terminal else 120)
    if costs.errors:
        console.print(terminal.memory_errors_table(costs))
    console.print(f"Costs        {folder / MEMORY_FILE}", highlight=False, soft_wrap=True)


def _measured(part: str, gpu: Gpu, old: MemoryCosts | None) -> list[dict[str, object]]:
    try:
        import torch

        _require_gpu(torch, gpu)
        if part == "mapping":
            from podsim import measure_mapping

            return measure_mapping.measure(_tell)
        if part == "growth":
            from podsim import measure_growth

            return measure_growth.measure(_tell)
        if part == "paged":
            from podsim import measure_paged

            return measure_paged.measure(_tell)
        from podsim import measure_kvpr, measure_transfers
    except ModuleNotFoundError as error:
        raise InputError(
            f"podsim profile-memory needs {error.name}: pip install 'podsim[gpu,vmm]' on the "
            "machine with the GPU"
        ) from None
    if part == "transfer":
        return measure_transfers.measure_transfers(_tell)
    if part == "recompute":
        return measure_transfers.measure_recompute(_tell)
    if old is None or not (old.transfer and old.recompute):
        raise InputError(f"{part} needs predictions: measure transfer and recompute first")
    schedule = "column" if part == "layers-column" else "row"

    def predict(model: str, batch: int, context: int, schedule: str) -> int:
        layers = measure_kvpr.NUM_LAYERS
        return layer_predictions.predicted_split(old, model, batch, context, schedule, layers)

    return measure_kvpr.measure(schedule, predict, _tell)


def _tell(text: str) -> None:
    messages.print(text, highlight=False, markup=False)


def _require_gpu(torch: Any, gpu: Gpu) -> None:
    if not torch.cuda.is_available():
        raise InputError(
            f"no CUDA GPU on this machine: run `podsim profile-memory` where the {gpu.name} is"
        )
    found = torch.cuda.get_device_name()
    if found != gpu.device_name:
        raise InputError(f"this machine's GPU is '{found}', but '{gpu.name}' is to be measured")


def _machine(command: str) -> dict[str, object]:
    """What a part's rows depend on."""
    import torch

    from podsim.gpu_sampler import driver_settings

    return {
        "device_name": torch.cuda.get_device_name(),
        **driver_settings(),
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
    }
