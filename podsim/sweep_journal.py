"""The journal of a sweep: a line for each finished simulation, safe against being killed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import TracebackType

from podsim.errors import InputError
from podsim.workers import WORKER_DIED

SYNC_SECONDS = 1.0
"""At most so much is lost when the machine, not only the process, goes down."""

MISSING = -1


class Journal:
    """Appends rows to a file and knows which it has. The first line says whose rows they are.

    A row is [index, error, numbers], whose numbers are null where there is none. What a killed
    process left half-written at the end is cut off. Simulations whose worker died are missing when
    a journal is opened, to be tried again. Only one process may have it open.
    """

    def __init__(self, path: Path, identity: Mapping[str, object], num_rows: int) -> None:
        self.path = path
        self.offset = array("q", [MISSING]) * num_rows
        """Of each row, its place in the file."""
        self.num_done = 0
        self._file = path.open("ab", buffering=0)
        self._synced = time.monotonic()
        try:
            self._lock()
            self._read(json.dumps(identity, sort_keys=True).encode() + b"\n")
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sync()
        self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path.parent}: another sweep is writing here") from None

    def _read(self, identity: bytes) -> None:
        with self.path.open("rb") as file:
            header = file.readline()
            if not header.endswith(b"\n"):  # new, or killed within the first line
                self._file.truncate(0)
                self._write(identity)
                self._sync()
                return
            if header != identity:
                raise InputError(
                    f"{self.path.parent}: holds another sweep ({_difference(header, identity)}); "
                    "name another --out, or remove it"
                )
            place = len(header)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    index, error, _ = json.loads(line)
                except ValueError:
                    raise InputError(
                        f"{self.path}: byte {place}: not a row of a sweep; remove the file to "
                        "start anew"
                    ) from None
                if not error.startswith(WORKER_DIED):
                    self._note(index, place)
                place += len(line)
        self._file.truncate(place)

    def _note(self, index: int, place: int) -> None:
        if self.offset[index] == MISSING:
            self.num_done += 1
            self.offset[index] = place

    def append(self, index: int, error: str, numbers: Sequence[float | None]) -> None:
        """Keep a finished row."""
        place = self._file.seek(0, os.SEEK_END)
        line = json.dumps([index, error, numbers], allow_nan=False, separators=(",", ":"))
        self._write(line.encode() + b"\n")
        self._note(index, place)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self._sync()

    def _write(self, line: bytes) -> None:
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def missing(self) -> Iterator[int]:
        """The rows that are not there yet, as of now."""
        yield from (i for i, place in enumerate(self.offset) if place == MISSING)

    def rows(self) -> Iterator[tuple[int, str, list[float | None]]]:
        """All rows by index; one at a time in memory."""
        with self.path.open("rb") as file:
            for place in self.offset:
                file.seek(place)
                index, error, numbers = json.loads(file.readline())
                yield index, error, numbers


def podsim_version() -> str:
    return version("podsim")


def _difference(header: bytes, identity: bytes) -> str:
    try:
        old, new = json.loads(header), json.loads(identity)
    except ValueError:
        return "its journal is broken"
    names = [name for name in new if not isinstance(old, dict) or old.get(name) != new[name]]
    return "different " + ", ".join(names)
