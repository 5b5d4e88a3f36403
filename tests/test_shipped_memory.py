"""The shipped memory costs: the fit of their rows, of the shipped kernels, and found by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from memory_table import judged
from typer.testing import CliRunner

from podsim.cli import app
from podsim.memory_calibration import COLUMNS, fit_folder
from podsim.memory_costs import APIS, DIRECTIONS, find_memory_costs
from podsim.profile import kernels_hash

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "profiles").glob("*/memory"))
LOAD = ["--arrivals", "poisson", "--qps", "4", "--requests", "30"]


def test_the_h200_is_among_them() -> None:
    assert "h200" in {folder.parent.name for folder in SHIPPED}


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.parent.name)
def test_shipped_costs_are_the_fit_of_their_rows(folder: Path, tmp_path: Path) -> None:
    shipped = json.loads((folder / "memory.json").read_text())
    for part in shipped["provenance"]:
        (tmp_path / f"{part}.csv").write_bytes((folder / f"{part}.csv").read_bytes())
    fit_folder(tmp_path, shipped["gpu"], shipped["provenance"])
    again = dict(leaves(json.loads((tmp_path / "memory.json").read_text())))
    expected = dict(leaves(shipped))
    assert again.keys() == expected.keys()
    for path, value in expected.items():
        # The last digits of a fit are those of the machine's LAPACK.
        wanted = pytest.approx(value, rel=1e-9) if isinstance(value, float) else value
        assert again[path] == wanted, path


def leaves(content: object, path: str = "") -> Iterator[tuple[str, object]]:
    """What is at the ends of nested dictionaries, by path."""
    if not isinstance(content, dict):
        yield path, content
        return
    for key, value in content.items():
        yield from leaves(value, f"{path}/{key}")


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.parent.name)
def test_it_is_said_where_they_come_from(folder: Path) -> None:
    provenance = find_memory_costs(folder.parent.name).provenance
    assert set(provenance) == {part for part in COLUMNS if (folder / f"{part}.csv").is_file()}
    assert set(provenance) == set(COLUMNS)
    for part, facts in provenance.items():
        assert isinstance(facts, dict)
        for fact in ("device_name", "driver", "power_limit", "torch", "cuda", "date"):
            assert facts[fact], (part, fact)
        assert facts["command"].startswith(f"podsim profile-memory {part} ")
    assert provenance["paged"]["kernels_sha256"] == kernels_hash()  # type: ignore[index]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda path: path.parent.name)
def test_the_rows_are_possible(folder: Path) -> None:
    costs = find_memory_costs(folder.parent.name)
    for direction in DIRECTIONS:
        pinned = costs.transfer_costs(f"{direction} pinned")
        pageable = costs.transfer_costs(f"{direction} pageable")
        assert 10e9 < 1 / pinned.per_unit < 64e9  # at most PCIe 5 with 16 lanes
        assert pageable.per_unit > pinned.per_unit
    mapping = costs.mapping_costs(2 * 2**20, "idle")
    for api in APIS:
        assert 0 < getattr(mapping, api).at(1) < 1e-3, api
    calls = pd.read_csv(folder / "mapping.csv")
    assert calls.loc[calls["api"] == "cycle", "repeats"].tolist() == [10_000]
    for size in (16, 32, 64, 128, 256):
        paged = costs.paged_costs(size)
        assert 0.95 < paged.prefill < 1.5
        assert 0.95 < paged.decode < 1.5


def test_the_bars_on_layers_and_splits() -> None:
    """Over 20 points of each schedule: times of full transfer, and of the timed split next to the
    predicted one, within 5 %; the predicted split within 10 % of the best measured, its time within
    3 %. Where other splits miss, docs/memory.md says.
    """
    costs = find_memory_costs("h200")
    folder = ROOT / "profiles" / "h200" / "memory"
    chains = [pd.read_csv(folder / f"{part}.csv") for part in ("layers", "layers-column")]
    points = judged(costs, pd.concat(chains))
    assert (points.groupby("schedule").size() >= 20).all()
    bars = {"full_error": 0.05, "kvpr_error": 0.05, "split_error": 0.1, "regret": 0.03}
    for name, bar in bars.items():
        assert points[name].abs().max() < bar, name
    for schedule in ("row", "column"):
        assert costs.errors[f"layers {schedule}: full"]["worst"] < bars["full_error"]
        assert costs.errors[f"layers {schedule}: best split"]["worst"] < bars["split_error"]
        assert costs.errors[f"layers {schedule}: regret"]["worst"] < bars["regret"]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--kv", "paged"], "block"),
        (["--kv", "vattention"], "page-groups of 2,048 KB"),
        (["--kv-offload", "full", "--host-memory", "40", "--kv-on-host"], "0.0% of its tokens"),
        (["--kv-offload", "kvpr", "--host-memory", "40", "--kv-on-host"], "% of its tokens"),
        (["--preemption", "swap", "--host-memory", "9", "--num-blocks", "700"], "requests out"),
        (["--kv", "paged", "--preemption", "swap", "--host-memory", "9"], "0 requests out"),
        (["--kv", "vattention", "--preemption", "swap", "--host-memory", "9"], "0 requests out"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_finds_them_by_itself(options: list[str], shown: str) -> None:
    command = ["simulate", *LOAD, "--gpu", "h200", "--model", "llama-2-7b", *options]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    assert shown in run.output


def test_a_comparison_finds_them_by_itself() -> None:
    run = CliRunner().invoke(app, ["compare", *LOAD, "--gpu", "h200", "--kv", "paged,vattention"])
    assert run.exit_code == 0, run.output
    assert "vattention: batch" in run.output


def test_they_are_installed_with_the_profiles() -> None:
    """package-data is by pattern: the files have to match it."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["podsim.profiles"]
    matched = {path for pattern in patterns for path in (ROOT / "profiles").glob(pattern)}
    for folder in SHIPPED:
        assert {path for path in folder.iterdir() if path.is_file()} <= matched
