"""Time: each term against arithmetic done by hand, and what must make it shorter or longer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_trd.planning import seconds
from megatron_trd.planning.devices import DEVICES, GPU_EFFICIENCY
from megatron_trd.planning.shapes import PUBLISHED
from megatron_trd.planning.workload import longest_of, mean_lengths
from tests.planning.cases import make

H100, SHARE = DEVICES["h100"], GPU_EFFICIENCY


def test_longest_of_evenly_spread_lengths() -> None:
    assert longest_of(1, 50, 100) == 50
    assert longest_of(3, 50, 100) == 75
    assert longest_of(10**6, 30, 100) == pytest.approx(60, rel=1e-5)  # as far above the mean as zero is below
    assert longest_of(10**6, 80, 100) == pytest.approx(100, rel=1e-5)
    assert longest_of(5, 100, 100) == 100


def test_decoding_reads_the_weights_once_a_step_and_keys_and_values_once_a_token() -> None:
    """One raw-rollout problem on one GPU: 8,192 tokens, the mean, one after the other."""
    case = make({"method": "opd-forward-kl", "batch_size": 1}, gpus_per_node=1)
    sample = seconds.by_phase(case)["sample"]
    weights = (8_190_735_360 - 151_936 * 4096) * 2  # not the embedding, of which a row is read
    assert sample["reading weights"] == pytest.approx(8192 * weights / (3.35e12 * SHARE.decoding), rel=1e-3)
    token = 36 * 2 * 8 * 128 * 2
    context = 2048 * 0.1 + 8192 / 2
    cache = 8192 * token * context / (3.35e12 * SHARE.decoding)
    assert sample["reading KV cache"] == pytest.approx(cache, rel=0.01)
    assert sample["engine steps"] == pytest.approx(8192 * SHARE.engine_seconds)


def test_two_engines_take_turns_and_one_of_one_model_does_both_at_once() -> None:
    frozen = seconds.by_phase(make({}))["sample"]
    assert frozen == seconds.by_phase(make({"sampler": {"one_engine": False}}))["sample"]
    live = seconds.by_phase(make({"teacher": {"weights": "live"}}))["sample"]
    assert live["engine steps"] == pytest.approx(frozen["engine steps"], rel=0.01)  # one after the other either way
    raw = seconds.by_phase(make({"method": "opsd-forward-kl"}))["sample"]
    assert sum(raw.values()) < 0.6 * sum(frozen.values())


def test_requests_that_have_no_room_wait() -> None:
    """4,096 rollouts and as many refinements on one engine each, 64 at once: a step of the engine for 64 tokens."""
    sampler = {"tp": 8, "max_sequences": 64, "memory_fraction": 0.4}
    found = seconds.by_phase(make({"batch_size": 4096, "sampler": sampler}))["sample"]["engine steps"]
    step = SHARE.engine_seconds + 2 * 36 * SHARE.collective_seconds
    assert found == pytest.approx(2 * 4096 * 8192 / 64 * step)


def test_teacher_and_training_are_their_flops() -> None:
    settings = {"method": "opd-forward-kl", "batch_size": 64}
    parts = seconds.by_phase(make(settings, gpus_per_node=8))
    length = 2048 * 0.1 + 8192
    weights = 36 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    forward = 8 * (2 * weights * length + 36 * 2 * 4096 * length**2)  # of the 8 samples of a replica
    host = 8 * 36 * SHARE.layer_seconds
    assert parts["teacher"]["layers"] == pytest.approx(forward / (989e12 * SHARE.forward) + host, rel=1e-3)
    assert parts["train"]["layers"] == pytest.approx(3 * forward / (989e12 * SHARE.training) + 3 * host, rel=1e-3)
    head = 8 * 8192 * 8 * 4096 * 151_936  # six products' worth of the student's, two of the teacher's
    assert parts["train"]["loss"] == pytest.approx(head / (989e12 * SHARE.head), rel=1e-3)
    again = seconds.by_phase(make(settings | {"student": {"recompute": True}}))
    assert again["train"]["layers"] == pytest.approx(parts["train"]["layers"] * 4 / 3)


def test_adapters_train_without_gradients_of_weights() -> None:
    """Forward and the gradients of inputs alone for the weights; attention and the adapters as ever."""
    settings: dict[str, Any] = {"method": "opd-forward-kl", "batch_size": 64, "lora": {"rank": 64}}
    length = 2048 * 0.1 + 8192
    weights = 2 * 36 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288) * length
    attention, adapters = 36 * 2 * 4096 * length**2, 2 * 174_587_904 * length
    for recompute, passes in ((False, 3), (True, 4)):
        train = seconds.by_phase(make(settings | {"student": {"recompute": recompute}}))["train"]
        flops = 8 * ((passes - 1) * weights + passes * (attention + adapters))
        host = 8 * 36 * passes * SHARE.layer_seconds
        assert train["layers"] == pytest.approx(flops / (989e12 * SHARE.training) + host, rel=1e-6)
    head = 8 * 8192 * (4 + 2) * 4096 * 151_936  # the student's logits and the gradient of its hidden states
    assert train["loss"] == pytest.approx(head / (989e12 * SHARE.head))
    exchanged = 174_587_904 * (4 + 2) * 7 / 8
    assert train["gradients over replicas"] == pytest.approx(exchanged / (450e9 * SHARE.link))
    assert train["optimizer"] == pytest.approx(174_587_904 / 8 * 34 / (3.35e12 * SHARE.copying))


def test_frozen_experts_have_no_gradients_either() -> None:
    settings: dict[str, Any] = {"model": "models/Qwen3-30B-A3B", "method": "opd-forward-kl", "sampler": {"tp": 4}}
    settings |= {"student": {"tp": 2, "ep": 4, "sequence_parallel": True}}
    trained, frozen = (
        seconds.by_phase(make(settings | {"lora": {"rank": rank}}))["train"]["layers"] for rank in (0, 1)
    )
    sequences, length = 16 / 4, 2048 * 0.1 + 8192  # of a replica
    active = 48 * (2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128 + 8 * 3 * 2048 * 768)
    saved = sequences * 2 * active * length / 2 / (989e12 * SHARE.training)
    assert trained - frozen == pytest.approx(saved, rel=0.002)  # adapters of rank 1 take almost nothing


def test_a_frozen_teacher_without_adapters_computes_as_the_student_does() -> None:
    settings: dict[str, Any] = {"model": "models/Qwen3-30B-A3B", "sampler": {"tp": 4}, "lora": {"rank": 64}}
    settings |= {"student": {"tp": 4, "ep": 4, "sequence_parallel": True}}
    shared, live = (
        seconds.by_phase(make(settings | {"teacher": {"weights": weights}}))["teacher"]
        for weights in ("frozen", "live")
    )
    assert shared == live
    once, twice = (seconds.by_phase(make(settings | {"epochs_per_batch": count}))["teacher"] for count in (1, 2))
    assert once == twice  # its hidden states stay valid


def test_a_refit_multiplies_adapters_out() -> None:
    """On every rank; the teacher's weights, which the same engine gets afterwards, are as they are."""
    settings: dict[str, Any] = {"student": {"tp": 8, "sequence_parallel": True}, "sampler": {"tp": 8}}
    plain, adapted = (seconds.by_phase(make(settings | {"lora": {"rank": rank}})) for rank in (0, 64))
    values = 36 * (4096 * 4096 * 2 + 2 * 4096 * 1024 + 3 * 4096 * 12288)
    merging = 2 * 64 * values / (989e12 * SHARE.forward) + (8 + 8) * values / (3.35e12 * SHARE.copying)
    assert adapted["refit"].pop("merging adapters") == pytest.approx(merging)
    assert "merging adapters" not in plain["refit"]
    live = seconds.by_phase(make(settings | {"lora": {"rank": 64}, "teacher": {"weights": "live"}}))["refit"]
    assert adapted["refit"]["exchange"] == pytest.approx(2 * live["exchange"])  # the student's, then the teacher's
    plain, adapted = (
        seconds.by_phase(make(settings | {"lora": {"rank": rank}, "teacher": {"weights": "ema"}}))["train"]
        for rank in (0, 64)
    )
    assert adapted["teacher's average"] - plain["teacher's average"] == pytest.approx(merging)


def test_a_step_is_not_shorter_than_its_longest_sequence() -> None:
    """16 samples over 16 replicas: the busiest has the longest one, not a mean one."""
    settings = {"method": "opd-forward-kl"}
    half = seconds.by_phase(make(settings, nodes=1))["train"]["layers"]
    full = seconds.by_phase(make(settings, nodes=2))["train"]["layers"]
    assert full == pytest.approx(half * longest_of(16, 8397, 18432) / (2 * 8397), rel=0.01)


def test_pipelines_fill() -> None:
    settings: dict[str, Any] = {"method": "opd-forward-kl", "batch_size": 8, "student": {"pp": 4}}
    parts = seconds.by_phase(make(settings, gpus_per_node=4))["train"]
    assert parts["pipeline fill"] == pytest.approx((parts["layers"] + parts["communication"]) * 3 / 8)


def test_further_epochs_train_again_and_ask_a_frozen_teacher_once() -> None:
    once, twice = (seconds.by_phase(make({"epochs_per_batch": count})) for count in (1, 2))
    assert twice["train"]["layers"] == pytest.approx(2 * once["train"]["layers"])
    assert twice["teacher"] == once["teacher"]
    live: dict[str, Any] = {"teacher": {"weights": "live"}}
    once, twice = (seconds.by_phase(make(live | {"epochs_per_batch": count})) for count in (1, 2))
    assert twice["teacher"]["layers"] == pytest.approx(2 * once["teacher"]["layers"])


def test_tensor_parallelism_sums_twice_a_layer_over_its_link() -> None:
    """One sample: 36 layers, two sums of [length, hidden] in bf16 each, of which a rank sends and gets 7/8 twice."""
    settings: dict[str, Any] = {"method": "opd-forward-kl", "batch_size": 1, "student": {"tp": 8}}
    size = (2048 * 0.1 + 8192) * 4096 * 2
    expected = 3 * 36 * 2 * (2 * size * 7 / 8 / (450e9 * SHARE.link) + SHARE.collective_seconds)
    found = seconds.by_phase(make(settings))["train"]["communication"]
    assert found == pytest.approx(expected)


def test_experts_exchange_tokens_over_the_network_where_they_leave_a_node() -> None:
    settings: dict[str, Any] = {"model": "models/Qwen3-30B-A3B", "sampler": {"tp": 4}}
    inside, across = (
        seconds.by_phase(make(settings | {"student": {"ep": ep}}, nodes=2))["train"]["communication"] for ep in (8, 16)
    )
    assert across == pytest.approx(inside * 9 * (15 / 16) / (7 / 8), rel=0.2)  # 450 GB/s and 50 GB/s


def test_gradients_of_one_node_do_not_cross_the_network() -> None:
    settings = {"method": "opd-forward-kl", "student": {"tp": 8, "sequence_parallel": True}, "sampler": {"tp": 8}}
    one, two = (seconds.by_phase(make(settings, nodes=nodes))["train"]["gradients over replicas"] for nodes in (1, 2))
    assert one == 0
    shard = (8_190_735_360 + 128 * 4096) / 8  # padding of the vocabulary is small
    assert two == pytest.approx(shard * 6 / 2 / (50e9 * SHARE.link), rel=0.01)


def test_refit_gathers_the_model_and_a_moving_teacher_s() -> None:
    settings: dict[str, Any] = {"student": {"tp": 8, "sequence_parallel": True}, "sampler": {"tp": 8}}
    live = seconds.by_phase(make(settings | {"teacher": {"weights": "live"}}))["refit"]
    assert live["exchange"] == pytest.approx(8.19e9 * 2 * 7 / 8 / (450e9 * SHARE.link), rel=0.01)
    two = {"sampler": {"tp": 8, "one_engine": False}}
    moving, frozen, swapped = (
        seconds.by_phase(make(settings | {"teacher": {"tp": 8, "weights": weights}} | engines))["refit"]
        for weights, engines in (("ema", two), ("frozen", two), ("frozen", {}))
    )
    assert moving["exchange"] == swapped["exchange"] == pytest.approx(2 * live["exchange"])
    assert frozen["exchange"] == live["exchange"]
    far, near = (
        seconds.by_phase(make({"student": {"pp": 2}, "teacher": {"weights": "live"}}, nodes=nodes))["refit"]
        for nodes in (2, 1)
    )
    assert far["exchange"] == pytest.approx(9 * near["exchange"])  # stages are on other nodes, where there are any
    alone = seconds.by_phase(make({"teacher": {"weights": "live"}}))["refit"]
    assert alone["exchange"] == 0  # TP 1: every rank has the whole model


def test_mixtures_read_the_experts_that_are_asked_for() -> None:
    """One sequence: 8 of 128 experts a layer; many: all of them."""
    arch = PUBLISHED["Qwen3-30B-A3B"]
    experts, vocabulary = 48 * 128 * 3 * 2048 * 768, 151_936 * 2048
    others = 30_532_122_624 - experts - vocabulary
    for active, share in ((1, 8 / 128), (4096, 1.0)):
        read = seconds._weights_read(arch, active)
        assert read == pytest.approx(others + share * experts, rel=0.05)


def test_mean_lengths_follow_the_contexts() -> None:
    config = make({}).config
    mean = mean_lengths(config, 1000)
    assert (mean.rollout, mean.response) == (1000, 1000)
    assert mean.teacher_prompt == pytest.approx(mean.prompt + 409.6 + 1000)
    raw = mean_lengths(replace(config, method="opd-forward-kl"), 1000)
    assert raw.teacher_prompt == raw.prompt
