"""The command `podsim profile-memory`."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
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

EXTENDED = ("mapping", "growth", "transfer", "layers", "layers-column")
"""Parts to whose rows others can be added."""
Rows = list[dict[str, object]] | pd.DataFrame


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
        bool,
        typer.Option(
            "--more",
            help="Keep the rows that are there, and add passes of growth, kinds of transfers and "
            "calls of mapping that they lack, or the error of layers.",
        ),
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
        if more and part not in EXTENDED:
            raise InputError(f"--more adds to {', '.join(EXTENDED)}; {part} is measured as a whole")
        if more and part not in provenance:
            raise InputError(f"{folder}: no {part} that --more could add to")
        kept = memory_calibration.read_rows(folder, part) if more else None
        memory_calibration.write_rows(folder, part, _measured(part, known, old, kept))
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


def _measured(part: str, gpu: Gpu, old: MemoryCosts | None, kept: pd.DataFrame | None) -> Rows:
    """Rows of a part: all of them, or what is kept and what that lacks."""
    try:
        import torch

        _require_gpu(torch, gpu)
        from podsim import measure_growth, measure_kvpr, measure_mapping, measure_transfers

        if part == "paged":
            from podsim import measure_paged

            return measure_paged.measure(_tell)
    except ModuleNotFoundError as error:
        raise InputError(
            f"podsim profile-memory needs {error.name}: pip install 'podsim[gpu,vmm]' on the "
            "machine with the GPU"
        ) from None
    if part == "recompute":
        return measure_transfers.measure_recompute(_tell)
    if part.startswith("layers"):
        if kept is not None:
            return measure_kvpr.check(kept, _tell)
        return measure_kvpr.measure(*_schedule_and_splits(part, old), _tell)
    if part == "mapping":
        rows = measure_mapping.measure(_tell, set() if kept is None else set(kept["api"]))
    elif part == "growth":
        rows = measure_growth.measure(_tell)
    else:
        kinds = ["direction", "memory", "beside"]
        known = [] if kept is None else kept[kinds].to_numpy().tolist()
        rows = measure_transfers.measure_transfers(_tell, set(map(tuple, known)))
    return rows if kept is None else memory_calibration.with_more(part, kept, rows)


def _schedule_and_splits(
    part: str, old: MemoryCosts | None
) -> tuple[str, Callable[[str, int, int, str], int]]:
    """What layers are timed with: the schedule, and what the costs predict."""
    if old is None or not (old.transfer and old.recompute):
        raise InputError(f"{part} needs predictions: measure transfer and recompute first")
    from podsim.measure_kvpr import NUM_LAYERS

    def predict(model: str, batch: int, context: int, schedule: str) -> int:
        return layer_predictions.predicted_split(old, model, batch, context, schedule, NUM_LAYERS)

    return "column" if part == "layers-column" else "row", predict


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
