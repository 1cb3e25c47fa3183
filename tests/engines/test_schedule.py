"""How many micro-batches each rank runs, where ranks wait for each other in them."""

from __future__ import annotations

from collections.abc import Iterator

from tests.distributed import run_ranks

LAYOUTS = [(1, 1, 3), (2, 1, 3), (3, 1, 2), (2, 1, 2), (1, 2, 3)]  # tp, pp, ep over six ranks


def counts(rank: int, world: int) -> list[tuple[int, int]]:
    """Rank function: for each layout, this rank's replica and how many micro-batches it is to run."""
    from megatron.core import parallel_state

    from megatron_trd import platform
    from megatron_trd.engines.schedule import _batch_count
    from megatron_trd.parallel.grid import student_grid

    platform.current().set_up()

    def found() -> Iterator[tuple[int, int]]:
        for tp, pp, ep in LAYOUTS:
            grid = student_grid(tp, pp, ep, seed=0)
            samples = 5 if grid.dp_rank == 0 else 1
            yield grid.dp_rank, _batch_count(samples, 2, grid)
            parallel_state.destroy_model_parallel()

    return list(found())


def test_ranks_that_share_tensors_or_experts_run_equally_many_micro_batches() -> None:
    by_rank = run_ranks(counts, 6)
    for (tp, pp, ep), layout in zip(LAYOUTS, zip(*by_rank, strict=True), strict=True):
        of_replica: dict[int, set[int]] = {}
        for replica, count in layout:
            of_replica.setdefault(replica, set()).add(count)
        assert all(len(found) == 1 for found in of_replica.values()), (tp, pp, ep, layout)
        assert of_replica[0] == {3}, (tp, pp, ep)
