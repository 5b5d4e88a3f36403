"""The plan of a sweep: which simulations, from a TOML file of lists and ranges of options."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from podsim.config import Deployment, Workload, converted, load_toml, option_types, require_known
from podsim.errors import InputError
from podsim.slo import Slo, parse_slo
from podsim.workload import shipped_traces

SETTINGS = ("samples", "seed", "slo", "pareto", "within", "cost_per_gpu_hour")
"""Keys of the table [sweep]."""
RANGE_KEYS = ("from", "to", "step", "count", "log")


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers to draw from: uniform, or uniform in the logarithm."""

    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, rng: np.random.Generator) -> float:
        if self.whole and not self.log:
            return int(rng.integers(int(self.low), int(self.high), endpoint=True))
        low, high = (math.log(x) if self.log else x for x in (self.low, self.high))
        drawn = rng.uniform(low, high)
        drawn = min(max(math.exp(drawn) if self.log else drawn, self.low), self.high)
        return round(drawn) if self.whole else float(f"{drawn:.9g}")


Choice = tuple[object, ...] | Range


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """Every simulation of a sweep, by its index: the same index is always the same one."""

    choices: Mapping[str, Choice]
    """Of each option, in the order of the file; those with one value are the same throughout."""
    samples: int | None = None
    """How many to draw at random; None: every combination."""
    seed: int = 0
    """Of the drawing."""
    slos: tuple[Slo, ...] = ()
    """What goodput is measured by."""
    pareto: tuple[str, ...] = ()
    """The two columns whose front is marked in the table."""
    within: tuple[str, ...] | None = None
    """Rows are compared where these options are equal; None: all options of the workload."""
    cost_per_gpu_hour: float | None = None

    def __len__(self) -> int:
        return self.samples or math.prod(len(_values(choice)) for choice in self.choices.values())

    def values(self, name: str) -> tuple[object, ...]:
        """The values of an option that has no continuous range; none if it is not in the plan."""
        return _values(self.choices.get(name, ()))

    def options(self, index: int) -> dict[str, object]:
        """The options of a simulation; the last option of the file changes fastest."""
        if self.samples is not None:
            rng = np.random.default_rng([self.seed, index])
            return {name: _drawn(choice, rng) for name, choice in self.choices.items()}
        options = {}
        for name in reversed(list(self.choices)):
            values = _values(self.choices[name])
            index, which = divmod(index, len(values))
            options[name] = values[which]
        return {name: options[name] for name in self.choices}


def _values(choice: Choice) -> tuple[object, ...]:
    assert isinstance(choice, tuple), "a range without steps is only drawn from"
    return choice


def _drawn(choice: Choice, rng: np.random.Generator) -> object:
    if isinstance(choice, Range):
        return choice.draw(rng)
    return choice[int(rng.integers(len(choice)))]


# --------------------------------------------------------------------------------- from a file


def read_plan(path: Path) -> SweepPlan:
    """The plan of a TOML file; InputError, naming file and key, for what is wrong in it.

    A key is an option of `podsim simulate`: a value, a list of values, or a range {from, to} with
    a step, a count (log = true spaces it geometrically), or neither (only with samples). The table
    [sweep] holds SETTINGS.
    """
    values = load_toml(path)
    settings = values.pop("sweep", {})
    if not isinstance(settings, dict):
        raise InputError(f"{path}: sweep is {settings!r}, expected a table [sweep]")
    kinds = {**option_types(Workload), **option_types(Deployment)}
    require_known(path, values, list(kinds))
    require_known(path, settings, SETTINGS, " in [sweep]")
    try:
        choices = {name: _choice(name, value, kinds[name]) for name, value in values.items()}
        plan = _plan(choices, settings)
        _check(plan)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return plan


def _choice(name: str, value: object, kind: type) -> Choice:
    if isinstance(value, dict):
        if kind not in (int, float):
            raise InputError(f"{name} is a range, but it is text: give a list")
        return _range(name, value, kind)
    listed = value if isinstance(value, list) else [value]
    if not listed:
        raise InputError(f"{name} is an empty list")
    return tuple(dict.fromkeys(converted(name, item, kind) for item in listed))


def _range(name: str, given: Mapping[str, object], kind: type) -> Choice:
    unknown = [key for key in given if key not in RANGE_KEYS]
    if unknown or not {"from", "to"} <= set(given) or {"step", "count"} <= set(given):
        raise InputError(
            f"{name} is {dict(given)!r}, expected a range {{from, to}}, with step or count if it "
            "has steps, and log = true if it is geometric"
        )
    log = given.get("log", False) is True
    numbers = {k: _number(f"{name}.{k}", v) for k, v in given.items() if k != "log"}
    low, high = numbers["from"], numbers["to"]
    if not low <= high or (log and low <= 0):
        raise InputError(f"{name}: range from {low:g} to {high:g}{' with log' if log else ''}")
    if "count" in numbers:
        count = int(numbers["count"])
        space = np.geomspace if log else np.linspace
        steps = space(low, high, count).tolist() if count > 0 else []
    elif "step" in numbers and numbers["step"] > 0 and not log:
        count = math.floor((high - low) / numbers["step"] * (1 + 1e-9)) + 1
        steps = [low + i * numbers["step"] for i in range(count)]
    elif "step" in numbers:
        raise InputError(f"{name}: step is {numbers['step']:g}, expected above 0, without log")
    else:
        return Range(low, high, log, kind is int)
    if not steps:
        raise InputError(f"{name}: a range without any value")
    rounded = [round(x) if kind is int else float(f"{x:.12g}") for x in steps]
    return tuple(dict.fromkeys(rounded))


def _number(name: str, value: object) -> float:
    number = converted(name, value, float)
    assert isinstance(number, float)
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}, expected a finite number")
    return number


def _plan(choices: Mapping[str, Choice], settings: Mapping[str, object]) -> SweepPlan:
    whole = {name: _whole(name, settings[name]) for name in ("samples", "seed") if name in settings}
    texts = {k: _texts(k, settings[k]) for k in ("slo", "pareto", "within") if k in settings}
    cost = settings.get("cost_per_gpu_hour")
    return SweepPlan(
        choices=choices,
        samples=whole.get("samples"),
        seed=whole.get("seed", 0),
        slos=tuple(map(parse_slo, texts.get("slo", ()))),
        pareto=texts.get("pareto", ()),
        within=texts.get("within"),
        cost_per_gpu_hour=None if cost is None else _number("cost_per_gpu_hour", cost),
    )


def _whole(name: str, value: object) -> int:
    number = converted(name, value, int)
    assert isinstance(number, int)
    return number


def _texts(name: str, value: object) -> tuple[str, ...]:
    listed = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise InputError(f"{name} is {value!r}, expected a list of texts")
    return tuple(listed)


def _check(plan: SweepPlan) -> None:
    """What is wrong with all simulations of a plan, and not with a combination of options."""
    if plan.samples is not None and plan.samples < 1:
        raise InputError(f"samples is {plan.samples}, expected at least 1")
    if plan.seed < 0:
        raise InputError(f"seed is {plan.seed}, expected at least 0")
    for name, choice in plan.choices.items():
        if plan.samples is None and isinstance(choice, Range):
            raise InputError(f"{name} has no steps: give its range a step or a count, or samples")
    if not {"trace", "arrivals"} & set(plan.choices):
        raise InputError('no requests: name a trace, or make some up: arrivals = "poisson"')
    for trace in plan.values("trace"):
        if not os.path.exists(str(trace)) and trace not in shipped_traces():
            known = ", ".join(shipped_traces())
            raise InputError(f"trace '{trace}': no such file, nor a shipped trace ({known})")
