"""avg@k and the unbiased pass@k of a graded table, with bootstrap intervals over problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Score:
    """A mean over problems and the ends of its 95 % bootstrap interval; all in [0, 1]."""

    value: float
    low: float
    high: float


def average_at_k(right: Sequence[Sequence[bool]], *, seed: int = 0) -> Score:
    """Mean share of right responses; `right` is `[problems][samples]`."""
    return _bootstrap(np.array([np.mean(row) for row in right]), seed)


def pass_at_k(right: Sequence[Sequence[bool]], k: int, *, seed: int = 0) -> Score:
    """Probability that any of `k` responses is right: 1 - C(n - c, k) / C(n, k) per problem (Chen et al. 2021, eq. 1).

    Raises ValueError if a problem has fewer than `k` samples.
    """
    return _bootstrap(np.array([_pass_probability(len(row), sum(row), k) for row in right]), seed)


def summarise(right: Sequence[Sequence[bool]], samples: int, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """`avg@samples` and `pass@samples` as plain values."""
    return {
        f"avg@{samples}": asdict(average_at_k(right, seed=seed)),
        f"pass@{samples}": asdict(pass_at_k(right, samples, seed=seed)),
    }


def _pass_probability(samples: int, right: int, k: int) -> float:
    if not 0 < k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a problem, and there are {samples}")
    if samples - right < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - right + 1, samples + 1)))


def _bootstrap(values: np.ndarray, seed: int) -> Score:
    """Resample problems, not responses: responses to one problem are not independent."""
    if len(values) == 0:
        raise ValueError("no problems to score")
    picked = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picked].mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(float(values.mean()), float(low), float(high))
