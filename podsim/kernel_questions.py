"""What the evaluation of POD-Attention asks, as batches and the kernels to time on each.

sweep         Fig. 11: every strategy over models, contexts, chunk sizes and decode batches
quantization  Fig. 6: decode time against the number of decodes, with and without splits
tiles         Fig. 13: tiles, and how many CTAs share an SM
policies      Fig. 14: how the SMs are shared between prefill and decode
split         Table 8: into how many parts the keys of a decode are cut
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from podsim.kernel_workloads import (
    CHUNK_SIZES,
    CONTEXTS,
    FILLS,
    HEADS,
    KernelWorkload,
    decodes_that_fit,
    reference_workloads,
    uniform_workload,
)
from podsim.kernels.config import POLICIES, AttentionConfig, TileConfig

SWEEP_MODELS = ("Llama-3-8B", "Llama-2-7B", "Yi-6B")
POSITIONS = 3
"""Chunks of a prompt that the sweep takes: those that end its first, second, ... last third."""

STEPPED_CONTEXT, STEPPED_CHUNK = 16384, 512
STEPPED_BATCHES = range(28, 73)
FIXED_SPLITS = (2, 4)

TILE_CONTEXTS = (1024, 2048, 4096, 8192, 16384)
TILE_BATCHES = (8, 32, 128)

PREFILL_SHARES = (0.5, 0.625, 0.75, 0.875)
"""Shares of the SMs to which Hopper's POD keeps prefill, beside those of its policies."""

SPLIT_BATCHES = ((16384, (4, 8, 16, 32, 64)), (2048, (4, 16)))
"""Contexts of the decodes, and how many."""
SPLITS = (1, 2, 4, 8, 16, 32)
LEAST_SPLIT = 128
"""Keys of the largest block: shorter splits are rounded up to it."""
ITEMS_PER_SM = (1, 2, 3, 4, 6, 12)
SHORTEST_SPLITS = (64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to compute a batch, or one side of it alone."""

    name: str
    strategy: str
    config: AttentionConfig
    side: str = ""
    """prefill or decode: that side alone."""
    prefill_share: float = 0.0
    """Of the SMs, for prefill in Hopper's POD; 0: as the policy says."""
    about: Mapping[str, object] = field(default_factory=dict)
    """Further columns of its rows."""


@dataclass(frozen=True, slots=True)
class Case:
    """A batch, and the variants that are timed in turn on it."""

    workload: KernelWorkload
    variants: tuple[Variant, ...]
    about: Mapping[str, object] = field(default_factory=dict)
    """Further columns of its rows."""


def fixed_splits(config: AttentionConfig, context: int, count: int) -> AttentionConfig:
    """The configuration that cuts decodes of that context into `count` parts, whatever the batch.

    The plan takes the longer of what fills the SMs, here nothing, and of the least length. One
    part is also what FlashAttention's rule gives once there are 0.8 CTAs for each slot of the GPU.
    """
    return replace(config, decode_items_per_sm=1 << 30, min_split_len=-(-context // count))


def sweep(kernels: str) -> list[Case]:
    found = {}
    for model in SWEEP_MODELS:
        for context in CONTEXTS:
            for chunk in CHUNK_SIZES:
                for fill in FILLS:
                    decodes = decodes_that_fit(HEADS[model][1], context, fill)
                    for prompt in _prompts(context, chunk):
                        workload = uniform_workload(HEADS[model], chunk, prompt, decodes, context)
                        about = {"model": model, "context": context, "chunk": chunk}
                        about |= {"prompt": prompt, "decodes": decodes}
                        found[workload.name] = Case(workload, _strategies(workload, kernels), about)
    return list(found.values())


def _prompts(context: int, chunk: int) -> list[int]:
    """Where the chunks end that are taken of a prompt of that many tokens."""
    count = context // chunk
    return sorted({-(-i * count // POSITIONS) * chunk for i in range(1, POSITIONS + 1)})


def _strategies(workload: KernelWorkload, kernels: str) -> tuple[Variant, ...]:
    """Both sides alone, and the batch by every strategy, as the engine would run them."""
    serial = workload.config("serial", kernels)
    alone = (Variant(side, "serial", serial, side) for side in ("prefill", "decode"))
    names = ("serial", "streams", "unified", "pod")
    return (*alone, *(Variant(name, name, workload.config(name, kernels)) for name in names))


def quantization(kernels: str) -> list[Case]:
    cases = []
    for count in STEPPED_BATCHES:
        context = STEPPED_CONTEXT
        workload = uniform_workload(HEADS["Yi-6B"], STEPPED_CHUNK, context, count, context)
        serial, pod = (workload.config(name, kernels) for name in ("serial", "pod"))
        streams = workload.config("streams", kernels)
        whole, whole_pod = fixed_splits(serial, context, 1), fixed_splits(pod, context, 1)
        variants = (
            Variant("decode", "serial", serial, "decode"),
            Variant("decode, whole", "serial", whole, "decode"),
            *(
                Variant(f"decode, {n} splits", "serial", fixed_splits(serial, context, n), "decode")
                for n in FIXED_SPLITS
            ),
            Variant("serial", "serial", serial),
            Variant("serial, whole", "serial", whole),
            Variant("streams, whole", "streams", fixed_splits(streams, context, 1)),
            Variant("pod", "pod", pod),
            Variant("pod, whole", "pod", whole_pod),
        )
        cases.append(Case(workload, variants, {"decodes": count}))
    return cases


def tiles(kernels: str) -> list[Case]:
    cases = []
    for context in TILE_CONTEXTS:
        for count in TILE_BATCHES:
            workload = uniform_workload(HEADS["Llama-3-8B"], context, context, count, context)
            variants = [Variant("serial", "serial", workload.config("serial", kernels))]
            if kernels == "hopper":
                variants += _hopper_tiles(workload)
            variants += _portable_tiles(workload)
            cases.append(Case(workload, tuple(variants), {"context": context, "decodes": count}))
    return cases


HOPPER_PREFILL = ((64, 4, 2), (64, 8, 2), (128, 3, 2), (128, 4, 2), (128, 5, 1))
"""Keys of a block, blocks in the ring, tiles of queries."""
HOPPER_DECODE = ((64, 3), (64, 6), (64, 12), (128, 3), (128, 6))
HOPPER_POD = (
    ((64, 5), (64, 6), (208, 64, 32)),
    ((64, 3), (64, 8), (208, 64, 32)),
    ((64, 5), (128, 3), (200, 80, 32)),
    ((128, 3), (64, 3), (208, 64, 32)),
    ((128, 3), (64, 5), (208, 64, 32)),
)
"""Block and ring of prefill, block and ring of decode, registers."""
PORTABLE_POD = (
    ("1 CTA", TileConfig(128, 64, 8, 3), TileConfig(16, 64, 8, 3)),
    ("2 CTAs", TileConfig(64, 64, 4, 3), TileConfig(16, 64, 4, 3)),
    ("2 CTAs, shallow", TileConfig(64, 64, 4, 2), TileConfig(16, 64, 4, 2)),
    ("4 CTAs", TileConfig(32, 32, 2, 3), TileConfig(16, 32, 2, 3)),
)
"""CTAs on an SM of Hopper, as registers and shared memory allow; tiles of prefill and decode."""


def _hopper_tiles(workload: KernelWorkload) -> list[Variant]:
    serial, pod = workload.config("serial", "hopper"), workload.config("pod", "hopper")
    prefill, decode = serial.prefill, serial.decode
    assert decode is not None
    assert pod.decode is not None
    found = []
    for block, ring, queries in HOPPER_PREFILL:
        tile = replace(prefill, block_n=block, num_stages=ring)
        config = replace(serial, prefill=tile, query_buffers=queries)
        text = f"{block} keys x {ring}, {queries} Q"
        found.append(_tile("prefill", text, "serial", config, "prefill"))
    for block, ring in HOPPER_DECODE:
        config = replace(serial, decode=replace(decode, block_n=block, num_stages=ring))
        found.append(_tile("decode", f"{block} keys x {ring}", "serial", config, "decode"))
    for (block, ring), (decode_block, decode_ring), registers in HOPPER_POD:
        config = replace(
            pod,
            prefill=replace(pod.prefill, block_n=block, num_stages=ring),
            decode=replace(pod.decode, block_n=decode_block, num_stages=decode_ring),
            registers=registers,
        )
        text = f"{block} keys x {ring} + {decode_block} keys x {decode_ring}"
        found.append(_tile("pod", text, "pod", config))
    return found


def _portable_tiles(workload: KernelWorkload) -> list[Variant]:
    base = workload.config("pod", "triton")
    return [
        _tile("portable pod", text, "pod", replace(base, prefill=prefill, decode=decode))
        for text, prefill, decode in PORTABLE_POD
    ]


def _tile(
    family: str, text: str, strategy: str, config: AttentionConfig, side: str = ""
) -> Variant:
    return Variant(
        f"{family}: {text}", strategy, config, side, about={"family": family, "tile": text}
    )


def policies_of(kernels: str) -> list[str]:
    """The portable POD draws tickets by one of two rules; `adaptive` is Hopper's alone."""
    return [policy for policy in POLICIES if kernels == "hopper" or policy != "adaptive"]


def policies(kernels: str) -> list[Case]:
    cases = []
    for workload in reference_workloads():
        pod = workload.config("pod", kernels)
        variants = [
            *_strategies(workload, kernels),
            *(
                Variant(f"pod, {policy}", "pod", replace(pod, policy=policy))
                for policy in policies_of(kernels)
            ),
        ]
        if kernels == "hopper":
            every = replace(pod, policy="50:50")
            variants += [
                Variant(f"pod, prefill on {share:g} of the SMs", "pod", every, prefill_share=share)
                for share in PREFILL_SHARES
            ]
        cases.append(Case(workload, tuple(variants)))
    return cases


def split(kernels: str) -> list[Case]:
    cases = []
    for context, batches in SPLIT_BATCHES:
        for count in batches:
            chunk = STEPPED_CHUNK
            workload = uniform_workload(HEADS["Llama-3-8B"], chunk, context, count, context)
            variants = _splits("decode", workload.config("serial", kernels), context)
            variants += _splits("pod", workload.config("pod", kernels), context)
            cases.append(Case(workload, tuple(variants), {"context": context, "decodes": count}))
    return cases


def _splits(kernel: str, config: AttentionConfig, context: int) -> list[Variant]:
    """The configuration as it is, then with one number of it changed."""
    changed = [
        *(
            ("splits a decode", n, fixed_splits(config, context, n))
            for n in SPLITS
            if context // n >= LEAST_SPLIT
        ),
        *(("items an SM", n, replace(config, decode_items_per_sm=n)) for n in ITEMS_PER_SM),
        *(("keys at least", n, replace(config, min_split_len=n)) for n in SHORTEST_SPLITS),
    ]
    strategy, side = ("pod", "") if kernel == "pod" else ("serial", "decode")
    return [
        Variant(kernel, strategy, config, side, about={"side": kernel}),
        *(
            Variant(
                f"{kernel}, {value} {knob}",
                strategy,
                one,
                side,
                about={"side": kernel, "knob": knob, "value": value},
            )
            for knob, value, one in changed
        ),
    ]


PARTS: dict[str, Callable[[str], list[Case]]] = {
    "sweep": sweep,
    "quantization": quantization,
    "tiles": tiles,
    "policies": policies,
    "split": split,
}
"""The cases of each part for a set of kernels."""
