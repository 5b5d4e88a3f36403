"""Client statistics as ServeGen publishes them, and requests drawn from them.

A client is chunk-I-trace.csv (its rate, and the law of the gaps between its requests, window by
window) with chunk-I-dataset.json (histograms of its lengths, in windows of their own).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from podsim.errors import InputError
from podsim.trace_fields import MAX_TOKENS, shown
from podsim.trace_formats import format_named
from podsim.trace_rows import Ints, ReadOptions, Rows

MAX_REQUESTS = 50_000_000  # that may be drawn at once: 2 GB
PROMPT_FIELDS = ("text_tokens", "image_tokens", "audio_tokens", "video_tokens")

Floats = NDArray[np.float64]

_NAME = re.compile(r"chunk-([0-9]{1,6})-(trace\.csv|dataset\.json)")
_FLOAT = r"[0-9]{1,20}(?:\.[0-9]{0,40})?(?:[eE][+-]?[0-9]{1,3})?"
_HISTOGRAM = re.compile(rf"\{{(?:{_FLOAT}: ?{_FLOAT}(?:, ?{_FLOAT}: ?{_FLOAT})*)?\}}")


@dataclass(frozen=True, slots=True)
class Histogram:
    """How probable each number is."""

    values: Floats
    probabilities: Floats

    @property
    def mean(self) -> float:
        return float(self.values @ self.probabilities)


@dataclass(frozen=True, slots=True)
class Client:
    """One client: columns over its windows, and its histograms by window start and field."""

    start: Floats
    rate: Floats
    cv: Floats
    law: tuple[str, ...]
    shape: Floats
    histograms: Mapping[float, Mapping[str, Histogram]]

    @property
    def width(self) -> float:
        """Seconds of a window."""
        return float(self.start[1] - self.start[0]) if len(self.start) > 1 else 600.0


# ---- files


def has_clients(path: Path) -> bool:
    """Whether a folder holds client files, at any depth."""
    return path.is_dir() and next(path.rglob("chunk-*-trace.csv"), None) is not None


def read_clients(path: Path) -> tuple[list[Client], str]:
    """The clients of a folder or archive, in order of number, and the hash of their files.

    InputError: no client files, those of several models, or a wrong value.
    """
    try:
        files = sorted(_client_files(path), key=lambda file: (file[0].parent, _order(file[0])))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition("\n")[0]
        raise InputError(f"{path}: cannot be read: {reason.rstrip(':')}") from None
    folders = sorted({str(name.parent) for name, _ in files})
    if not files:
        raise InputError(f"{path}: holds no client files (chunk-0-trace.csv and so on)")
    if len(folders) > 1:
        raise InputError(f"{path}: holds clients of several models, name one: {folders[:3]}")
    content = {name.name: data for name, data in files}
    digest = hashlib.sha256()
    for name, data in content.items():
        digest.update(f"{name} {len(data)} ".encode() + data)
    traces = [name for name in content if name.endswith(".csv")]
    clients = [
        _client(path, name, data, content.get(name.replace("-trace.csv", "-dataset.json"), b"{}"))
        for name, data in content.items()
        if name in traces
    ]
    return clients, digest.hexdigest()


def _client_files(path: Path) -> Iterator[tuple[Path, bytes]]:
    if path.is_dir():
        for file in path.rglob("chunk-*"):
            if _NAME.fullmatch(file.name) and file.is_file():
                yield file, file.read_bytes()
        return
    with tarfile.open(path) as archive:
        for member in archive:
            name = Path(member.name)
            data = archive.extractfile(member) if _NAME.fullmatch(name.name) else None
            if data is not None:
                yield name, data.read()


def _order(name: Path) -> tuple[int, str]:
    match = _NAME.fullmatch(name.name)
    assert match
    return int(match[1]), match[2]


def _client(path: Path, name: str, trace: bytes, dataset: bytes) -> Client:
    windows = []
    lines = io.StringIO(trace.decode("utf-8-sig", errors="replace"))
    try:
        for number, row in enumerate(csv.reader(lines), 1):
            if row:
                windows.append(_window(f"{path}: {name}:{number}", row))
    except csv.Error as error:
        raise InputError(f"{path}: {name}: is not CSV: {error}") from None
    if not windows:
        raise InputError(f"{path}: {name}: is empty, expected a window per line")
    start, rate, cv, shape = np.array([numbers for _, numbers in windows]).T
    if not (np.diff(start) > 0).all():
        raise InputError(f"{path}: {name}: windows are not in order of time")
    laws = tuple(law for law, _ in windows)
    histograms = _histograms(f"{path}: {name.replace('-trace.csv', '-dataset.json')}", dataset)
    return Client(start, rate, cv, laws, shape, histograms)


def _window(place: str, row: list[str]) -> tuple[str, tuple[float, float, float, float]]:
    if len(row) != 6:
        raise InputError(f"{place}: has {len(row)} fields, expected 6 (start, rate, CV, law, ...)")
    start, rate, cv, law, shape, _ = (text.strip() for text in row)
    if law not in ("", "Gamma", "Weibull"):
        raise InputError(f"{place}: law is {shown(law)}, expected Gamma, Weibull or nothing")
    names = {"start": start, "rate": rate, "CV": cv, "shape": shape}
    for what, text in names.items():
        if not re.fullmatch(_FLOAT, text) or float(text) > 1e12:
            raise InputError(f"{place}: {what} is {shown(text)}, expected a number")
    if law and float(rate) > 0 and not 1e-4 <= float(shape) <= 1e6:
        raise InputError(f"{place}: shape is {shown(shape)}, expected 0.0001 to 1000000")
    return law, (float(start), float(rate), float(cv), float(shape))


def _histograms(place: str, dataset: bytes) -> dict[float, dict[str, Histogram]]:
    try:
        windows = json.loads(dataset)
    except (ValueError, RecursionError):
        windows = None
    if not isinstance(windows, dict):
        raise InputError(f"{place}: is not JSON, expected an object of windows")
    histograms: dict[float, dict[str, Histogram]] = {}
    for start, fields in windows.items():
        if not re.fullmatch(_FLOAT, start) or not isinstance(fields, dict):
            raise InputError(f"{place}: window {shown(start)} is wrong, expected a time in seconds")
        histograms[float(start)] = {
            field: _histogram(f"{place}: {field} at {start}", text)
            for field, text in fields.items()
            if text != "{}"  # no data
        }
    return dict(sorted(histograms.items()))


def _histogram(place: str, text: object) -> Histogram:
    if not isinstance(text, str) or not _HISTOGRAM.fullmatch(text):
        raise InputError(f"{place}: is {shown(str(text))}, expected '{{tokens: probability}}'")
    pairs = np.array([pair.split(":") for pair in text[1:-1].split(",")], dtype=np.float64)
    values, probabilities = pairs.T
    total = probabilities.sum()
    if not 0 < total < math.inf or values.max() >= MAX_TOKENS:
        raise InputError(f"{place}: is {shown(text)}, expected probabilities of token numbers")
    return Histogram(values, probabilities / total)


# ---- what the clients are like


def client_statistics(path: Path) -> dict[str, float]:
    """Of all clients: windows, total rate (requests/s), CV over active windows, mean lengths."""
    clients, _ = read_clients(path)
    total: dict[float, float] = {}
    for client in clients:
        for start, rate in zip(client.start.tolist(), client.rate.tolist(), strict=True):
            total[start] = total.get(start, 0.0) + rate
    rates = np.array(list(total.values()))
    cvs = np.concatenate([client.cv[client.rate > 0] for client in clients])
    statistics = {
        "clients": len(clients),
        "windows": len(rates),
        "rate_mean": float(rates.mean()),
        "rate_min": float(rates.min()),
        "rate_max": float(rates.max()),
    }
    if len(cvs):
        statistics |= {
            "iat_cv_p50": float(np.percentile(cvs, 50)),
            "iat_cv_p90": float(np.percentile(cvs, 90)),
        }
    means: dict[str, list[float]] = {}
    for client in clients:
        for fields in client.histograms.values():
            for field, histogram in fields.items():
                means.setdefault(field, []).append(histogram.mean)
    return statistics | {f"{field}_mean": float(np.mean(of)) for field, of in means.items()}


# ---- requests


def draw_requests(path: Path, options: ReadOptions) -> Rows:
    """Requests of all clients, drawn with the seed of the options.

    In each window the gaps are drawn by their law and stretched so that they fill it: its rate is
    as published. InputError as `read_clients`, and if there are too many requests.
    """
    clients, sha256 = read_clients(path)
    first, last = options.client_window
    expected = sum(float((c.rate * _inside(c, first, last)).sum()) for c in clients)
    if expected > MAX_REQUESTS:
        raise InputError(
            f"{path}: {expected:.0f} requests would be drawn, expected {MAX_REQUESTS} at most: "
            "choose a part with --client-window FROM:TO (seconds)"
        )
    rng = np.random.default_rng(options.seed)
    parts = []
    silent = 0
    for client in clients:
        times = _times(client, first, last, rng)
        lengths = _lengths(client, times, rng) if len(times) else None
        if lengths is not None:
            parts.append((times, *lengths))
        elif len(times):
            silent += 1
    if not parts:
        raise InputError(f"{path}: no client has requests with lengths in the time to draw from")
    times, prompts, outputs = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(times, kind="stable")
    notes = [f"drawn from the statistics of {len(clients)} clients, seed {options.seed}"]
    if silent:
        notes.append(f"{silent} clients left out: nothing is known of their lengths")
    return Rows(
        format=format_named("servegen"),
        lines=np.arange(1, len(order) + 1, dtype=np.int32),
        time_ns=np.rint(times[order] * 1e9).astype(np.int64),
        num_prompt_tokens=prompts[order],
        num_output_tokens=outputs[order],
        notes=notes,
        sha256=sha256,
    )


def _inside(client: Client, first: float, last: float) -> Floats:
    """Seconds of each window that lie between first and last."""
    ends = np.minimum(client.start + client.width, last)
    seconds: Floats = np.maximum(ends - np.maximum(client.start, first), 0)
    return seconds


def _times(client: Client, first: float, last: float, rng: np.random.Generator) -> Floats:
    parts = [np.empty(0)]
    inside = _inside(client, first, last)
    for i in np.flatnonzero((client.rate > 0) & (inside > 0)).tolist():
        # The whole window is filled, then cut: bursts come as often in a part of it.
        count = int(client.rate[i] * client.width + rng.random())
        gaps = _gaps(client.law[i], float(client.shape[i]), count + 1, rng)
        times = client.start[i] + np.cumsum(gaps)[:-1] * (client.width / gaps.sum())
        parts.append(times[(times >= first) & (times < last)])
    return np.concatenate(parts)


def _gaps(law: str, shape: float, count: int, rng: np.random.Generator) -> Floats:
    """Gaps of any mean, but not all 0."""
    if law == "Gamma":
        gaps = rng.gamma(shape, size=count)
    elif law == "Weibull":
        gaps = rng.weibull(shape, size=count)
    else:
        gaps = rng.exponential(size=count)
    usable = 0 < gaps.sum() < math.inf  # a tiny shape leaves the range of a float
    return gaps if usable else np.ones(count)


def _lengths(client: Client, times: Floats, rng: np.random.Generator) -> tuple[Ints, Ints] | None:
    """Prompt and output tokens of requests at these times; None if the client has no data."""
    prompts = _drawn(client, ("input_tokens",), times, rng)
    if prompts is None:
        prompts = _drawn(client, PROMPT_FIELDS, times, rng)
    outputs = _drawn(client, ("output_tokens",), times, rng)
    return None if prompts is None or outputs is None else (prompts, outputs)


def _drawn(
    client: Client, fields: tuple[str, ...], times: Floats, rng: np.random.Generator
) -> Ints | None:
    """The sum of these fields for each time; None if there is no data of any."""
    totals = np.zeros(len(times))
    known = False
    for field in fields:
        starts = [start for start, of in client.histograms.items() if field in of]
        if starts:
            known = True
            # A window without data takes the one before it, or the first.
            window = np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)
            for i in np.unique(window).tolist():
                histogram = client.histograms[starts[i]][field]
                which = window == i
                totals[which] += rng.choice(
                    histogram.values, int(which.sum()), p=histogram.probabilities
                )
    return np.rint(totals).astype(np.int64) if known else None
