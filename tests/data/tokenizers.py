"""Small real tokenizers: byte-level BPE, as the supported models have it."""

from __future__ import annotations

import functools
from typing import Any, Literal

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from megatron_trd.data.prompts import TEMPLATES

START, END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL = (END_OF_TEXT, START, END)
# Qwen's: newlines join the punctuation before them, which is where prompts tokenized in pieces go wrong.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}no thoughts\n{% endif %}"
)


@functools.cache
def tokenizer(*, chat: bool = True) -> Any:
    """ChatML, ended by `<|im_end|>`; without `chat` a base model's, whose texts begin with a special token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
    )
    texts = [text for task in TEMPLATES.values() for text in task.values()]
    backend.train_from_iterator([*texts, "user", "assistant", "Hello, hello! What is 12 + 34?\n\n"] * 20, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if not chat:
        first = backend.token_to_id(END_OF_TEXT)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, first)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END_OF_TEXT,
        chat_template=_CHAT if chat else None,
        clean_up_tokenization_spaces=False,
    )


def ids_of(*tokens: str) -> list[int]:
    """Ids of tokens by name."""
    return [tokenizer().convert_tokens_to_ids(token) for token in tokens]


def spaced_tokenizer(kind: Literal["Prepend", "Metaspace", "ByteLevel"]) -> Any:
    """One that begins every text with a space: SentencePiece's two ways (Llama 2, TinyLlama), and byte-level BPE's."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    if kind == "Prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "Metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator([text for task in TEMPLATES.values() for text in task.values()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
