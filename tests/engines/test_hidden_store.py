"""Hidden states that wait: those that are kept come back, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_trd.config import HiddenPlace
from megatron_trd.engines.hidden_store import HiddenStore


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_what_is_kept_comes_back_and_the_rest_is_gone(place: HiddenPlace, tmp_path: Path) -> None:
    store = HiddenStore(place, tmp_path / "hidden" / "0")
    tensors = {name: torch.randn(3, 4) for name in "ab"}
    store.add("abc", tensors)  # c is another rank's
    assert all(store[name].equal(tensor) for name, tensor in tensors.items())
    with pytest.raises(KeyError):
        store["c"]
    store.keep("bc")
    assert ["a" in store, "b" in store, "c" in store] == [False, True, True]
    assert store["b"].equal(tensors["b"])
    with pytest.raises(KeyError):
        store["a"]


def test_the_last_rank_s_store_takes_the_folder_with_it(tmp_path: Path) -> None:
    first, last = (HiddenStore("disk", tmp_path / "hidden" / str(rank)) for rank in range(2))
    first.add("a", {"a": torch.ones(2)})
    first.close()
    assert [path.name for path in (tmp_path / "hidden").iterdir()] == ["1"]
    last.close()
    assert list(tmp_path.iterdir()) == []
