"""What commands share: every option of a workload and a deployment, the trace and the files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from podsim import config
from podsim.config import Deployment, Workload
from podsim.errors import InputError

TraceArgument = Annotated[
    str | None,
    typer.Argument(help="Trace file (Azure, Mooncake, Vidur or podsim) or name of a shipped one."),
]
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of options; those on the command line win."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to leave the results in.")]


def with_options(*, lists: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command every option of Workload and Deployment, as declared there.

    The command receives them as keyword arguments, None where not given; with `lists` as text,
    to be split at commas.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        kept = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        added = []
        for options in (Workload, Deployment):
            kinds = config.option_types(options)
            for option in fields(options):
                if option.name == "trace":
                    continue
                kind: Any = str if lists and options is Deployment else kinds[option.name]
                short = option.metadata["short"]
                names = [f"--{option.name.replace('_', '-')}", short] if short else []
                default = "" if option.default is None else f" Default: {option.default}."
                annotation = Annotated[
                    kind | None,
                    typer.Option(
                        *names,
                        help=option.metadata["help"] + default,
                        show_default=False,
                        rich_help_panel=options.__name__,
                    ),
                ]
                added.append(
                    inspect.Parameter(
                        option.name,
                        inspect.Parameter.KEYWORD_ONLY,
                        default=None,
                        annotation=annotation,
                    )
                )
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept] + added
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


class ListsCommand(TyperCommand):
    """Of `with_options(lists=True)`: options that are true or false also stand alone, as where they
    take no lists.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _with_values(args))


def _with_values(args: Sequence[str]) -> list[str]:
    """`--kv-on-host` and `--no-kv-on-host` with the value that they stand for."""
    kinds = config.option_types(Deployment)
    flags = {f"--{name.replace('_', '-')}" for name, kind in kinds.items() if kind is bool}
    done: list[str] = []
    for arg, following in zip(args, [*args, ""][1:], strict=True):
        flag = arg.replace("--no-", "--", 1)
        values = {value.strip() for value in following.lower().split(",")}
        if flag not in flags or (arg == flag and values <= {"true", "false"}):
            done.append(arg)
        else:
            done += [flag, str(arg == flag).lower()]
    return done


def given_options(
    trace: str | None, config_file: Path | None, options: dict[str, object]
) -> dict[str, object]:
    """The options of the file, overridden by those of the command line."""
    from_file = config.read_toml(config_file) if config_file else {}
    return from_file | {k: v for k, v in {"trace": trace, **options}.items() if v is not None}


@contextmanager
def naming_the_line(config_file: Path | None, given: Mapping[str, object]) -> Iterator[None]:
    """An error about an option that the file sets, and the command line not, says in which line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{_place(config_file, given, str(error))}{error}") from None


def _place(config_file: Path | None, given: Mapping[str, object], complaint: str) -> str:
    if config_file is None:
        return ""
    set_there = [k for k, value in config.read_toml(config_file).items() if given.get(k) == value]
    found = re.search(rf"\b({'|'.join(set_there)})\b", complaint) if set_there else None
    return f"{config.place_of(config_file, found[0])}: " if found else ""
