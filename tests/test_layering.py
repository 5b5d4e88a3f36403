"""The rules of the architecture: imports point up the list, the core needs no GPU packages."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SIMULATE = "simulate --arrivals poisson --qps 4 --prompt-tokens 300 --output-tokens 9 --requests 20"

LAYERS = [
    {"errors", "ranks", "workers", "ray_workers", "gpu_sampler", "gpu_power"},
    {"request", "batch", "model", "model_config", "hardware", "config", "graph_sizes", "heat"},
    {"sensitivity"},
    {"page_groups", "memory_costs", "kvpr", "offloaded_shapes"},
    {"trace_fields", "trace_records", "trace_formats", "trace_rows", "trace_files"},
    {"trace_clients", "trace_folders"},
    {"workload_arrivals", "workload_trace", "trace_prefix", "workload_synthetic", "workload"},
    {"trace_tokenizer", "trace_statistics", "trace_report", "trace_writers"},
    {"roofline", "scaling"},
    {"fit_non_negative", "op_tables"},
    {"profile", "points", "attention_features", "unified_features", "overlap", "attention_model"},
    {"collectives", "latency", "paged_latency"},
    {"fitting", "heat_fitting", "held_out", "row_clocks"},
    {"step_fitting"},
    {"fit_plots", "calibration", "collective_calibration"},
    {"layer_predictions", "memory_calibration"},
    {
        "row_checks",
        "profile_plan",
        "profile_journal",
        "profile_run",
        "profile_extend",
        "profile_checks",
    },
    {"vidur_export"},
    {"prefix_cache", "swap_space", "kv_cache", "block_tables", "decode_group", "waiting"},
    {"scheduler", "step_inputs"},
    {"vattention", "step_memory", "swap_time", "mapping_time", "offload_time", "memory_system"},
    {
        "clock",
        "event_log",
        "replica_heat",
        "replica",
        "router",
        "cluster",
        "metrics",
        "simulation",
        "engine",
    },
    {"latency_provider"},
    {
        "variants",
        "slo",
        "result_row",
        "capacity_search",
        "capacity",
        "recording_checks",
        "validation",
    },
    {"pareto", "sweep_plan", "sweep_point", "sweep_journal", "sweep_table", "sweep"},
    {"step_costs", "perfetto", "request_records", "terminal", "trace_figure", "validation_figure"},
    {"report_charts", "report_html", "report", "capacity_report"},
    {"virtual_memory", "mapping_thread", "memory_view", "virtual_kv"},
    {
        "measure",
        "measure_clock",
        "measure_ceilings",
        "measure_sequences",
        "measure_collectives",
    },
    {"llama_weights", "tensor_parallel", "step_buffers", "step_clocks", "cuda_graphs", "llama"},
    {"kernel_starts", "serving", "shared_server"},
    {"kernel_workloads", "flashinfer_kernels", "measure_kernels", "check_kernels", "kernel_report"},
    {"kernel_questions", "measure_questions", "questions_report", "questions_figures"},
    {"offloaded_layers", "check_offload", "check_mapping"},
    {"measure_mapping", "measure_transfers", "measure_kvpr"},
    {"measure_paged", "measure_growth"},
    {"command_options", "profile_command", "collectives_command", "memory_command"},
    {"kernels_command"},
    {"questions_command"},
    {"trace_command", "search_command", "validate_command", "doctor", "cli"},
    {"__init__", "__main__"},
]


def imported(path: Path) -> set[str]:
    """Every absolute module name that a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_every_module_has_a_layer() -> None:
    modules = {path.stem for path in (ROOT / "podsim").glob("*.py")}
    assert modules == set().union(*LAYERS)


def test_imports_point_up_the_layers() -> None:
    level = {module: i for i, layer in enumerate(LAYERS) for module in layer}
    for path in (ROOT / "podsim").glob("*.py"):
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "podsim" and len(parts) > 1 and parts[1] in level:
                assert level[parts[1]] <= level[path.stem], f"{path.name} imports {name}"


def test_simpy_lives_in_the_time_layer_only() -> None:
    users = {p.stem for p in (ROOT / "podsim").glob("*.py") if "simpy" in imported(p)}
    assert users == {"clock", "replica", "cluster", "simulation"}


def test_kernels_know_nothing_of_the_simulator() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not any(name.split(".")[0] == "podsim" for name in imported(path)), path


def test_the_core_loads_without_torch_and_triton() -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'triton'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import podsim, podsim.cli\n"
        "assert podsim.simulate"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


@pytest.mark.parametrize(
    "code",
    [
        "import podsim",
        "import podsim.cli",
        "from podsim.sweep_point import run_point",  # what a worker of a sweep loads
        f"from podsim.cli import app; app('{SIMULATE}'.split(), standalone_mode=False)",
        f"from podsim.cli import app; app('{SIMULATE} --out x'.split(), standalone_mode=False)",
    ],
    ids=["library", "commands", "worker", "simulate", "simulate --out"],
)
def test_nothing_slow_is_loaded_before_it_is_used(code: str, tmp_path: Path) -> None:
    """Every command and every worker of a sweep would wait for it: some half a second each."""
    loaded = "import sys; print('loaded:', *sorted({m.split('.')[0] for m in sys.modules}))"
    command = [sys.executable, "-c", f"{code}; {loaded}"]
    done = subprocess.run(command, check=True, cwd=tmp_path, capture_output=True, text=True)
    modules = set(done.stdout.splitlines()[-1].removeprefix("loaded: ").split())
    assert {"podsim", "numpy"} <= modules
    assert modules.isdisjoint({"scipy", "matplotlib", "torch", "triton", "ray"})


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == set(settings["package-dir"])
    for package, folder in settings["package-dir"].items():
        assert (ROOT / folder / "__init__.py").exists(), package
        subfolders = {p.parent for p in (ROOT / folder).rglob("*.py")} - {ROOT / folder}
        assert not subfolders, f"{subfolders} would not be installed with {package}"
