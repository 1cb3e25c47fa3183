"""avg@k and pass@k against their definitions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_trd.evaluation.scores import average_at_k, pass_at_k, summarise


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_one(right: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(right)))
    subsets = list(combinations(right, k))
    assert pass_at_k([right], k).value == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_values_are_means_over_problems() -> None:
    right = [[True, False, False, False], [True, True, True, True], [False] * 4]
    assert average_at_k(right).value == pytest.approx((0.25 + 1 + 0) / 3)
    assert pass_at_k(right, 4).value == pytest.approx(2 / 3)
    assert pass_at_k(right, 2).value == pytest.approx((0.5 + 1 + 0) / 3)
    assert set(summarise(right, 4)) == {"avg@4", "pass@4"}


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        chances = random.beta(2, 3, size=60)
        score = average_at_k((random.random((60, 8)) < chances[:, None]).tolist(), seed=trial)
        covered += score.low <= 0.4 <= score.high  # the mean of Beta(2, 3)
    assert 180 <= covered <= 199


def test_the_interval_resamples_problems_not_responses() -> None:
    # ten problems, each all right or all wrong: 160 responses say no more than ten
    score = average_at_k([[index % 2 == 0] * 16 for index in range(10)])
    assert score.high - score.low > 0.5


def test_too_few_samples_and_no_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 samples"):
        pass_at_k([[True, False]], 3)
    with pytest.raises(ValueError, match="no problems"):
        average_at_k([])
