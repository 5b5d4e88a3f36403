"""Measuring a profile, with a GPU made up: what is timed, kept, resumed, repeated and refused."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import dropwhile, pairwise
from pathlib import Path
from zlib import crc32

import pandas as pd
import pytest

from podsim.errors import InputError
from podsim.graph_sizes import graph_sizes
from podsim.hardware import gpu_named
from podsim.model import model_named
from podsim.op_tables import ALIGNED, LAYER_OPS
from podsim.points import NUM_STEPS, long_points, sustained_points
from podsim.profile import find_profile, read_profile
from podsim.profile_checks import check_profile
from podsim.profile_extend import reopen
from podsim.profile_journal import JOURNAL_FILE
from podsim.profile_plan import CEILINGS, Job, Key, Plan, Turn, plan_profile
from podsim.profile_run import LONG_ROUND, MOST_ROUNDS, Round, run_profile
from podsim.roofline import Ceilings, attention_work, op_work, step_seconds
from podsim.row_checks import HOST_COPIES

MODEL, GPU = model_named("llama-3-8b"), gpu_named("h200")
PLAN = plan_profile(MODEL, GPU, quick=True)
REAL = Ceilings(flops=800e12, bandwidth=4.4e12, launch=2.8e-6, measured=True)
PROVENANCE: dict[str, object] = {
    "device_name": "NVIDIA H200",
    "num_sms": 132,
    "driver": "580.1",
    "power_limit": "700 W",
    "cuda": "13.0",
    "torch": "2.11",
    "triton": "3.6",
    "geometry": {
        "num_sms": 132, "pack": 4, "block_m": 128, "block_n": 64, "decode_block_n": 64,
        "decode_items_per_sm": 6, "min_split_len": 256,
    },
}  # fmt: skip
WORK = {"matrix_rate": 1.1e12, "layer_matrix_rate": 1e12}


def true_seconds(job: Job, key: Key) -> float:
    """A GPU that needs 1.3 times as long as it must, and 4 us a kernel."""
    if job.kind == "ceiling":
        rate = {**dict.fromkeys(WORK, REAL.flops), "launch_latency": 1 / REAL.launch}
        rate |= dict.fromkeys(HOST_COPIES, 54e9)
        work = WORK.get(job.strategy, 1.0 if job.strategy == "launch_latency" else 4e9)
        return work / rate.get(job.strategy, REAL.bandwidth)
    if job.kind == "launch":
        return 2.5e-6 + 0.7e-6 * job.num_tokens
    if job.kind == "linear" or job.kind == "once":
        return 4e-6 + 1.3 * REAL.least_seconds(op_work(MODEL, GPU, key.op, job.num_tokens))
    assert job.point is not None
    chunks, contexts = job.point.prefills, job.point.decode_contexts
    if job.kind == "sustained":
        slower = 1 + 0.1 * (1 - math.exp(-float(key.strategy.removesuffix(" s")) / 0.3))
        return 1.5 * slower * step_seconds(MODEL, GPU, REAL, chunks, contexts, LAYER_OPS)
    if job.kind == "step":
        return 1.5 * step_seconds(MODEL, GPU, REAL, chunks, contexts, LAYER_OPS)
    return 4e-6 + 1.3 * REAL.least_seconds(attention_work(MODEL, GPU, chunks, contexts))


@dataclass
class FakeGpu:
    """Times jobs by `true_seconds`, scattered a little; what a test wants otherwise comes in."""

    prepared: list[Job] = field(default_factory=list)
    stop_at: int | None = None
    """The call of `prepare` at which the user presses Ctrl-C."""
    change: Callable[[Job, int], float] = lambda job, times: 1.0
    """A factor on a job's times, given how often it was prepared."""
    scatter: float = 0.01
    fault: Callable[[Job, int], str] = lambda job, times: ""
    """What a job's rounds say against themselves, given how often it was prepared."""

    def prepare(self, job: Job) -> FakeSequence:
        if self.stop_at == len(self.prepared):
            raise KeyboardInterrupt
        self.prepared.append(job)
        times = self.prepared.count(job)
        return FakeSequence(job, self.change(job, times), self.scatter, self.fault(job, times))


@dataclass
class FakeSequence:
    job: Job
    factor: float
    scatter: float
    fault: str
    rounds: int = 0

    @property
    def work(self) -> float | None:
        return WORK.get(self.job.strategy, 4e9) if self.job.kind == "ceiling" else None

    def round(self, first: bool) -> Round:
        assert first == (self.rounds == 0)
        self.rounds += 1
        seconds = {}
        for key in self.job.keys:
            middle = true_seconds(self.job, key) * self.factor
            noise = [crc32(f"{key} {self.rounds} {i}".encode()) / 2**32 - 0.5 for i in range(11)]
            seconds[self.job.label(key)] = [middle * (1 + self.scatter * part) for part in noise]
        return Round(seconds, 1.755e9, self.fault)


def measure(folder: Path, gpu: FakeGpu, plan: Plan = PLAN, **changes: object) -> None:
    run_profile(
        folder,
        plan,
        MODEL,
        GPU,
        PROVENANCE | changes,
        gpu.prepare,
        lambda *_: None,
        "podsim profile",
        time.perf_counter() - 12.0,
    )


def contents(folder: Path) -> tuple[str, dict[str, object]]:
    """Of a finished profile; but for how long it took."""
    assert {path.name for path in folder.iterdir()} == {"measurements.csv", "profile.json"}
    profile = json.loads((folder / "profile.json").read_text())
    del profile["provenance"]["wall_seconds"]
    return (folder / "measurements.csv").read_text(), profile


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Measured without an interruption."""
    folder = tmp_path_factory.mktemp("profile") / "whole"
    gpu = FakeGpu()
    measure(folder, gpu)
    assert [turn.job for turn in PLAN.turns] == gpu.prepared
    return folder


def test_a_plan_is_every_point_in_both_passes_after_the_ceilings() -> None:
    plan = plan_profile(MODEL, GPU)
    num = len(CEILINGS)
    assert [turn.job.strategy for turn in plan.turns[:num]] == list(CEILINGS)
    while plan.turns[num].job.kind == "sustained":
        num += 1
    assert num == len(CEILINGS) + len(sustained_points())
    long = [turn.job for turn in plan.turns[-len(long_points()) :]]
    assert [job.attention for job in long] == ["serial", "pod"] * 2
    assert {(job.kind, job.num_tokens) for job in long} == {("sustained", 1024)}
    assert {job.attention for job in (turn.job for turn in plan.turns[len(CEILINGS) : num])} == {
        "serial"
    }
    duties = [turn.job for turn in plan.turns if turn.job.kind == "duty"]
    counts = {job.split: (job.mixed_steps, job.decode_steps) for job in duties}
    assert counts["1 in 1"] == (1, 0)
    assert counts["1 in 8"] == (1, 7)
    assert counts["8 in 16"] == (8, 8)
    assert set(counts) == {"1 in 1", "1 in 2", "1 in 4", "1 in 8", "8 in 16", "1 in 32"}
    first, second = (
        [
            turn.job
            for turn in plan.turns[num:]
            if turn.number == number and turn.job.kind not in ("sustained", "duty")
        ]
        for number in (0, 1)
    )
    assert first != second
    once = {job for job in first if job.kind == "step" and job.split == "grid"}
    assert set(first) - once == set(second)
    assert len(once) == NUM_STEPS
    assert {job.strategy for job in once} == {"serial"}
    assert len(set(plan.rows())) == len(list(plan.rows()))
    assert plan.sha256() == plan_profile(MODEL, GPU).sha256() != PLAN.sha256()


def test_whole_steps_of_many_layers_are_timed_once() -> None:
    steps = {
        layers: plan_profile(replace(MODEL, num_layers=layers), GPU).counts()["step"]
        for layers in (64, 65)
    }
    of_held_out = sum(
        turn.job.kind == "step" and turn.job.split == "held_out"
        for turn in plan_profile(replace(MODEL, num_layers=65), GPU).turns
    )
    assert steps[64]["sequences"] - steps[65]["sequences"] == of_held_out > 0
    assert steps[64]["points"] == steps[65]["points"]


def test_quick_is_a_tenth_of_each_kind_and_can_be_fitted() -> None:
    few, all_ = PLAN.counts(), plan_profile(MODEL, GPU).counts()
    for kind in ("linear", "once", "attention", "step"):
        share = few[kind]["points"] / all_[kind]["points"]
        assert 1 / 12 <= share < 1 / 5, kind
    tokens = {turn.job.num_tokens for turn in PLAN.turns if turn.job.kind == "linear"}
    assert {1, 8, 8192} <= tokens


def test_a_measured_profile_passes_its_own_check(whole: Path) -> None:
    assert check_profile(whole) == []
    profile = find_profile("h200", MODEL, whole)
    assert profile.provenance["quick"] is True
    assert profile.provenance["refused_rows"] == 0
    assert profile.provenance["ceilings"]["read_bandwidth"] == pytest.approx(4.4e12, rel=0.01)
    wall = profile.provenance["wall_seconds"]
    assert isinstance(wall, dict)
    assert set(wall) == {"start", "fit", "total", *PLAN.counts()} - {"duty"}
    assert 12.0 <= wall["start"] < 20.0
    assert wall["fit"] > 0
    assert wall["total"] == pytest.approx(sum(wall.values()) - wall["total"])
    rows = pd.read_csv(whole / "measurements.csv", keep_default_na=False)
    assert (rows["sm_clock_mhz"] == 1755).all()
    assert len(rows) == len(list(PLAN.rows()))


@pytest.mark.parametrize("stop_at", [0, 1, 5, 300, len(PLAN.turns) - 1])
def test_interrupted_and_run_again_it_ends_with_the_same_files(
    whole: Path, tmp_path: Path, stop_at: int
) -> None:
    folder = tmp_path / "profile"
    with pytest.raises(KeyboardInterrupt):
        measure(folder, FakeGpu(stop_at=stop_at))
    assert [path.name for path in folder.iterdir()] == [JOURNAL_FILE]
    assert len((folder / JOURNAL_FILE).read_text().splitlines()) == 2 + sum(
        len(turn.job.keys) for turn in PLAN.turns[:stop_at]
    )
    rest = FakeGpu()
    measure(folder, rest)
    assert rest.prepared == [turn.job for turn in PLAN.turns[stop_at:]]
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("cut", [1, 40, 4000])
def test_killed_within_a_line_or_a_sequence_it_times_that_sequence_again(
    whole: Path, tmp_path: Path, cut: int
) -> None:
    folder = tmp_path / "profile"
    with pytest.raises(KeyboardInterrupt):
        measure(folder, FakeGpu(stop_at=200))
    journal = folder / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-cut])
    rest = FakeGpu()
    measure(folder, rest)
    assert len(rest.prepared) > len(PLAN.turns) - 200
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize(
    ("name", "value"), [("driver", "590.2"), ("device_name", "NVIDIA A100"), ("triton", "3.7")]
)
def test_it_does_not_go_on_on_another_machine(tmp_path: Path, name: str, value: str) -> None:
    folder = tmp_path / "profile"
    with pytest.raises(KeyboardInterrupt):
        measure(folder, FakeGpu(stop_at=20))
    before = (folder / JOURNAL_FILE).read_bytes()
    with pytest.raises(InputError, match=f"{name} is '{PROVENANCE[name]}' there, '{value}' now"):
        measure(folder, FakeGpu(), **{name: value})
    with pytest.raises(InputError, match="quick is True there, False now"):
        measure(folder, FakeGpu(), plan_profile(MODEL, GPU))
    assert (folder / JOURNAL_FILE).read_bytes() == before


def test_another_card_of_the_kind_may_go_on(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, FakeGpu(stop_at=20), card="0a1b2c3d")
    rest = FakeGpu()
    measure(tmp_path, rest, card="4e5f6a7b")
    assert len(rest.prepared) < len(PLAN.turns) - 15
    assert contents(tmp_path)[0] == contents(whole)[0]
    begun = len(PLAN.turns) - len(rest.prepared)
    card = read_profile(tmp_path, "").provenance["card"]
    assert card == f"0a1b2c3d, from sequence {begun} on 4e5f6a7b"
    reopen(tmp_path, PLAN, MODEL, GPU.name, {**PROVENANCE, "card": "11111111"})
    measure(tmp_path, FakeGpu(), card="11111111")
    assert read_profile(tmp_path, "").provenance["card"] == card, "nothing was left to measure"


def test_a_quick_plan_reaches_as_far_in_either_alignment_as_the_whole() -> None:
    def grid(plan: Plan, is_aligned: bool) -> set[int]:
        jobs = [turn.job for turn in plan.turns if turn.job.kind == "linear"]
        return {
            job.num_tokens
            for job in jobs
            if job.split == "grid" and (job.num_tokens % ALIGNED == 0) is is_aligned
        }

    whole = plan_profile(MODEL, GPU)
    for is_aligned in (True, False):
        few, all_of_them = grid(PLAN, is_aligned), grid(whole, is_aligned)
        assert len(few) < len(all_of_them) / 4
        assert (min(few), max(few)) == (min(all_of_them), max(all_of_them))


def test_every_card_that_measured_is_told(tmp_path: Path) -> None:
    for card, stop_at in (("a", 20), ("b", 30), ("b", 10)):
        with pytest.raises(KeyboardInterrupt):
            measure(tmp_path, FakeGpu(stop_at=stop_at), card=card)
    measure(tmp_path, FakeGpu(), card="a")
    card = str(read_profile(tmp_path, "").provenance["card"])
    first, *others = card.split(", ")
    assert (first, [text.split(" on ")[1] for text in others]) == ("a", ["b", "a"])
    numbers = [int(text.split()[2]) for text in others]
    assert 0 < numbers[0] < numbers[1] < len(PLAN.turns)


def test_kernels_that_changed_in_between_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, FakeGpu(stop_at=20))
    monkeypatch.setattr("podsim.profile_run.kernels_hash", lambda: "other")
    with pytest.raises(InputError, match=r"kernels_sha256 is '.*' there, 'other' now"):
        measure(tmp_path, FakeGpu())


def test_a_folder_of_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty, and no profile"):
        measure(tmp_path, FakeGpu())
    (tmp_path / "notes.txt").rename(tmp_path / JOURNAL_FILE)
    (tmp_path / JOURNAL_FILE).write_text("mine\nand\n")
    with pytest.raises(InputError, match=f"{JOURNAL_FILE}: not a journal"):
        measure(tmp_path, FakeGpu())


def test_an_old_profile_stays_until_the_new_one_is_whole(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    measure(folder, FakeGpu())
    old = contents(folder)
    with pytest.raises(KeyboardInterrupt):
        measure(folder, FakeGpu(stop_at=50), driver="600")
    (folder / JOURNAL_FILE).rename(tmp_path / "kept")
    assert contents(folder) == old
    (tmp_path / "kept").rename(folder / JOURNAL_FILE)
    measure(folder, FakeGpu(), driver="600")
    assert contents(folder)[1]["provenance"]["driver"] == "600"  # type: ignore[index]


def test_a_profile_of_an_earlier_plan_is_extended_by_what_it_lacks(
    whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "profile"
    measure(folder, FakeGpu(), Plan(PLAN.turns[:-10], quick=True))
    reopen(folder, PLAN, MODEL, GPU.name, PROVENANCE)
    rest = FakeGpu()
    measure(folder, rest)
    assert rest.prepared == [turn.job for turn in PLAN.turns[-10:]]
    assert contents(folder) == contents(whole)


def test_a_profile_that_cannot_be_extended_stays_as_it_is(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "profile"
    shutil.copytree(whole, folder)
    before = contents(folder)
    with pytest.raises(InputError, match=f"driver is '{PROVENANCE['driver']}' there, '600' now"):
        reopen(folder, PLAN, MODEL, GPU.name, PROVENANCE | {"driver": "600"})
    other = Plan((*PLAN.turns[:20], *PLAN.turns[21:]), quick=True)
    with pytest.raises(InputError, match=r"measurements\.csv:\d+: not the row that comes here"):
        reopen(folder, other, MODEL, GPU.name, PROVENANCE)
    with pytest.raises(InputError, match="this version's plan ends before"):
        reopen(folder, Plan(PLAN.turns[:-10], quick=True), MODEL, GPU.name, PROVENANCE)
    assert contents(folder) == before


def test_every_graph_size_is_planned_after_what_earlier_plans_had() -> None:
    plan = plan_profile(MODEL, GPU)
    planned = {turn.job.num_tokens for turn in plan.turns if turn.job.kind == "linear"}
    assert set(graph_sizes(8192)) <= planned
    late = list(dropwhile(lambda turn: turn.number != 1, plan.turns))
    first_late = next(i for i, turn in enumerate(late) if turn.number == 0)
    kinds = {turn.job.kind for turn in late[first_late:]}
    assert kinds == {"linear", "once", "duty", "attention", "sustained"}


def test_more_batches_of_several_chunks_are_judged_by() -> None:
    plan = plan_profile(MODEL, GPU)
    points = list(dict.fromkeys(t.job.point for t in plan.turns if t.job.kind == "attention"))
    lengths = Counter((point.prefills, point.decode_contexts) for point in points if point)
    assert set(lengths.values()) == {1}, "none is both fitted on and judged by"
    twice = [turn for turn in plan.turns if turn.job.kind == "attention" and turn.number < 2]
    last = twice[-2 * 60 :]
    assert {turn.job.split for turn in last} == {"held_out"}
    assert {len(turn.job.point.prefills) for turn in last if turn.job.point} == {2, 3, 4}
    assert Counter(turn.number for turn in last) == {0: 60, 1: 60}


def test_held_out_products_and_prefill_are_timed_four_times() -> None:
    turns = plan_profile(MODEL, GPU).turns
    passes = Counter(t.job for t in turns if t.job.kind in ("linear", "once", "attention"))
    for job, count in passes.items():
        decodes = job.point is not None and job.point.decode_contexts
        if job.split == "held_out":
            assert count == (2 if decodes else 3 if job.kind == "attention" else 4), job
        elif job.kind == "attention":
            assert count == 2, job


def test_usual_token_budgets_are_timed_oftener() -> None:
    plan = plan_profile(MODEL, GPU)
    passes = Counter(turn.job.num_tokens for turn in plan.turns if turn.job.kind == "linear")
    judged = {turn.job.num_tokens for turn in plan.turns if turn.job.split == "held_out"
              and turn.job.kind == "linear"}  # fmt: skip
    often = {num_tokens for num_tokens, count in passes.items() if count > 2} - judged
    assert often == {256, 512, 1024, 2048, 4096}
    assert {passes[num_tokens] for num_tokens in often} == {6}
    rows = [*plan.rows()]
    assert len(rows) == len(set(rows)), "no two rows of a name"


def test_narrow_products_are_timed_between_graph_sizes_too() -> None:
    model = model_named("llama-3-70b")
    plans = [plan_profile(model.shard(n), GPU) for n in (4, 8)]
    wide, narrow = (
        {turn.job.num_tokens for turn in plan.turns if turn.job.kind == "linear"} for plan in plans
    )
    more = sorted(narrow - wide)
    assert wide < narrow
    assert all(n % 8 for n in more)
    sizes = graph_sizes(8192)
    for low, high in pairwise(sizes):
        if high - low > 8:
            assert sum(low < n < high and n % 8 > 0 for n in narrow) >= 3


def few_turns(kind: str, count: int = 1) -> Plan:
    """The ceilings and some sequences of one kind."""
    ceilings = [turn for turn in PLAN.turns if turn.job.kind == "ceiling"]
    return Plan((*ceilings, *[t for t in PLAN.turns if t.job.kind == kind][:count]), quick=True)


def journal_rows(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / JOURNAL_FILE, skiprows=1, keep_default_na=False)


def measured_rows(folder: Path, gpu: FakeGpu, plan: Plan) -> pd.DataFrame:
    """What is in the journal when all of a plan that is too small to be fitted is measured."""
    with pytest.raises(InputError, match=r"measurements\.csv"):
        measure(folder, gpu, plan)
    rows = journal_rows(folder)
    return rows[rows["op"] != "ceiling"]


def test_a_quiet_sequence_runs_one_round_and_a_noisy_one_until_the_cap(tmp_path: Path) -> None:
    quiet = measured_rows(tmp_path / "quiet", FakeGpu(scatter=0.01), few_turns("attention"))
    noisy = measured_rows(tmp_path / "noisy", FakeGpu(scatter=0.2), few_turns("attention"))
    assert quiet["repeats"].tolist() == [11]
    assert noisy["repeats"].tolist() == [11 * MOST_ROUNDS]
    assert noisy["refused"].tolist() == [""]


def test_a_round_of_long_steps_is_enough(tmp_path: Path) -> None:
    plan = few_turns("step")
    (key,) = plan.turns[-1].job.keys
    slower = 1.1 * LONG_ROUND / 11 / true_seconds(plan.turns[-1].job, key)
    gpu = FakeGpu(scatter=0.2, change=lambda job, times: slower if job.kind == "step" else 1.0)
    assert measured_rows(tmp_path / "long", gpu, plan)["repeats"].tolist() == [11]


def test_a_row_faster_than_the_machine_is_timed_again_then_refused(tmp_path: Path) -> None:
    plan = few_turns("step")
    step = plan.turns[-1].job
    gpu = FakeGpu(change=lambda job, times: 0.1 if job.kind == "step" else 1.0)
    (reason,) = measured_rows(tmp_path / "always", gpu, plan)["refused"]
    assert "is faster than" in reason
    assert gpu.prepared.count(step) == 2
    gpu = FakeGpu(change=lambda job, times: 0.1 if (job.kind, times) == ("step", 1) else 1.0)
    assert measured_rows(tmp_path / "once", gpu, plan)["refused"].tolist() == [""]


def test_a_row_that_the_device_does_not_believe_is_timed_again_then_refused(tmp_path: Path) -> None:
    plan = few_turns("step")
    gpu = FakeGpu(fault=lambda job, times: "not finite" if job.kind == "step" else "")
    assert measured_rows(tmp_path / "always", gpu, plan)["refused"].tolist() == ["not finite"]
    assert gpu.prepared.count(plan.turns[-1].job) == 2
    gpu = FakeGpu(fault=lambda job, times: "not finite" if times == 1 else "")
    assert measured_rows(tmp_path / "once", gpu, plan)["refused"].tolist() == [""]


def test_a_row_that_stays_scattered_is_refused(tmp_path: Path) -> None:
    rows = measured_rows(tmp_path, FakeGpu(scatter=0.6), few_turns("step"))
    assert "of the median apart" in rows["refused"].item()


def test_passes_that_disagree_are_both_refused_and_not_fitted(whole: Path, tmp_path: Path) -> None:
    job = next(t.job for t in PLAN.turns if t.job.kind == "attention" and t.job.split == "grid")
    slow_once = FakeGpu(change=lambda other, times: 3.0 if other == job and times == 1 else 1.0)
    measure(tmp_path, slow_once)
    rows = pd.read_csv(tmp_path / "measurements.csv", keep_default_na=False)
    refused = rows[rows["refused"] != ""]
    assert refused["refused"].str.contains("the passes took").tolist() == [True, True]
    assert slow_once.prepared.count(job) == 3  # the second pass is timed again
    assert json.loads((tmp_path / "profile.json").read_text())["provenance"]["refused_rows"] == 2
    assert check_profile(tmp_path) == []


def test_a_ceiling_above_the_data_sheet_is_refused_and_not_used(tmp_path: Path) -> None:
    gpu = FakeGpu(change=lambda job, times: 0.1 if job.strategy == "read_bandwidth" else 1.0)
    measure(tmp_path, gpu)
    rows = pd.read_csv(tmp_path / "measurements.csv", keep_default_na=False)
    (reason,) = rows[rows["refused"] != ""]["refused"]
    assert "above the published" in reason
    ceilings = json.loads((tmp_path / "profile.json").read_text())["provenance"]["ceilings"]
    assert "read_bandwidth" not in ceilings


def test_two_cannot_measure_into_one_folder(tmp_path: Path) -> None:
    class Second(FakeGpu):
        def prepare(self, job: Job) -> FakeSequence:
            with pytest.raises(InputError, match="another `podsim profile` is writing it"):
                measure(tmp_path, FakeGpu())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path, Second())


def podsim(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "podsim", "profile", *arguments], capture_output=True, text=True
    )


def test_a_dry_run_counts_the_points_and_says_how_long(tmp_path: Path) -> None:
    run = podsim("--dry-run", "--json")
    plan = json.loads(run.stdout)
    counts = plan_profile(MODEL, GPU).counts()
    assert {k: v["points"] for k, v in plan["kinds"].items()} == {
        k: v["points"] for k, v in counts.items()
    }
    assert 60 < plan["seconds"] < 660
    kinds = sum(kind["seconds"] for kind in plan["kinds"].values())
    assert plan["seconds"] == pytest.approx(plan["start_seconds"] + kinds + plan["fit_seconds"])
    quick = json.loads(podsim("--dry-run", "--quick", "--json").stdout)
    assert quick["seconds"] < 120
    assert "Times from" in podsim("--dry-run").stdout


def test_options_that_would_be_ignored_are_refused() -> None:
    run = podsim("--check", "profiles/h200/llama-3-8b", "--quick")
    assert run.returncode == 2
    assert run.stderr == "podsim: --check works on a folder alone: leave out --quick\n"


def test_turns_name_their_rows() -> None:
    turn = Turn(Job("linear", "grid", 64), 1)
    assert [key.op for key in turn.job.keys] == list(LAYER_OPS)
