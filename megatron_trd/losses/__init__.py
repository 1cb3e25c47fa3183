"""Divergences between a teacher's and a student's next-token distributions, sharded by vocabulary.

Imports only torch. Training uses `fused_linear_divergence`; `vocab_parallel_divergence` is the same mathematics on
existing logits; `dense_divergence` is the plain reference that both are tested against.
"""

from megatron_trd.losses.dense import dense_divergence
from megatron_trd.losses.fused_linear import FusedDivergence, fused_linear_divergence
from megatron_trd.losses.log_prob import vocab_parallel_log_prob
from megatron_trd.losses.objective import Divergence
from megatron_trd.losses.vocab_parallel import vocab_parallel_divergence

__all__ = [
    "Divergence",
    "FusedDivergence",
    "dense_divergence",
    "fused_linear_divergence",
    "vocab_parallel_divergence",
    "vocab_parallel_log_prob",
]
