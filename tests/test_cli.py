"""The command line as a user types it: results, and one clear line for what is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest

AZURE_ROWS = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0319600,3180,8\n"
    "2023-11-16 18:17:04.0781490,110,27\n"
)


def podsim(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "podsim", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def refusal(*arguments: object) -> str:
    """The one line that a command refuses its input with."""
    run = podsim(*arguments)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.count("\n") == 1, run.stderr
    assert run.stderr.startswith("podsim: ")
    return run.stderr.removeprefix("podsim: ").rstrip("\n")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text(AZURE_ROWS)
    return path


def test_simulate_prints_a_table_and_leaves_a_folder(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = podsim("simulate", trace, "--attention", "pod", "--out", out)
    assert run.returncode == 0, run.stderr
    for word in ("TTFT", "TBT", "TPOT", "End-to-end latency", "Queue time", "P99", "3 completed"):
        assert word in run.stdout
    names = {path.name for path in out.glob("[!.]*")}
    assert names == {"summary.json", "requests.csv", "steps.csv", "config.toml", "report.html"}
    summary = json.loads((out / "summary.json").read_text())
    requests = pd.read_csv(out / "requests.csv")
    assert summary["completed"] == len(requests) == 3
    assert summary["total_output_tokens"] == 45
    assert summary["mean_ttft_ms"] == pytest.approx(requests["ttft_s"].mean() * 1000, rel=1e-6)
    assert summary["median_tpot_ms"] == pytest.approx(requests["tpot_s"].median() * 1000, rel=1e-6)
    steps = pd.read_csv(out / "steps.csv")
    assert steps["num_prefill_tokens"].sum() == 4808 + 3180 + 110
    assert steps["num_decodes"].sum() == 45 - 3


def test_a_streamed_run_gives_the_same_numbers(trace: Path, tmp_path: Path) -> None:
    kept, streamed = tmp_path / "kept", tmp_path / "streamed"
    podsim("simulate", trace, "--no-error-bars", "--out", kept)
    run = podsim("simulate", trace, "--stream", "--out", streamed)
    assert run.returncode == 0, run.stderr
    assert "in order of leaving" in run.stdout
    assert {p.name for p in streamed.glob("[!.]*")} == {
        "summary.json",
        "requests.csv",
        "config.toml",
    }
    full, brief = (json.loads((f / "summary.json").read_text()) for f in (kept, streamed))
    for name in ("max_output_tokens_per_s", "max_concurrent_requests"):
        assert brief[name] is None
        full[name] = None
    for name, value in full.items():
        assert brief[name] == (pytest.approx(value) if isinstance(value, float) else value)
    rows = [pd.read_csv(f / "requests.csv").sort_values("request_id") for f in (kept, streamed)]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in rows))
    assert "keeps nothing" in refusal("simulate", trace, "--stream", "--error-bars")


def test_summary_has_the_keys_of_vllm_bench_serve(trace: Path, tmp_path: Path) -> None:
    podsim("simulate", trace, "--out", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    keys = {
        *("duration", "completed", "failed", "total_input_tokens", "total_output_tokens"),
        *("request_throughput", "output_throughput", "total_token_throughput"),
    }
    for metric in ("ttft", "tpot", "itl", "e2el"):
        keys |= {f"{statistic}_{metric}_ms" for statistic in ("mean", "median", "std", "p99")}
    assert keys <= summary.keys()


def test_the_same_run_is_byte_identical(trace: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert podsim("simulate", trace, "--out", tmp_path / name).returncode == 0
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_the_resolved_config_gives_the_same_run_again(trace: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    podsim("simulate", trace, "--qps", 3, "--token-budget", 512, "--out", first)
    podsim("simulate", "--config", first / "config.toml", "--out", second)
    assert (first / "summary.json").read_bytes() == (second / "summary.json").read_bytes()


def test_the_command_line_wins_over_the_file(trace: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'trace = "{trace}"\ntoken_budget = 512\nattention = "pod"\n')
    out = tmp_path / "out"
    run = podsim("simulate", "--config", config, "--token-budget", 256, "--out", out)
    assert run.returncode == 0, run.stderr
    resolved = (out / "config.toml").read_text()
    assert "token_budget = 256" in resolved
    assert 'attention = "pod"' in resolved


def test_results_replace_results_and_nothing_else(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        assert podsim("simulate", trace, "--out", out).returncode == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("do not lose")
    complaint = refusal("simulate", trace, "--out", precious)
    assert (
        complaint
        == f"{precious}: thesis.tex is of no result of this podsim; remove it or name another --out"
    )
    assert (precious / "thesis.tex").exists()
    leftovers = {path.name for path in tmp_path.iterdir()}
    assert leftovers == {"trace.csv", "out", "precious"}


def test_synthetic_requests(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = podsim(
        *("simulate", "--arrivals", "poisson", "--qps", 8, "--requests", 200),
        *("--prompt-tokens", 1500, "--output-tokens", 30, "--seed", 3, "--out", out),
    )
    assert run.returncode == 0, run.stderr
    requests = pd.read_csv(out / "requests.csv")
    assert len(requests) == 200
    assert set(requests["num_prompt_tokens"]) == {1500}
    assert requests["arrival_time_s"].iloc[-1] == pytest.approx(200 / 8, rel=0.25)


def test_compare_puts_variants_side_by_side(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = podsim(
        *("compare", trace, "--attention", "serial,pod", "--token-budget", "512,1024"),
        *("--out", out),
    )
    assert run.returncode == 0, run.stderr
    compared = pd.read_csv(out / "compare.csv", index_col="metric")
    variants = [
        "serial,token_budget=512",
        "serial,token_budget=1024",
        "pod,token_budget=512",
        "pod,token_budget=1024",
    ]
    ends = [f"{variant} {end}" for variant in variants for end in ("low", "high")]
    assert list(compared.columns) == variants + ends
    for variant in variants:
        summary = json.loads((out / variant / "summary.json").read_text())
        assert compared.loc["ttft_p50", variant] * 1000 == pytest.approx(summary["median_ttft_ms"])
    assert "%" in run.stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--graph-padding"], [True, True]),
        (["--no-graph-padding"], [False, False]),
        (["--graph-padding=true"], [True, True]),
        (["--graph-padding", "false"], [False, False]),
        (["--graph-padding", "true,false"], [True, False, True, False]),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_a_comparison_takes_flags_alone_or_as_lists(
    trace: Path, tmp_path: Path, options: list[str], expected: list[bool]
) -> None:
    """The trace after a flag is no value of it."""
    out = tmp_path / "out"
    run = podsim("compare", *options, trace, "--router", "random,round_robin", "--out", out)
    assert run.returncode == 0, run.stderr
    resolved = [tomllib.loads(path.read_text()) for path in out.glob("*/config.toml")]
    assert sorted(c["graph_padding"] for c in resolved) == sorted(expected)


def test_every_command_has_help() -> None:
    for command in ("simulate", "compare", "profile", "capacity", "sweep"):
        assert podsim(command, "--help").returncode == 0
    shown = podsim("simulate", "--help").stdout
    for option in ("--qps", "--rate-scale", "--attention", "--num-blocks", "--replicas", "--seed"):
        assert option in shown


# -------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "bad.csv:1: is empty"),
        (AZURE_ROWS.replace("ContextTokens", "Tokens"), "bad.csv:1: "),
        (AZURE_ROWS.replace("3180", "many"), "bad.csv:3: ContextTokens is 'many'"),
        (AZURE_ROWS.replace("3180", "-5"), "bad.csv:3: ContextTokens is '-5'"),
        (AZURE_ROWS.replace(",27", ",0"), "bad.csv:4: GeneratedTokens is '0'"),
        (AZURE_ROWS.replace("2023-11-16 18:17:04.03", "noon"), "bad.csv:3: TIMESTAMP is 'noon"),
    ],
)
def test_a_broken_trace_is_one_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    assert complaint in refusal("simulate", path)


def test_unsorted_rows_are_sorted_with_a_note(tmp_path: Path) -> None:
    header, first, second, third = AZURE_ROWS.splitlines()
    path = tmp_path / "unsorted.csv"
    path.write_text("\n".join([header, third, first, second]))
    run = podsim("simulate", path)
    assert run.returncode == 0, run.stderr
    assert "Note" in run.stdout
    assert "sorted" in run.stdout


def test_unknown_names_are_one_line(trace: Path, tmp_path: Path) -> None:
    assert "no-such-trace" in refusal("simulate", "no-such-trace")
    assert "unknown model 'gpt-9'" in refusal("simulate", trace, "--model", "gpt-9")
    assert "unknown GPU 'abacus'" in refusal("simulate", trace, "--gpu", "abacus")
    assert "attention is 'magic'" in refusal("simulate", trace, "--attention", "magic")


def test_a_command_line_that_cannot_be_parsed_is_one_line(trace: Path) -> None:
    assert refusal("simulate", trace, "--atention", "pod").startswith("No such option: --atention")
    assert "'--token-budget'" in refusal("simulate", trace, "--token-budget", "many")
    assert refusal("simulate", trace, trace).endswith("(see podsim simulate --help)")
    assert "Did you mean 'simulate'?" in refusal("simulat", trace)
    missing = "Option '--check' requires an argument (see podsim profile --help)"
    assert refusal("profile", "--check") == missing
    for command in ("simulate", "compare"):
        assert refusal(command).startswith("no requests: name a trace")


def test_options_that_would_be_ignored_are_refused() -> None:
    assert refusal("profile", "--check", ".", "--model", "yi-6b").endswith("leave out --model")
    assert refusal("profile", "--refit", ".", "--dry-run").endswith("leave out --dry-run")
    assert refusal("profile", "--dry-run", "--extend").endswith("leave out --extend")


def test_long_spans_are_simulated_or_refused(tmp_path: Path) -> None:
    few = ("--requests", "3", "--prompt-tokens", "8", "--output-tokens", "2")
    run = podsim("simulate", "--arrivals", "poisson", "--qps", "1e-7", *few, "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["max_output_tokens_per_s"] == 2.0
    out = tmp_path / "trace.csv"
    rare = ("--arrivals", "poisson", "--qps", "1e-10", *few)
    assert refusal("trace", "generate", *rare, "--out", out).endswith("expected below 146 years")
    assert not out.exists()
    said = refusal("simulate", "azure-conv-like", "--host-overhead", "inf")
    assert said.startswith("host_overhead is inf")


def test_the_version_is_shown() -> None:
    run = podsim("--version")
    assert (run.returncode, run.stderr) == (0, "")
    assert re.fullmatch(r"podsim \d+\.\d+\.\d+\n", run.stdout)


def test_a_profile_of_another_model_is_refused(trace: Path) -> None:
    shipped = Path(__file__).parent.parent / "profiles" / "h200" / "llama-3-8b"
    complaint = refusal("simulate", trace, "--profile", shipped, "--model", "llama-2-7b")
    assert "measured for llama-3-8b (num_kv_heads 8), but llama-2-7b has num_kv_heads 32" in (
        complaint
    )


def test_a_broken_profile_is_one_line(trace: Path, tmp_path: Path) -> None:
    assert "No such file" in refusal("simulate", trace, "--profile", tmp_path / "nowhere")
    (tmp_path / "profile.json").write_text("{")
    assert "not a podsim profile" in refusal("simulate", trace, "--profile", tmp_path)


def test_an_unknown_toml_key_is_named(trace: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f'trace = "{trace}"\ntoken_bugdet = 512\n')
    complaint = refusal("simulate", "--config", config)
    assert complaint == f"{config}: unknown key 'token_bugdet'; did you mean 'token_budget'?"
    config.write_text('token_budget = "many"\n')
    complaint = refusal("simulate", trace, "--config", config)
    assert complaint == f"{config}:1: token_budget is 'many', expected a whole number"


def test_a_value_of_a_file_that_is_out_of_range_is_named_with_its_line(
    trace: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text('# served so\nattention = "pod"\ntoken_budget = -5\nqps = 3\n')
    wrong = "token_budget is -5, expected at least 1"
    assert refusal("simulate", trace, "--config", config) == f"{config}:3: {wrong}"
    assert refusal("compare", trace, "--config", config) == f"{config}:3: {wrong}"
    assert refusal("validate", trace, "--config", config) == f"{config}:3: {wrong}"
    wrong = "token_budget is -7, expected at least 1"  # which the file does not say
    assert refusal("simulate", trace, "--config", config, "--token-budget", "-7") == wrong
    config.write_text("max_num_seqs = 600\n")
    complaint = refusal("simulate", trace, "--config", config, "--token-budget", 512)
    assert complaint.startswith(f"{config}:1: token_budget is 512, expected at least max_num_seqs")
    config.write_text("max_num_seqs = 600\ntoken_budget = 512\n")
    assert refusal("simulate", trace, "--config", config).startswith(f"{config}:2: token_budget")


def test_a_folder_that_cannot_be_written_is_refused_first(trace: Path) -> None:
    complaint = refusal("simulate", trace, "--out", trace / "results")
    assert complaint.startswith(f"{trace}/results: cannot write results here")


def test_nothing_to_compare_is_said(trace: Path) -> None:
    assert "nothing to compare" in refusal("compare", trace, "--attention", "pod")


def test_profile_without_a_gpu_is_one_line(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    complaint = refusal("profile", "--out", tmp_path / "profile")
    assert "no CUDA GPU on this machine" in complaint
    assert not (tmp_path / "profile").exists()


def test_compare_says_why_kvpr_recomputes_nothing(trace: Path) -> None:
    offload = ("--kv-offload", "full,kvpr", "--kv-on-host", "--host-memory", "100")
    note = "KVPR recomputes nothing (l = 0)"
    printed = podsim("compare", trace, *offload, "--no-error-bars").stdout
    assert f"kvpr: {note}" in printed
    assert f"full: {note}" not in printed
    summaries = json.loads(podsim("compare", trace, *offload, "--json").stdout)
    notes = {name: "".join(summary["podsim"]["notes"]) for name, summary in summaries.items()}
    assert note in notes["kvpr"]
    assert note not in notes["full"]


def test_a_block_table_of_other_heads_than_were_timed_is_told_of(trace: Path) -> None:
    note = "was measured with 32/8 query and KV heads, and is taken for 32/4"
    assert note in podsim("simulate", trace, "--kv", "paged", "--model", "yi-6b").stdout
    assert "query and KV heads" not in podsim("simulate", trace, "--kv", "paged").stdout
    printed = podsim("compare", trace, "--kv", "ideal,paged", "--model", "yi-6b").stdout
    assert f"paged: what attention takes longer from blocks {note}" in printed


def test_out_replaces_its_own_results_and_nothing_else(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert podsim("simulate", trace, "--out", out, "--parquet").returncode == 0
    assert podsim("simulate", trace, "--out", out).returncode == 0
    assert not (out / "requests.parquet").exists()
    before = (out / "summary.json").read_bytes()
    (out / "notes").mkdir()
    (out / "notes" / "mine.txt").write_text("mine")
    complaint = refusal("simulate", trace, "--out", out)
    assert f"{out}: notes/mine.txt is of no result of this podsim" in complaint
    assert (out / "notes" / "mine.txt").read_text() == "mine"
    assert (out / "summary.json").read_bytes() == before
    project = tmp_path / "project"
    project.mkdir()
    (project / "config.toml").write_text("a = 1\n")
    assert "config.toml is of no result of this podsim" in refusal(
        "compare", trace, "--out", project, "--attention", "serial,pod"
    )
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "target")
    assert podsim("simulate", trace, "--out", link).returncode == 0
    assert (tmp_path / "target" / "summary.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_metrics_without_samples_are_null_in_intervals_too(tmp_path: Path) -> None:
    single = tmp_path / "single.csv"
    single.write_text("arrival_time,num_prompt_tokens,num_output_tokens\n0,100,1\n1,50,1\n")
    printed = podsim("simulate", single, "--json").stdout
    assert "NaN" not in printed
    assert json.loads(printed)["podsim"]["intervals"]["tbt_p99"] == [None, None]


def test_many_variants_are_shown_in_as_many_tables_as_it_takes(trace: Path) -> None:
    budgets = ",".join(str(256 * n) for n in range(1, 9))
    options = ("--attention", "serial,pod", "--token-budget", budgets, "--no-error-bars")
    printed = podsim("compare", trace, *options).stdout
    assert "…" not in printed
    assert printed.count("TTFT P50") > 2
    for budget in budgets.split(","):
        assert f"token_budget={budget}" in printed


def test_a_damaged_profile_names_the_number(trace: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).parent.parent / "profiles" / "h200" / "llama-3-8b" / "profile.json"
    for part, name, value in (
        ("sustained", "rest", -5),
        ("sustained", "layer_gap", float("nan")),
        ("launch", "graph", "abc"),
    ):
        content = json.loads(shipped.read_text())
        content[part][name] = value
        (tmp_path / "profile.json").write_text(json.dumps(content))
        complaint = refusal("simulate", trace, "--profile", tmp_path)
        assert f"{part}.{name} is {value!r}, expected a number, 0 or more" in complaint


def test_a_profile_that_tells_half_of_the_clock_is_refused(trace: Path, tmp_path: Path) -> None:
    shipped = Path(__file__).parent.parent / "profiles" / "h200" / "llama-3-8b" / "profile.json"
    for part, name in (
        *(("sustained", name) for name in ("rest", "products", "products_at")),
        ("clock_falls", "falls"),
        ("clock_sensitivity.pod", "turn"),
    ):
        content = json.loads(shipped.read_text())
        owner = content
        for step in part.split("."):
            owner = owner[step]
        del owner[name]
        (tmp_path / "profile.json").write_text(json.dumps(content))
        whole = f"{part}.{name}" if part == "sustained" else part
        line = f"{whole} is not whole; repeat the fit with `podsim profile --refit {tmp_path}`"
        assert refusal("simulate", trace, "--profile", tmp_path).endswith(line)
    content = json.loads(shipped.read_text())
    content["sustained"]["products_at"] = {"many": 0.4}
    (tmp_path / "profile.json").write_text(json.dumps(content))
    complaint = refusal("simulate", trace, "--profile", tmp_path)
    assert "sustained.products_at is not whole" in complaint


def test_lengths_of_made_up_requests_are_refused_with_a_trace(trace: Path) -> None:
    assert "prompt_tokens is '100': of made-up" in refusal(
        "simulate", trace, "--prompt-tokens", "100"
    )


def test_a_full_disk_behind_stdout_is_one_line(trace: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "podsim", "simulate", str(trace), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    assert (run.returncode, run.stderr) == (1, "podsim: cannot print: No space left on device\n")
