"""Jobs that train adapters: resumed to the same bits, and exported so that others compute the same with them."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_tools import hf_to_megatron, megatron_to_hf, verify
from megatron_trd import platform
from megatron_trd.config import SamplerConfig, apply_overrides, load
from megatron_trd.errors import UserError
from megatron_trd.files import read_sums, write_sums
from megatron_trd.models.folder import ADAPTER_CONFIG
from megatron_trd.models.loading import named_tensors
from megatron_trd.models.model import open_model
from megatron_trd.training.checks import check
from tests.checkpoint_tools.folders import flip, tensors
from tests.distributed import run_ranks
from tests.training import jobs
from tests.training.test_jobs import assert_same_run

RANK = 4


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(job file, run folder) of a job that nobody disturbed. The teacher is the student without its adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    # A grid of 3 does not divide its ranks, and is not asked for: the teacher is on the student's.
    teacher = {"weights": "frozen", "tp": 3}
    student = {"tp": 1, "micro_batch_size": 2, "recompute": True}
    job = jobs.write_job(folder, student=student, teacher=teacher, lora={"rank": RANK}, world_size=2)
    jobs.finish(jobs.start("train", job, f"run_dir={folder / 'run'}", "--verify-refit", "--verify-logprobs", "1e-4"))
    return job, folder / "run"


def test_it_learns_and_only_adapters_have_optimizer_state(unbroken: tuple[Path, Path]) -> None:
    job, run = unbroken
    rows = jobs.metrics(run)
    assert len(rows) == jobs.STEPS
    assert all(row["refit/verified"] > 20 for row in rows)
    step = open_model(run / f"checkpoints/step_{jobs.STEPS}")
    before, after = tensors(Path(load(job).model)), dict(named_tensors(step.arch, step.source))
    assert {name for name in before if not before[name].equal(after[name])} == {
        name for name in before if "_proj" in name
    }
    moved = sum(path.stat().st_size for path in step.path.glob("*.distcp"))
    weights = sum(tensor.nbytes for tensor in before.values())
    assert moved < 2.5 * weights, "weights, and three times the adapters; two moments of all would make it thrice"


def test_a_killed_job_resumes_to_the_same_bits(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    job, expected = unbroken
    run = [f"run_dir={tmp_path / 'run'}", "teacher.tp=1"]
    process = jobs.start("train", job, *run)
    jobs.wait_for(lambda: len(jobs.metrics(tmp_path / "run")) >= 3)
    os.kill(jobs.rank_pids(process)[0], signal.SIGKILL)
    jobs.finish(process, code=1)
    config = tmp_path / "run" / "config.yaml"
    begun = config.read_text()
    for rank in (0, 8):
        again = ["train", job, *run, "--resume", f"lora.rank={rank}"]
        assert f"was begun with lora.rank=4, not {rank}" in jobs.finish(jobs.start(*again), code=2)
        config.write_text(begun.replace("rank: 4", f"rank: {rank}"))  # on purpose, as that says
        refused = jobs.finish(jobs.start(*again), code=2)
        assert "step_2' was saved with lora.rank=4 lora.alpha=8: set that" in refused
        assert "Traceback" not in refused
        config.write_text(begun)
    jobs.finish(jobs.start("train", job, *run, "--resume"))
    assert_same_run(tmp_path / "run", expected)


@torch.no_grad()
def test_what_is_exported_computes_the_same_with_peft_and_without(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job, run = unbroken
    step = run / f"checkpoints/step_{jobs.STEPS}"
    megatron_to_hf.convert(step, tmp_path / "merged")
    assert verify.verify(tmp_path / "merged", step), "it is what the checkpoint is"
    for dtype in (None, torch.bfloat16):
        megatron_to_hf.convert(step, tmp_path / str(dtype), weights="adapters", dtype=dtype)
    config = json.loads((tmp_path / "None" / ADAPTER_CONFIG).read_text())
    assert config["base_model_name_or_path"] == load(job).model
    base = AutoModelForCausalLM.from_pretrained(load(job).model)
    ids = torch.arange(5, 45)[None]
    plain = base(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "None"))(ids).logits
    assert torch.allclose(adapted, merged, atol=1e-5)
    assert (merged - plain).abs().max() > 1e-3
    rounded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(load(job).model), str(tmp_path / "torch.bfloat16")
    )
    assert 1e-5 < (rounded(ids).logits - merged).abs().max() < 0.1


_ENGINES: list[Any] = []  # to the end of the process: one that is dropped takes everyone's process groups with it


def by_vllm(rank: int, world: int, base: str, adapters: str, merged: str) -> list[list[float]]:
    """Rank function: log-probabilities of greedy tokens, by the base model with its adapters, without, and merged."""
    current = platform.current()
    os.environ.update(current.sampler_environment())
    arguments = current.sampler_arguments(SamplerConfig(), 64, sleeps=False, alone=False)
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    with current.starting_sampler("adapters"):
        for model, more in ((base, {"enable_lora": True, "max_lora_rank": 8}), (merged, {})):
            _ENGINES.append(LLM(model, dtype="float32", max_model_len=64, **arguments, **more))
    plain, whole = _ENGINES
    parameters = SamplingParams(temperature=0.0, max_tokens=8, logprobs=0, ignore_eos=True, detokenize=False)
    found = []
    for llm, request in ((plain, LoRARequest("trained", 1, adapters)), (plain, None), (whole, None)):
        prompt = {"prompt_token_ids": list(range(10, 50))}
        [output] = llm.generate([prompt], parameters, use_tqdm=False, lora_request=request)
        chosen = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
        found.append([entry[token].logprob for token, entry in chosen])
    return found


def test_vllm_takes_the_adapters_as_they_are_exported(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    job, run = unbroken
    step, base = run / f"checkpoints/step_{jobs.STEPS}", load(job).model
    megatron_to_hf.convert(step, tmp_path / "adapters", weights="adapters")
    megatron_to_hf.convert(step, tmp_path / "merged")
    [(adapted, plain, merged)] = run_ranks(by_vllm, 1, base, str(tmp_path / "adapters"), str(tmp_path / "merged"))
    assert adapted == pytest.approx(merged, abs=1e-5)
    assert adapted != pytest.approx(plain, abs=1e-3)


def test_adapters_are_not_written_over_what_they_are_made_from_nor_taken_for_a_model(
    unbroken: tuple[Path, Path], tmp_path: Path
) -> None:
    job, run = unbroken
    step, base = run / f"checkpoints/step_{jobs.STEPS}", Path(shutil.copytree(load(job).model, tmp_path / "base"))
    for out in (base, base / "adapters", step, step / "adapters"):
        with pytest.raises(UserError, match="overlap"):
            megatron_to_hf.convert(step, out, weights="adapters", like=base, force=True)
    assert tensors(base)
    assert open_model(step)
    out = tmp_path / "adapters"
    megatron_to_hf.convert(step, out, weights="adapters", dry_run=True)
    assert not out.exists()
    megatron_to_hf.convert(step, out, weights="adapters", like=base)
    with pytest.raises(UserError, match="exists already"):
        megatron_to_hf.convert(step, out, weights="adapters")
    assert set(read_sums(out)) == {ADAPTER_CONFIG, "adapter_model.safetensors"}
    with pytest.raises(UserError, match="adapters alone; give a model"):
        open_model(out)


def test_a_damaged_checkpoint_s_adapters_are_not_exported(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    step = Path(shutil.copytree(unbroken[1] / f"checkpoints/step_{jobs.STEPS}", tmp_path / "step_4"))
    for path in step.glob("*.distcp"):
        flip(path)
    with pytest.raises(UserError, match="damaged"):
        megatron_to_hf.convert(step, tmp_path / "out", weights="adapters")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_a_run_begins_with_merged_adapters_and_adds_its_own(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    """With another alpha than the default, which the checkpoint has to keep."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    job, first = unbroken
    step = first / f"checkpoints/step_{jobs.STEPS}"
    overrides = [f"model={step}", f"run_dir={tmp_path / 'run'}", "steps=1", "lora.rank=7", "lora.alpha=29"]
    jobs.finish(jobs.start("train", job, *overrides, "--verify-refit"))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("alpha: 29", "alpha: 14"))
    changed = [*overrides[:-1], "lora.alpha=14", "steps=2", "--resume"]
    config.write_text(config.read_text().replace("steps: 1\n", "steps: 2\n"))
    assert "was saved with lora.rank=7 lora.alpha=29: set that" in jobs.finish(jobs.start("train", job, *changed), 2)
    second = tmp_path / "run/checkpoints/step_1"
    megatron_to_hf.convert(step, tmp_path / "base")
    megatron_to_hf.convert(second, tmp_path / "adapters", weights="adapters")
    megatron_to_hf.convert(second, tmp_path / "merged")
    written = json.loads((tmp_path / "adapters" / ADAPTER_CONFIG).read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (7, 29, str(step))
    ids = torch.arange(5, 45)[None]
    base, merged = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("base", "merged"))
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapters"))(ids).logits
    assert torch.allclose(adapted, merged(ids).logits, atol=1e-5)
    assert (adapted - plain).abs().max() > 1e-4


def test_logits_of_megatron_s_model_with_adapters_are_those_of_the_exported_one(
    unbroken: tuple[Path, Path], tmp_path: Path
) -> None:
    step = unbroken[1] / f"checkpoints/step_{jobs.STEPS}"
    jobs.finish(jobs.start("convert", "megatron-to-hf", "--megatron", step, "--out", tmp_path / "merged"))
    command = ["convert", "verify", "--megatron", step, "--logits", "--hf"]
    assert "SAME" in jobs.finish(jobs.start(*command, tmp_path / "merged"))
    other = jobs.finish(jobs.start(*command, load(unbroken[0]).model), code=1)
    assert "tensors differ" in other


def test_a_checkpoint_without_adapters_or_with_a_damaged_list_is_refused(
    unbroken: tuple[Path, Path], tmp_path: Path
) -> None:
    step = Path(shutil.copytree(unbroken[1] / f"checkpoints/step_{jobs.STEPS}", tmp_path / "step_4"))
    path = step / "hf" / ADAPTER_CONFIG
    numbers = ("0", "1"), ("4", "NaN"), ("4", "null"), ("1e999", "1"), ("4.5", "1")
    for content in (
        *("{", "[]", '{"r": 4}'),
        *(f'{{"r": {r}, "lora_alpha": {alpha}, "base_model_name_or_path": ""}}' for r, alpha in numbers),
    ):
        path.write_text(content)
        write_sums(step)
        with pytest.raises(UserError, match="not a configuration of adapters"):
            open_model(step)
    path.write_text('{"r": 5, "lora_alpha": 1, "base_model_name_or_path": ""}')
    write_sums(step)
    with pytest.raises(UserError, match=r"has shape \[4, 4, 64\], config.json asks for \[4, 5, 64\]"):
        open_model(step)
    path.unlink()
    write_sums(step)
    with pytest.raises(UserError, match=r"_adapter.*is not one of Qwen3ForCausalLM"):
        open_model(step)


def test_adapters_are_asked_for_only_where_there_are_some(unbroken: tuple[Path, Path], tmp_path: Path) -> None:
    config = load(unbroken[0])
    hf_to_megatron.convert(Path(config.model), tmp_path / "megatron")
    with pytest.raises(UserError, match="has no adapters; leave --weights out"):
        megatron_to_hf.convert(tmp_path / "megatron", tmp_path / "out", weights="adapters")
    with pytest.raises(UserError, match=r"lora.alpha scales adapters, and there are none"):
        check(apply_overrides(config, ["lora.rank=0", "lora.alpha=3", "teacher.tp=1"]))
    with pytest.raises(UserError, match=r"lora.rank=65 is more than the rank of any matrix.*size is 64"):
        check(apply_overrides(config, ["lora.rank=65"]))
    check(apply_overrides(config, ["lora.rank=64"]))
    with pytest.raises(UserError, match=r"teacher.offload=true: this teacher has no weights of its own"):
        check(apply_overrides(config, ["teacher.offload=true"]))
    with pytest.raises(UserError, match=r"teacher.tp=3 does not divide"):
        check(apply_overrides(config, ["teacher.weights=ema"]))  # which has weights and a grid of its own
