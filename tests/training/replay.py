"""A whole run computed again in float64 by `transformers` and torch, as docs/method.md and docs/data.md describe it.

Only what was sampled is taken from the run, and of the product only the wording of the prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_trd.data.prompts import TEMPLATES, Context
from tests.engines.reference import forward_kl, load, response_logits

PAD, EOS = 0, 1
CHAT_TEMPLATE = "<pad>{{ messages[0]['content'] }}<eos>{% if add_generation_prompt %}answer:{{ begin }}{% endif %}"
CONTEXTS: dict[str, Context] = {"trd-opd": "refine", "trd-opsd": "refine_reference"}


class Replay:
    """Student, teacher and optimizer of a run with these settings, which name everything that is used here."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings, self.updates = settings, 0
        self.student = load(Path(settings["model"]))
        self.teacher = load(Path(settings["teacher"].get("model", settings["model"]))).requires_grad_(False)
        self.parameters = list(self.student.parameters())
        self.moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in self.parameters]
        self.problems = [json.loads(line) for line in Path(settings["data"]["path"]).read_text().splitlines()]
        self.vocabulary = json.loads(Path(settings["model"], "tokenizer.json").read_text())["model"]["vocab"]

    def step(self, step: int, trajectories: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Train on the trajectories of a step (from 0), in the problems' order. Returns the step's metrics.

        `rollout` and `refinement` among them are the largest difference, over all such tokens, between the sampler's
        log-probability and that of the student or teacher as it was when the step began.
        """
        settings, trained = self.settings, []
        differences: dict[str, list[float]] = {"rollout": [], "refinement": []}
        repeats = settings["rollouts_per_problem"] * settings["refinements_per_rollout"]
        assert len(trajectories) == settings["batch_size"] * repeats
        for number, trajectory in enumerate(trajectories):
            problem = self.problems[(step * settings["batch_size"] + number // repeats) % len(self.problems)]
            question = self.prompt("vanilla", problem)
            shown = self.prompt(CONTEXTS[settings["method"]], problem, trajectory["rollout"]["tokens"])
            for key, model, prompt in (("rollout", self.student, question), ("refinement", self.teacher, shown)):
                differences[key].append(difference(model, prompt, trajectory[key]))
            refinement = trajectory["refinement"]["tokens"]
            if settings["data"]["overlong"] == "cut" or refinement[-1] == EOS:
                trained.append((question, shown, refinement))
        first, *_ = [self.train(trained) for _ in range(settings["epochs_per_batch"])]
        counts = {"samples/trained": len(trained), "tokens/trained": sum(len(tokens) for *_, tokens in trained)}
        return first | counts | {key: torch.tensor(found).max().item() for key, found in differences.items()}

    def prompt(self, context: Context, problem: dict[str, str], rollout: Sequence[int] = ()) -> list[int]:
        """A user's message in the chat template, with a rollout as it was sampled, but for the token that ended it.
        A token of these tokenizers is a character."""
        reference = problem["solution"][: self.settings["data"]["max_reference_tokens"]]
        text = TEMPLATES["math"][context].replace("$problem", problem["problem"]).replace("$reference", reference)
        before, _, after = text.partition("$rollout")
        of_teacher = {} if context == "vanilla" else self.settings["teacher"]["chat_template_kwargs"]
        answer = "answer:" + (self.settings["data"]["chat_template_kwargs"] | of_teacher)["begin"]
        head, tail, answered = ([self.vocabulary[letter] for letter in part] for part in (before, after, answer))
        return [PAD, *head, *(token for token in rollout if token != EOS), *tail, EOS, *answered]

    def train(self, trained: Sequence[tuple[list[int], list[int], list[int]]]) -> dict[str, float]:
        """One optimizer step, after which an averaged teacher follows."""
        optimizer, teacher, divergences = self.settings["optimizer"], self.settings["teacher"], []
        for question, shown, tokens in trained:
            logits = response_logits(self.teacher, shown, tokens), response_logits(self.student, question, tokens)
            divergences.append(forward_kl(*(side / self.settings["loss"]["temperature"] for side in logits)))
        loss = torch.stack([tokens.mean() for tokens in divergences]).mean()
        gradients = torch.autograd.grad(loss, self.parameters)
        norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
        self.updates += 1
        with torch.no_grad():
            for parameter, gradient, (mean, square) in zip(self.parameters, gradients, self.moments, strict=True):
                clipped = gradient * min(1.0, optimizer["clip_grad"] / norm)
                mean.mul_(optimizer["beta1"]).add_((1 - optimizer["beta1"]) * clipped)
                square.mul_(optimizer["beta2"]).add_((1 - optimizer["beta2"]) * clipped.square())
                root = (square / (1 - optimizer["beta2"] ** self.updates)).sqrt() + optimizer["eps"]
                decay = optimizer["weight_decay"] if parameter.dim() > 1 else 0.0  # norms do not decay
                parameter.mul_(1 - self.rate * decay)
                parameter.sub_(self.rate * mean / (1 - optimizer["beta1"] ** self.updates) / root)
            if teacher["weights"] == "ema":
                for average, parameter in zip(self.teacher.parameters(), self.parameters, strict=True):
                    average.copy_(teacher["ema_decay"] * average + (1 - teacher["ema_decay"]) * parameter)
        mean_of_all = torch.cat(divergences).mean().item()
        return {"loss": loss.item(), "divergence/mean": mean_of_all, "grad_norm": norm, "lr": self.rate}

    @property
    def rate(self) -> float:
        """The learning rate of the present update."""
        settings, total = self.settings["optimizer"], self.settings["steps"] * self.settings["epochs_per_batch"]
        warm = round(settings["warmup_fraction"] * total)
        if self.updates <= warm:
            return float(settings["lr"] * self.updates / warm)
        falling = (1 + math.cos(math.pi * (self.updates - warm) / (total + 1 - warm))) / 2
        return float(settings["lr"] * (settings["min_lr_ratio"] + (1 - settings["min_lr_ratio"]) * falling))


@torch.no_grad()
def difference(model: torch.nn.Module, prompt: list[int], sampled: dict[str, Any]) -> float:
    """The largest difference between the sampler's log-probabilities of a response's tokens and those of a model."""
    logits = response_logits(model, prompt, sampled["tokens"])
    found = logits.log_softmax(-1)[range(len(logits)), sampled["tokens"]]
    return (found - torch.tensor(sampled["log_probs"])).abs().max().item()
