"""However a step is sampled, its tokens are the same: streamed or in two phases, cramped, or after an engine died."""

from __future__ import annotations

import dataclasses
import math
import weakref
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_trd.config import from_dict
from megatron_trd.data.problems import Problem
from tests.distributed import run_ranks
from tests.models import write_model

PROBLEMS = 14


def schedule_ahead() -> None:
    """Have vLLM plan a step while another runs, as on a GPU, so that two are under way. On a CPU it decides not to."""
    from vllm.platforms.cpu import CpuPlatform

    decide = CpuPlatform.check_and_update_config

    def decide_otherwise(config: Any) -> None:
        decide(config)
        config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(decide_otherwise)


def stream_ranks(rank: int, world: int, model: str, ahead: bool) -> dict[str, Any]:
    """Rank function: the same step, sampled in every way."""
    from megatron_trd import platform
    from megatron_trd.engines.engine import Engine
    from megatron_trd.engines.sampler import EngineDied, Sampler, _Group
    from megatron_trd.models.model import open_model

    platform.current().set_up()
    if ahead:
        schedule_ahead()
    values = {"model": model, "sampler": {"max_rollout_tokens": 40, "max_refinement_tokens": 40}}
    config = from_dict(values, "test")
    opened = open_model(model)
    engine = Engine(opened, config, max_length=128, sleeps=True)
    engine.refit(opened.source)
    assert engine.llm.llm_engine.engine_core.engine_core.batch_queue_size == 1 + ahead
    problems = [Problem(index, "", None, None) for index in range(PROBLEMS)]
    prompts = [[5, 6 + index, 7 + index] for index in range(PROBLEMS)]

    def refine(problem: Problem, rollout: Any) -> list[int] | None:
        return None if problem.index == 3 else [9, *rollout.tokens, 10]

    def sample(refinements: int = 1, **settings: Any) -> tuple[list[Any], dict[str, float]]:
        changed = dataclasses.replace(
            config,
            refinements_per_rollout=refinements,
            sampler=dataclasses.replace(config.sampler, **settings),
        )
        sampler = Sampler(changed, engine, engine)
        return sampler.sample(0, problems, prompts, refine), sampler.stats

    found = {
        "streamed": sample(),
        "two phases": sample(stream=False),
        "few at once": sample(max_sequences=2),
        "few tokens": sample(max_running_tokens=150),
        "several": sample(refinements=3),
        "overdue": None,
    }
    # Requests that run for too long, once: at the second meeting of the groups, all that run then.
    report, meetings = _Group.report, []

    def late(group: _Group, timeout: float | None) -> Any:
        meetings.append(len(group.running))
        if len(meetings) == 2:
            group.running = {name: (task, -math.inf) for name, (task, _) in group.running.items()}
        return report(group, timeout)

    with mock.patch.object(_Group, "report", late):
        found["begun anew"] = sample(request_timeout=1e6)
    found["late"] = meetings[1]
    assert not engine.busy, "what was begun anew does not run twice"
    # Weights that change amid the sampling do so once, when nothing runs, and only if there is something to refine.
    found["changes"], nothing = [], []
    changing, note = Sampler(config, engine, engine), found["changes"]
    trajectories = changing.sample(0, problems, prompts, refine, None, lambda: note.append(engine.busy))
    found["changed"] = trajectories, changing.stats
    changing.sample(0, problems, prompts, lambda *_: None, None, lambda: nothing.append(engine.busy))
    assert nothing == []
    # Asleep while others train. On a CPU vLLM keeps the memory, all else is as on a GPU.
    engine.sleep()
    assert engine.empty
    assert engine.llm.llm_engine.is_sleeping()
    engine.wake("weights")
    engine.refit(opened.source)
    engine.wake("kv_cache")
    assert not engine.llm.llm_engine.is_sleeping()
    found["slept"] = sample()
    # An engine that fails on one rank, in the middle of the step: known to all, and made good by new engines.
    step, calls = engine.llm.llm_engine.step, 0

    def failing() -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls >= 20:
            raise RuntimeError("killed" if calls == 20 else "stepped after its death")
        return step()

    sampler = Sampler(config, engine, engine)
    [old] = engine.llm.apply_model(lambda model: [weakref.ref(parameter) for parameter in model.parameters()])
    with mock.patch.object(engine.llm.llm_engine, "step", failing), pytest.raises(EngineDied) as death:
        sampler.sample(0, problems, prompts, refine)
    found["death"] = str(death.value)
    sampler.restart()
    assert engine.empty
    assert not any(parameter() for parameter in old), "an engine that sleeps is to have its process for itself"
    engine.refit(opened.source)
    found["restarted"] = sampler.sample(0, problems, prompts, refine), sampler.stats
    # A request that takes longer than it may is begun anew, once.
    try:
        sample(request_timeout=1e-6)
    except EngineDied as error:
        found["overdue"] = str(error)
    return found


def tokens(trajectories: list[Any]) -> list[Any]:
    return [
        (one.problem.index, one.rollout.tokens, one.refine_prompt, one.refinement and one.refinement.tokens)
        for one in trajectories
    ]


@pytest.mark.parametrize("ahead", [False, True])
def test_the_same_tokens_however_they_are_sampled(tmp_path: Path, ahead: bool) -> None:
    model = write_model(tmp_path / "model")
    ranks = run_ranks(stream_ranks, 2, str(model), ahead)
    assert tokens(ranks[0]["streamed"][0]) == tokens(ranks[1]["streamed"][0]), "every rank has every trajectory"
    found = ranks[0]
    streamed = tokens(found["streamed"][0])
    assert [index for index, *_ in streamed] == list(range(PROBLEMS))
    assert len({len(rollout) for _, rollout, *_ in streamed}) > 1, "rollouts end at different times"
    for way in ("two phases", "few at once", "few tokens", "begun anew", "changed", "slept", "restarted"):
        assert tokens(found[way][0]) == streamed, way
    several = tokens(found["several"][0])
    assert len(several) == 3 * PROBLEMS - 2, "but for the one without a refinement prompt"
    first = {index: rest for index, *rest in reversed(several)}
    assert [(index, *rest) for index, rest in sorted(first.items())] == streamed
    per_rollout = [refined for index, *_, refined in several if index == 0]
    assert len(set(per_rollout)) == 3, "each refinement has its own seed"
    assert [rank["changes"] for rank in ranks] == [[False], [False]]
    assert "killed" in found["death"]
    assert ranks[0]["death"] == ranks[1]["death"]
    assert "twice" in found["overdue"]
    assert found["begun anew"][1]["sampler/retried"] == sum(rank["late"] for rank in ranks) > 0
    stats = found["few at once"][1]
    assert stats["sampler/preemptions"] == 0
    assert 0 <= stats["sampler/idle_queued"] <= stats["sampler/idle"] < 1
