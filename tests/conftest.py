from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import dev_cluster


@pytest.fixture(scope="session")
def nodes() -> Iterator[dict[str, str]]:
    """Environment variables of a SLURM of three nodes: two for a job and one for whoever comes in its way."""
    with dev_cluster(3) as environment:
        yield environment
