"""`megatron-trd plan`: what it prints, its exit codes, and bad input in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest

from megatron_trd import cli
from megatron_trd.demo import STUDENT
from megatron_trd.reporting.progress import PHASES

DEMO = ["plan", "opsd_demo", "--gpus-per-node", "2"]
EIGHT = [
    "model=models/Qwen3-8B",
    "student.micro_batch_size=1",
    "teacher.micro_batch_size=1",
    "sampler.max_rollout_tokens=16384",
    "sampler.max_refinement_tokens=16384",
]


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `megatron-trd ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["megatron-trd", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_a_recipe_that_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(DEMO, monkeypatch, capsys)
    assert code == 0
    for text in ("It fits", "optimizer", "KV cache", "the recipe", "tokens/s", "GPU-hours", "by arithmetic", *PHASES):
        assert text in out
    tables = [line for line in out.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in tables)  # Markdown, nothing folded
    assert not set(out) & set("━│┃─┏")


def test_adapters_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _, plain, _ = run(DEMO, monkeypatch, capsys)
    assert "adapters" not in plain
    assert "merged parameter" not in plain
    _, out, _ = run([*DEMO, "model=models/Qwen3-8B", "lora.rank=64"], monkeypatch, capsys)
    assert "of 8.191 G parameters with adapters of rank 64 (174.6 M), teacher the student without them;" in out
    assert "merged parameter" in out
    assert "| the student |" in out  # its layout
    for other, teacher in (("teacher.weights=live", "the student, live"), ("teacher.weights=ema", "the student, ema")):
        _, out, _ = run([*DEMO, "lora.rank=4", other], monkeypatch, capsys)
        assert f"teacher {teacher};" in out


def test_a_recipe_that_does_not_fit_says_why_and_what_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(["plan", "opsd_demo", *EIGHT, "--gpus-per-node", "8"], monkeypatch, capsys)
    assert code == 1
    assert "It does not fit. train:" in out
    assert "GiB too much (activations" in out
    assert "Layout 1 as overrides: student." in out


def test_overrides_are_for_the_gpus_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A recipe that says how many ranks it is for refuses to run on others."""
    arguments = ["plan", "opsd_qwen3_1_7b", "--nodes", "2"]
    _, open_, _ = run(arguments, monkeypatch, capsys)
    assert "world_size" not in open_
    _, fixed, _ = run([*arguments, "world_size=8"], monkeypatch, capsys)
    assert "world_size=16" in fixed


def test_nothing_fits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "opsd_demo", *EIGHT, "student.tp=1", "--gpus-per-node", "1"]
    code, out, _ = run(arguments, monkeypatch, capsys)
    assert code == 1
    assert "No layout fits" in out


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([*DEMO, "--gpu", "cpu", "--mean-response", "52"], monkeypatch, capsys)
    assert code == 0
    assert "measured now, a rank:" in out
    assert "responses of 52 tokens on average of at most 80" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "opsd_dmo"], ["opsd_dmo", "opsd_demo"]),
        ([*DEMO, "--gpu", "h1000"], ["h1000", "h100, h200", "cpu"]),
        ([*DEMO, "--nodes", "0"], ["--nodes 0"]),
        ([*DEMO, "--gpu", "cpu", "--nodes", "2"], ["--nodes must be 1"]),
        ([*DEMO, "--mean-response", "81"], ["--mean-response 81", "80"]),
        ([*DEMO, "student.tp=4"], ["student.tp=4", "heads"]),
        (["plan", "opsd_demo", "--gpus-per-node", "4", "sampler.tp=4"], ["sampler.tp=4", "key/value heads"]),
        ([*DEMO, "student.pp=2"], ["world size 2", "tp=2 x pp=2"]),
        (["plan", "opsd_demo", "--gpus-per-node", "3"], ["world size 3", "tp=2"]),
        ([*DEMO, "model=models/Qwen9-8B"], ["Qwen9-8B", "no such folder", "Qwen3-8B"]),
        ([*DEMO, "model=''"], ["model is not set"]),
        (["plan", "opd_qwen3_8b", f"teacher.model={STUDENT}"], ["teacher.model has embeddings of", "151936"]),
        ([*DEMO, "data.max_prompt_tokens=2000"], ["context of model is 1024"]),
        ([*DEMO, "student.tpp=1"], ["student.tpp", "did you mean"]),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, error = run(arguments, monkeypatch, capsys)
    assert code == 2
    assert len(error.splitlines()) == 1
    for part in says:
        assert part in error


def test_planning_loads_neither_engine() -> None:
    """So that it works on a laptop, at once."""
    code = "import sys, megatron_trd.planning.command; print(set(sys.modules) & {'vllm', 'megatron.core'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
