"""Whole jobs against their replay: every step's metrics and samples, and every tensor that is exported at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from checkpoint_tools.megatron_to_hf import convert
from megatron_trd.launch import launch
from tests.checkpoint_tools.folders import tensors
from tests.models import write_model
from tests.training import jobs, recorder
from tests.training.replay import CHAT_TEMPLATE, EOS, Replay

OPTIMIZER: dict[str, Any] = {
    "lr": 2e-3,
    "min_lr_ratio": 0.1,
    "warmup_fraction": 0.5,
    "weight_decay": 0.2,
    "beta1": 0.8,
    "beta2": 0.9,
    "eps": 1e-4,  # with the usual 1e-8, an element whose gradient is nothing but rounding moves as far as any other
    "clip_grad": 3.0,
}
CASES: dict[str, dict[str, Any]] = {
    # TP 2 x DP 2, and a teacher over PP 2. One engine has the weights of both in turn.
    "trd-opsd": {
        "world_size": 4,
        "student": {"tp": 2, "micro_batch_size": 2},
        "teacher": {"weights": "ema", "ema_decay": 0.7, "pp": 2},
        "rollouts_per_problem": 2,
        "refinements_per_rollout": 1,
        "epochs_per_batch": 1,
        "loss": {"temperature": 1.0},
        "sampler": {"max_rollout_tokens": 24, "max_refinement_tokens": 24},
    },
    # PP 2, whose stages share one matrix as embedding and head, and a larger teacher over TP 2 with its own engine.
    "trd-opd": {
        "world_size": 2,
        "student": {"pp": 2, "micro_batch_size": 2},
        "teacher": {"weights": "frozen", "tp": 2},
        "rollouts_per_problem": 1,
        "refinements_per_rollout": 3,
        "epochs_per_batch": 2,
        "loss": {"temperature": 1.5},
        "sampler": {"max_rollout_tokens": 24, "max_refinement_tokens": 8},
    },
}


def write_job(folder: Path, method: str) -> dict[str, Any]:
    """Models, problems and `job.yaml` of a case; returns its settings."""
    # A padding token's embedding begins as zeros, through which gradients explode, and `transformers` never trains it.
    fields: dict[str, Any] = {"pad_token_id": None, "initializer_range": 0.06, "max_position_embeddings": 1024}
    fields["tie_word_embeddings"] = method == "trd-opd"
    write_model(folder / "teacher", seed=1, **fields | {"hidden_size": 128, "num_hidden_layers": 2})
    fixed = {"method": method, "run_dir": str(folder / "run"), "optimizer": OPTIMIZER, "held_out": {}, "checkpoint": {}}
    job = jobs.write_job(folder, fields=fields, **fixed, **CASES[method])
    settings: dict[str, Any] = yaml.safe_load(job.read_text())
    settings["data"] |= {"max_reference_tokens": 12, "shuffle": False, "chat_template_kwargs": {"begin": "1"}}
    settings["teacher"]["chat_template_kwargs"] = {}
    if method == "trd-opd":
        settings["teacher"] |= {"model": str(folder / "teacher"), "chat_template_kwargs": {"begin": "2"}}
        settings["data"]["overlong"] = "drop"
    job.write_text(yaml.safe_dump(settings))
    for weights in folder.glob("*/model.safetensors"):
        (weights.parent / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        content = load_file(weights)
        content.get("lm_head.weight", content["model.embed_tokens.weight"])[EOS] *= 2  # so that some responses end
        save_file(content, weights, {"format": "pt"})
    # Special tokens as text, references too long, and five problems in batches of three.
    rows = [{"problem": f"<eos>{n}+2?", "answer": "2", "solution": f"{n}+2={n + 2}" + "!" * n**2} for n in range(5)]
    Path(settings["data"]["path"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return settings


@pytest.mark.parametrize("method", CASES)
def test_a_run_is_its_replay(method: str, tmp_path: Path) -> None:
    settings = write_job(tmp_path, method)
    run, replay = Path(settings["run_dir"]), Replay(settings)
    launch([recorder.__file__, str(tmp_path / "job.yaml")], settings["world_size"], tmp_path / "logs")
    norms, ended = [], set()
    for step, row in enumerate(jobs.metrics(run)):
        trajectories = json.loads((run / f"sampled_{step}.json").read_text())["trajectories"]
        want = replay.step(step, trajectories)
        # Largest found in float32: 1e-5. The weights of another step give 1.
        assert want.pop("rollout") < 5e-5, step
        assert want.pop("refinement") < 5e-5, step
        assert {key: row[key] for key in want} == pytest.approx(want, rel=1e-5), step
        assert row["lr"] == pytest.approx(want["lr"], rel=1e-12), step
        norms.append(want["grad_norm"])
        ended |= {one["refinement"]["tokens"][-1] == EOS for one in trajectories}
    assert len(norms) == jobs.STEPS
    assert max(norms) > OPTIMIZER["clip_grad"], "some gradients are clipped"
    assert ended == {True, False}, "some responses are cut off"
    exported = {"model": replay.student} | ({"ema": replay.teacher} if method == "trd-opsd" else {})
    began = tensors(Path(settings["model"]))
    for weights, model in exported.items():
        convert(run / f"checkpoints/step_{jobs.STEPS}", tmp_path / "hf" / weights, weights=weights)
        found, expected = tensors(tmp_path / "hf" / weights), dict(model.named_parameters())
        assert found.keys() == expected.keys()
        # Norms are near 1, where each step rounds them by up to 6e-8, and move by 1e-3 or more in all.
        for name, tensor in expected.items():
            error = (found[name] - tensor).norm() / (tensor - began[name]).norm()
            assert error < 2e-4, (weights, name, float(error))
