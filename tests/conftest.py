from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.slurm.cluster import dev_cluster

_CLUSTER = re.compile("tests/(slurm|recipes/test_nemo_slurm)")
_LONGEST = ("tests/slurm", "tests/recipes/test_nemo_slurm", "tests/training/test_jobs", "tests/demo", "tests/engines")


@pytest.fixture(scope="session")
def nodes() -> Iterator[dict[str, str]]:
    """Environment variables of a SLURM of three nodes: two for a job and one for whoever comes in its way."""
    with dev_cluster(3) as environment:
        yield environment


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest first, so that two processes (`make test`) end together."""
    items.sort(key=lambda item: next((n for n, part in enumerate(_LONGEST) if part in item.nodeid), len(_LONGEST)))


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files to each process, and all files that need the cluster to one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return "cluster" if _CLUSTER.match(nodeid) else super()._split_scope(nodeid)

    return Scheduling(config, log)
