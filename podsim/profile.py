"""A profile: measured rows of one GPU and model, and the cost models fitted to them."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import math
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from podsim.attention_features import FEATURES
from podsim.errors import InputError
from podsim.hardware import GPUS, Gpu
from podsim.heat import Warming
from podsim.model import Model
from podsim.scaling import Scaling
from podsim.sensitivity import Sensitivity

SCHEMA_VERSION = 7
OLDER = (2, 3, 4, 5, 6)
"""Whose rows can be fitted again."""
PROFILE_FILE = "profile.json"
MEASUREMENTS_FILE = "measurements.csv"


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """What `profile.json` holds. Times in seconds."""

    source: str
    """Where it was read from."""
    gpu: str
    model: str
    shape: Mapping[str, int]
    """Of the model, or of the share of it that one GPU holds: `Model.shape`."""
    provenance: Mapping[str, object]
    """GPU, driver, versions, date, command and hash of the kernels' source."""
    ops: Mapping[str, Mapping[str, Any]]
    """Of each operation but attention: num_tokens, seconds and roofline (`podsim.op_tables`)."""
    attention: Mapping[str, Mapping[str, Any]]
    """Geometry, and of each kernel model the coefficients of its features and its overlap."""
    launch: Mapping[str, float]
    """What a graph launch and a kernel in a graph add."""
    sustained: Mapping[str, Any]
    """`layer_gap` of whole steps, on how many it was fitted, and the numbers of `heat.Warming`."""
    errors: Mapping[str, Mapping[str, Any]]
    """Of each kernel model: relative error on held-out points, and the batch of the worst."""
    hull: Mapping[str, int]
    """The largest values that were measured."""
    clock_falls: Mapping[str, list[float]] = field(default_factory=dict)
    """`num_tokens`, and of each the `falls`: the logarithm of the highest clock over the usual one
    of layers over so many tokens. The first profiles lack them, as do those of cards that do not
    tell."""
    clock_sensitivity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """How the times of matrix products (`products`) and of attention under each strategy follow the
    clock: `sensitivity.Sensitivity`. None of those whose rows are as timed."""
    scaling: Scaling | None = None
    """None: measured. Otherwise how its costs come from those of another GPU; in no file."""

    def with_errors(self, errors: Mapping[str, Mapping[str, Any]]) -> Profile:
        return replace(self, errors=errors)

    def description(self) -> dict[str, object]:
        """What it is of, what it was measured on, and how far it is off."""
        return {
            "gpu": self.gpu,
            "model": self.model,
            "provenance": dict(self.provenance),
            "hull": dict(self.hull),
            "errors": {kernel: dict(error) for kernel, error in self.errors.items()},
            **({"uncalibrated": self.scaling.note} if self.scaling else {}),
        }

    def to_json(self) -> str:
        content = {
            "schema": SCHEMA_VERSION,
            "gpu": self.gpu,
            "model": self.model,
            "shape": self.shape,
            "provenance": self.provenance,
            "hull": self.hull,
            "errors": self.errors,
            "launch": self.launch,
            "sustained": self.sustained,
            "clock_falls": self.clock_falls,
            "clock_sensitivity": self.clock_sensitivity,
            "attention": self.attention,
            "ops": self.ops,
        }
        return json.dumps(content, indent=1) + "\n"


def find_profile(gpu: str, model: Model, folder: Path | None = None) -> Profile:
    """The profile in `folder`, or the shipped one of this GPU and model shape.

    For a GPU without any, the shipped one of the nearest GPU, scaled (`podsim.scaling`). Raises
    InputError if there is none, or if it was measured for another GPU or model.
    """
    if folder is not None:
        profile = read_profile(folder, str(folder))
        if profile.gpu != gpu:
            raise InputError(f"{profile.source}: measured on '{profile.gpu}', not on '{gpu}'")
        _check_device(profile)
        _check_shape(profile, model)
        _check_features(profile, folder)
        _check_numbers(profile)
        _check_clock(profile, folder)
        return profile
    shipped = _shipped_profiles(gpu)
    for profile in shipped:
        if profile.shape == model.shape:
            return profile
    nearest = _nearest_profile(gpu, model) if not shipped and gpu in GPUS else None
    if nearest is not None:
        return _scaled(nearest, GPUS[gpu], model)
    have = ", ".join(profile.model for profile in shipped) or "none"
    raise InputError(
        f"no shipped profile of {model.name} on {gpu} (shipped for {gpu}: {have}); measure one on "
        f"that GPU with `podsim profile --gpu {gpu} {model.command_options} --out FOLDER` and give "
        "it with --profile FOLDER"
    )


def _shipped_profiles(gpu: str) -> list[Profile]:
    folder = files("podsim.profiles").joinpath(gpu)
    if not folder.is_dir():
        return []
    models = [entry for entry in folder.iterdir() if entry.joinpath(PROFILE_FILE).is_file()]
    models.sort(key=lambda entry: entry.name)
    return [read_profile(entry, f"profiles/{gpu}/{entry.name}") for entry in models]


def _nearest_profile(gpu: str, model: Model) -> Profile | None:
    """The shipped profile of the model on the GPU whose FLOPs a byte are most like this one's."""
    wanted = GPUS[gpu]

    def distance(profile: Profile) -> tuple[bool, float]:
        measured = GPUS[profile.gpu]
        other_kind = measured.architecture != wanted.architecture
        return other_kind, abs(math.log(measured.flops_per_byte / wanted.flops_per_byte))

    profiles = [profile for name in GPUS for profile in _shipped_profiles(name)]
    fitting = [profile for profile in profiles if profile.shape == model.shape]
    return min(fitting, key=distance, default=None)


def _scaled(profile: Profile, gpu: Gpu, model: Model) -> Profile:
    scaling = Scaling(profile.source, GPUS[profile.gpu], gpu, model)
    return replace(profile, gpu=gpu.name, ops=scaling.ops(profile.ops), scaling=scaling)


def _check_device(profile: Profile) -> None:
    device, known = profile.provenance.get("device_name"), GPUS.get(profile.gpu)
    if known is not None and device not in (None, known.device_name):
        raise InputError(
            f"{profile.source}: gpu '{profile.gpu}' is '{known.device_name}', but it was measured "
            f"on '{device}'"
        )


def _check_shape(profile: Profile, model: Model) -> None:
    for name in dict.fromkeys((*model.shape, *profile.shape)):
        measured, wanted = profile.shape.get(name), model.shape.get(name)
        if measured != wanted:
            raise InputError(
                f"{profile.source}: measured for {profile.model} ({name} {measured}), "
                f"but {model.name} has {name} {wanted}"
            )


def _check_features(profile: Profile, folder: Path) -> None:
    """Coefficients of another version's features would be taken for those of this one's."""
    fitted = profile.attention["features"]
    for name, features in FEATURES.items():
        if fitted.get(name) != list(features):
            raise InputError(
                f"{profile.source}: attention '{name}' was fitted by another version of podsim; "
                f"repeat the fit with `podsim profile --refit {folder}`"
            )


def _check_numbers(profile: Profile) -> None:
    """Whatever times are computed from is a number of at least 0."""
    attention = {part: profile.attention[part] for part in ("geometry", "coefficients", "overlap")}
    parts = {"launch": profile.launch, "ops": profile.ops, "sustained": profile.sustained}
    parts |= {"clock_falls": profile.clock_falls, "clock_sensitivity": profile.clock_sensitivity}
    for name, value in _leaves({**parts, "attention": attention, "hull": profile.hull}, ""):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and 0 <= value < math.inf):  # type: ignore[operator]
            raise InputError(f"{profile.source}: {name} is {value!r}, expected a number, 0 or more")


def _check_clock(profile: Profile, folder: Path) -> None:
    """What the clock is predicted from is there whole, or not at all."""
    watched, falls = profile.sustained, profile.clock_falls
    names = {item.name for item in fields(Warming)}
    faults = {f"sustained.{name}": name not in watched for name in sorted(names)}
    if not names & set(watched):
        faults = {}
    elif not faults["sustained.products_at"]:
        tokens = watched["products_at"]
        numbers = isinstance(tokens, Mapping) and all(n.isdecimal() for n in tokens)
        faults["sustained.products_at"] = not numbers
    if faults or falls:
        lists = [falls.get(name) for name in ("num_tokens", "falls")]
        sizes = {len(some) if isinstance(some, list) else 0 for some in lists}
        faults["clock_falls"] = len(sizes) > 1 or min(sizes) < 2
    sensitivity = {item.name for item in fields(Sensitivity)}
    for name, follows in profile.clock_sensitivity.items():
        faults[f"clock_sensitivity.{name}"] = set(follows) != sensitivity
    for name, is_fault in faults.items():
        if is_fault:
            raise InputError(
                f"{profile.source}: {name} is not whole; repeat the fit with "
                f"`podsim profile --refit {folder}`"
            )


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """What nested tables and lists hold, by the names on the way there."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name}[{index}]")
    else:
        yield name, value


def read_profile(folder: Traversable, source: str, *, to_refit: bool = False) -> Profile:
    """The profile of a folder, which error messages call `source`.

    Raises InputError if it is broken, or of an older schema, but for its rows to be fitted again.
    """
    known = (SCHEMA_VERSION, *OLDER) if to_refit else (SCHEMA_VERSION,)
    source = f"{source}/{PROFILE_FILE}"
    try:
        content = _parsed(folder.joinpath(PROFILE_FILE).read_text(encoding="utf-8"))
        if content["schema"] not in known:
            again = "fit its rows again with `podsim profile --refit`"
            anew = "measure it again with `podsim profile`"
            raise InputError(
                f"{source}: schema {content['schema']}, this podsim reads {SCHEMA_VERSION}; "
                f"{again if content['schema'] in OLDER else anew}"
            )
        profile = Profile(source=source, **{k: v for k, v in content.items() if k != "schema"})
        _check_tables(profile)
        return profile
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not a podsim profile: {error}") from None


def _check_tables(profile: Profile) -> None:
    """What is looked up by name is a table."""
    named: dict[str, object] = {
        name: getattr(profile, name) for name in ("sustained", "clock_falls", "clock_sensitivity")
    }
    if isinstance(profile.clock_sensitivity, Mapping):
        follows = profile.clock_sensitivity.items()
        named |= {f"clock_sensitivity.{name}": value for name, value in follows}
    for name, value in named.items():
        if not isinstance(value, Mapping):
            raise InputError(f"{profile.source}: {name} is {value!r}, expected a table")
    for op, table in profile.ops.items():
        line: object = table.get("roofline", {}) if isinstance(table, Mapping) else {}
        for name, value in ((f"ops.{op}", table), (f"ops.{op}.roofline", line)):
            if not isinstance(value, Mapping):
                raise InputError(f"{profile.source}: {name} is {value!r}, expected a table")


@lru_cache(maxsize=8)
def _parsed(text: str) -> dict[str, Any]:
    """What the file of a profile says; a sweep reads the same few for every simulation."""
    content: dict[str, Any] = json.loads(text)
    return content


def kernels_hash() -> str:
    """SHA-256 of the kernels' source: a profile is of the kernels it was measured with.

    Comments, docstrings and the layout of lines do not count.
    """
    digest = hashlib.sha256()
    sources = [entry for entry in files("podsim.kernels").iterdir() if entry.name.endswith(".py")]
    for entry in sorted(sources, key=lambda e: e.name):
        code = _code_of(entry.read_text(encoding="utf-8"))
        digest.update(entry.name.encode() + b"\0" + code.encode())
    return digest.hexdigest()


def _code_of(source: str) -> str:
    """Python source without comments, docstrings and white space."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and _is_text(node.value):
            first, last = node.lineno - 1, node.end_lineno or node.lineno
            lines[first:last] = [""] * (last - first)
    return "".join("".join(lines).split())


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
