"""More work takes longer, but for what docs/how-it-works.md says of falls: in every profile."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from podsim.attention_model import AttentionModel
from podsim.batch import BatchShape
from podsim.config import STRATEGIES
from podsim.hardware import gpu_named
from podsim.latency import ProfiledLatency
from podsim.model import model_named
from podsim.points import AttentionPoint, attention_points
from podsim.profile import find_profile

PROFILES = Path(__file__).parent.parent / "profiles" / "h200"
NAMES = sorted(path.parent.name for path in PROFILES.glob("*/profile.json"))
MORE = (1, 7, 8, 64, 256)
"""Tokens of a context or a chunk, or decodes, that come to a batch."""

LARGEST_FALL = {"attention": 0.1, "step": 0.05}
"""Where plans cut the work anew, the SMs are shared anew, or cuBLAS takes another kernel."""
LARGEST_FALL_OF_TILES = {"attention": 0.21, "step": 0.05}
"""Where POD goes over to its tiles for much decode, or back."""
MOST_THAT_FALL = 0.06
"""Share of the batches, under any strategy."""


class Growth(NamedTuple):
    what: str
    """"attention" or "step"."""
    strategy: str
    other_tiles: bool
    change: float
    """Of the predicted time, relative."""
    batch: str


def grown(batch: AttentionPoint, more: int) -> Iterator[tuple[str, BatchShape]]:
    """The batch with longer contexts, with a longer first chunk, and with more decodes."""
    chunks, contexts = batch.prefills, batch.decode_contexts
    longer = [context + more for context in contexts]
    yield "contexts", BatchShape.of([(n, context + more) for n, context in chunks], longer)
    if chunks:
        (tokens, context), *others = chunks
        yield "chunk", BatchShape.of([(tokens + more, context + more), *others], contexts)
    if contexts:
        alike = [contexts[len(contexts) // 2]] * more
        yield "decodes", BatchShape.of(chunks, sorted([*contexts, *alike], reverse=True))


@cache
def growths(name: str) -> tuple[Growth, ...]:
    """Of random batches as profiles have them, each grown in every way."""
    whole, _, num_gpus = name.partition("-tp")
    model = model_named(whole).shard(int(num_gpus or 1))
    profile = find_profile("h200", model)
    rng = np.random.default_rng(7)
    points = [p for p in attention_points(rng, model, gpu_named("h200")) if p.split == "held_out"]
    cases = [
        (point.shape, shape, f"{point.summary}, {more} more of {way}")
        for point, more in zip(points, rng.choice(MORE, len(points)).tolist(), strict=True)
        for way, shape in grown(point, more)
    ]
    found = []
    for strategy in STRATEGIES:
        latency = ProfiledLatency(profile, model, strategy)
        attention = AttentionModel.of(model, profile.attention)
        for small, large, batch in cases:
            other = attention.is_decode_heavy(strategy, small) != attention.is_decode_heavy(
                strategy, large
            )
            for what, before, after in (
                ("attention", *(attention.seconds(strategy, s) for s in (small, large))),
                ("step", *(latency.step_time(s) for s in (small, large))),
            ):
                found.append(Growth(what, strategy, other, after / before - 1, batch))
    return tuple(found)


@pytest.mark.parametrize("name", NAMES)
def test_a_larger_batch_is_hardly_ever_predicted_to_be_faster(name: str) -> None:
    for growth in growths(name):
        most = LARGEST_FALL_OF_TILES if growth.other_tiles else LARGEST_FALL
        assert growth.change >= -most[growth.what], growth


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_few_batches_are_predicted_to_be_faster_at_all(name: str, strategy: str) -> None:
    changes = [growth.change for growth in growths(name) if growth.strategy == strategy]
    assert len(changes) > 800
    assert np.mean(np.array(changes) < -1e-3) < MOST_THAT_FALL


@pytest.mark.parametrize("name", NAMES)
def test_attention_of_a_prompt_alone_never_falls(name: str) -> None:
    """Nothing is cut anew: its tiles are those of before, and more."""
    alone = [g for g in growths(name) if g.what == "attention" and "decode" not in g.batch]
    assert len(alone) > 100
    assert all(growth.change >= 0 for growth in alone)
