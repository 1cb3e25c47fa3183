"""All prompt templates, and the conversion of prompts to token ids.

The same refinement prompt generates y_r and conditions the teacher in training. A rollout enters it as exactly the
token ids that were sampled, without the one that ended it: the text around it is tokenized in pieces and the ids are
spliced in between, so nothing is decoded and re-encoded between sampler and trainer. Only the chat template writes
special tokens: the text `<|im_end|>` in a problem is encoded as characters, not as the token that would end the user's
turn.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import TYPE_CHECKING, Any, Literal, Self

from megatron_trd.config import DataConfig
from megatron_trd.errors import UserError, line_of

if TYPE_CHECKING:
    from megatron_trd.models.folder import ModelFolder

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
        "reference": "$problem\n\nReference program:\n$reference\n\nSolve the problem in your own words. " + _CODE_TASK,
        "refine": "$problem\n\nInitial solution:\n$rollout\n\n"
        "Rewrite the initial solution: keep its structure and correct parts, and mend every bug, missed case and slow "
        "step. Output only the rewritten solution, with the program in one ```python block.",
        "refine_reference": "$problem\n\nReference program:\n$reference\n\nInitial solution:\n$rollout\n\n"
        "Rewrite the initial solution so that it passes wherever the reference passes: keep its structure and correct "
        "parts, mend every bug. Output only the rewritten solution, with the program in one ```python block.",
    },
}

# Prefixes that stand for a leading space in a token: SentencePiece's, and a byte-level tokenizer's.
_SPACES = ("\u2581", "\u0120")

# Llama 3's chat templates write today's date unless given another. A run that is resumed the next day, or whose ranks
# start around midnight, must keep its prompts. This is the date that the templates themselves fall back to.
_DATE = datetime.date(2024, 7, 26)

# Stands for the user message while the chat template is applied.
_MARK = "\ue000message\ue000"


@dataclass(frozen=True)
class PromptBuilder:
    """Turns problems and rollouts into prompt token ids with the model's own chat template.

    For a tokenizer without a chat template (a base model), the prompt template's text is used as it stands.
    """

    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    task: str = "math"
    chat_template_kwargs: dict[str, Any] | None = None

    @classmethod
    def of(cls, model: ModelFolder, data: DataConfig, chat_template_kwargs: Mapping[str, Any] | None = None) -> Self:
        """A builder of the prompts that `data` configures, for a model's tokenizer.

        `chat_template_kwargs` of this model take precedence over those of `data`.
        Raises `UserError` for a tokenizer that begins every text with a space: each piece of a prompt would have one.
        """
        builder = cls(model.tokenizer, data.task, data.chat_template_kwargs | dict(chat_template_kwargs or {}))
        (first, *_) = builder.tokenizer.convert_ids_to_tokens(builder._encode("a")) or [""]
        if first.startswith(_SPACES):
            raise UserError(
                f"model folder '{model.path}': its tokenizer makes {first!r} of 'a', a space before every text, so the "
                "pieces of a prompt cannot be encoded apart; take a model whose tokenizer adds none, as those of Qwen "
                "2.5 and 3, Llama 3 and SmolLM2"
            )
        return builder

    def text(self, context: Context, problem: str, reference: str | None = None, rollout: str | None = None) -> str:
        """The user message of a context, as text."""
        parts = self._parts(context, problem, reference) | {"rollout": rollout or ""}
        return Template(TEMPLATES[self.task][context]).substitute(parts)

    def _parts(self, context: Context, problem: str, reference: str | None) -> dict[str, str]:
        if reference is None and "reference" in context:
            raise UserError(
                f"a {context} prompt needs the problem's reference solution; set data.reference_field to its field"
            )
        return {"problem": problem, "reference": reference or ""}

    def ids(
        self,
        context: Context,
        problem: str,
        reference: str | None = None,
        rollout_ids: Sequence[int] | None = None,
    ) -> list[int]:
        """Prompt token ids; `rollout_ids` are spliced in unchanged."""
        if (rollout_ids is not None) != ("refine" in context):
            raise ValueError(f"a {context} prompt {'shows no' if rollout_ids is not None else 'needs the'} rollout")
        before, _, after = TEMPLATES[self.task][context].partition("$rollout")
        parts = self._parts(context, problem, reference)
        head, tail = self._frame
        return [
            *self._encode(head, special=True),
            *self._encode(Template(before).substitute(parts), start=not self.tokenizer.chat_template),
            *(rollout_ids or ()),
            *self._encode(Template(after).substitute(parts)),
            *self._encode(tail, special=True),
        ]

    def count(self, text: str) -> int:
        """Number of tokens of a text on its own."""
        return len(self._encode(text))

    def cut(self, text: str, tokens: int) -> str:
        """Text shortened by at least `tokens` tokens at its end (to nothing, if it has no more)."""
        ids = self._encode(text)
        kept: str = self.tokenizer.decode(ids[: max(0, len(ids) - tokens)], clean_up_tokenization_spaces=False)
        return kept.rstrip("\ufffd")  # decoded from the first bytes of a character that was cut in two

    @functools.cached_property
    def _frame(self) -> tuple[str, str]:
        """What the chat template writes before and after the user message."""
        if not self.tokenizer.chat_template:
            return "", ""
        messages = [{"role": "user", "content": _MARK}]
        options = {"strftime_now": _DATE.strftime} | (self.chat_template_kwargs or {})
        whose = f"the chat template of '{self.tokenizer.name_or_path}'"
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise UserError(f"{whose} fails: {line_of(error)}; mend it, or data.chat_template_kwargs") from None
        head, mark, tail = rendered.partition(_MARK)
        if not mark:
            raise UserError(f"{whose} does not show the user message; mend it")
        return head, tail

    def decode(self, tokens: Sequence[int]) -> str:
        """A response as text, without special tokens."""
        decoded: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return decoded

    def _encode(self, text: str, *, special: bool = False, start: bool = False) -> list[int]:
        """Ids of a piece of a prompt. `special`: special tokens in the text are parsed as such; `start`: begin with the
        tokenizer's beginning-of-sequence token if it has one, as plain text does (a chat template writes its own)."""
        if not text and not start:
            return []
        return list(self.tokenizer(text, add_special_tokens=start, split_special_tokens=not special)["input_ids"])
