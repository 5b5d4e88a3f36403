"""The command group `podsim trace`: inspect, convert, generate and slice traces."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console

from podsim.command_options import JsonOption
from podsim.errors import InputError
from podsim.terminal import progress_bar
from podsim.trace_clients import client_statistics
from podsim.trace_report import statistics_lines
from podsim.trace_rows import ReadOptions
from podsim.trace_statistics import inspect_trace
from podsim.trace_tokenizer import token_counter
from podsim.trace_writers import WRITERS, atomic_file, check_format, not_kept, write_trace
from podsim.workload import Synthetic, Trace, generate, read_trace

trace_app = typer.Typer(
    no_args_is_help=True, help="Inspect, convert, generate and slice request traces."
)

Source = Annotated[
    str, typer.Argument(help="Trace file, folder of sessions or clients, or a shipped trace.")
]
FormatOption = Annotated[
    str | None, typer.Option("--format", help="Format of the source, in place of recognising it.")
]
ZeroLength = Annotated[
    str, typer.Option(help="Rows with zero prompt or output tokens: drop (counted) or error.")
]
CharsPerToken = Annotated[
    float | None, typer.Option(help="Count tokens of texts as characters divided by this.")
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="MODULE:FUNCTION that makes tokens, or their number, of a text."),
]
BlockSize = Annotated[
    int | None, typer.Option(help="Tokens of a block of hash_ids, where not the format's own.")
]
ClientWindow = Annotated[
    str | None, typer.Option(help="FROM:TO, seconds of client statistics (servegen) to draw from.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Out = Annotated[Path, typer.Option("--out", help="File to write; .gz compresses it.")]
OutFormat = Annotated[str, typer.Option("--to", help=f"Output format: {', '.join(WRITERS)}.")]
SpreadTies = Annotated[
    bool, typer.Option("--spread-ties", help="Spread requests that arrive at once over the tick.")
]
Tick = Annotated[
    float | None, typer.Option(help="Seconds of a tick; default: the median gap between ticks.")
]
RateScale = Annotated[
    float | None, typer.Option(help="Multiply the rate, by dividing time; no request is lost.")
]
SessionQps = Annotated[
    float | None, typer.Option(help="Start the sessions anew: Poisson, so many a second.")
]
MaxTokens = Annotated[int | None, typer.Option(help="Most prompt plus output tokens of a request.")]
Overflow = Annotated[
    str, typer.Option(help="Requests over --max-tokens: drop (counted) or truncate.")
]


@trace_app.command("inspect")
def inspect_command(
    source: Source,
    format_: FormatOption = None,
    zero_length: ZeroLength = "drop",
    chars_per_token: CharsPerToken = None,
    tokenizer: Tokenizer = None,
    block_size: BlockSize = None,
    client_window: ClientWindow = None,
    seed: Seed = 0,
    cache_blocks: Annotated[
        str | None, typer.Option(help="Prefix hits with LRU caches of so many blocks: 1000,5000.")
    ] = None,
    as_json: JsonOption = False,
    figure: Annotated[
        Path | None, typer.Option(help="PNG of arrivals over time and length distributions.")
    ] = None,
) -> None:
    """Rows, rate, burstiness, lengths, ideal prefix hits and sessions of a trace."""
    options = _options(
        format_, zero_length, chars_per_token, tokenizer, block_size, client_window, seed
    )
    sizes = _sizes(cache_blocks)
    with _output(figure) as file:
        trace = _read(source, options)
        if sizes and trace.hash_ids is None:
            raise InputError(f"{trace.name}: --cache-blocks needs hash ids, and this has none")
        statistics = inspect_trace(trace, sizes)
        if trace.format == "servegen":
            statistics["clients"] = client_statistics(Path(source))
        if file is not None:
            from podsim.trace_figure import plot_trace  # matplotlib takes a second to load

            plot_trace(trace, file)
    text = json.dumps(statistics, indent=2) if as_json else "\n".join(statistics_lines(statistics))
    typer.echo(text)


@trace_app.command("convert")
def convert_command(
    source: Source,
    out: Out,
    to: OutFormat = "podsim",
    format_: FormatOption = None,
    zero_length: ZeroLength = "drop",
    chars_per_token: CharsPerToken = None,
    tokenizer: Tokenizer = None,
    block_size: BlockSize = None,
    client_window: ClientWindow = None,
    session_qps: SessionQps = None,
    spread_ties: SpreadTies = False,
    tick: Tick = None,
    rate_scale: RateScale = None,
    max_tokens: MaxTokens = None,
    overflow: Overflow = "drop",
    seed: Seed = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a trace of any format as podsim, mooncake, vidur or vllm-timed."""
    options = _options(
        format_, zero_length, chars_per_token, tokenizer, block_size, client_window, seed
    )

    def make() -> Trace:
        trace = _read(source, options)
        if max_tokens is not None:
            trace = trace.within_context(max_tokens, overflow)
        if session_qps is not None:
            trace = trace.with_session_starts(session_qps, seed)
        if spread_ties or tick is not None:
            trace = trace.spread_ties(seed, tick)
        return trace if rate_scale is None else trace.scaled(rate_scale)

    _write(make, out, to, as_json)


@trace_app.command("slice")
def slice_command(
    source: Source,
    out: Out,
    to: OutFormat = "podsim",
    start: Annotated[
        float | None, typer.Option("--from", help="Seconds after the first arrival.")
    ] = None,
    end: Annotated[float | None, typer.Option("--until", help="Seconds; not included.")] = None,
    rows: Annotated[
        str | None, typer.Option(help="FIRST:LAST in order of arrival, from 0; LAST not included.")
    ] = None,
    format_: FormatOption = None,
    zero_length: ZeroLength = "drop",
    chars_per_token: CharsPerToken = None,
    tokenizer: Tokenizer = None,
    block_size: BlockSize = None,
    client_window: ClientWindow = None,
    seed: Seed = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a part of a trace: a window of time, a range of rows, or the rows of a window."""
    options = _options(
        format_, zero_length, chars_per_token, tokenizer, block_size, client_window, seed
    )
    if start is None and end is None and rows is None:
        raise InputError("nothing to slice by: give --from, --until or --rows")
    first, last = _range("rows", rows)

    def make() -> Trace:
        trace = _read(source, options)
        if start is not None or end is not None:
            trace = trace.between(start or 0.0, math.inf if end is None else end)
        if rows is None:
            return trace
        return trace.rows(int(first), len(trace) if math.isinf(last) else int(last))

    _write(make, out, to, as_json)


@trace_app.command("generate")
def generate_command(
    out: Out,
    arrivals: Annotated[
        str,
        typer.Option(help="poisson, gamma, weibull, uniform, static, ramp or diurnal."),
    ] = "poisson",
    qps: Annotated[
        float | None, typer.Option(help="Mean requests per second; sessions, where --turns.")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Shape of gamma and weibull gaps: 1 is Poisson, less is burstier.")
    ] = 1.0,
    end_qps: Annotated[float | None, typer.Option(help="Where a ramp from --qps ends.")] = None,
    amplitude: Annotated[
        float, typer.Option(help="Of a diurnal rate: 0.5 swings it by half.")
    ] = 0.5,
    period: Annotated[float, typer.Option(help="Seconds of a diurnal swing.")] = 86_400.0,
    requests: Annotated[int, typer.Option(help="How many.")] = 1000,
    prompt_tokens: Annotated[
        str,
        typer.Option(help="N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA; of what a turn adds."),
    ] = "1500",
    output_tokens: Annotated[str, typer.Option(help="Written like --prompt-tokens.")] = "300",
    lengths_from: Annotated[
        str | None, typer.Option(help="Trace whose pairs of lengths are drawn from instead.")
    ] = None,
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of a shared prefix.")] = 0,
    num_prefixes: Annotated[int, typer.Option(help="Different shared prefixes.")] = 1,
    turns: Annotated[
        str, typer.Option(help="Turns of a session, written like --prompt-tokens.")
    ] = "1",
    think_time: Annotated[float, typer.Option(help="Mean seconds before a later turn.")] = 10.0,
    block_size: Annotated[int, typer.Option(help="Tokens of a block of hash_ids.")] = 16,
    seed: Seed = 0,
    as_json: JsonOption = False,
) -> None:
    """Write a synthetic trace in podsim's format; it records its seed and command."""
    options = Synthetic(
        arrivals=arrivals,
        qps=qps,
        burstiness=burstiness,
        end_qps=end_qps,
        amplitude=amplitude,
        period=period,
        num_requests=requests,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        prefix_tokens=prefix_tokens,
        num_prefixes=num_prefixes,
        turns=turns,
        think_time=think_time,
        block_size=block_size,
        seed=seed,
    )

    def make() -> Trace:
        lengths = ReadOptions(zero_length="drop")
        return generate(options, _read(lengths_from, lengths) if lengths_from else None)

    _write(make, out, "podsim", as_json, made=(f"seed {seed}",))


# ---- shared


def _options(
    format_: str | None,
    zero_length: str,
    chars_per_token: float | None,
    tokenizer: str | None,
    block_size: int | None,
    client_window: str | None,
    seed: int,
) -> ReadOptions:
    return ReadOptions(
        format=format_,
        zero_length=zero_length,
        count_tokens=token_counter(chars_per_token, tokenizer),
        block_size=block_size,
        client_window=_range("client window", client_window),
        seed=seed,
    )


def _read(source: str, options: ReadOptions) -> Trace:
    """`read_trace` with a progress bar."""
    read = 0
    size = _size(Path(source))
    with progress_bar("reading", size and size // 1000, Console(stderr=True), "kB") as done:

        def on_bytes(number: int) -> None:
            nonlocal read
            read += number
            done(read // 1000)

        return read_trace(source, replace(options, on_bytes=on_bytes))


def _size(path: Path) -> int | None:
    """Bytes that will be read, if that is known before."""
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.glob("*.json*")) or None


def _range(what: str, text: str | None) -> tuple[float, float]:
    """FROM:TO, either of which may be left out."""
    first, colon, last = (text or ":").partition(":")
    try:
        numbers = float(first or 0), float(last or math.inf)
        int(numbers[0])
    except (ValueError, OverflowError):
        colon = ""
    if not colon or not 0 <= numbers[0] < numbers[1]:
        raise InputError(f"{what} is {text!r}, expected FROM:TO")
    return numbers


def _sizes(text: str | None) -> list[int]:
    sizes = (text or "").split(",") if text is not None else []
    if not all(size.strip().isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(f"cache blocks is {text!r}, expected numbers of blocks: 1000,5000")
    return [int(size) for size in sizes]


@contextmanager
def _output(path: Path | None) -> Iterator[IO[bytes] | None]:
    """The file to write, if there is one; refused before any work is done."""
    if path is None:
        yield None
        return
    with atomic_file(path) as file:
        yield file


def _write(
    make: Callable[[], Trace], out: Path, to: str, as_json: bool, made: Sequence[str] = ()
) -> None:
    check_format(to)
    command = "command podsim " + shlex.join(sys.argv[1:])
    with atomic_file(out) as file:
        trace = make()
        with progress_bar("writing", len(trace), Console(stderr=True)) as done:
            zipped = out.suffix == ".gz"
            write_trace(trace, file, to, made=(command, *made), zipped=zipped, on_progress=done)
    lost = not_kept(trace, to)
    if as_json:
        described = {
            "file": str(out),
            "requests": len(trace),
            "rows_read": trace.rows_read,
            "dropped": dict(trace.dropped),
            "notes": list(trace.notes),
            "not_kept": list(lost),
        }
        typer.echo(json.dumps(described, indent=2))
        return
    typer.echo(f"{len(trace)} requests of {trace.rows_read} rows: {out}")
    lines = [*trace.notes, *([f"not kept by {to}: {', '.join(lost)}"] if lost else [])]
    for line in [*(f"dropped {n}: {reason}" for reason, n in trace.dropped.items()), *lines]:
        typer.echo(line)
