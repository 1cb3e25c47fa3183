"""Jobs as users start them: what they write, and that stopping or killing one changes nothing but the time it takes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_trd.config import CheckpointConfig
from megatron_trd.data.problems import step_indices
from megatron_trd.errors import JobFailed, UserError
from megatron_trd.files import write_sums
from megatron_trd.launch import launch
from megatron_trd.training.run import _check_trained
from tests.checkpoint_tools.folders import flip, tensors
from tests.distributed import run_ranks
from tests.models import write_model
from tests.training import jobs

NAME = re.compile(r"`([a-z_/<>@]+)`")
# What must not differ between an unbroken and a resumed run, to the bit.
SAME = ("loss", "grad_norm", "lr", "divergence/mean", "tokens/trained", "length/rollout", "length/refinement")


def load_tensors(rank: int, world: int, checkpoint: str) -> dict[str, torch.Tensor]:
    """Rank function: every tensor of a checkpoint, optimizer state included."""
    from megatron.core import dist_checkpointing

    from megatron_trd import platform

    platform.current().set_up()
    with platform.current().megatron():
        return dict(flatten(dist_checkpointing.load_plain_tensors(checkpoint)))


def flatten(tree: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of nested dictionaries and lists, by its path."""
    if isinstance(tree, torch.Tensor):
        yield name, tree
    elif isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from flatten(value, f"{name}/{key}")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """(job file, run folder, output) of a job that nobody disturbed, with its refit checked every step."""
    folder = tmp_path_factory.mktemp("unbroken")
    job = jobs.write_job(folder)
    output = jobs.finish(jobs.start("train", job, f"run_dir={folder / 'run'}", "--verify-refit"))
    return job, folder / "run", output


def held_out(run: Path) -> list[dict[str, Any]]:
    """Scores of the held-out problems, without the time they took."""
    rows = jobs.metrics(run, "held_out.jsonl")
    return [{key: value for key, value in row.items() if key != "held_out/seconds"} for row in rows]


def assert_same_run(found: Path, expected: Path, *, asks: bool = True) -> None:
    rows = zip(jobs.metrics(found), jobs.metrics(expected), strict=True)
    for row, other in rows:
        assert {key: row.get(key) for key in SAME} == {key: other.get(key) for key in SAME}
    assert held_out(found) == (held_out(expected) if asks else [])
    name = f"checkpoints/step_{jobs.STEPS}"
    left, right = (run_ranks(load_tensors, 1, str(run / name))[0] for run in (found, expected))
    assert left.keys() == right.keys()
    assert len(left) > 20
    for key, tensor in left.items():
        assert torch.equal(tensor, right[key]), key
    averaged = [
        {file.name: file.read_bytes() for file in (run / name / "ema").glob("*.safetensors")}
        for run in (found, expected)
    ]
    assert averaged[0] == averaged[1]


def test_a_run_writes_what_is_promised(unbroken: tuple[Path, Path, str]) -> None:
    _, run, output = unbroken
    rows: list[dict[str, Any]] = jobs.metrics(run)
    assert [row["step"] for row in rows] == list(range(jobs.STEPS))
    for row in rows:
        assert row["samples/trained"] == 3
        assert row["loss"] > 0
        assert row["grad_norm"] > 0
        assert row["refit/verified"] > 2 * 20, "of student and teacher, and --verify-refit looks at every tensor"
        assert row["drift/max"] < 1e-4, "sampler and trainer give the same log-probabilities"
        for key in ("time/refit", "time/sample", "time/teacher", "time/train", "throughput/sample", "memory/host_gib"):
            assert row[key] > 0, key
        assert row["time/step"] >= sum(row[f"time/{name}"] for name in ("refit", "sample", "teacher", "train"))
    assert rows[-1]["loss"] < rows[0]["loss"], "an averaged teacher of decay 0.5 and a student that follow each other"
    falling = [1e-3 * 0.5 * (1 + math.cos(math.pi * step / (jobs.STEPS + 1))) for step in range(1, jobs.STEPS + 1)]
    assert [row["lr"] for row in rows] == pytest.approx(falling), "a tenth of four steps is no warm-up"
    assert (run / "config.yaml").is_file()
    assert list((run / "tensorboard").glob("events*"))
    assert len(list((run / "samples").glob("*.jsonl"))) == jobs.STEPS
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_2", "step_4"]
    assert list((run / "checkpoints/step_4/ema").glob("*.safetensors"))
    assert output.count("step ") >= jobs.STEPS


def test_every_step_trains_on_its_own_problems(unbroken: tuple[Path, Path, str]) -> None:
    _, run, _ = unbroken
    for step, path in enumerate(sorted((run / "samples").glob("*.jsonl"))):
        asked = [json.loads(line)["problem"] for line in path.read_text().splitlines()]
        indices = step_indices(6, 3, step, seed=0, shuffle=True)
        assert asked == [f"What is {index} + 2?" for index in indices], path.name


def test_held_out_problems_are_asked_before_between_and_after(unbroken: tuple[Path, Path, str]) -> None:
    _, run, output = unbroken
    rows = held_out(run)
    assert [row["step"] for row in rows] == [0, 2, jobs.STEPS]
    for row in rows:
        assert row["held_out/avg@2/low"] <= row["held_out/avg@2"] <= row["held_out/avg@2/high"]
        assert 0 < row["held_out/mean_tokens"] <= 24
    assert output.count("held out, after") == 3
    assert list((run / "tensorboard/held_out").glob("events*"))


def test_every_metric_is_documented(unbroken: tuple[Path, Path, str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    documented = {name for line in page.splitlines() if line.startswith("| `") for name in NAME.findall(line)}
    rows = [*jobs.metrics(unbroken[1]), *jobs.metrics(unbroken[1], "held_out.jsonl")]
    names = set().union(*rows) - {"step"}
    names = {re.sub("memory/[a-z]+/", "memory/<phase>/", name).replace("@2", "@k") for name in names}
    assert len(names) > 25
    assert names <= documented


def test_a_checkpoint_exports_the_student_and_the_averaged_teacher(
    unbroken: tuple[Path, Path, str], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    step = unbroken[1] / f"checkpoints/step_{jobs.STEPS}"
    for weights in ("model", "ema"):
        command = ["convert", "megatron-to-hf", "--megatron", step, "--out", tmp_path / weights, "--weights", weights]
        jobs.finish(jobs.start(*command))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / weights)
        assert model.dtype == torch.float32
        assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()
    student, averaged = (tensors(tmp_path / weights) for weights in ("model", "ema"))
    assert averaged.keys() == student.keys()
    assert not all(averaged[name].equal(student[name]) for name in student)
    stored = tensors(step / "ema")
    assert all(averaged[name].equal(stored[name]) for name in stored)
    # As megatron-core reads them: layers stacked, gate above up, the vocabulary padded.
    plain = run_ranks(load_tensors, 1, str(step))[0]
    layer = "model.layers.1.mlp."
    gate_up = torch.cat([student[f"{layer}gate_proj.weight"], student[f"{layer}up_proj.weight"]])
    assert plain["/decoder.layers.mlp.linear_fc1.weight"][1].equal(gate_up)
    embedding = student["model.embed_tokens.weight"]
    assert plain["/embedding.word_embeddings.weight"][: len(embedding)].equal(embedding)


def test_a_killed_rank_ends_the_job_and_resume_gives_the_same_bits(
    unbroken: tuple[Path, Path, str], tmp_path: Path
) -> None:
    job, expected, _ = unbroken
    run = tmp_path / "run"
    process = jobs.start("train", job, f"run_dir={run}")
    jobs.wait_for(lambda: len(jobs.metrics(run)) >= 3)
    os.kill(jobs.rank_pids(process)[-1], signal.SIGKILL)
    begin = time.monotonic()
    output = jobs.finish(process, code=1)
    assert time.monotonic() - begin < 15
    assert output.count("killed by SIGKILL") == 1
    assert "Traceback" not in output.splitlines()[-1]
    refused = jobs.finish(jobs.start("train", job, f"run_dir={run}"), code=2)
    assert "--resume" in refused
    jobs.finish(jobs.start("train", job, f"run_dir={run}", "--resume"))
    assert_same_run(run, expected)


def test_resume_is_exact_over_data_parallel_ranks_and_a_frozen_teacher_whatever_its_engine(tmp_path: Path) -> None:
    student, teacher = {"tp": 1, "micro_batch_size": 2}, {"weights": "frozen", "tp": 2}
    several = {"refinements_per_rollout": 2, "epochs_per_batch": 2}
    job = jobs.write_job(tmp_path, student=student, teacher=teacher, world_size=2, **several)
    unbroken, run = tmp_path / "unbroken", tmp_path / "run"
    jobs.finish(jobs.start("train", job, f"run_dir={unbroken}", "sampler.one_engine=false"))
    swapped = [f"run_dir={run}", "--verify-refit"]
    process = jobs.start("train", job, *swapped)
    jobs.wait_for(lambda: len(jobs.metrics(run)) >= 3)
    os.kill(jobs.rank_pids(process)[0], signal.SIGKILL)
    jobs.finish(process, code=1)
    jobs.finish(jobs.start("train", job, *swapped, "--resume"))
    assert_same_run(run, unbroken)
    for row, other in zip(jobs.metrics(run), jobs.metrics(unbroken), strict=True):
        assert row["refit/gib"] > 1.5 * other["refit/gib"] or other["step"] == 0, (
            "a frozen teacher's once, or each step"
        )
        assert row["drift/max"] < 1e-4, "refinements are the teacher's"
        assert row["drift/rollout"] < 1e-4, "rollouts are the student's"
        assert row["time/step"] >= sum(row[f"time/{name}"] for name in ("refit", "sample", "teacher", "train"))
    for row in jobs.metrics(unbroken):
        assert row["samples/trained"] == 3 * 2
        assert row["loss/last_epoch"] != row["loss"], "the second step is taken where the first one led"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_student_learns_from_a_larger_teacher_whatever_rows_that_has_beyond_the_tokens(
    family: str, tmp_path: Path
) -> None:
    """Qwen2.5's larger models have 128 more than the smaller ones."""
    exact = write_model(tmp_path / "exact", family=family, num_hidden_layers=6, max_position_embeddings=1024)
    padded = Path(shutil.copytree(exact, tmp_path / "padded"))
    weights = load_file(exact / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], 9 * torch.randn(128, weights[name].shape[1])])
    save_file(weights, padded / "model.safetensors", {"format": "pt"})
    values = json.loads((padded / "config.json").read_text())
    (padded / "config.json").write_text(json.dumps(values | {"vocab_size": values["vocab_size"] + 128}))
    found = []
    for teacher in (exact, padded):
        sides = {"student": {}, "teacher": {"model": str(teacher), "weights": "frozen"}}
        job = jobs.write_job(tmp_path, method="trd-opd", steps=1, held_out={}, **sides)
        jobs.finish(jobs.start("train", job, f"run_dir={tmp_path / teacher.name / 'run'}", "--verify-refit"))
        [row] = jobs.metrics(tmp_path / teacher.name / "run")
        assert row["samples/trained"] == 3
        assert row["drift/max"] < 1e-4, "the second engine has the teacher's weights"
        found.append([row[key] for key in ("loss", "grad_norm", "length/rollout", "length/refinement")])
    assert found[0] == found[1]


def train_with_failures(rank: int, world: int, job: str, run_dir: str, setting: str) -> tuple[list[str], list[Any]]:
    """Rank function: a job in which rank 1's engine dies in step 1, and after it a step in which every engine does.

    Where one engine has the student's weights and the averaged teacher's in turn, it dies among the refinements. The
    job keeps what it can outside of the device's memory, which is to change nothing either. Returns the notes, and the
    responses to a held-out problem after training, again, and of other weights.
    """
    from megatron_trd.config import apply_overrides, load
    from megatron_trd.engines.engine import Engine
    from megatron_trd.training.loop import train
    from megatron_trd.training.run import Run

    elsewhere = ["student.offload=true", "teacher.offload=true", "teacher.hidden_in=disk"]
    elsewhere += ["held_out.path=null", "held_out.every=0"]  # nor is it to matter to training that nothing is asked
    run = Run(apply_overrides(load(Path(job)), [f"run_dir={run_dir}", setting, *elsewhere]))
    step, steps = Engine.step, {"left": 5}

    def failing(engine: Engine) -> Any:
        refitted = run.phases.seconds.get("refit") and len(run.sampling._refitted) == 2
        if refitted and len(jobs.metrics(Path(run_dir))) == 1:
            steps["left"] -= 1
            if rank == 1 and steps["left"] == 0:
                raise RuntimeError("out of luck")
        return step(engine)

    said: list[str] = []
    run.sampling.note = said.append
    with mock.patch.object(Engine, "step", failing):
        train(run)
    question = [run.inputs.problems[0]] * 2, [[5, 6, 7]] * 2
    responses = [run.sampling.ask(*question), run.sampling.ask(*question)]
    with torch.no_grad():
        for parameter in run.student.model.parameters():
            parameter.mul_(1.5)
    responses.append(run.sampling.ask(*question))
    with mock.patch.object(Engine, "step", mock.Mock(side_effect=RuntimeError("always"))):
        try:
            run.sampling.take(0)
        except UserError as error:
            said.append(f"{error}, exit code {error.exit_code}")
    return said, [[one.rollout.tokens for one in asked] for asked in responses]


@pytest.mark.parametrize("setting", ["sampler.one_engine=false", "sampler.one_engine=true"])
def test_an_engine_that_dies_and_memory_lent_change_nothing(
    unbroken: tuple[Path, Path, str], tmp_path: Path, setting: str
) -> None:
    job, expected, _ = unbroken
    run = tmp_path / "run"
    abandoned = run / "checkpoints" / "step_3.partial"  # by a save that was killed
    abandoned.mkdir(parents=True)
    for said, (trained, again, moved) in run_ranks(train_with_failures, 2, str(job), str(run), setting):
        assert trained == again != moved, "held-out problems are asked of the present weights, with the same seeds"
        once, again, twice = [text for text in said if "died" in text]
        assert once.startswith("step 1: a sampler's engine died (RuntimeError: out of luck)")
        assert again.startswith("step 0: a sampler's engine died (RuntimeError: always)")
        assert twice == "a sampler's engine died twice in step 0: RuntimeError: always, exit code 1"
    assert_same_run(run, expected, asks=False)
    assert not abandoned.exists()


def test_a_run_that_samples_beside_training_is_marked_and_resumes_exactly(
    unbroken: tuple[Path, Path, str], tmp_path: Path
) -> None:
    job, on_policy, _ = unbroken
    expected, run = tmp_path / "unbroken", tmp_path / "run"
    settings = ["staleness=1", "teacher.hidden_in=host", "log.max_drift=1e-4"]
    jobs.finish(jobs.start("train", job, f"run_dir={expected}", *settings))
    rows = jobs.metrics(expected)
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1]
    assert [row["staleness"] for row in jobs.metrics(on_policy)] == [0] * jobs.STEPS
    assert max(row["drift/mean"] for row in rows[1:]) > 1e-4, "the model has moved since, which is no fault"
    assert all(row["time/refit"] > 0 for row in rows[:-1]), "before what the next step trains on is sampled"
    assert all(row["throughput/sample"] < 1e5 for row in rows), "sampling takes its time wherever it is done"
    assert rows[0]["loss"] == jobs.metrics(on_policy)[0]["loss"]
    assert rows[1]["loss"] != jobs.metrics(on_policy)[1]["loss"]
    process = jobs.start("train", job, f"run_dir={run}", *settings)
    jobs.wait_for(lambda: len(jobs.metrics(run)) >= 3)
    os.kill(jobs.rank_pids(process)[0], signal.SIGKILL)
    jobs.finish(process, code=1)
    assert (run / "checkpoints" / "step_2" / "sampled.json").is_file()
    jobs.finish(jobs.start("train", job, f"run_dir={run}", *settings, "--resume"))
    assert_same_run(run, expected)


def train_with_first_weights(rank: int, world: int, job: str, run_dir: str) -> str:
    """Rank function: a job whose student samples with the weights it began with. Returns why it ends."""
    from megatron_trd.config import apply_overrides, load
    from megatron_trd.training.loop import train
    from megatron_trd.training.run import Run
    from megatron_trd.training.sampling import Sampling, _Refitted

    settings = ["method=trd-opsd", "teacher.weights=frozen", "sampler.one_engine=false", "log.max_drift=1e-4"]
    settings += ["held_out.path=null", "held_out.every=0", f"run_dir={run_dir}"]
    run = Run(apply_overrides(load(Path(job)), settings))
    bring, engines = Sampling._bring, set()

    def bring_once(sampling: Sampling, engine: Any, source: Any) -> Any:
        if engine in engines:
            return _Refitted(0, 1.0, 0)
        engines.add(engine)
        return bring(sampling, engine, source)

    with mock.patch.object(Sampling, "_bring", bring_once), pytest.raises(UserError) as ended:
        train(run)
    return str(ended.value)


def test_a_student_that_samples_with_old_weights_is_noticed_whoever_refines(
    unbroken: tuple[Path, Path, str], tmp_path: Path
) -> None:
    """A frozen teacher's refinements say nothing of the refit: its weights are what they were."""
    run = tmp_path / "run"
    for said in run_ranks(train_with_first_weights, 2, str(unbroken[0]), str(run)):
        assert "nats a token on rollouts, log.max_drift is 0.0001" in said
    first, second, *_ = jobs.metrics(run)
    assert first["drift/rollout"] < 1e-4 < second["drift/rollout"]
    assert second["drift/mean"] < 1e-4


def test_a_drift_above_its_bound_stops_the_run(unbroken: tuple[Path, Path, str], tmp_path: Path) -> None:
    job, run = unbroken[0], tmp_path / "run"
    output = jobs.finish(jobs.start("train", job, f"run_dir={run}", "--verify-logprobs", "1e-9"), code=2)
    assert "log.max_drift is 1e-09" in output
    assert not (run / "checkpoints").exists()


def test_a_run_that_never_trained_says_so_after_it_has_saved(unbroken: tuple[Path, Path, str], tmp_path: Path) -> None:
    job, run = unbroken[0], tmp_path / "run"
    settings = [f"run_dir={run}", "steps=1", "data.overlong=drop", "held_out.path=null", "held_out.every=0"]
    settings += ["sampler.max_rollout_tokens=1", "sampler.max_refinement_tokens=1"]
    output = jobs.finish(jobs.start("train", job, *settings), code=2)
    assert "step 1/1  loss none, nothing to train on" in output
    assert "overflow/rollout 3" in output.splitlines()[-1]
    assert "data.overlong" in output.splitlines()[-1]
    assert (run / "checkpoints" / "step_1").is_dir()


def test_a_run_that_was_stopped_is_not_told_that_it_never_trained() -> None:
    untrained = {"samples/trained": 0, "overflow/rollout": 3}
    _check_trained([untrained], steps=2)
    _check_trained([untrained, untrained | {"samples/trained": 1}], steps=2)
    with pytest.raises(UserError, match="overflow/rollout 3"):
        _check_trained([untrained, untrained], steps=2)


def begin(rank: int, world: int, job: str, run_dir: str) -> str:
    """Rank function: why a run does not begin."""
    from megatron_trd.config import apply_overrides, load
    from megatron_trd.training.run import Run

    with pytest.raises(UserError) as refused:
        Run(apply_overrides(load(Path(job)), [f"run_dir={run_dir}"]))
    return str(refused.value)


def test_a_damaged_model_is_not_trained(tmp_path: Path) -> None:
    """One bit of a weight, which nothing but the folder's checksums tells."""
    job, model = jobs.write_job(tmp_path, student={"tp": 1}), tmp_path / "model"
    write_sums(model)
    flip(model / "model.safetensors")
    [said] = run_ranks(begin, 1, str(job), str(tmp_path / "run"), timeout=300)
    assert "model.safetensors' is damaged" in said


def save_and_resume_untrained(rank: int, world: int, job: str, run_dir: str) -> bool:
    """Rank function: engines that have trained on nothing, through a checkpoint; whether the student is the same."""
    from megatron_trd import platform
    from megatron_trd.config import load
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.engines.teacher import TeacherEngine
    from megatron_trd.models import loading
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid
    from megatron_trd.training import checkpoint

    platform.current().set_up()
    config = load(Path(job))
    model = open_model(config.model)
    student = StudentEngine(config, model, student_grid(2, 1, seed=0))
    teacher = TeacherEngine(config, student, model)
    checkpoint.save(run_dir, 3, student, teacher, CheckpointConfig())
    assert checkpoint.resume(run_dir, student, teacher) == 3
    found, expected = (loading.named_tensors(model.arch, source) for source in (student.source(), model.source))
    return all(full.equal(tensor) for (_, full), (_, tensor) in zip(found, expected, strict=True))


@pytest.mark.parametrize("distributed", [True, False])
def test_a_run_that_has_trained_on_nothing_is_saved_and_resumed(tmp_path: Path, *, distributed: bool) -> None:
    """Where every response was cut off and dropped, no optimizer step has made the state that a checkpoint is of."""
    student = {"tp": 2, "micro_batch_size": 2, "distributed_optimizer": distributed}
    job, run = jobs.write_job(tmp_path, student=student), tmp_path / "run"
    run.mkdir()
    assert run_ranks(save_and_resume_untrained, 2, str(job), str(run)) == [True, True]


def test_a_stopped_job_saves_and_resume_gives_the_same_bits(unbroken: tuple[Path, Path, str], tmp_path: Path) -> None:
    job, expected, _ = unbroken
    run = tmp_path / "run"
    settings = [f"run_dir={run}", "checkpoint.every=0", "overlap=teacher"]  # which changes nothing either
    process = jobs.start("train", job, *settings)
    jobs.wait_for(lambda: len(jobs.metrics(run)) >= 1)
    process.send_signal(signal.SIGTERM)
    output = jobs.finish(process, code=130)
    done = len(jobs.metrics(run))
    assert done < jobs.STEPS, "stopped too late to test anything"
    assert f"{done} steps done" in output
    assert "--resume" in output
    jobs.finish(jobs.start("train", job, *settings, "--resume"))
    assert_same_run(run, expected)


def test_resume_with_other_settings_is_refused_and_changes_nothing(unbroken: tuple[Path, Path, str]) -> None:
    job, run, _ = unbroken
    before = (run / "config.yaml").read_bytes()
    output = jobs.finish(jobs.start("train", job, f"run_dir={run}", "steps=9", "--resume"), code=2)
    assert "steps=4, not 9" in output
    assert (run / "config.yaml").read_bytes() == before


def launch_program(folder: Path, text: str, ranks: int = 1) -> None:
    """Run a program as each rank of a job."""
    script = folder / "worker.py"
    script.write_text(text)
    launch([str(script)], ranks, folder / "logs")


def test_logs_may_be_read_by_whom_the_user_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        launch_program(tmp_path, "import sys\nprint('said', file=sys.stderr)\n")
    finally:
        os.umask(before)
    (log,) = tmp_path.glob("logs/*/*/attempt_0/0/stderr.log")
    assert log.read_text() == "said\n"
    folders = [folder for folder in log.parents if folder.is_relative_to(tmp_path / "logs")]
    assert {oct(folder.stat().st_mode & 0o777) for folder in folders} == {"0o750"}


def test_a_rank_that_fails_takes_a_busy_one_down_within_seconds(tmp_path: Path) -> None:
    """The survivor is in a long computation of its own and deaf to SIGTERM, as a rank between steps is."""
    program = (
        "import os, signal, time\n"
        "from megatron_trd.launch import run_rank\n"
        "def main():\n"
        "    signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "    if os.environ['RANK'] == '1':\n"
        "        time.sleep(1)\n"
        "        raise ValueError('the reason')\n"
        "    while True:\n"
        "        time.sleep(0.1)\n"
        "run_rank(main)\n"
    )
    begin = time.monotonic()
    with pytest.raises(JobFailed, match=r"rank 1 failed: ValueError: the reason"):
        launch_program(tmp_path, program, ranks=2)
    assert time.monotonic() - begin < 15


def test_a_second_stop_request_ends_the_job_at_once_and_is_no_failure_of_a_rank(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    program = (
        "import pathlib, signal, time\n"
        "from megatron_trd.launch import run_rank\n"
        "def main():\n"
        "    signal.signal(signal.SIGTERM, lambda *_: None)\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        "    time.sleep(600)\n"
        "run_rank(main)\n"
    )

    def ask_twice() -> None:
        jobs.wait_for(ready.exists)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    asking = threading.Thread(target=ask_twice)
    asking.start()
    with pytest.raises(JobFailed, match=r"^stopped at once, as asked"):
        launch_program(tmp_path, program)
    asking.join()


def test_a_job_started_with_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    ready, hung_up = tmp_path / "ready", tmp_path / "hung_up"
    worker, launcher = tmp_path / "worker.py", tmp_path / "launcher.py"
    worker.write_text(
        "import pathlib, time\n"
        "from megatron_trd.launch import run_rank\n"
        "def main():\n"
        f"    pathlib.Path({str(ready)!r}).touch()\n"
        f"    while not pathlib.Path({str(hung_up)!r}).exists():\n"
        "        time.sleep(0.05)\n"
        "run_rank(main)\n"
    )
    launcher.write_text(
        "import pathlib\n"
        "from megatron_trd.launch import launch\n"
        f"launch([{str(worker)!r}], 1, pathlib.Path({str(tmp_path / 'logs')!r}))\n"
    )
    process = subprocess.Popen(
        ["nohup", sys.executable, str(launcher)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    jobs.wait_for(ready.exists)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)  # whatever it would do has begun
    hung_up.touch()
    output = jobs.finish(process)
    assert "stopping" not in output


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    pids = tmp_path / "pids"
    pids.mkdir()
    script.write_text(
        "import os, pathlib, time\n"
        "from megatron_trd.launch import run_rank\n"
        "def main():\n"
        f"    pathlib.Path({str(pids)!r}, str(os.getpid())).touch()\n"
        "    time.sleep(600)\n"
        "run_rank(main)\n"
    )
    code = (
        "from pathlib import Path; from megatron_trd.launch import launch;"
        f"launch([{str(script)!r}], 2, Path({str(tmp_path / 'logs')!r}))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code])
    jobs.wait_for(lambda: len(list(pids.iterdir())) == 2)
    launcher.kill()
    launcher.wait()
    jobs.wait_for(lambda: not any(Path("/proc", path.name).exists() for path in pids.iterdir()))


@pytest.mark.parametrize("code", [1, 2])  # 2: that of bad input, which has a reason otherwise
def test_a_rank_whose_reason_found_no_room_is_said_to_have_had_none(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
    with pytest.raises(JobFailed, match=rf"rank 0 failed: exit code {code}; logs in .*, whose disk is full$"):
        launch_program(tmp_path, f"import os\nos._exit({code})\n")


def test_a_rank_whose_reason_was_cut_short_is_said_to_have_left_none(tmp_path: Path) -> None:
    """As on a full disk: the file of the reason is made, and nothing goes into it."""
    program = (
        "import resource\n"
        "from megatron_trd.launch import run_rank\n"
        "def main():\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        "    raise ValueError('a reason')\n"
        "run_rank(main)\n"
    )
    with pytest.raises(JobFailed, match=r"rank 0 failed: exit code 1; logs in "):
        launch_program(tmp_path, program)


def test_what_torch_raises_when_it_cannot_write_is_an_error_too(tmp_path: Path) -> None:
    program = (
        "from megatron_trd.launch import run_rank\n"
        "from torch.distributed.checkpoint.api import CheckpointException\n"
        "def main():\n"
        "    raise CheckpointException('write', {})\n"
        "run_rank(main)\n"
    )
    with pytest.raises(JobFailed, match=r"rank 0 failed: CheckpointException: "):
        launch_program(tmp_path, program)
