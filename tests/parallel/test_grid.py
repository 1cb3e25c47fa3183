"""Layouts: who holds what, without a process group."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_trd.parallel.grid import Layout
from tests.data.errors import user_error

SIZES = st.integers(1, 5)


def layout(tp: int, pp: int, dp: int) -> Layout:
    return Layout(tp, pp, tp * pp * dp)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SIZES, SIZES, SIZES)
def test_rank_and_coordinates_are_each_other_s_inverse(tp: int, pp: int, dp: int) -> None:
    grid = layout(tp, pp, dp)
    assert grid.dp == dp
    seen = set()
    for rank in range(grid.world):
        t, p, d = grid.coordinates(rank)
        assert 0 <= t < tp
        assert 0 <= p < pp
        assert 0 <= d < dp
        assert grid.rank(t, p, d) == rank
        seen.add((t, p, d))
    assert len(seen) == grid.world


def test_coordinates_of_a_layout_written_out() -> None:
    # tensor-parallel fastest, then data-parallel, then pipeline; (tp, pp, dp)
    assert [Layout(2, 2, 8).coordinates(rank) for rank in range(8)] == [
        (0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (1, 1, 0), (0, 1, 1), (1, 1, 1)
    ]  # fmt: skip


@pytest.mark.parametrize(("tp", "pp", "dp"), list(product((1, 2, 3), repeat=3)))
def test_groups_are_those_that_megatron_makes(tp: int, pp: int, dp: int) -> None:
    from megatron.core.parallel_state import RankGenerator

    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")  # megatron-core's default order
    grid = layout(tp, pp, dp)
    ranks = range(grid.world)

    def grouped(kept: tuple[int, ...]) -> set[tuple[int, ...]]:
        """Ranks that agree in the coordinates `kept`, in rank order."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for rank in ranks:
            groups.setdefault(tuple(grid.coordinates(rank)[axis] for axis in kept), []).append(rank)
        return set(map(tuple, groups.values()))

    for token, kept in {"tp": (1, 2), "pp": (0, 2), "dp": (0, 1), "tp-pp": (2,)}.items():
        assert set(map(tuple, generator.get_ranks(token))) == grouped(kept), token


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(SIZES, SIZES, SIZES)
def test_last_stages_are_the_last_ranks_in_tensor_parallel_order(tp: int, pp: int, dp: int) -> None:
    grid = layout(tp, pp, dp)
    stages = [grid.last_stage(replica) for replica in range(dp)]
    for replica, stage in enumerate(stages):
        assert [grid.coordinates(rank) for rank in stage] == [(t, pp - 1, replica) for t in range(tp)]
    assert sorted(rank for stage in stages for rank in stage) == list(range(grid.world - tp * dp, grid.world))


@pytest.mark.parametrize(("tp", "pp", "world"), [(2, 1, 3), (2, 2, 2), (1, 3, 4), (3, 2, 8)])
def test_a_world_that_does_not_fit_is_named_with_what_would(tp: int, pp: int, world: int) -> None:
    message = user_error(Layout, tp, pp, world)
    for part in (f"world size {world}", f"tp={tp}", f"pp={pp}", f"multiple of {tp * pp}", "world_size="):
        assert part in message, message
