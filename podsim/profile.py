"""A profile: measured rows of one GPU and model, and the cost models fitted to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from podsim.errors import InputError
from podsim.model import Model

SCHEMA_VERSION = 1
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
    ops: Mapping[str, Mapping[str, list[float]]]
    """Of each operation but attention: num_tokens and seconds, piecewise linear between them."""
    attention: Mapping[str, Mapping[str, Any]]
    """Of each kernel model: the coefficients of its features."""
    launch: Mapping[str, float]
    """What a graph launch and a kernel in a graph add."""
    errors: Mapping[str, Mapping[str, float]]
    """Of each kernel model: relative error on held-out points."""
    hull: Mapping[str, int]
    """The largest values that were measured."""

    def with_errors(self, errors: Mapping[str, Mapping[str, float]]) -> Profile:
        return replace(self, errors=errors)

    def description(self) -> dict[str, object]:
        """What it is of, what it was measured on, and how far it is off."""
        return {
            "gpu": self.gpu,
            "model": self.model,
            "provenance": dict(self.provenance),
            "hull": dict(self.hull),
            "errors": {kernel: dict(error) for kernel, error in self.errors.items()},
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
            "attention": self.attention,
            "ops": self.ops,
        }
        return json.dumps(content, indent=1) + "\n"


def find_profile(gpu: str, model: Model, folder: Path | None = None) -> Profile:
    """The profile in `folder`, or the shipped one of this GPU and model shape.

    Raises InputError if there is none, or if it was measured for another GPU or model.
    """
    if folder is not None:
        profile = read_profile(folder, str(folder))
        if profile.gpu != gpu:
            raise InputError(f"{profile.source}: measured on '{profile.gpu}', not on '{gpu}'")
        _check_shape(profile, model)
        return profile
    shipped = _shipped_profiles(gpu)
    for profile in shipped:
        if profile.shape == model.shape:
            return profile
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


def _check_shape(profile: Profile, model: Model) -> None:
    for name in dict.fromkeys((*model.shape, *profile.shape)):
        measured, wanted = profile.shape.get(name), model.shape.get(name)
        if measured != wanted:
            raise InputError(
                f"{profile.source}: measured for {profile.model} ({name} {measured}), "
                f"but {model.name} has {name} {wanted}"
            )


def read_profile(folder: Traversable, source: str) -> Profile:
    """The profile of a folder, which error messages call `source`. InputError if it is broken."""
    source = f"{source}/{PROFILE_FILE}"
    try:
        content = json.loads(folder.joinpath(PROFILE_FILE).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA_VERSION:
            raise InputError(
                f"{source}: schema {content['schema']}, this podsim reads {SCHEMA_VERSION}; "
                "measure it again with `podsim profile`"
            )
        return Profile(source=source, **{k: v for k, v in content.items() if k != "schema"})
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not a podsim profile: {error}") from None


def kernels_hash() -> str:
    """SHA-256 of the kernels' source: a profile is of the kernels it was measured with."""
    digest = hashlib.sha256()
    sources = [entry for entry in files("podsim.kernels").iterdir() if entry.name.endswith(".py")]
    for entry in sorted(sources, key=lambda e: e.name):
        digest.update(entry.name.encode() + b"\0" + entry.read_bytes())
    return digest.hexdigest()
