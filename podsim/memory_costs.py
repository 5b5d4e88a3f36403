"""What memory systems cost on one kind of GPU: mapping, transfers, recomputation, paged kernels.

Read from `memory.json` (docs/memory.md), which `podsim profile-memory` fits to measured rows. A
part that was not measured is missing there, and who needs it is told so.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any

from podsim.errors import InputError

SCHEMA_VERSION = 1
MEMORY_FILE = "memory.json"
FOLDER = "memory"
"""Of the shipped costs, beside the profiles of the same GPU."""
APIS = ("create", "map", "set_access", "unmap", "release")
"""Of CUDA's virtual memory: cuMemCreate, cuMemMap, cuMemSetAccess, cuMemUnmap, cuMemRelease."""
ADDRESS_APIS = ("reserve", "free_address")
"""cuMemAddressReserve, cuMemAddressFree: once, when a cache is made and given up."""
GPU_STATES = ("idle", "busy")
DIRECTIONS = ("h2d", "d2h")


@dataclass(frozen=True, slots=True)
class Line:
    """Seconds of a call with so many units: a fixed part, and so many seconds a unit."""

    fixed: float
    per_unit: float

    def at(self, units: float) -> float:
        return self.fixed + self.per_unit * units if units else 0.0

    def pieces(self) -> Iterator[tuple[float, Line]]:
        """As those of a `Curve`."""
        yield math.inf, self

    @classmethod
    def of(cls, value: Mapping[str, float]) -> Line:
        line = cls(float(value["fixed"]), float(value["per_unit"]))
        if not (0 <= line.fixed < math.inf and 0 <= line.per_unit < math.inf):
            raise ValueError(f"a cost of {value} is not a time")
        return line


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds by units as they were measured: straight in between and beyond the last, and no less
    than the first.
    """

    units: tuple[float, ...]
    seconds: tuple[float, ...]

    def at(self, units: float) -> float:
        if units <= self.units[0]:
            return self.seconds[0] if units else 0.0
        segment = min(bisect_left(self.units, units), len(self.units) - 1)
        line = self._line(segment)
        return line.fixed + line.per_unit * units

    def _line(self, segment: int) -> Line:
        """Through the knots before and at `segment`; its fixed part may be negative."""
        before, after = self.units[segment - 1], self.units[segment]
        slope = (self.seconds[segment] - self.seconds[segment - 1]) / (after - before)
        return Line(self.seconds[segment] - slope * after, slope)

    def pieces(self) -> Iterator[tuple[float, Line]]:
        """Lines, and up to how many units each holds."""
        yield self.units[0], Line(self.seconds[0], 0.0)
        last = len(self.units) - 1
        for segment in range(1, last + 1):
            yield (math.inf if segment == last else self.units[segment]), self._line(segment)

    @classmethod
    def of(cls, value: Mapping[str, Sequence[float]]) -> Curve:
        """ValueError if this is not one."""
        curve = cls(tuple(map(float, value["units"])), tuple(map(float, value["seconds"])))
        rising = all(a < b for a, b in pairwise(curve.units))
        possible = 0 < curve.seconds[0] <= curve.seconds[-1] < math.inf
        possible = possible and all(a <= b for a, b in pairwise(curve.seconds))
        if len(curve.units) != len(curve.seconds) or len(curve.units) < 2 or not rising:
            raise ValueError("a cost needs two or more units, each larger than the one before")
        if not possible or curve.units[0] <= 0:
            raise ValueError(f"costs of {curve.seconds} are no times that grow")
        return curve


@dataclass(frozen=True, slots=True)
class MappingCosts:
    """Seconds of CUDA's virtual memory calls; units are page-groups of the call's range."""

    create: Line
    map: Line
    set_access: Line
    unmap: Line
    release: Line
    growth: Line | None = None
    """Of `map` and `set_access` while an engine serves, by page-groups of all tensors; None: they
    take there what they take in a loop."""

    def map_seconds(self, num_tensors: int, page_groups: int) -> float:
        """Of adjacent page-groups in each virtual tensor, of physical memory that exists.

        A handle is mapped by a call of its own; one call makes a range accessible.
        """
        if self.growth is not None:
            return self.growth.at(num_tensors * page_groups)
        one_tensor = page_groups * self.map.at(1) + self.set_access.at(page_groups)
        return num_tensors * one_tensor

    def unmap_seconds(self, num_tensors: int, page_groups: int) -> float:
        """Of adjacent page-groups in each virtual tensor, by one call a tensor."""
        return num_tensors * self.unmap.at(page_groups)


@dataclass(frozen=True, slots=True)
class PagedCosts:
    """What a block table costs, at one block size."""

    prefill: float
    """Time of the paged prefill kernel over that of the contiguous one."""
    decode: float
    table_step: float
    """Seconds in which the host prepares the table of a step: once,"""
    table_request: float
    """for each of its requests,"""
    table_block: float
    """and for each of their blocks."""
    heads: str = ""
    """Query and KV heads that the kernels were timed with, as "32/8, 32/4"; empty: not known."""


@dataclass(frozen=True, slots=True, eq=False)
class MemoryCosts:
    """What `memory.json` holds, in seconds, bytes and tokens; parts may be missing."""

    source: str
    gpu: str
    provenance: Mapping[str, object]
    mapping: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    """By bytes of a page-group, state of the GPU, and API: a `Line`, units page-groups."""
    growth: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By bytes of a page-group and state of the GPU: a `Line`, of `MappingCosts.growth`."""
    interference: Mapping[str, float] = field(default_factory=dict)
    """By bytes of a page-group: seconds that steps take longer for a second of mapping beside."""
    transfer: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By "h2d pinned", "h2d pinned beside matrix", ...: a `Line`, units bytes."""
    recompute: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By "hidden x outputs" of the product that makes K and V, with "rotated" if K is rotated
    then: a `Curve` or a `Line`, units tokens."""
    handoff: float = 0.0
    """Between two streams: from the end of a copy to a kernel that waits for it, or back."""
    relay: float | None = None
    """From the end of a copy to one that waits for a mark which another stream sets behind the
    first; None, where it was not measured: two handoffs."""
    paged: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By tokens of a block: `PagedCosts`."""
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of each fitted line: relative error on held-out rows."""

    def mapping_costs(self, page_group: int, gpu_state: str) -> MappingCosts:
        """InputError if page-groups of this size were not measured in this state of the GPU."""
        by_state = self.mapping.get(str(page_group), {})
        if gpu_state not in by_state:
            have = ", ".join(f"{int(size) // 1024} KB" for size in self.mapping) or "none"
            raise InputError(
                f"{self.source}: no times of mapping page-groups of {page_group // 1024} KB, GPU "
                f"{gpu_state} (there are: {have}); {self._how('mapping')}"
            )
        lines = by_state[gpu_state]
        growth = self.growth.get(str(page_group), {}).get(gpu_state)
        calls = {api: Line.of(lines[api]) for api in APIS}
        return MappingCosts(**calls, growth=None if growth is None else Line.of(growth))

    def transfer_costs(self, name: str) -> Line:
        """InputError if this was not measured."""
        if name not in self.transfer:
            raise InputError(
                f"{self.source}: no times of transfers '{name}'; {self._how('transfer')}"
            )
        return Line.of(self.transfer[name])

    def recompute_costs(self, hidden_size: int, num_outputs: int, rotated: bool) -> Line | Curve:
        """Of the K and V of tokens, from activations of `hidden_size` to `num_outputs` values.

        InputError if this shape was not measured.
        """
        name = recompute_name(hidden_size, num_outputs, rotated)
        if name not in self.recompute:
            raise InputError(
                f"{self.source}: no times of recomputing K and V of shape {name} (there are: "
                f"{', '.join(self.recompute) or 'none'}); {self._how('recompute')}"
            )
        return line_or_curve(self.recompute[name])

    def paged_costs(self, block_size: int) -> PagedCosts:
        """InputError if the paged kernels were not measured with blocks of so many tokens."""
        if str(block_size) not in self.paged:
            raise InputError(
                f"{self.source}: no overhead of paged kernels with blocks of {block_size} tokens "
                f"(there are: {', '.join(self.paged) or 'none'}); {self._how('paged')}, or leave "
                "the overhead out with --kv ideal"
            )
        values = dict(self.paged[str(block_size)])
        heads = str(values.pop("heads", ""))
        return PagedCosts(**{name: float(value) for name, value in values.items()}, heads=heads)

    def _how(self, part: str) -> str:
        return f"measure them with `podsim profile-memory {part} --gpu {self.gpu} --out FOLDER`"

    def description(self) -> dict[str, object]:
        """What was measured, on what, and how far the fits are off."""
        return {
            "gpu": self.gpu,
            "provenance": dict(self.provenance),
            **{part: sorted(getattr(self, part)) for part in PARTS},
            "errors": {name: dict(error) for name, error in self.errors.items()},
        }

    def to_json(self) -> str:
        content = {
            "schema": SCHEMA_VERSION,
            "gpu": self.gpu,
            "provenance": self.provenance,
            "handoff": self.handoff,
            "relay": self.relay,
            **{part: getattr(self, part) for part in (*PARTS, "errors")},
        }
        return json.dumps(content, indent=1) + "\n"


def line_or_curve(value: Mapping[str, Any]) -> Line | Curve:
    """Of memory.json."""
    return Curve.of(value) if "units" in value else Line.of(value)


def recompute_name(hidden_size: int, num_outputs: int, rotated: bool) -> str:
    """The key of `MemoryCosts.recompute`."""
    return f"{hidden_size}x{num_outputs}" + " rotated" * rotated


PARTS = ("mapping", "growth", "interference", "transfer", "recompute", "paged")


def find_memory_costs(gpu: str, folder: Path | None = None) -> MemoryCosts:
    """The costs in `folder`, or the shipped ones of this GPU; InputError if there are none."""
    if folder is not None:
        found = read_memory_costs(folder, str(folder))
        if found.gpu != gpu:
            raise InputError(f"{found.source}: measured on '{found.gpu}', not on '{gpu}'")
        return found
    shipped = files("podsim.profiles").joinpath(gpu, FOLDER)
    if not shipped.joinpath(MEMORY_FILE).is_file():
        raise InputError(
            f"no memory costs of {gpu} are shipped; measure them with `podsim profile-memory` on "
            "that GPU and give their folder with --memory-costs FOLDER"
        )
    return read_memory_costs(shipped, f"profiles/{gpu}/{FOLDER}")


def read_memory_costs(folder: Traversable, source: str) -> MemoryCosts:
    """The costs of a folder, which error messages call `source`. InputError if it is broken."""
    source = f"{source}/{MEMORY_FILE}"
    try:
        content = json.loads(folder.joinpath(MEMORY_FILE).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA_VERSION:
            raise InputError(
                f"{source}: schema {content['schema']}, this podsim reads {SCHEMA_VERSION}; "
                "measure again with `podsim profile-memory`"
            )
        found = MemoryCosts(source=source, **{k: v for k, v in content.items() if k != "schema"})
        _check(found)
        return found
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not podsim's memory costs: {error!r}") from None


def _check(costs: MemoryCosts) -> None:
    """Read every part once, so that what is broken shows where the file is named."""
    for size, states in costs.mapping.items():
        for state in states:
            costs.mapping_costs(int(size), state)
    for lines in costs.growth.values():
        for line in lines.values():
            Line.of(line)
    for name in costs.transfer:
        costs.transfer_costs(name)
    if not 0 <= costs.handoff < math.inf:
        raise ValueError(f"a handoff of {costs.handoff} is not a time")
    if costs.relay is not None and not 0 <= costs.relay < math.inf:
        raise ValueError(f"a relay of {costs.relay} is not a time")
    for line in costs.recompute.values():
        line_or_curve(line)
    for block_size in costs.paged:
        costs.paged_costs(int(block_size))
