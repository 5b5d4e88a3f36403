"""The journal of a measurement: rows as they are measured, safe against being killed."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from podsim.errors import InputError
from podsim.profile_plan import Key, Plan

JOURNAL_FILE = "measurements.partial.csv"
"""Beside the profile that it will become; its first line says what is measured on what."""

ROW_COLUMNS = (
    *("op", "strategy", "split", "num_tokens", "prefills", "decodes", "pass"),
    *("time_us", "time_p10_us", "time_p90_us", "repeats", "sm_clock_mhz", "work", "refused"),
)
"""Of measurements.csv; docs/profile-format.md says what each holds."""
_WALL = "wall_s"
"""Seconds that the whole sequence of a row took, in its first row; only in the journal."""
_CARD = "card"
"""That timed it, in the same row."""
_COLUMNS = (*ROW_COLUMNS, _WALL, _CARD)
_START = "# podsim profile "
SYNC_SECONDS = 1.0
"""At most so much is lost when the machine, not only the process, goes down."""

Row = Mapping[str, str]


class Journal:
    """Rows of a plan's first sequences, whole sequences only.

    What a killed process left half-written is cut off. Only one process may have it open. Raises
    InputError if the file is of another measurement: another plan, GPU, driver, kernels, versions.
    The card may be another.
    """

    def __init__(self, path: Path, identity: Mapping[str, object], plan: Plan) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.first_passes: dict[tuple[str, ...], Row] = {}
        """Of each point, by `key_of`, the row of its first pass."""
        self.num_done = 0
        """Sequences of the plan that are measured."""
        self.seconds: dict[str, list[float]] = {}
        """Of each kind of sequence: the wall time of each."""
        self._plan = plan
        self._identity = {str(key): value for key, value in identity.items()}
        self.cards: list[tuple[int, str]] = []
        """From which sequence on which card measured; nothing where it is not known."""
        self._file = path.open("a+b", buffering=0)
        self._synced = time.monotonic()
        try:
            self._lock()
            self._read()
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
        os.fsync(self._file.fileno())
        self._file.close()

    def append(self, rows: Sequence[Row], wall_seconds: float, card: str) -> None:
        """Keep the rows of the plan's next sequence, in the order of its keys."""
        timed = [{**row, _WALL: "", _CARD: ""} for row in rows]
        timed[0] |= {_WALL: f"{wall_seconds:.3f}", _CARD: card}
        self._write(_lines(timed))
        self._note(timed)
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another `podsim profile` is writing it") from None

    def _read(self) -> None:
        self._file.seek(0)
        content: bytes = self._file.readall()
        lines: list[bytes] = [*content.splitlines(keepends=True), b"", b""]
        first, header, *lines = lines
        if not (first.endswith(b"\n") and header.endswith(b"\n")):  # new, or killed at its start
            self._file.truncate(0)
            start = _START + json.dumps(self._identity, sort_keys=True) + "\n"
            self._write(start.encode() + ",".join(_COLUMNS).encode() + b"\n")
            return
        self._require_same(first)
        if header.decode() != ",".join(_COLUMNS) + "\n":
            raise InputError(f"{self.path}: not a journal of this podsim; remove it")
        whole = [line for line in lines if line.endswith(b"\n")]
        end = len(first) + len(header) + self._read_rows(whole)
        self._file.truncate(end)

    def _read_rows(self, lines: Sequence[bytes]) -> int:
        """Note the rows of whole sequences; how many bytes they take."""
        texts = io.StringIO(b"".join(lines).decode())
        rows = list(csv.DictReader(texts, fieldnames=_COLUMNS))
        num_read = 0
        for job, number in self._plan.turns:
            mine = rows[num_read : num_read + len(job.keys)]
            for row, key in zip(mine, job.keys, strict=False):
                if (*key_of(row), row["pass"]) != (*map(str, key), str(number)):
                    line = num_read + 3
                    raise InputError(f"{self.path}:{line}: not the row that comes here; remove it")
            if len(mine) < len(job.keys):
                break
            self._note(mine)
            num_read += len(mine)
        return sum(map(len, lines[:num_read]))

    def _note(self, rows: Sequence[Row]) -> None:
        job = self._plan.turns[self.num_done].job
        self.seconds.setdefault(job.kind, []).append(float(rows[0][_WALL]))
        if not self.cards or self.cards[-1][1] != rows[0][_CARD]:
            self.cards.append((self.num_done, rows[0][_CARD]))
        for row in rows:
            self.rows.append({name: row[name] for name in ROW_COLUMNS})
            self.first_passes.setdefault(key_of(row), self.rows[-1])
        self.num_done += 1

    def _require_same(self, first: bytes) -> None:
        try:
            found = json.loads(first.decode().removeprefix(_START))
            differing = [
                f"{name} is {found.get(name)!r} there, {self._identity.get(name)!r} now"
                for name in sorted({*found, *self._identity})
                if found.get(name) != self._identity.get(name)
            ]
        except (ValueError, AttributeError):
            raise InputError(f"{self.path}: not a journal of podsim profile; remove it") from None
        if differing:
            raise InputError(
                f"{self.path}: holds another measurement: {'; '.join(differing)}; name another "
                "--out, or remove the file to start anew"
            )

    def _write(self, text: bytes) -> None:
        if self._file.write(text) != len(text):
            raise OSError(28, os.strerror(28))


def key_of(row: Row) -> tuple[str, ...]:
    """What names a row beside its pass."""
    return tuple(row[name] for name in Key._fields)


def _lines(rows: Sequence[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writerows(rows)
    return text.getvalue().encode()
