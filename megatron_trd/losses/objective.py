"""What is measured between the two distributions: the parameters of the loss, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

# Minimum share of a side in the mixture of `jsd`, which is zero if the mixture is one of the sides.
LEAST_SHARE = 0.001


@dataclass(frozen=True)
class Objective:
    """A divergence and its parameters, which the public functions document."""

    divergence: Divergence = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    clip: float | None = None
    top_k: int | None = None
    tail: bool = False

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, not {self.divergence!r}")
        if not LEAST_SHARE <= self.beta <= 1 - LEAST_SHARE:
            raise ValueError(
                f"beta is the teacher's share of jsd's mixture and must lie in [{LEAST_SHARE}, {1 - LEAST_SHARE}], not "
                f"{self.beta}: towards either end jsd is zero (see forward_kl and reverse_kl)"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive (None: no bound), not {self.clip}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1 (None: the whole vocabulary), not {self.top_k}")
