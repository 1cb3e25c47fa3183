"""Hugging Face configuration -> megatron-core `GPTModel`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_trd import platform
from megatron_trd.errors import UserError
from megatron_trd.models.folder import ModelFolder
from megatron_trd.parallel.grid import Grid

# Vocabulary shards are padded to a multiple of this many rows: the width that GPU matrix products like.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True)
class Architecture:
    """What a dense decoder needs to be built, whatever its family."""

    family: str  # Hugging Face architecture, e.g. Qwen3ForCausalLM
    layers: int
    hidden_size: int
    ffn_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    tied: bool  # input embedding and output head are one tensor
    norm_eps: float
    rope_theta: float
    qk_norm: bool

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding and of the head over all `tp` shards, padding included."""
        multiple = VOCAB_MULTIPLE * tp
        return math.ceil(self.vocab_size / multiple) * multiple

    def check_layout(self, tp: int, pp: int, who: str) -> None:
        """Raise `UserError` if tensor or pipeline parallelism does not divide the model."""
        for key, parts, count, what in (
            ("tp", tp, self.heads, "attention heads"),
            ("tp", tp, self.kv_heads, "key/value heads"),
            ("tp", tp, self.ffn_size, "feed-forward units"),
            ("pp", pp, self.layers, "layers"),
        ):
            if count % parts:
                raise UserError(
                    f"{who}.{key}={parts} does not divide the model's {count} {what}; use a divisor of {count}"
                )


# family -> whether queries and keys are normalised. Adding a family: a row here and a table in models/weights.py.
FAMILIES = {"Qwen3ForCausalLM": True, "LlamaForCausalLM": False}


def read_architecture(folder: ModelFolder) -> Architecture:
    """Architecture of a folder. Raises `UserError` for a family or a feature that is not supported."""
    hf = folder.config
    family = (getattr(hf, "architectures", None) or [type(hf).__name__])[0]
    if family not in FAMILIES:
        raise UserError(
            f"model folder '{folder.path}': architecture {family} is not supported; supported: {', '.join(FAMILIES)}"
        )
    rope = dict(getattr(hf, "rope_parameters", None) or {})
    unsupported = {
        f"rope type {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
        "attention bias": getattr(hf, "attention_bias", False),
        "feed-forward bias": getattr(hf, "mlp_bias", False),
        "sliding-window attention": bool(getattr(hf, "use_sliding_window", False)),
        f"activation {hf.hidden_act}": hf.hidden_act != "silu",
        # names and shapes are those of plain weights, the scales are apart
        "quantized weights": getattr(hf, "quantization_config", None) is not None,
    }
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"model folder '{folder.path}': {family} with {feature} is not supported")
    return Architecture(
        family=family,
        layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        vocab_size=hf.vocab_size,
        max_positions=hf.max_position_embeddings,
        tied=hf.tie_word_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_theta=float(rope.get("rope_theta", 10_000.0)),
        qk_norm=FAMILIES[family],
    )


def transformer_config(
    arch: Architecture, grid: Grid, *, sequence_parallel: bool = False, recompute: bool = False
) -> Any:
    """megatron-core `TransformerConfig` of an architecture on a grid."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    recompute_fields = (
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1} if recompute else {}
    )
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_size,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        qk_layernorm=arch.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=grid.layout.tp,
        pipeline_model_parallel_size=grid.layout.pp,
        sequence_parallel=sequence_parallel,
        variable_seq_lengths=True,  # micro-batches are as long as their longest sample, no longer
        moe_token_dispatcher_type="alltoall",  # what variable_seq_lengths asks for, dense models too
        calculate_per_token_loss=True,  # gradients are sums; token weights carry every normalisation
        **platform.current().transformer_config(),
        **recompute_fields,
    )


def build_model(arch: Architecture, grid: Grid, config: Any, *, with_head: bool) -> torch.nn.Module:
    """This rank's stage and shard of a `GPTModel` whose last stage returns hidden states instead of logits.

    `forward(input_ids [b, s], position_ids [b, s], attention_mask=None)` gives `[s, b, hidden]` after the final norm
    on the last stage (`[s/tp, b, hidden]` with sequence parallelism): the output head belongs to the loss. Without
    `with_head` the last stage holds no head weight at all.
    """
    from megatron.core.models.gpt import GPTModel

    class HiddenStateModel(GPTModel):
        def _postprocess(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states

    model = HiddenStateModel(
        config=config,
        transformer_layer_spec=platform.current().layer_spec(qk_norm=arch.qk_norm),
        vocab_size=arch.padded_vocab(grid.layout.tp),
        max_sequence_length=arch.max_positions,
        pre_process=grid.is_first_stage,
        post_process=grid.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied and with_head,
        position_embedding_type="rope",
        rotary_base=int(arch.rope_theta),
        pg_collection=grid.groups,
    )
    if grid.is_last_stage and not with_head:
        del model.output_layer
    return model.to(platform.current().device)
