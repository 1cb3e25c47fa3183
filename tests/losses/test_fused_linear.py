"""`fused_linear_divergence` against the float64 reference, at every tensor-parallel size."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_trd.losses import fused_linear_divergence
from megatron_trd.losses.head import add_product, product_into
from tests.distributed import run_ranks
from tests.losses import cases, ranks, reference
from tests.losses.reference import Case, Outcome, check, check_fused, check_gradient, check_loss

CASES = cases.for_fused()


@pytest.fixture(scope="module", params=cases.WORLDS)
def outcomes(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    """By the case's name, what every rank of a world found."""
    world, listed = request.param, list(CASES.values())
    by_rank = [ranks.fused(0, 1, listed)] if world == 1 else run_ranks(ranks.fused, world, listed)
    return {name: [found[number] for found in by_rank] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_dense_reference_on_every_rank(
    name: str, outcomes: dict[str, list[Outcome]]
) -> None:
    reference.check_fused(CASES[name], outcomes[name])


@pytest.mark.parametrize("name", CASES)
def test_every_rank_returns_the_same_bits(name: str, outcomes: dict[str, list[Outcome]]) -> None:
    first, *others = outcomes[name]
    assert first.per_token.dtype == torch.promote_types(CASES[name].dtype, torch.float32)
    assert not first.per_token.requires_grad
    for other in others:
        assert torch.equal(other.per_token, first.per_token)
        assert torch.equal(other.loss, first.loss)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.clip])
def test_the_clipped_cases_have_tokens_on_both_sides_of_the_bound(name: str) -> None:
    case = CASES[name]
    clipped = reference.fused(case).per_token.eq(case.clip or 0)
    assert clipped.any()
    assert not clipped.all()


def test_groups_of_one_world_do_not_mix() -> None:
    listed = [Case(seed=1, tokens=5), Case("jsd", seed=2, tokens=9, chunk_tokens=2)]
    found = run_ranks(ranks.in_pairs, 4, listed)
    for rank in range(4):
        case = listed[rank // 2]
        want = reference.fused(case)
        check_loss(case, found[rank][0], want)
        check_gradient(case, found[rank][0].gradients["student_hidden"], want.gradients["student_hidden"])


def call(inputs: reference.Heads, **options: Any) -> Tensor:
    return fused_linear_divergence(*inputs, **options).loss


def trained(inputs: reference.Heads) -> list[Tensor]:
    return [
        inputs.student_hidden.requires_grad_(),
        inputs.student_weight.requires_grad_(),
        inputs.token_weights.requires_grad_(),
    ]


def gradients(inputs: reference.Heads, **options: Any) -> tuple[Tensor, ...]:
    leaves = trained(inputs)
    return torch.autograd.grad(call(inputs, **options), leaves)


OPTIONS = st.fixed_dictionaries(
    {
        "divergence": st.sampled_from(["forward_kl", "reverse_kl", "jsd"]),
        "beta": st.floats(0.001, 0.999),
        "temperature": st.floats(0.25, 4),
        "clip": st.one_of(st.none(), st.floats(0.01, 5)),
        "top_k": st.one_of(st.none(), st.integers(1, 12)),
        "tail": st.booleans(),
        "tokens": st.integers(0, 9),
        "vocabulary": st.integers(1, 11),
        "width": st.integers(11, 13),
        "hidden": st.integers(1, 5),
        "teacher_hidden": st.integers(1, 5),
        "chunk_tokens": st.one_of(st.none(), st.integers(1, 10)),
        "seed": st.integers(0, 10**6),
    }
)


@settings(max_examples=80, deadline=None)
@given(OPTIONS)
def test_any_sizes_and_options_agree_with_the_reference(options: dict[str, Any]) -> None:
    case = Case(**options, dtype=torch.float64)
    want = reference.fused(case)
    if case.clip is not None:  # too close to the bound, and float64 does not say on which side
        apart = (want.per_token - case.clip).abs()
        assume(not ((apart > 0) & (apart < 1e-9)).any())
    (found,) = ranks.fused(0, 1, [case])
    check_loss(case, found, want)
    for name, gradient in want.gradients.items():
        check_gradient(case, found.gradients[name][: gradient.shape[0]], gradient)


def waiting(rank: int, world: int, chunks: int, listed: list[Case]) -> list[Outcome]:
    """As `ranks.fused`; the gradients of so many chunks wait for one product, as on a GPU with 16-bit weights."""

    def room(tokens: int, chunk: int, *_: object, under_way: int) -> int:
        return min(tokens, chunks * under_way * chunk)

    with mock.patch("megatron_trd.losses.fused_linear.waiting_tokens", room):
        return ranks.fused(rank, world, listed)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunks", [1, 2, 3, 100])
def test_gradients_that_wait_for_one_product_are_the_same(chunks: int, world: int) -> None:
    listed = [case for case in CASES.values() if case.dtype in (torch.float32, torch.float64)]
    found = run_ranks(waiting, world, chunks, listed)
    for number, case in enumerate(listed):
        check_fused(case, [rank[number] for rank in found])


@pytest.mark.parametrize(("chunks", "products"), [(0, 4), (1, 4), (2, 2), (3, 2), (4, 1)])
def test_as_many_gradients_as_have_room_wait_for_one_product(chunks: int, products: int) -> None:
    case = Case(tokens=13, chunk_tokens=4)  # chunks of 4, 4, 4 and 1
    with mock.patch("megatron_trd.losses.fused_linear.add_product", wraps=add_product) as product:
        waiting(0, 1, chunks, [case])
    assert product.call_count == products


@settings(max_examples=30, deadline=None)
@given(OPTIONS)
def test_the_result_does_not_depend_on_chunk_tokens(options: dict[str, Any]) -> None:
    """In float32, up to the rounding of a matrix product of another height."""
    case = Case(**options)
    (found,) = ranks.fused(0, 1, [case])
    (whole,) = ranks.fused(0, 1, [Case(**options | {"chunk_tokens": None})])
    assert torch.allclose(found.per_token, whole.per_token, rtol=2e-6, atol=1e-7)
    for name, gradient in whole.gradients.items():
        check(case, found.gradients[name], gradient, 1e-5)


@pytest.mark.parametrize("name", [*cases.THREE, "jsd(0.001)", "jsd(0.999)"])
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 4}, {"top_k": 3, "tail": True}, {"clip": 0.6, "temperature": 1.5}], ids=str
)
def test_gradcheck(name: str, options: dict[str, Any]) -> None:
    base = cases.DIVERGENCES[name]
    case = Case(**base.objective() | options, tokens=5, vocabulary=7, hidden=3, dtype=torch.float64, seed=4)
    inputs = reference.heads(case)

    def loss(hidden: Tensor, weight: Tensor, token_weights: Tensor) -> Tensor:
        replaced = inputs._replace(student_hidden=hidden, student_weight=weight, token_weights=token_weights)
        return call(replaced, vocab_size=6, chunk_tokens=2, **case.objective())

    assert torch.autograd.gradcheck(loss, trained(inputs))


@pytest.mark.parametrize("name", cases.THREE)
def test_the_teacher_never_receives_a_gradient(name: str) -> None:
    inputs = reference.heads(cases.DIVERGENCES[name])
    call(reference.Heads(*(tensor.requires_grad_() for tensor in inputs)), divergence=name.split("(")[0]).backward()
    assert inputs.teacher_hidden.grad is None
    assert inputs.teacher_weight.grad is None
    assert inputs.student_hidden.grad is not None


def test_a_head_shared_with_the_teacher_is_trained_as_the_students_alone() -> None:
    case = Case(teacher_hidden=8, dtype=torch.float64)
    inputs = reference.heads(case)
    shared = inputs._replace(teacher_weight=inputs.student_weight)
    apart = inputs._replace(teacher_weight=inputs.student_weight.clone())
    assert all(torch.equal(found, want) for found, want in zip(gradients(shared), gradients(apart), strict=True))


@pytest.mark.parametrize("wanted", ["student_hidden", "student_weight", "token_weights"])
def test_an_input_that_needs_no_gradient_does_not_change_that_of_another(wanted: str) -> None:
    case = Case(chunk_tokens=4)
    inputs = reference.Heads(*(tensor.to(ranks.DEVICE) for tensor in reference.heads(case)))
    alone = getattr(inputs, wanted).requires_grad_()
    call(inputs, chunk_tokens=4).backward()
    (together,) = ranks.fused(0, 1, [case])
    assert torch.equal(alone.grad.cpu(), together.gradients[wanted].cpu())
    assert sum(tensor.grad is not None for tensor in inputs) == 1


def test_without_gradients_the_loss_is_the_same_and_has_no_graph() -> None:
    inputs = reference.heads(Case("reverse_kl"))
    trained(inputs)
    with torch.no_grad():
        found = fused_linear_divergence(*inputs, divergence="reverse_kl")
    want = fused_linear_divergence(*inputs, divergence="reverse_kl")
    assert not found.loss.requires_grad
    assert torch.equal(found.loss, want.loss)
    assert torch.equal(found.per_token, want.per_token)


def test_backward_scales_by_the_upstream_gradient_and_can_run_twice() -> None:
    inputs = reference.heads(Case())
    leaves = trained(inputs)
    loss = call(inputs)
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    thrice = torch.autograd.grad(-3 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(loss, leaves)
    for first, scaled, repeated in zip(once, thrice, again, strict=True):
        assert torch.allclose(scaled, -3 * first)
        assert torch.equal(repeated, first)


def test_inputs_are_left_as_they_were() -> None:
    inputs = reference.heads(Case("jsd", top_k=4, temperature=2.0))
    before = [tensor.clone() for tensor in inputs]
    trained(inputs)
    call(inputs, divergence="jsd", top_k=4, temperature=2.0).backward()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(inputs, before, strict=True))


def test_strided_inputs_give_what_contiguous_ones_do() -> None:
    inputs = reference.heads(Case(dtype=torch.float64))
    strided = reference.Heads(*(torch.stack([tensor, tensor], dim=-1)[..., 0] for tensor in inputs))
    assert not strided.student_hidden.is_contiguous()
    for found, want in zip(gradients(strided), gradients(inputs), strict=True):
        assert torch.allclose(found, want, rtol=1e-13)


@pytest.mark.parametrize("name", cases.THREE)
@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bf16_is_no_worse_than_float32_softmaxes_of_dense_bf16_logits(name: str, teacher_dtype: torch.dtype) -> None:
    """Errors against float64 on the same bf16 inputs; the dense computation's gradients are autograd's own."""
    case = cases.DIVERGENCES[name]
    given = _bf16_heads(teacher_dtype)
    exact = reference.Heads(*(tensor.double() for tensor in given))
    want = _loss_and_gradients(exact, reference.divergence(*reference.products(_trained(exact)), case))
    student, teacher = reference.products(_trained(given))
    plain = _loss_and_gradients(given, _float32_divergence(student.float(), teacher.float(), case))
    fused = call(given, divergence=case.divergence, beta=case.beta, chunk_tokens=17)
    found = [fused, *torch.autograd.grad(fused, given[:2])]
    assert [gradient.dtype for gradient in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for ours, dense, right in zip(found, plain, want, strict=True):
        assert (ours - right).norm() <= 1.05 * (dense - right).norm() + 1e-5 * right.norm()


@pytest.mark.parametrize("wide", [True, False], ids=["vocabulary > hidden", "hidden > vocabulary"])
def test_bf16_logits_are_not_rounded_to_bf16(wide: bool) -> None:
    """Near its teacher a student's gradient is the difference of nearly equal softmaxes, which bf16 logits hide.

    Dense logits, rounded, are beside it: the case must be one where that matters.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, hidden, vocabulary = (96, 64, 3000) if wide else (16, 640, 256)
    given = torch.randn(tokens, hidden, generator=generator), torch.randn(vocabulary, hidden, generator=generator)
    student, weight = given[0].bfloat16(), (given[1] * 2.5 / hidden**0.5).bfloat16()
    teacher = (given[0] + 0.02 * torch.randn(tokens, hidden, generator=generator)).bfloat16()
    inputs = _trained(reference.Heads(student, weight, teacher, weight.clone(), torch.ones(tokens)))
    case = Case()
    exact = _trained(reference.Heads(*(tensor.detach().double() for tensor in inputs)))
    want = _loss_and_gradients(exact, reference.divergence(*reference.products(exact), case))
    assert 1e-4 < want[0] / tokens < 1e-2
    found = call(inputs, chunk_tokens=32 if wide else 5)
    gradients = torch.autograd.grad(found, inputs[:2])
    rounded = _loss_and_gradients(inputs, _float32_divergence(*(x.float() for x in reference.products(inputs)), case))
    for ours, dense, right in zip((found, *gradients), rounded, want, strict=True):
        size = right.norm()
        assert (ours.double() - right).norm() < 4e-3 * size  # gradients are returned in bf16
        assert (dense.double() - right).norm() > 1e-2 * size


def _bf16_heads(teacher_dtype: torch.dtype) -> reference.Heads:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul(0.6)

    student = normal(64, 32).bfloat16(), normal(500, 32).bfloat16()
    teacher = normal(64, 24).to(teacher_dtype), normal(500, 24).to(teacher_dtype)
    return reference.Heads(*student, *teacher, torch.rand(64, generator=generator))


def _trained(inputs: reference.Heads) -> reference.Heads:
    trained(inputs)
    return inputs


def _loss_and_gradients(inputs: reference.Heads, per_token: Tensor) -> list[Tensor]:
    loss = (per_token * inputs.token_weights).sum()
    return [loss, *torch.autograd.grad(loss, inputs[:2])]


def _float32_divergence(student: Tensor, teacher: Tensor, case: Case) -> Tensor:
    log_s, log_t = student.log_softmax(dim=1), teacher.log_softmax(dim=1).detach()
    if case.divergence == "forward_kl":
        return (log_t.exp() * (log_t - log_s)).sum(dim=1)
    if case.divergence == "reverse_kl":
        return (log_s.exp() * (log_s - log_t)).sum(dim=1)
    log_m = (case.beta * log_t.exp() + (1 - case.beta) * log_s.exp()).log()
    of_teacher, of_student = (log_t.exp() * (log_t - log_m)).sum(dim=1), (log_s.exp() * (log_s - log_m)).sum(dim=1)
    return case.beta * of_teacher + (1 - case.beta) * of_student


def test_a_hidden_state_that_is_nan_gives_nan_and_leaves_other_tokens_alone() -> None:
    """A step with a broken activation must be visible and skippable, with and without top_k."""
    for top_k in (None, 3):
        inputs = reference.heads(Case())
        want = fused_linear_divergence(*inputs, top_k=top_k).per_token
        for side in (inputs.student_hidden, inputs.teacher_hidden):
            kept = side[1].clone()
            side[1] = torch.nan
            found = fused_linear_divergence(*inputs, top_k=top_k).per_token
            side[1] = kept
            assert found.isnan().tolist() == [number == 1 for number in range(6)]
            assert torch.equal(found[2:], want[2:])


WRONG_SHAPES = {
    "student_hidden": torch.ones(6, 7),
    "student_weight": torch.ones(23, 8),
    "teacher_hidden": torch.ones(5, 12),
    "teacher_weight": torch.ones(24, 11),
    "token_weights": torch.ones(6, 1),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_shapes_that_do_not_fit_are_named(name: str) -> None:
    inputs = reference.heads(Case())._replace(**{name: WRONG_SHAPES[name]})
    with pytest.raises(ValueError, match="expected hidden") as error:
        call(inputs)
    assert str(list(WRONG_SHAPES[name].shape)) in str(error.value)


def test_three_dimensional_hidden_states_are_refused() -> None:
    inputs = reference.heads(Case())
    with pytest.raises(ValueError, match="expected hidden"):
        call(inputs._replace(student_hidden=inputs.student_hidden[None]))


BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"divergence": "kl"}, "divergence must be one of forward_kl, reverse_kl, jsd, not 'kl'"),
    ({"beta": -0.1}, r"beta .* must lie in \[0.001, 0.999\], not -0.1"),
    ({"beta": 1.0}, r"beta .* must lie in \[0.001, 0.999\], not 1.0"),
    ({"beta": float("nan")}, "beta .* not nan"),
    ({"temperature": 0}, "temperature must be positive, not 0"),
    ({"temperature": float("nan")}, "temperature must be positive, not nan"),
    ({"clip": 0.0}, "clip must be positive"),
    ({"clip": -1.0}, "clip must be positive"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
    ({"vocab_size": 0}, r"vocab_size 0 does not fit 1 shard\(s\) of 24 columns"),
    ({"vocab_size": 25}, r"vocab_size 25 does not fit 1 shard\(s\) of 24 columns"),
]


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS, ids=[str(options) for options, _ in BAD_ARGUMENTS])
def test_arguments_out_of_range_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(reference.heads(Case()), **options)


def parameter_under_ddp(inputs: reference.Heads, dtype: torch.dtype = torch.float32) -> Any:
    """The student's head with a `main_grad` that holds 0.5 everywhere, of an earlier micro-batch."""
    weight: Any = torch.nn.Parameter(inputs.student_weight.detach().clone())
    weight.main_grad = torch.full_like(weight, 0.5, dtype=dtype)
    weight.grad_added_to_main_grad = False
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_under_megatron_s_ddp_the_head_s_gradient_goes_to_main_grad(tied: bool, dtype: torch.dtype) -> None:
    inputs = reference.heads(Case(tokens=7, dtype=torch.float32))
    want = gradients(inputs)[1]
    weight = parameter_under_ddp(inputs, dtype)
    weight.zero_out_wgrad = tied
    (3 * call(inputs._replace(student_weight=weight))).backward()
    assert weight.grad_added_to_main_grad
    exact = dtype == torch.float32
    assert torch.allclose(weight.main_grad.float(), 0.5 + 3 * want, rtol=1e-6 if exact else 1e-2, atol=1e-6)
    assert weight.grad.shape == weight.shape, "a stand-in, for the hooks to run"
    assert not tied or weight.grad.eq(0).all(), "it is added to the embedding's gradient"


@pytest.mark.parametrize(("inner", "columns"), [(40, 5), (5, 40)])
def test_a_weight_of_16_bits_is_widened_block_by_block_along_its_longer_side(inner: int, columns: int) -> None:
    """Where a shard of the vocabulary has fewer columns than the hidden states, the blocks are summed."""
    left, right = (torch.randn(shape).bfloat16() for shape in ((3, inner), (inner, columns)))
    with mock.patch("megatron_trd.losses.torch_kernels.HOST_BLOCK_BYTES", 256):
        found = product_into(torch.full((3, columns), torch.nan), left, right)
    assert torch.allclose(found, left.float() @ right.float(), atol=1e-5)


@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_head_s_gradient_is_accumulated_at_once_where_that_is_asked_for(
    dtype: torch.dtype, chunk_tokens: int | None
) -> None:
    case = Case(tokens=7, dtype=torch.float32)
    inputs = reference.heads(case)
    hidden_gradient, want, _ = gradients(inputs)
    weight = parameter_under_ddp(inputs, dtype)
    at_once = inputs._replace(student_weight=weight)
    loss = call(at_once, chunk_tokens=chunk_tokens, accumulate=True)
    there = weight.main_grad.ne(0.5).any()
    assert there == (dtype == torch.float32), "what is summed more coarsely waits for backward"
    loss.backward()
    assert inputs.student_hidden.grad is not None
    assert torch.allclose(inputs.student_hidden.grad, hidden_gradient, rtol=1e-6, atol=1e-9)
    assert weight.grad_added_to_main_grad
    exact = dtype == torch.float32
    assert torch.allclose(weight.main_grad.float(), 0.5 + want, rtol=1e-6 if exact else 1e-2, atol=1e-6)


def test_rows_of_padding_are_left_alone_when_the_gradient_is_accumulated_at_once() -> None:
    inputs = reference.heads(Case(tokens=7, dtype=torch.float32))
    weight = parameter_under_ddp(inputs)
    call(inputs._replace(student_weight=weight), vocab_size=5, accumulate=True).backward()
    assert weight.main_grad[5:].eq(0.5).all()
    assert weight.main_grad[:5].ne(0.5).any()


def test_a_scaled_loss_whose_gradient_was_accumulated_at_once_is_refused() -> None:
    inputs = reference.heads(Case(tokens=7, dtype=torch.float32))
    loss = call(inputs._replace(student_weight=parameter_under_ddp(inputs)), accumulate=True)
    with pytest.raises(RuntimeError, match="back-propagated as it is"):
        (2 * loss).backward()


def test_nothing_is_accumulated_without_gradients_or_a_main_grad() -> None:
    inputs = reference.heads(Case(tokens=7, dtype=torch.float32))
    weight = parameter_under_ddp(inputs)
    with torch.no_grad():
        call(inputs._replace(student_weight=weight), accumulate=True)
    assert weight.main_grad.eq(0.5).all()
    _, plain, _ = gradients(inputs)
    (3 * call(inputs, accumulate=True)).backward()
    assert inputs.student_weight.grad is not None
    assert torch.allclose(inputs.student_weight.grad, 3 * plain)
