"""Refit raises where an engine would be left with other weights than the model's; real ones: `test_sampler.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_trd.engines import refit
from megatron_trd.models import weights
from tests.weights.test_mapping import architecture

ARCH = architecture()


def tensors(slot: weights.Slot) -> list[torch.Tensor]:
    return [torch.ones(shape) for shape in slot.shapes]


def make_engine() -> refit._Engine:
    """An engine of one rank as vLLM would have it, with nothing in it."""
    slots = weights.exported_slots(ARCH)
    return refit._Engine(
        {refit._engine_name(slot): torch.nn.Parameter(torch.zeros(slot.whole)) for slot in slots}, 0, 1
    )


def test_a_parameter_that_no_tensor_fills_is_named() -> None:
    engine = make_engine()
    engine.parameters["model.layers.0.self_attn.sinks"] = torch.nn.Parameter(torch.zeros(4))
    llm: Any = SimpleNamespace(apply_model=lambda _: [engine])
    with pytest.raises(RuntimeError, match=r"no refit reaches: model\.layers\.0\.self_attn\.sinks$"):
        refit.refit(llm, ARCH, tensors)


@torch.no_grad()
def test_a_parameter_of_which_a_part_is_missing_is_named() -> None:
    engine = make_engine()
    for slot in weights.exported_slots(ARCH):
        pieces = weights.uncut(tensors(slot))
        name, parameter = refit._filled(slot, pieces, engine, ARCH)
        assert parameter.eq(1).all()
        with pytest.raises(RuntimeError, match=rf"{name}: {parameter.numel()} values in the engine"):
            refit._filled(slot, pieces[1:], engine, ARCH)
