"""Whether a measured row can be believed: not faster than the machine, not too scattered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from podsim.hardware import Gpu
from podsim.model import Model
from podsim.op_tables import LAYER_OPS
from podsim.points import AttentionPoint
from podsim.roofline import Ceilings, Work, attention_work, op_work, step_seconds

TOLERANCE = 0.05
"""A row may be so much faster than the ceilings allow: these are measured themselves, in a few
repetitions of a few kernels, and two runs of one kernel differ by up to 2 %."""
MOST_SPREAD = 0.25
"""P90 minus P10 over the median, beyond which a timing says too little."""
MOST_JITTER = 2e-6
"""Seconds of P90 minus P10 that are never too much: the events' own scatter."""
MOST_APART = 1.5
"""The passes of one point may differ by this factor; all but launches stay within 1.3."""

BANDWIDTHS = ("read_bandwidth", "matvec_bandwidth", "decode_bandwidth", "copy_bandwidth")
RATES = ("matrix_rate", "layer_matrix_rate")
HOST_COPIES = ("host_to_device", "device_to_host")

Row = Mapping[str, object]


def number(row: Row, name: str) -> float:
    return float(str(row[name]))


def rate(row: Row) -> float:
    """Of a ceiling's row: its bytes or FLOPs a second."""
    return number(row, "work") / (number(row, "time_us") * 1e-6)


def ceiling_rates(rows: Iterable[Row]) -> dict[str, float]:
    """Of each ceiling that is among the rows: bytes/s, FLOP/s, or the seconds of a launch."""
    found = {}
    for row in rows:
        if row["op"] == "ceiling" and not row["refused"]:
            name = str(row["strategy"])
            seconds = number(row, "time_us") * 1e-6
            found[name] = seconds if name == "launch_latency" else rate(row)
    return found


def ceilings_of(rates: Mapping[str, float], gpu: Gpu) -> Ceilings:
    """The measured ceilings; what the data sheet says where one is missing."""
    published = Ceilings.published(gpu)
    bandwidth = max((rates[name] for name in BANDWIDTHS if name in rates), default=0.0)
    flops = max((rates[name] for name in RATES if name in rates), default=0.0)
    return Ceilings(
        flops=flops or published.flops,
        bandwidth=bandwidth or published.bandwidth,
        launch=rates.get("launch_latency", published.launch),
        measured=bool(flops and bandwidth),
    )


def fault_of(row: Row, model: Model, gpu: Gpu, ceilings: Ceilings) -> str:
    """Why a row cannot be believed; nothing if it can."""
    return _too_fast(row, model, gpu, ceilings) or _too_wide(row)


def _too_fast(row: Row, model: Model, gpu: Gpu, ceilings: Ceilings) -> str:
    seconds = number(row, "time_us") * 1e-6
    if row["op"] == "ceiling":
        return _ceiling_fault(row, gpu)
    point = AttentionPoint.from_text(str(row["prefills"]), str(row["decodes"]), "")
    work = None
    if row["op"] == "launch":
        least = ceilings.launch
    elif row["op"] in ("step", "sustained", "duty"):
        chunks, contexts = point.prefills, point.decode_contexts
        if str(row["strategy"]).startswith("decode "):
            chunks = ()  # of a duty
        least = step_seconds(model, gpu, ceilings, chunks, contexts, LAYER_OPS)
    else:
        work = _work(row, point, model, gpu)
        least = ceilings.least_seconds(work)
    if seconds >= least * (1 - TOLERANCE):
        return ""
    return f"{_us(seconds)} is faster than {_us(least)}, {_reason(work, least, ceilings)}"


def _work(row: Row, point: AttentionPoint, model: Model, gpu: Gpu) -> Work:
    if row["op"] == "attention":
        return attention_work(model, gpu, point.prefills, point.decode_contexts)
    return op_work(model, gpu, str(row["op"]), int(number(row, "num_tokens")))


def _reason(work: Work | None, least: float, ceilings: Ceilings) -> str:
    if work is None:
        return "the sum of what its parts take at least"
    source = "measured" if ceilings.measured else "published"
    if least == work.flops / ceilings.flops:
        return f"{work.flops / 1e9:,.2f} GFLOP at the {source} {ceilings.flops / 1e12:,.0f} TFLOP/s"
    if least == work.bytes / ceilings.bandwidth:
        return f"{work.bytes / 1e6:,.1f} MB at the {source} {ceilings.bandwidth / 1e12:.2f} TB/s"
    return "the shortest launch"


def _ceiling_fault(row: Row, gpu: Gpu) -> str:
    """No ceiling lies above the published peak."""
    name = str(row["strategy"])
    peak = {
        **dict.fromkeys(BANDWIDTHS, gpu.peak_bandwidth),
        **dict.fromkeys(RATES, gpu.peak_flops),
        **dict.fromkeys(HOST_COPIES, gpu.host_bandwidth),
    }
    if name not in peak or rate(row) <= peak[name] * (1 + TOLERANCE):
        return ""
    return f"{name} of {rate(row):.3g}/s is above the published {peak[name]:.3g}/s"


def _too_wide(row: Row) -> str:
    if row["op"] in ("ceiling", "sustained", "duty"):  # the best counts; the clock is meant to fall
        return ""
    low, middle, high = (number(row, n) for n in ("time_p10_us", "time_us", "time_p90_us"))
    if not 0 < low <= middle <= high:
        return f"its median, {middle:,.2f} us, does not lie between its P10 and P90"
    jitter = high - low
    spread = jitter / middle
    if spread <= MOST_SPREAD or jitter * 1e-6 <= MOST_JITTER:
        return ""
    return f"P90 and P10 lie {spread:.0%} of the median apart, more than {MOST_SPREAD:.0%}"


def name_of(row: Row) -> str:
    """What a row is of, in words."""
    words = [str(row["op"]), str(row["strategy"]), str(row["split"])]
    batch = [str(row["prefills"]), str(row["decodes"])]
    if any(batch):
        text = " + ".join(part if len(part) < 40 else f"{part[:36]} ..." for part in batch if part)
        words.append(f"[{text}]")
    elif row["op"] != "ceiling":
        words.append(f"{row['num_tokens']} tokens" if row["op"] != "launch" else "")
    return " ".join(word for word in [*words, f"pass {row['pass']}"] if word)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.2f} us"


def disagreement(row: Row, other: Row) -> str:
    """Why two passes of one point cannot both be right; nothing if they can."""
    low, high = sorted((number(row, "time_us"), number(other, "time_us")))
    if high <= MOST_APART * low:
        return ""
    return f"the passes took {low:,.2f} and {high:,.2f} us"
