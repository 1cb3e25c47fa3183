from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, dev_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes: two for a job and one for whoever comes in its way."""
    with dev_cluster(3) as environment:
        yield Cluster(environment, tmp_path_factory.mktemp("slurm"))
