"""The commands `podsim kernels bench`, `check`, `paging` and `tune`."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pandas as pd
import typer
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from podsim import kernel_report, report
from podsim.errors import InputError
from podsim.gpu_sampler import current_gpu
from podsim.kernel_workloads import (
    KernelWorkload,
    reference_workloads,
    sweep_workloads,
    uneven_workloads,
)
from podsim.profile import kernels_hash

ROWS_FILE = "rows.csv"
OVERHEAD_FILE = "launch_overhead.csv"
PROVENANCE_FILE = "provenance.json"
PROGRESS_SECONDS = 10.0
BENCH_SEED, TUNE_SEED = 7, 11
"""Random workloads are tuned on and judged by different draws."""
KINDS: dict[str, Callable[[], list[KernelWorkload]]] = {
    "reference": reference_workloads,
    "sweep": lambda: sweep_workloads(24, BENCH_SEED),
    "uneven": lambda: uneven_workloads(12, BENCH_SEED),
}
"""What `bench` times."""

kernels_app = typer.Typer(
    no_args_is_help=True, help="Time, check and tune the attention kernels on this machine's GPU."
)
console = Console()

KernelsOption = Annotated[
    str, typer.Option("--kernels", help="auto, hopper (compute capability 9.0) or triton.")
]
SecondsOption = Annotated[float, typer.Option(help="For how long.", min=1)]


@kernels_app.command("bench")
def bench_command(
    out: Annotated[Path, typer.Option(help="Folder to leave the results in.")],
    sources: Annotated[
        list[Path] | None,
        typer.Option(
            "--from",
            help="Results again from this folder's rows, or from several folders'; needs no GPU.",
        ),
    ] = None,
    kernels: KernelsOption = "auto",
    workloads: Annotated[
        str, typer.Option(help="Comma list of reference, sweep and uneven.")
    ] = "reference,sweep,uneven",
    rounds: Annotated[int, typer.Option(help="Bursts of each kernel.", min=1)] = 5,
    sustained: Annotated[
        bool, typer.Option(help="Also serial and pod back to back, with their energy.")
    ] = True,
    flashinfer: Annotated[
        bool | None,
        typer.Option(help="Also FlashInfer's kernels. Default: where it is installed."),
    ] = None,
) -> None:
    """Time serial, streams, unified and pod, and both sides alone, batch by batch.

    The folder gets rows.csv (every burst, with the SM clock), results.csv and summary.csv (medians
    and gains), launch_overhead.csv (time of the host), bench.png, and provenance.json. The kernels
    of a workload take turns, in a random order that changes from round to round.
    """
    chosen = _chosen(workloads)
    if sources:
        known = {workload.name for kind in KINDS.values() for workload in kind()}
        table = pd.concat(kernel_report.read_rows(path / ROWS_FILE, known) for path in sources)
        table = table[table["workload"].isin([workload.name for workload in chosen])]
        if table.empty:
            raise InputError(f"{sources[0]}: has no rows of --workloads {workloads}")
        overhead = pd.concat(kernel_report.read_overhead(path / OVERHEAD_FILE) for path in sources)
        machine = kernel_report.one_machine([path / PROVENANCE_FILE for path in sources])
        with report.result_folder(out) as folder:
            found = _leave_bench(folder, table, overhead, machine)
    else:
        measure = measuring()
        if flashinfer is None:
            flashinfer = importlib.util.find_spec("flashinfer") is not None
        names = ("serial", "pod") if sustained else ()
        with report.result_folder(out) as folder:
            with progress_bar(chosen, "timing") as done:
                rows = measure.bench(chosen, kernel_set(kernels), rounds, names, flashinfer, done)
            overhead = pd.DataFrame(measure.launch_overhead(kernel_set(kernels)))
            machine = provenance(f"podsim kernels bench --workloads {workloads}")
            found = _leave_bench(folder, pd.DataFrame(rows), overhead, machine)
    console.print(kernel_report.workloads_table(found))
    console.print(kernel_report.summary_table(found))


def _leave_bench(
    folder: Path, table: pd.DataFrame, overhead: pd.DataFrame, machine: dict[str, object]
) -> pd.DataFrame:
    """Write all files of `bench`, most of them from its rows, and return its results."""
    workloads = [workload for kind in KINDS.values() for workload in kind()]
    found = kernel_report.results(table, workloads)
    table = table.assign(group=found["group"].loc[table["workload"]].to_numpy())
    table.to_csv(folder / ROWS_FILE, index=False, float_format="%.6g")
    found.to_csv(folder / "results.csv", float_format="%.5g")
    kernel_report.summary(found).to_csv(folder / "summary.csv", index=False, float_format="%.4f")
    kernel_report.write_figure(found, folder / "bench.png")
    overhead.to_csv(folder / OVERHEAD_FILE, index=False, float_format="%.3g")
    (folder / PROVENANCE_FILE).write_text(json.dumps(machine, indent=2) + "\n")
    return found


@kernels_app.command("tune")
def tune_command(
    out: Annotated[Path, typer.Option(help="Folder to leave the rows in.")],
    count: Annotated[int, typer.Option(help="Random workloads.", min=1)] = 24,
    rounds: Annotated[int, typer.Option(help="Bursts of each variant.", min=1)] = 3,
) -> None:
    """Time the variants of Hopper's POD that podsim.kernels.config chooses from.

    The folder gets rows.csv, gains.csv (gain of every variant over serial, by workload) and
    provenance.json. The workloads are drawn apart from those of `podsim kernels bench`.
    """
    measure = measuring()
    kernel_set("hopper")
    chosen = [*sweep_workloads(count, TUNE_SEED), *uneven_workloads(count // 4, TUNE_SEED)]
    with report.result_folder(out) as folder:
        with progress_bar(chosen, "tuning") as done:
            rows = measure.tune(chosen, rounds, done)
        table = pd.DataFrame(rows)
        table.to_csv(folder / ROWS_FILE, index=False, float_format="%.6g")
        times = kernel_report.medians(table)
        gains = times.rdiv(times["serial"], axis=0)
        gains.to_csv(folder / "gains.csv", float_format="%.4f")
        _write_provenance(folder, f"podsim kernels tune --count {count}")
    console.print(gains.mean().sort_values(ascending=False).to_string(float_format="{:.3f}".format))


@kernels_app.command("paging")
def paging_command(
    out: Annotated[Path, typer.Option(help="Folder to leave the rows in.")],
    kernels: KernelsOption = "auto",
    rounds: Annotated[int, typer.Option(help="Bursts of each kernel.", min=1)] = 5,
) -> None:
    """Time prefill, decode and pod from contiguous keys and from pages of 16 to 256 keys.

    The folder gets rows.csv, overhead.csv (time from pages over contiguous, by workload) and
    provenance.json. The pages of a request lie in a random order.
    """
    measure = measuring()
    chosen = reference_workloads()[:4]
    with report.result_folder(out) as folder:
        with progress_bar(chosen, "timing") as done:
            rows = measure.paging(chosen, kernel_set(kernels), rounds, done)
        table = pd.DataFrame(rows)
        table.to_csv(folder / ROWS_FILE, index=False, float_format="%.6g")
        found = kernel_report.paging_overhead(table)
        found.to_csv(folder / "overhead.csv", index=False, float_format="%.4f")
        _write_provenance(folder, "podsim kernels paging")
    mean = found.groupby(["kernel", "page_size"])["overhead"].agg(["mean", "max"])
    console.print(mean.to_string(float_format="{:.3f}".format))


@kernels_app.command("check")
def check_command(
    seconds: SecondsOption = 60.0,
    kernels: KernelsOption = "auto",
    batches: Annotated[int, typer.Option(help="Random batches of each kernel in turn.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the batches.")] = 0,
    strategy: Annotated[
        str | None, typer.Option(help="Comma list of strategies. Default: all.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Comma list such as 32/8,28/4. Default: all.")
    ] = None,
    page_size: Annotated[
        str | None, typer.Option(help="Comma list; 0: contiguous. Default: all.")
    ] = None,
) -> None:
    """Compare every kernel with float64 on random batches, one kernel after another.

    Lengths from one key to 131072, up to 4 chunks and 512 decodes, contiguous and paged caches with
    shuffled pages, and large numbers where no result may look. Exits with 1 if anything is wrong,
    and with 130 if it was interrupted before it found anything; says in both cases how far it came.
    """
    measuring()
    checks = importlib.import_module("podsim.check_kernels")
    chosen = _kept(checks.cases(seed), "--strategy", strategy, lambda case: case.strategy)
    chosen = _kept(chosen, "--heads", heads, lambda case: "{}/{}".format(*case.heads))
    chosen = _kept(chosen, "--page-size", page_size, lambda case: str(case.page_size))
    counts = CheckCounts()
    interrupted = False
    try:
        checks.check(kernel_set(kernels), chosen, seconds, batches, seed, counts.add)
    except KeyboardInterrupt:
        interrupted = True
    console.print(("interrupted: " if interrupted else "") + counts.text())
    if counts.wrong or interrupted:
        raise typer.Exit(1 if counts.wrong else 130)


class CheckCounts:
    """What `check` has done; says so on stderr every PROGRESS_SECONDS."""

    def __init__(self) -> None:
        self.batches = self.wrong = 0
        self._seen: set[object] = set()
        self._started = self._said = time.monotonic()

    def add(self, case: object, wrong: list[str]) -> None:
        self.batches += 1
        self._seen.add(case)
        if wrong:
            self.wrong += 1
            console.print(f"{case}: {'; '.join(wrong[:3])}")
        if time.monotonic() - self._said >= PROGRESS_SECONDS:
            self._said = time.monotonic()
            Console(stderr=True).print(self.text())

    def text(self) -> str:
        return (
            f"{self.batches} random batches of {len(self._seen)} kernels in "
            f"{time.monotonic() - self._started:.0f} s: {self.wrong} wrong"
        )


def _kept(
    cases: list[Any], option: str, text: str | None, value_of: Callable[[Any], str]
) -> list[Any]:
    """The cases with one of the values that an option lists; all if it lists none."""
    if text is None:
        return cases
    known = sorted({value_of(case) for case in cases})
    for name in text.split(","):
        if name not in known:
            raise InputError(f"{option} has '{name}', expected some of {', '.join(known)}")
    return [case for case in cases if value_of(case) in text.split(",")]


def measuring() -> ModuleType:
    """podsim.measure_kernels; InputError on a machine where it cannot run."""
    try:
        import torch

        from podsim import measure_kernels
    except ModuleNotFoundError as error:
        raise InputError(
            f"podsim kernels needs {error.name}: pip install 'podsim[gpu]' on the machine with "
            "the GPU"
        ) from None
    if not torch.cuda.is_available():
        raise InputError("no CUDA GPU on this machine: run `podsim kernels` where it is")
    return measure_kernels


def kernel_set(asked: str) -> str:
    """hopper or triton, as asked or as this machine's GPU can."""
    import torch

    from podsim.kernels.config import KERNELS

    if asked == "auto":
        return "hopper" if torch.cuda.get_device_capability() == (9, 0) else "triton"
    if asked not in KERNELS:
        raise InputError(f"--kernels is '{asked}', expected auto or one of {', '.join(KERNELS)}")
    if asked == "hopper" and torch.cuda.get_device_capability() != (9, 0):
        raise InputError(
            f"the Hopper kernels need compute capability 9.0, {torch.cuda.get_device_name()} has "
            f"{torch.cuda.get_device_capability()}"
        )
    return asked


def _chosen(text: str) -> list[KernelWorkload]:
    names = text.split(",")
    for name in names:
        if name not in KINDS:
            raise InputError(f"--workloads has '{name}', expected some of {', '.join(KINDS)}")
    return [workload for name in names for workload in KINDS[name]()]


@contextmanager
def progress_bar(workloads: Sequence[object], verb: str) -> Iterator[Callable[[], None]]:
    """A bar; what is yielded is to be called when a workload is done."""
    columns = [*Progress.get_default_columns(), TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{verb} {len(workloads)} workloads", total=len(workloads))
        yield lambda: progress.advance(task)


def _write_provenance(folder: Path, command: str) -> None:
    (folder / PROVENANCE_FILE).write_text(json.dumps(provenance(command), indent=2) + "\n")


def provenance(command: str) -> dict[str, object]:
    """The GPU, its driver and the software that a command measures with."""
    import torch
    import triton

    query = "driver_version,power.limit"
    output = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", f"--id={current_gpu()}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    driver, power_limit = (part.strip() for part in output.split(","))
    return {
        "device_name": torch.cuda.get_device_name(),
        "driver": driver,
        "power_limit": power_limit,
        "cuda": torch.version.cuda,
        "torch": str(torch.__version__),
        "triton": triton.__version__,
        "flashinfer": _version("flashinfer-python"),
        "kernels_sha256": kernels_hash(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
