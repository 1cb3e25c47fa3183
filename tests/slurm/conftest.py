from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster


@pytest.fixture(scope="session")
def cluster(nodes: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(nodes, tmp_path_factory.mktemp("slurm"))
