"""Every command and snippet of the README and docs/ runs; CONTRIBUTING.md: how to mark one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from podsim import config
from podsim.sweep_plan import read_plan

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {"console gpu", "console slow", "text"}


@dataclass(frozen=True)
class Block:
    line: int
    info: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = []
    lines = page.read_text().splitlines()
    start, info = None, ""
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start is None:
            start, info = number, line.removeprefix("```").strip()
        else:
            found.append(Block(start, info, "\n".join(lines[start : number - 1]) + "\n"))
            start = None
    assert start is None, f"{page.name}:{start}: a block without an end"
    return found


def commands(block: Block) -> list[str]:
    found = [line.removeprefix("$ ") for line in block.text.splitlines() if line.startswith("$ ")]
    assert found, f"line {block.line}: a console block without a command"
    return found


@pytest.fixture
def shell(tmp_path: Path) -> dict[str, str]:
    """An environment in which `podsim` and `python` are these."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, arguments in (("podsim", "-m podsim"), ("python", "")):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / name).chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_runs(
    page: Path, shell: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "validation").symlink_to(ROOT / "validation")
    monkeypatch.chdir(work)
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        kind, _, name = block.info.partition(" ")
        if block.info in NOT_RUN:
            continue
        if block.info == "console":
            for command in commands(block):
                run = subprocess.run(
                    ["bash", "-euo", "pipefail", "-c", command],
                    capture_output=True,
                    text=True,
                    env=shell,
                )
                assert run.returncode == 0, f"{where}: {command}\n{run.stderr}"
        elif kind == "toml" and name:
            Path(name).write_text(block.text)
            (read_plan if name == "sweep.toml" else config.read_toml)(Path(name))
        elif block.info == "python":
            exec(compile(block.text, where, "exec"), {"__name__": "__main__"})
        else:
            pytest.fail(f"{where}: `{block.info}` is not a kind of block that is known")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_hides_outside_a_block(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"^(?: {4}|\t|\$ )(?:podsim|python|pip|make) .*$", prose, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_are_named_exist(page: Path) -> None:
    """Also in what is not run: every --option of a podsim command is one of its --help."""
    for block in blocks(page):
        if not block.info.startswith("console"):
            continue
        for command in commands(block):
            for words in re.findall(r"^podsim ((?:trace |kernels )?\S+)([^|#]*)", command):
                known = help_of(words[0])
                for option in re.findall(r"(?<!\S)--[a-z-]+", words[1]):
                    assert option in known, f"{page.name}:{block.line}: {option}"


def help_of(command: str) -> set[str]:
    from typer.main import get_command

    from podsim.cli import app

    found = get_command(app)
    for word in command.split():
        found = found.commands[word]
    return {option for parameter in found.params for option in parameter.opts}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_the_site_lists_every_page() -> None:
    listed = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert listed == {page.name for page in PAGES if page.parent.name == "docs"}
