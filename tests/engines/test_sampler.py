"""The real vLLM engine in every rank: greedy tokens equal `transformers`, before and after a refit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_trd.config import TrainConfig, from_dict
from megatron_trd.data.problems import Problem
from megatron_trd.engines.sampler import _Step
from megatron_trd.engines.work import Task
from tests.distributed import run_ranks
from tests.engines import reference
from tests.models import write_model

# The last one fills blocks of the prefix cache, which are of the weights that computed them.
PROMPTS = [*([5, 6, 7 + index] for index in range(4)), [5 + index * index % 80 for index in range(300)]]
ROLLOUT, REFINEMENT = 12, 8  # tokens


def refine(problem: Problem, rollout: Any) -> list[int] | None:
    return None if problem.index == 3 else [9, *rollout.tokens, 10]


# Problems, prompts, and the refinement's prompt: what a sampler is asked.
ASKED = [Problem(index, "", None, None) for index in range(len(PROMPTS))], PROMPTS, refine


def make_config(model: str, student: dict[str, Any], *, sampler_tp: int, temperature: float) -> TrainConfig:
    values = {
        "model": model,
        "student": student,
        "sampler": {
            "tp": sampler_tp,
            "temperature": temperature,
            "max_rollout_tokens": ROLLOUT,
            "max_refinement_tokens": REFINEMENT,
        },
    }
    return from_dict(values, "test")


def sample_ranks(
    rank: int, world: int, model: str, other: str, student_settings: dict[str, Any], sampler_tp: int
) -> dict[str, Any]:
    """Rank function: greedy trajectories from the folder's weights, then from another model's after refit."""
    from megatron_trd import platform
    from megatron_trd.engines import refit
    from megatron_trd.engines.engine import Engine
    from megatron_trd.engines.sampler import Sampler
    from megatron_trd.engines.student import StudentEngine
    from megatron_trd.models import loading
    from megatron_trd.models.model import open_model
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()
    greedy = make_config(model, student_settings, sampler_tp=sampler_tp, temperature=0.0)
    grid = student_grid(greedy.student.tp, greedy.student.pp, greedy.student.ep, seed=0)
    opened = open_model(model)
    arch = opened.arch
    student = StudentEngine(greedy, opened, grid)
    engine = Engine(opened, greedy, max_length=320)
    engine.refit(opened.source)
    found = {"before": Sampler(greedy, engine, engine).sample(0, *ASKED)}
    loading.load(loading.local_parameters(student.model, arch, grid), arch, grid, open_model(other).source)
    found["stale"] = refit.verify(engine.llm, arch, student.source())
    engine.refit(student.source())
    found["fresh"] = refit.verify(engine.llm, arch, student.source())
    found["after"] = Sampler(greedy, engine, engine).sample(1, *ASKED)
    random = make_config(model, student_settings, sampler_tp=sampler_tp, temperature=1.0)
    found["random"] = [Sampler(random, engine, engine).sample(step, *ASKED) for step in (2, 2, 3)]
    other_seed = replace(random, seed=random.seed + 1)
    found["other seed"] = Sampler(other_seed, engine, engine).sample(2, *ASKED)
    nucleus = replace(random, sampler=replace(random.sampler, top_p=1e-6))
    found["nucleus"] = Sampler(nucleus, engine, engine).sample(2, *ASKED)
    best = replace(random, sampler=replace(random.sampler, top_k=1))
    found["best"] = Sampler(best, engine, engine).sample(2, *ASKED)
    return found


def greedy_tokens(model: torch.nn.Module, prompt: Sequence[int], count: int) -> tuple[tuple[int, ...], list[float]]:
    """Greedy continuation with end-of-sequence, and its log-probabilities, by `transformers`."""
    tokens, log_probs = list(prompt), []
    for _ in range(count):
        row = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
        tokens.append(int(row.argmax()))
        log_probs.append(row.max().item())
        if tokens[-1] == 1:
            break
    return tuple(tokens[len(prompt) :]), log_probs


def check_greedy(trajectories: Sequence[Any], folder: Path) -> None:
    model = reference.load(folder).float()
    for index, trajectory in enumerate(trajectories):
        tokens, log_probs = greedy_tokens(model, PROMPTS[index], ROLLOUT)
        assert trajectory.rollout.tokens == tokens
        assert trajectory.rollout.log_probs == pytest.approx(log_probs, abs=1e-4)
        assert trajectory.rollout.truncated == (tokens[-1] != 1)
        if index == 3:  # its refinement prompt was dropped
            assert trajectory.refinement is None
            continue
        assert trajectory.refinement.tokens == greedy_tokens(model, trajectory.refine_prompt, REFINEMENT)[0]


@pytest.mark.parametrize(
    ("ranks", "family", "student", "sampler_tp", "tied"),
    [
        (4, "qwen3", {"tp": 2, "pp": 2}, 1, False),
        (4, "qwen3", {"tp": 2, "pp": 2}, 2, True),
        (2, "qwen2", {"tp": 2}, 2, False),
        (2, "llama", {"pp": 2}, 1, True),
        (2, "qwen3_moe", {"ep": 2}, 1, False),
        (2, "qwen3_moe", {"tp": 2, "ep": 2, "sequence_parallel": True}, 2, True),
    ],
)
def test_greedy_refit_and_seeds(
    tmp_path: Path, ranks: int, family: str, student: dict[str, Any], sampler_tp: int, tied: bool
) -> None:
    fields = {"hidden_size": 128} if family == "qwen2" else {}  # vLLM takes its head size from it
    first, second = (
        write_model(tmp_path / name, family=family, seed=seed, tie_word_embeddings=tied, **fields)
        for seed, name in enumerate(("first", "second"))
    )
    found, *others = run_ranks(sample_ranks, ranks, str(first), str(second), student, sampler_tp)
    assert all(other["before"] == found["before"] for other in others), "every rank has every trajectory"
    check_greedy(found["before"], first)
    check_greedy(found["after"], second)
    assert list(found["stale"].values()).count(False) > 20, "the check must see weights that were not refit"
    stored = load_file(first / "model.safetensors").keys()
    assert found["stale"].keys() == found["fresh"].keys() == stored | {"lm_head.weight"}, "also where it is tied"
    assert all(found["fresh"].values())
    again, repeat, other = found["random"]
    assert again == repeat, "a step's tokens are a function of its seeds"
    assert again != other
    assert found["other seed"] != again, "and of the run's"
    greedy, nucleus, best = ([one.rollout.tokens for one in found[how]] for how in ("after", "nucleus", "best"))
    assert greedy == nucleus == best, "of the smallest nucleus, and of one token, the most probable is left"


def sample_under_pressure(rank: int, world: int, model: str) -> list[tuple[int, int]]:
    """Rank function: requests put back so far in each of two engines, of which the first works, and then the second."""
    from megatron_trd import platform
    from megatron_trd.engines.engine import Engine
    from megatron_trd.engines.work import Task
    from megatron_trd.models.model import open_model

    current, opened = platform.current(), open_model(model)
    current.set_up()
    config = make_config(model, {}, sampler_tp=1, temperature=1.0)
    arguments, few = current.sampler_arguments, {"num_gpu_blocks_override": 6}
    with mock.patch.object(current, "sampler_arguments", lambda *a, **k: arguments(*a, **k) | few):
        engines = [Engine(opened, config, 320, alone=False) for _ in range(2)]
    found = []
    for engine in engines:
        for index in range(6):
            engine.add(Task("rollout", index, 0, tuple(range(5, 80)), 200), index, config.sampler)
        while engine.busy:
            list(engine.step())
        engine.llm.llm_engine.do_log_stats()  # as vLLM does every ten seconds, whatever its loggers are
        found.append((engines[0].preemptions, engines[1].preemptions))
    return found


def test_each_engine_counts_the_requests_that_it_put_back(tmp_path: Path) -> None:
    """vLLM's own counter is that of the engine made last."""
    model = write_model(tmp_path / "model", max_position_embeddings=512)
    [[(first, none), (before, second)]] = run_ranks(sample_under_pressure, 1, str(model))
    assert first == before > 0
    assert none == 0 < second


def test_every_request_has_a_seed_of_its_own() -> None:
    """With one in common, two samples of a problem could be one text twice, or a step's those of another."""
    engine: Any = mock.Mock()
    for seed, step in itertools.product(range(2), range(2)):
        config = from_dict({"seed": seed}, "test")
        sampler: Any = SimpleNamespace(config=config, settings=config.sampler, student=engine, teacher=engine)
        problems = [Problem(4, "", None, None)] * 2
        begun = _Step(sampler, step, problems, [[5], [5]], None, None, None)
        refinements = [Task("refinement", index, number, (5,), 9) for index in range(2) for number in range(2)]
        for task in (*begun.waiting, *refinements):
            begun._begin(task)
    seeds = [call.args[1] for call in engine.add.call_args_list]
    assert len(set(seeds)) == len(seeds) == 2 * 2 * (2 + 2 * 2)
