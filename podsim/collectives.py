"""Collectives: how long the GPUs of a replica take to add up and to gather their parts.

Under tensor parallelism each layer ends its attention and its MLP with an all-reduce of
[num_tokens, hidden_size], so does the sharded embedding, and the logits of each sampled token are
gathered (Megatron-LM, arXiv 1909.08053, section 3). Each is described by a line, a latency and the
bytes at a rate; what a message was measured to take above or below it comes on top, straight
between the measured sizes: NCCL changes its algorithm from one size to the next.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from podsim.errors import InputError
from podsim.model import BYTES_PER_VALUE, Model

ALL_REDUCE, ALL_GATHER = "all_reduce", "all_gather"
COLLECTIVES = (ALL_REDUCE, ALL_GATHER)
SCHEMA_VERSION = 2
COLLECTIVES_FILE = "collectives.json"
FOLDER = "collectives"
"""Of the shipped times, beside the profiles of the same GPU."""
NVLS_SETTING = "NCCL_NVLS_ENABLE"
"""NCCL's environment variable that lets the NVLink switches do the adding (0: they do not)."""


@dataclass(frozen=True, slots=True, eq=False)
class MessageTimes:
    """Seconds of one collective among some GPUs, by the size of the message."""

    num_bytes: Sequence[int]
    seconds: Sequence[float]
    latency: float
    seconds_per_byte: float
    """The line."""

    def at(self, num_bytes: float) -> float:
        """The line, and what the measured sizes have beside it, straight between them; the ends
        hold beyond them.
        """
        sizes = self.num_bytes
        line = self.latency + self.seconds_per_byte * num_bytes
        if num_bytes <= sizes[0]:
            return line + self._beside(0)
        if num_bytes >= sizes[-1]:
            return line + self._beside(-1)
        i = bisect_left(sizes, num_bytes)
        part = (num_bytes - sizes[i - 1]) / (sizes[i] - sizes[i - 1])
        before = self._beside(i - 1)
        return line + before + part * (self._beside(i) - before)

    def _beside(self, i: int) -> float:
        return self.seconds[i] - self.latency - self.seconds_per_byte * self.num_bytes[i]


Tables = Mapping[str, Mapping[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, eq=False)
class Collectives:
    """What `collectives.json` holds: measured times of one kind of GPU, in seconds and bytes."""

    source: str
    """Where it was read from."""
    gpu: str
    provenance: Mapping[str, object]
    """GPUs, driver, versions, NCCL's settings, date and command."""
    tables: Tables
    """Of each collective and number of GPUs: bytes and seconds as measured, and the line's latency
    and seconds_per_byte."""
    errors: Mapping[str, Mapping[str, float]]
    """Of each collective and number of GPUs: relative error on held-out messages."""

    @property
    def gpu_counts(self) -> list[int]:
        """Among how many GPUs they were measured."""
        return sorted(int(count) for count in self.tables[ALL_REDUCE])

    def times(self, op: str, num_gpus: int) -> MessageTimes:
        table = self.tables[op][str(num_gpus)]
        sizes = [int(size) for size in table["bytes"]]
        return MessageTimes(
            sizes, table["seconds"], float(table["latency"]), float(table["seconds_per_byte"])
        )

    def description(self) -> dict[str, object]:
        """What was measured, on what, and how far the interpolation is off."""
        return {
            "gpu": self.gpu,
            "gpu_counts": self.gpu_counts,
            "provenance": dict(self.provenance),
            "errors": {name: dict(error) for name, error in self.errors.items()},
        }

    def to_json(self) -> str:
        content = {
            "schema": SCHEMA_VERSION,
            "gpu": self.gpu,
            "provenance": self.provenance,
            "errors": self.errors,
            "tables": self.tables,
        }
        return json.dumps(content, indent=1) + "\n"


class StepCollectives:
    """Seconds of the collectives of a step, which all GPUs of a replica spend together.

    `model` is one GPU's share. Raises KeyError if so many GPUs were not measured.
    """

    def __init__(self, collectives: Collectives, model: Model) -> None:
        num_gpus = model.tensor_parallel_size
        self.collectives = collectives
        self.num_all_reduces = 2 * model.num_layers + 1
        """After attention and MLP of each layer, and after the embedding."""
        self.token_bytes = model.hidden_size * BYTES_PER_VALUE
        self.logits_bytes = model.num_logits * BYTES_PER_VALUE
        self._all_reduce = collectives.times(ALL_REDUCE, num_gpus)
        self._all_gather = collectives.times(ALL_GATHER, num_gpus)
        self._names = [error_name(op, num_gpus) for op in COLLECTIVES]

    def seconds(self, num_tokens: int, num_sampled: int) -> float:
        """Of a step over so many tokens, of which so many bring out a token."""
        seconds = self.num_all_reduces * self._all_reduce.at(num_tokens * self.token_bytes)
        if num_sampled:
            seconds += self._all_gather.at(num_sampled * self.logits_bytes)
        return seconds

    @property
    def max_tokens(self) -> int:
        """The most tokens of a step whose messages are within the measured sizes."""
        return self._all_reduce.num_bytes[-1] // self.token_bytes

    @property
    def max_sampled(self) -> int:
        return self._all_gather.num_bytes[-1] // self.logits_bytes

    @property
    def errors(self) -> list[Mapping[str, float]]:
        """Held-out errors of what a step runs."""
        return [self.collectives.errors[name] for name in self._names]

    def notes(self) -> list[str]:
        """What a reader of the results should know of these times."""
        if self.collectives.provenance.get(NVLS_SETTING) != "0":
            return []
        return [f"collectives were measured with {NVLS_SETTING}=0: no adding up in the switches"]


def error_name(op: str, num_gpus: int) -> str:
    """The key of `Collectives.errors`."""
    return f"{op}, {num_gpus} GPUs"


# --------------------------------------------------------------------------------------- files


def find_collectives(gpu: str, num_gpus: int, folder: Path | None = None) -> Collectives:
    """The times in `folder`, or the shipped ones of this GPU.

    Raises InputError if there are none, or none of this GPU or among so many.
    """
    how = (
        f"measure them with `podsim profile-collectives --gpu {gpu} --gpus {num_gpus} --out FOLDER`"
        f" on a machine with {num_gpus} GPUs and give them with --collectives FOLDER"
    )
    if folder is not None:
        found = read_collectives(folder, str(folder))
        if found.gpu != gpu:
            raise InputError(f"{found.source}: measured on '{found.gpu}', not on '{gpu}'")
    else:
        shipped = files("podsim.profiles").joinpath(gpu, FOLDER)
        if not shipped.joinpath(COLLECTIVES_FILE).is_file():
            raise InputError(
                f"tensor_parallel_size is {num_gpus}, but no times of collectives on {gpu} are "
                f"shipped; {how}"
            )
        found = read_collectives(shipped, f"profiles/{gpu}/{FOLDER}")
    if num_gpus not in found.gpu_counts:
        counts = ", ".join(map(str, found.gpu_counts))
        raise InputError(f"{found.source}: measured among {counts} GPUs, not {num_gpus}; {how}")
    return found


def read_collectives(folder: Traversable, source: str) -> Collectives:
    """The times of a folder, which error messages call `source`. InputError if it is broken."""
    source = f"{source}/{COLLECTIVES_FILE}"
    try:
        content = json.loads(folder.joinpath(COLLECTIVES_FILE).read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA_VERSION:
            raise InputError(
                f"{source}: schema {content['schema']}, this podsim reads {SCHEMA_VERSION}; "
                "measure again with `podsim profile-collectives`"
            )
        found = Collectives(source=source, **{k: v for k, v in content.items() if k != "schema"})
        for op in COLLECTIVES:
            for num_gpus in found.gpu_counts:
                found.times(op, num_gpus)
                found.errors[error_name(op, num_gpus)]
        return found
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{source}: not podsim's times of collectives: {error!r}") from None
