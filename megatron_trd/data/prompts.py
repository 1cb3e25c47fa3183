"""Every prompt template, once, and how a prompt becomes token ids.

The same refinement prompt generates y_r and conditions the teacher in training. A rollout enters it as the very token
ids that were sampled: the text around it is tokenized in pieces and the ids are spliced in between, so nothing is
decoded and encoded again between sampler and trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any, Literal

from megatron_trd.errors import UserError

Context = Literal["vanilla", "reference", "refine", "refine_reference"]

_MATH_TASK = "Reason step by step, and put the final answer within \\boxed{}."
_CODE_TASK = "Reason step by step, and put the final program in one ```python block."

TEMPLATES: dict[str, dict[Context, str]] = {
    "math": {
        "vanilla": "$problem\n\n" + _MATH_TASK,
        "reference": "$problem\n\nReference solution:\n$reference\n\n"
        "Solve the problem in your own words. " + _MATH_TASK,
        "refine": "$problem\n\nInitial solution:\n$rollout\n\n"
        "Rewrite the initial solution: keep its structure and correct steps, fix every error. "
        "Output only the rewritten solution, with the final answer within \\boxed{}.",
        "refine_reference": "$problem\n\nReference solution:\n$reference\n\nInitial solution:\n$rollout\n\n"
        "Rewrite the initial solution to agree with the reference: keep its style and correct steps, fix every error. "
        "Output only the rewritten solution, with the final answer within \\boxed{}.",
    },
    "code": {
        "vanilla": "$problem\n\n" + _CODE_TASK,
        "reference": "$problem\n\nReference program:\n$reference\n\n"
        "Solve the problem in your own words. " + _CODE_TASK,
        "refine": "$problem\n\nInitial solution:\n$rollout\n\n"
        "Rewrite the initial solution: keep its structure and correct parts, and mend every bug, missed case and slow "
        "step. Output only the rewritten solution, with the program in one ```python block.",
        "refine_reference": "$problem\n\nReference program:\n$reference\n\nInitial solution:\n$rollout\n\n"
        "Rewrite the initial solution so that it passes wherever the reference passes: keep its structure and correct "
        "parts, mend every bug. Output only the rewritten solution, with the program in one ```python block.",
    },
}

# Stands for a part of the prompt while the chat template is applied; private-use characters no problem contains.
_MARK = "\ue000{}\ue000"


@dataclass(frozen=True)
class PromptBuilder:
    """Turns problems and rollouts into prompt token ids with the model's own chat template.

    A tokenizer without a chat template (a base model) gets the template's text as it stands.
    """

    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    task: str = "math"
    chat_template_kwargs: dict[str, Any] | None = None

    def text(self, context: Context, problem: str, reference: str | None = None, rollout: str | None = None) -> str:
        """The user message of a context, as text."""
        if reference is None and "reference" in context:
            raise UserError(
                f"a {context} prompt needs the problem's reference solution; set data.reference_field to its field"
            )
        parts = {"problem": problem, "reference": reference, "rollout": rollout}
        return Template(TEMPLATES[self.task][context]).substitute(parts)

    def ids(
        self,
        context: Context,
        problem: str,
        reference: str | None = None,
        rollout_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """Prompt token ids; `rollout_ids` are spliced in as they are, without their end-of-sequence token."""
        mark = _MARK.format("rollout")
        rendered = self._render(self.text(context, problem, reference, mark))
        if rollout_ids is None:
            return self._encode(rendered)
        before, _, after = rendered.partition(mark)
        return self._encode(before) + self.without_eos(rollout_ids) + self._encode(after, start=False)

    def without_eos(self, ids: Sequence[int]) -> list[int]:
        """Response ids without a trailing end-of-sequence token."""
        ids = list(ids)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def cut(self, text: str, tokens: int) -> str:
        """Text shortened by at least `tokens` tokens at its end (all of it, if it has no more)."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer.decode(ids[: max(0, len(ids) - tokens)])

    def _render(self, content: str) -> str:
        if not self.tokenizer.chat_template:
            return content
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            **(self.chat_template_kwargs or {}),
        )

    def _encode(self, text: str, start: bool = True) -> list[int]:
        """Ids of a piece of a prompt; a chat template writes its own special tokens, plain text gets them at `start`."""
        special = start and not self.tokenizer.chat_template
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
