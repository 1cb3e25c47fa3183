"""Memory grows with `chunk_tokens * V / p`, never with `tokens * V`."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from megatron_trd.losses import fused_linear_divergence, vocab_parallel_log_prob
from megatron_trd.losses.head import chunks, chunks_under_way, waiting_tokens
from tests.distributed import run_ranks
from tests.losses import ranks

VOCABULARY, HIDDEN, CHUNK = 16384, 4, 32
LOGITS = CHUNK * VOCABULARY * 4  # bytes of a chunk, one side
SMALL = 0.3 * LOGITS  # room for scratch of a few rows, statistics and what is [tokens, hidden]

OPTIONS: list[dict[str, Any]] = [
    {},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd"},
    {"top_k": 32},
    {"top_k": 32, "tail": True},
    {"top_k": VOCABULARY},
    {"clip": 0.1, "temperature": 2.0},
]


def sizes(tokens: int, **options: Any) -> dict[str, Any]:
    return {"tokens": tokens, "vocabulary": VOCABULARY, "hidden": HIDDEN, "chunk_tokens": CHUNK} | options


def head_gradient(world: int) -> int:
    return VOCABULARY // world * HIDDEN * 4


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_two_chunks_of_logits_are_the_peak_however_many_tokens(options: dict[str, Any]) -> None:
    for tokens in (CHUNK, 6 * CHUNK):
        (found,) = ranks.memory(0, 1, [sizes(tokens, **options)])
        assert 2 * LOGITS <= found.peak <= 2 * LOGITS + head_gradient(1) + SMALL, tokens
        assert found.left <= head_gradient(1) + 0.1 * LOGITS, "logits outlive the call"


def test_a_rank_of_two_needs_half() -> None:
    calls = [sizes(3 * CHUNK), sizes(3 * CHUNK, divergence="jsd", top_k=32)]
    for rank in run_ranks(ranks.memory, 2, calls):
        for found in rank:
            assert found.peak <= LOGITS + head_gradient(2) + SMALL
            assert found.left <= head_gradient(2) + 0.1 * LOGITS


def test_the_default_chunk_is_what_its_budget_holds() -> None:
    with (
        mock.patch("megatron_trd.losses.head.HOST_CHUNK_BYTES", LOGITS + VOCABULARY),
        mock.patch("megatron_trd.losses.head.ROW_MULTIPLE", 1),
    ):
        (found,) = ranks.memory(0, 1, [sizes(6 * CHUNK, chunk_tokens=None)])
    assert 2 * LOGITS <= found.peak <= 2 * LOGITS + head_gradient(1) + SMALL


def test_log_probabilities_need_one_chunk() -> None:
    tokens = 4 * CHUNK
    inputs = torch.randn(tokens, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.zeros(tokens, dtype=torch.int64)
    found = ranks.allocated(lambda: vocab_parallel_log_prob(*inputs, chunk_tokens=CHUNK))
    assert LOGITS <= found.peak <= LOGITS + SMALL
    assert found.left <= 0.1 * LOGITS


def test_without_gradients_the_heads_gradient_is_not_allocated() -> None:
    with torch.no_grad():
        (found,) = ranks.memory(0, 1, [sizes(4 * CHUNK, hidden=64)])
    assert found.peak <= 2 * LOGITS + SMALL < 2 * LOGITS + VOCABULARY * 64 * 4


@pytest.mark.parametrize("retained", [False, True])
def test_backward_scales_gradients_where_they_are_unless_they_are_wanted_again(retained: bool) -> None:
    student, teacher = ([torch.randn(512, 64), torch.randn(2048, 64)] for _ in range(2))
    leaves = [tensor.requires_grad_() for tensor in student]
    loss = fused_linear_divergence(*student, *teacher, torch.ones(512)).loss
    found = ranks.allocated(lambda: torch.autograd.grad(loss, leaves, retain_graph=retained))
    gradients = sum(leaf.nbytes for leaf in leaves)
    assert found.peak >= gradients if retained else found.peak < 0.01 * gradients


@pytest.mark.parametrize(
    ("device", "parts", "tokens", "rows"),
    [
        ("cpu", 1, 8192, 547),  # 552 fit, 15 chunks
        ("cuda", 1, 8192, 1024),  # 1104 fit
        ("cuda", 2, 8192, 1024),  # of half the columns, and two chunks under way
        ("cuda", 4, 8192, 2048),
        ("cuda", 1, 1100, 640),  # in halves, not 1024 and a rest
        ("cuda", 1, 100, 100),
    ],
)
def test_chunks_are_whole_tiles_of_what_fits(device: str, parts: int, tokens: int, rows: int) -> None:
    width = 151936 // parts
    found = chunks(tokens, width, None, torch.float32, torch.device(device), under_way=chunks_under_way(parts))
    assert found[0] == slice(0, rows)
    assert [here.start for here in found[1:]] == [here.stop for here in found[:-1]]
    assert found[-1].stop == tokens
    assert max(here.stop - here.start for here in found) == rows


def test_an_accumulated_gradient_takes_no_memory() -> None:
    weight: Any = torch.randn(VOCABULARY, 64, requires_grad=True)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    hidden, teacher = torch.randn(2 * CHUNK, 64), torch.randn(2 * CHUNK, 64)
    ones = torch.ones(2 * CHUNK)
    found = ranks.allocated(
        lambda: fused_linear_divergence(
            hidden, weight, teacher, weight.detach(), ones, chunk_tokens=CHUNK, accumulate=True
        )
    )
    assert found.peak <= 2 * LOGITS + SMALL < 2 * LOGITS + weight.nbytes
    assert found.left <= 0.1 * LOGITS


@pytest.mark.parametrize("chunks", [2, 4])
def test_gradients_that_wait_take_the_memory_of_so_many_chunks(chunks: int) -> None:
    with mock.patch("megatron_trd.losses.fused_linear.waiting_tokens", return_value=chunks * CHUNK):
        (found,) = ranks.memory(0, 1, [sizes(9 * CHUNK)])
    held = (2 + chunks) * LOGITS  # both sides' logits, and gradients as wide
    assert held <= found.peak <= held + head_gradient(1) + SMALL
    assert found.left <= head_gradient(1) + 0.1 * LOGITS, "gradients outlive the call"


def test_gradients_wait_where_they_are_narrower_than_the_logits_on_a_gpu() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert waiting_tokens(8192, 1024, torch.bfloat16, torch.float32, cuda) == 2048
    assert waiting_tokens(8192, 512, torch.bfloat16, torch.float32, cuda, under_way=2) == 2048
    assert waiting_tokens(1500, 768, torch.bfloat16, torch.float32, cuda) == 1500
    assert waiting_tokens(8192, 1024, torch.float32, torch.float32, cuda) == 0
    assert waiting_tokens(8192, 1024, torch.bfloat16, torch.float32, cpu) == 0
