"""Hugging Face configuration -> megatron-core `GPTModel`."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_trd import platform
from megatron_trd.errors import UserError
from megatron_trd.models.folder import ModelFolder
from megatron_trd.models.weights import FAMILIES, Dim
from megatron_trd.parallel.grid import EXPERT_TP, Grid

# Vocabulary shards are padded to a multiple of this many rows, a width that suits GPU matrix products.
VOCAB_MULTIPLE = 128

EXTENSIONS = ("linear", "llama3", "yarn")  # context extensions, by `rope_type` in config.json


@dataclass(frozen=True)
class Architecture:
    """What is needed to build a decoder of any family."""

    family: str  # Hugging Face architecture, a key of weights.FAMILIES
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
    rope_frequencies: tuple[float, ...]  # radians per position, one for each pair of a head's dimensions
    rope_scale: float = 1.0  # factor on rotated queries and keys, where a context extension changes their length
    experts: int = 0  # per layer; 0: dense
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    normalised_routing: bool = False  # the chosen experts' weights sum to 1

    def has(self, parameter: str) -> bool:
        """Whether its layers have a parameter with this Megatron name."""
        return FAMILIES[self.family].has(parameter)

    def sizes(self) -> dict[Dim, int]:
        """Values of the sizes named in the tables of `weights`."""
        return {
            "hidden": self.hidden_size,
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim,
            "ffn": self.ffn_size,
            "experts": self.experts,
            "expert_ffn": self.expert_ffn_size,
        }

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding and of the head over all `tp` shards, padding included."""
        multiple = VOCAB_MULTIPLE * tp
        return math.ceil(self.vocab_size / multiple) * multiple

    def check_layout(self, tp: int, pp: int, who: str, ep: int = 1) -> None:
        """Raise `UserError` if tensor, pipeline or expert parallelism does not divide the model."""
        if ep > 1 and not self.experts:
            raise UserError(f"{who}.ep={ep} is for a mixture of experts, {self.family} is not one: leave it out")
        feed_forward = (
            ("ep", ep, self.experts, "experts") if self.experts else ("tp", tp, self.ffn_size, "feed-forward units")
        )
        for key, parts, count, what in (
            ("tp", tp, self.heads, "attention heads"),
            ("tp", tp, self.kv_heads, "key/value heads"),
            feed_forward,
            ("pp", pp, self.layers, "layers"),
        ):
            if count % parts:
                raise UserError(
                    f"{who}.{key}={parts} does not divide the model's {count} {what}; use a divisor of {count}"
                )


def read_architecture(folder: ModelFolder) -> Architecture:
    """Architecture of a folder. Raises `UserError` for a family or a feature that is not supported."""
    hf = folder.config
    family = (getattr(hf, "architectures", None) or [type(hf).__name__])[0]
    if family not in FAMILIES:
        raise UserError(
            f"model folder '{folder.path}': architecture {family} is not supported; supported: {', '.join(FAMILIES)}"
        )
    _check_features(folder, family)
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    experts = FAMILIES[family].has("mlp.router.weight")
    frequencies, rope_scale = _rotary(hf, head_dim)
    return Architecture(
        family=family,
        layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_size=hf.intermediate_size,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=hf.vocab_size,
        max_positions=_max_positions(hf),
        tied=hf.tie_word_embeddings,
        norm_eps=hf.rms_norm_eps,
        rope_frequencies=frequencies,
        rope_scale=rope_scale,
        experts=hf.num_experts if experts else 0,
        experts_per_token=hf.num_experts_per_tok if experts else 0,
        expert_ffn_size=hf.moe_intermediate_size if experts else 0,
        normalised_routing=bool(hf.norm_topk_prob) if experts else False,
    )


def _check_features(folder: ModelFolder, family: str) -> None:
    hf, where = folder.config, f"model folder '{folder.path}'"
    # another family's configuration may have settings, such as multipliers, that are ignored here
    if type(hf).__name__ != family.replace("ForCausalLM", "Config"):
        raise UserError(
            f"{where}: config.json has the architecture {family} and the model_type {hf.model_type} of another: "
            "take the config.json that belongs to the weights"
        )
    rope = _rope(hf)
    for key in ("rope_theta", "factor") if rope["rope_type"] in EXTENSIONS else ("rope_theta",):
        if not isinstance(rope.get(key, 1.0), int | float):
            raise UserError(f"{where}: config.json has {rope[key]!r} for {key} of rope_parameters: set it to a number")
    unsupported = {
        f"rope type {rope['rope_type']}": rope["rope_type"] not in ("default", *EXTENSIONS),
        "partial rotary embeddings": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "attention bias": getattr(hf, "attention_bias", False),
        "feed-forward bias": getattr(hf, "mlp_bias", False),
        "sliding-window attention": bool(getattr(hf, "use_sliding_window", False)),
        "dual chunk attention": getattr(hf, "dual_chunk_attention_config", None) is not None,
        "attention that is not causal": not getattr(hf, "is_causal", True),
        f"activation {hf.hidden_act}": hf.hidden_act != "silu",
        # names and shapes are those of plain weights; the scales are separate
        "quantized weights": getattr(hf, "quantization_config", None) is not None,
        "dense layers between its experts": getattr(hf, "decoder_sparse_step", 1) != 1
        or bool(getattr(hf, "mlp_only_layers", None)),
        # its weight is then 1 whatever the router says; megatron-core refuses that
        "one expert a token, its weight normalised": getattr(hf, "num_experts_per_tok", None) == 1
        and getattr(hf, "norm_topk_prob", False),
    }
    for feature, present in unsupported.items():
        if present:
            raise UserError(f"{where}: {family} with {feature} is not supported")


def _rope(hf: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0} | dict(getattr(hf, "rope_parameters", None) or {})


def _rotary(hf: Any, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Rotary frequencies and the factor of rotated vectors, as `transformers` computes them, extension included."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = _rope(hf)
    if rope["rope_type"] == "default":
        steps = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return tuple((1.0 / rope["rope_theta"] ** steps).tolist()), 1.0
    frequencies, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](hf, "cpu")
    return tuple(frequencies.tolist()), float(scale)


def _max_positions(hf: Any) -> int:
    """Tokens of context. For yarn, the length it was trained on times its factor, as in vLLM: the model's own value in
    config.json may be either length."""
    rope = _rope(hf)
    if rope["rope_type"] == "yarn":
        return int(rope["original_max_position_embeddings"] * rope["factor"])
    positions: int = hf.max_position_embeddings
    return positions


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
        ffn_hidden_size=arch.expert_ffn_size or arch.ffn_size,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        qk_layernorm=arch.has("self_attention.q_layernorm.weight"),
        add_qkv_bias=arch.has("self_attention.linear_qkv.bias"),
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        attention_softmax_in_fp32=True,
        attention_backend=attention_backend(),
        # Queries and keys are rotated whole, so scaling both scales their products.
        softmax_scale=arch.rope_scale**2 / math.sqrt(arch.head_dim),
        tensor_model_parallel_size=grid.layout.tp,
        pipeline_model_parallel_size=grid.layout.pp,
        sequence_parallel=sequence_parallel,
        variable_seq_lengths=True,  # micro-batches are as long as their longest sample, no longer
        moe_token_dispatcher_type="alltoall",  # required by variable_seq_lengths, for dense models too
        expert_model_parallel_size=grid.layout.ep,
        expert_tensor_parallel_size=EXPERT_TP,
        calculate_per_token_loss=True,  # gradients are sums; token weights carry every normalisation
        **platform.current().transformer_config(),
        **(_expert_fields(arch) if arch.experts else {}),
        **recompute_fields,
    )


def attention_backend() -> Any:
    """The kinds of attention that transformer-engine's own variables (`NVTE_FLASH_ATTN=0`, …) leave enabled.

    megatron-core's `AttnBackend` covers one kind or all of them; it refuses variables that differ from what it would
    set. Raises `UserError` if two are left.
    """
    from megatron.core.transformer.enums import AttnBackend

    kinds = {
        f"NVTE_{kind.name.upper()}_ATTN": kind for kind in (AttnBackend.flash, AttnBackend.fused, AttnBackend.unfused)
    }
    left = [kind for name, kind in kinds.items() if os.environ.get(name) != "0"]
    if len(left) == len(kinds):
        return AttnBackend.auto
    if len(left) == 1:
        return left[0]
    found = ", ".join(f"{name}={os.environ[name]}" for name in kinds if name in os.environ)
    raise UserError(f"{found}: megatron-core takes one kind of attention or all of them: set two to 0, or none")


def _expert_fields(arch: Architecture) -> dict[str, Any]:
    """Routing as in `transformers` modeling_qwen3_moe.py: softmax over all experts, the best chosen, then normalised
    or not. Normalising is the same as a softmax over the chosen experts alone, which megatron-core does without
    "pre-softmax". There is no balancing loss: the divergence is the whole objective."""
    return {
        "num_moe_experts": arch.experts,
        "moe_ffn_hidden_size": arch.expert_ffn_size,
        "moe_router_topk": arch.experts_per_token,
        "moe_router_pre_softmax": not arch.normalised_routing,
        "moe_router_score_function": "softmax",
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


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
        transformer_layer_spec=platform.current().layer_spec(config),
        vocab_size=arch.padded_vocab(grid.layout.tp),
        max_sequence_length=arch.max_positions,
        pre_process=grid.is_first_stage,
        post_process=grid.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=arch.tied and with_head,
        position_embedding_type="rope",
        pg_collection=grid.groups,
    )
    # megatron-core computes frequencies only for an integer base and one kind of context extension
    model.rotary_pos_emb.inv_freq = torch.tensor(arch.rope_frequencies, device=platform.current().device)
    if grid.is_last_stage and not with_head:
        del model.output_layer
    return model.to(platform.current().device)
