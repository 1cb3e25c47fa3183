"""Random small models in Hugging Face folders, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCAB = 99  # awkward on purpose: no tensor-parallel size divides it
FAMILIES = ("qwen3", "llama", "qwen2", "qwen3_moe")


def write_tokenizer(folder: Path) -> None:
    """A character tokenizer with a chat template."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {"<pad>": 0, "<eos>": 1} | {character: index + 2 for index, character in enumerate(characters)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    fast.save_pretrained(folder)


def classes(family: str) -> tuple[Any, Any]:
    """Configuration and model class of a family in `transformers`."""
    import transformers

    name = {"qwen3": "Qwen3", "llama": "Llama", "qwen2": "Qwen2", "qwen3_moe": "Qwen3Moe"}[family]
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


def write_model(
    folder: Path, *, family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> Path:
    """A random model of a family with logits far from uniform; returns its folder."""
    config_class, model_class = classes(family)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    if family == "qwen3_moe":
        settings |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    torch.manual_seed(seed)
    model = model_class(config_class(**(settings | fields))).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):  # a new model's are zero, and a bias that is lost would not be missed
                parameter.normal_(std=0.5)
            elif parameter.dim() > 1:
                parameter.mul_(3).view(-1)[0] = -0.0  # as published ones have some
            else:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
