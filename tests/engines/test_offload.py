"""Memory lent to others: the same bits come back, whatever the sizes, and what holds them meanwhile is no larger."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from megatron_trd import platform
from megatron_trd.engines import offload
from megatron_trd.engines.offload import Offload


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_LEAST", 16)
    monkeypatch.setattr(offload, "_MOST", 256)


@pytest.mark.parametrize("sizes", [[], [1], [256], [16, 16], [5, 1000, 3, 256, 77], [4096, 0, 1]])
def test_what_went_away_comes_back(sizes: list[int]) -> None:
    tensors = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    views = [tensor[1:] for tensor in tensors]
    before = [tensor.clone() for tensor in tensors]
    memory = Offload(lambda: [*tensors, *views])
    for _ in range(2):
        memory.away()
        assert all(len(tensor.untyped_storage()) == 0 for tensor in tensors)
        memory.away()  # is away
        memory.back()
        assert all(map(torch.equal, tensors, before))
        assert all(map(torch.equal, views, (tensor[1:] for tensor in before)))
    memory.back()  # is back


@pytest.mark.parametrize("total", [1, 16, 17, 255, 256, 1000, 1341])
def test_host_memory_is_asked_for_in_powers_of_two_and_not_for_much_more(total: int) -> None:
    tensor, asked = torch.zeros(total, dtype=torch.uint8), []
    real = platform.current().host_bytes
    with mock.patch.object(platform.current(), "host_bytes", lambda size: asked.append(size) or real(size)):
        Offload(lambda: [tensor]).away()
    assert all(size & (size - 1) == 0 and 16 <= size <= 256 for size in asked)
    assert 0 <= sum(asked) - total < 16
