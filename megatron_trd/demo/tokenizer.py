"""The demo models' tokenizer: byte-level BPE with single digits, trained on the demo's own text.

The fixed parts of the prompt templates are added as one token each, which keeps the prompts short: the tokenizer, and
with it the models, depend on the wording of `megatron_trd.data.prompts.TEMPLATES["math"]`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_trd.data.prompts import TEMPLATES
from megatron_trd.demo.task import STYLES, generate, own_solution

PAD, START, END = "<pad>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 347  # an awkward size: tensor parallelism has to pad it
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def phrases() -> list[str]:
    """The fixed parts of the prompt templates, each of which is one token."""
    found = {part for text in TEMPLATES["math"].values() for part in re.split(r"\$\w+", text) if part}
    return sorted(found)


def make_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same seed gives the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (PAD, START, END)]
    fixed = [AddedToken(text, special=False, normalized=False) for text in phrases()]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special) - len(fixed),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(fixed)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def _texts(seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for problem in generate(2000, seed):
        yield from ("user", "assistant", problem.problem, problem.solution)
        yield own_solution(problem, rng.choice(STYLES))
