"""Trains the demo's models from nothing: `python -m megatron_trd.demo.make_models [student|teacher]`.

What it wrote stands beside this file, in `models/`. The same seed, torch and thread count give the same weights.

The student stands for a base model that knows its arithmetic and writes carelessly: of the solutions it learned from,
as many as `slips` says have one wrong line, after which every line follows from the wrong value. It has also learned
to rewrite a solution, with and without a reference. The teacher of `--method trd-opd` is wider and deeper, and had
better texts. Neither has ever seen a wrong beginning continued towards the right answer: how a teacher with the
reference before its eyes goes on from a failed prefix is left to it, as in life.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_trd.data.prompts import Context, PromptBuilder
from megatron_trd.demo.task import STYLES, DemoProblem, corrupt, generate, mangle, own_solution
from megatron_trd.demo.tokenizer import make_tokenizer

MODELS = Path(__file__).parent / "models"
_PROBLEMS = 60_000  # all of the train split
_BATCH_TOKENS = 4096  # of sequences of one context
_IGNORED = -100


@dataclass(frozen=True)
class Making:
    """A model's shape and training data."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    slips: float  # share of wrong solutions among those for vanilla prompts
    mix: dict[Context, float]  # share of batches of each kind of prompt
    steps: int
    seed: int
    lr: float = 2e-3


MAKINGS = {
    "student": Making(
        hidden=128,
        layers=4,
        heads=4,
        ffn=384,
        slips=0.7,
        mix={"vanilla": 0.45, "reference": 0.1, "refine": 0.1, "refine_reference": 0.35},
        steps=2500,
        seed=0,
    ),
    "teacher": Making(
        hidden=160,
        layers=5,
        heads=6,
        ffn=448,
        slips=0.0,
        mix={"vanilla": 0.5, "refine": 0.5},
        steps=1500,
        seed=1,
    ),
}


def main() -> None:
    """Make the named models, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*MAKINGS, []], default=[])
    parser.add_argument("--out", type=Path, default=MODELS)
    options = parser.parse_args()
    for name in options.names or MAKINGS:
        _save(_train(MAKINGS[name]), options.out / name)


def _train(making: Making) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(making.seed)
    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=making.hidden,
            intermediate_size=making.ffn,
            num_hidden_layers=making.layers,
            num_attention_heads=making.heads,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=tokenizer.model_max_length,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    rng = random.Random(making.seed)
    problems = generate(_PROBLEMS, seed=making.seed)
    prompts = PromptBuilder(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=making.lr, weight_decay=0.01, betas=(0.9, 0.98))
    for step in range(making.steps):
        progress = step / making.steps
        rate = min(1.0, step / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        optimizer.param_groups[0]["lr"] = making.lr * rate
        context = rng.choices(list(making.mix), weights=list(making.mix.values()))[0]
        texts: list[tuple[list[int], list[int]]] = []
        while sum(len(prompt) + len(response) for prompt, response in texts) < _BATCH_TOKENS:
            texts.append(_text(making, context, rng.choice(problems), rng, prompts))
        tokens, labels = _batch(texts)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}/{making.steps}  {context}  loss {loss.item():.4f}", flush=True)
    return model, tokenizer


def _text(
    making: Making, context: Context, problem: DemoProblem, rng: random.Random, prompts: PromptBuilder
) -> tuple[list[int], list[int]]:
    """Prompt and response token ids of one example."""
    style = rng.choice(STYLES)
    right = own_solution(problem, style)
    rollout: str | None = None
    response = right
    if context == "vanilla" and rng.random() < making.slips:
        response, _ = corrupt(problem, style, rng)
    if "refine" in context:
        kind = rng.random()
        rollout = (
            right if kind < 0.3 else mangle(problem, style, rng) if kind < 0.6 else corrupt(problem, style, rng)[0]
        )
    tokenizer = prompts.tokenizer
    shown = None if rollout is None else tokenizer(rollout, add_special_tokens=False)["input_ids"]
    prompt = prompts.ids(context, problem.problem, problem.solution, shown)
    answer = tokenizer(response, add_special_tokens=False)["input_ids"]
    return prompt, [*answer, tokenizer.eos_token_id]


def _batch(texts: Sequence[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded tokens `[batch, length]` and the labels, for the responses only."""
    length = max(len(prompt) + len(response) for prompt, response in texts)
    tokens = torch.zeros(len(texts), length, dtype=torch.long)
    labels = torch.full((len(texts), length), _IGNORED)
    for row, (prompt, response) in enumerate(texts):
        end = len(prompt) + len(response)
        tokens[row, :end] = torch.tensor(prompt + response)
        labels[row, len(prompt) : end] = torch.tensor(response)
    return tokens, labels


def _save(made: tuple[Any, Any], folder: Path) -> None:
    model, tokenizer = made
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
