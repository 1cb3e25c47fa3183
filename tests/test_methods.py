"""The table of methods is the table of the design (DESIGN section 2, FACTS E)."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from megatron_trd import losses
from megatron_trd.config import LossConfig, MethodName, from_dict
from megatron_trd.data.prompts import TEMPLATES, Context
from megatron_trd.methods import METHODS, unused_settings
from megatron_trd.training.command import describe
from recipes.common import find_recipe, recipe_names

# name -> trajectory, teacher context, divergence, clipped, top-k, refines, needs a reference solution
TABLE = {
    "trd-opd": ("refined", "refine", "forward_kl", False, False, True, False),
    "trd-opsd": ("refined", "refine_reference", "forward_kl", False, False, True, True),
    "opd-forward-kl": ("raw", "vanilla", "forward_kl", False, False, False, False),
    "opd-forward-kl-clip": ("raw", "vanilla", "forward_kl", True, False, False, False),
    "opd-reverse-kl": ("raw", "vanilla", "reverse_kl", False, False, False, False),
    "opd-reverse-kl-topk": ("raw", "vanilla", "reverse_kl", False, True, False, False),
    "opsd-forward-kl": ("raw", "reference", "forward_kl", False, False, False, True),
    "opsd-forward-kl-clip": ("raw", "reference", "forward_kl", True, False, False, True),
    "opsd-reverse-kl": ("raw", "reference", "reverse_kl", False, False, False, True),
    "opsd-reverse-kl-topk": ("raw", "reference", "reverse_kl", False, True, False, True),
    "opsd-jsd": ("raw", "reference", "jsd", False, False, False, True),
}


def test_every_method_name_has_a_row_and_no_row_lacks_a_name() -> None:
    assert set(METHODS) == set(get_args(MethodName)) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_row_is_the_design_s(name: MethodName) -> None:
    method = METHODS[name]
    found = (method.trajectory, method.teacher_context, method.divergence.kind)
    found += (method.divergence.clipped, method.divergence.top_k, method.refines, method.needs_reference)
    assert found == TABLE[name]


def test_every_teacher_context_is_used_and_known() -> None:
    assert {method.teacher_context for method in METHODS.values()} == set(get_args(Context))
    assert all(set(templates) == set(get_args(Context)) for templates in TEMPLATES.values())


@pytest.mark.parametrize("name", TABLE)
def test_divergence_passes_only_the_numbers_it_uses(name: MethodName) -> None:
    numbers = LossConfig(temperature=2.0, beta=0.25, clip=0.3, top_k=7, tail=True)
    *_, kind, clipped, top_k, _, _ = TABLE[name]
    assert METHODS[name].divergence.arguments(numbers) == {
        "divergence": kind,
        "beta": 0.25,
        "temperature": 2.0,
        "clip": 0.3 if clipped else None,
        "top_k": 7 if top_k else None,
        "tail": top_k,
    }


def test_arguments_are_parameters_of_the_loss() -> None:
    parameters = inspect.signature(losses.fused_linear_divergence).parameters
    assert METHODS["trd-opsd"].divergence.arguments(LossConfig()).keys() <= parameters.keys()


EVERYTHING: dict[str, dict[str, object]] = {
    "loss": {"beta": 0.3, "clip": 0.2, "top_k": 8, "tail": True},
    "teacher": {"ema_decay": 0.5},
    "optimizer": {"min_lr_ratio": 0.1, "schedule": "constant"},
    "held_out": {"every": 5, "samples": 2},
}
SAID = {
    "loss.beta=0.3",
    "loss.clip=0.2",
    "loss.top_k=8",
    "loss.tail=True",
    "refinements_per_rollout=2",
    "teacher.ema_decay=0.5",
    "optimizer.min_lr_ratio=0.1",
    "held_out.every=5",
    "held_out.samples=2",
}
# The setting whose effect each of these brings about.
EFFECTS: list[tuple[dict[str, object], set[str]]] = [
    ({"method": "opsd-jsd"}, {"loss.beta=0.3"}),
    ({"method": "opsd-forward-kl-clip"}, {"loss.clip=0.2"}),
    ({"method": "opd-reverse-kl-topk"}, {"loss.top_k=8", "loss.tail=True"}),
    ({"method": "trd-opd"}, {"refinements_per_rollout=2"}),
    ({"method": "opsd-reverse-kl"}, set()),
    ({"method": "opsd-reverse-kl", "teacher": {"weights": "ema", "ema_decay": 0.5}}, {"teacher.ema_decay=0.5"}),
    ({"method": "opsd-reverse-kl", "optimizer": {"min_lr_ratio": 0.1}}, {"optimizer.min_lr_ratio=0.1"}),
    (
        {"method": "opsd-reverse-kl", "held_out": {"path": "test.jsonl", "every": 5, "samples": 2}},
        {"held_out.every=5", "held_out.samples=2"},
    ),
]


@pytest.mark.parametrize(("values", "used"), EFFECTS)
def test_settings_without_effect_are_said(values: dict[str, object], used: set[str]) -> None:
    config = from_dict(EVERYTHING | {"refinements_per_rollout": 2} | values, "test")
    assert set(unused_settings(config)) == SAID - used
    line = f"without effect in this run: {unused_settings(config)[0]}"
    assert line in describe(config, 2)


def test_no_recipe_has_a_setting_without_effect() -> None:
    for name in recipe_names():
        assert not unused_settings(find_recipe(name)), name
        assert "\n" not in describe(find_recipe(name), 2)
