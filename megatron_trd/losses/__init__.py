"""Divergences between a teacher's and a student's next-token distributions, sharded by vocabulary.

Imports torch alone. `fused_linear_divergence` is what training uses; `vocab_parallel_divergence` is the same
mathematics on logits that already exist; `dense_divergence` is the plain reference both are tested against.
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
