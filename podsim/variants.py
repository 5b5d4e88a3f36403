"""Variants of a deployment: every combination of the options that hold several values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields

from podsim.config import Deployment, options_from


def variants_of(given: Mapping[str, object]) -> dict[str, Deployment]:
    """Every combination of the deployment options that hold a comma list or a list, by name.

    Where none does, the one deployment, by the name of its attention strategy.
    """
    names = [option.name for option in fields(Deployment) if option.name in given]
    choices = {name: _split(given[name]) for name in names}
    varied = [name for name, values in choices.items() if len(values) > 1]
    variants = {}
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(names, values, strict=True))
        deployment = options_from(Deployment, chosen)
        label = ",".join(_label(name, chosen[name]) for name in varied)
        variants[label or deployment.attention] = deployment
    return variants


def _split(value: object) -> list[object]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    return list(value) if isinstance(value, list) else [value]


def _label(name: str, value: object) -> str:
    """Strategies and routers speak for themselves; a number needs its option's name."""
    text = str(value).replace("/", "_")  # a variant's results lie in a folder of this name
    return text if text[:1].isalpha() else f"{name}={text}"
