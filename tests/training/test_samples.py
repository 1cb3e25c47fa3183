"""Trajectories to training samples: what is trained on, what is dropped or cut and counted, and a step's metrics."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest

from megatron_trd.config import from_dict
from megatron_trd.data.problems import Problem
from megatron_trd.data.programs import ProgramTests
from megatron_trd.data.prompts import PromptBuilder
from megatron_trd.engines.engine import Completion
from megatron_trd.engines.sampler import Trajectory
from megatron_trd.evaluation.grading import are_correct
from megatron_trd.training.checks import prompt_limit
from megatron_trd.training.samples import SampleBuilder
from tests.data.tokenizers import END, END_OF_TEXT, ids_of, tokenizer
from tests.distributed import run_ranks
from tests.marks import needs_sandbox

(EOS,) = ids_of(END)
_INDICES = itertools.count(1000)
PROBLEM = Problem(0, "What is 12 + 34?", "46", "It is 46.")


def encode(text: str) -> list[int]:
    return list(tokenizer()(text, add_special_tokens=False)["input_ids"])


def builder(method: str = "trd-opsd", teacher: Any = None, **fields: Any) -> SampleBuilder:
    """`teacher`: a tokenizer of its own."""
    prompts = PromptBuilder(tokenizer())
    return SampleBuilder(from_dict({"method": method} | fields, "test"), prompts, PromptBuilder(teacher or tokenizer()))


def completion(text: str, *, truncated: bool = False) -> Completion:
    tokens = (*encode(text), *(() if truncated else (EOS,)))
    return Completion(tokens, tuple(-0.5 - place for place in range(len(tokens))), truncated)


def answer(value: int) -> str:
    return f"So it is\n\\boxed{{{value}}}"


def trajectory(
    before: Completion,
    after: Completion | None = None,
    problem: Problem = PROBLEM,
    prompt: Sequence[int] | None = (5, 6),
    index: int | None = None,
) -> Trajectory:
    """Of a rollout of its own, unless `index` says which it is."""
    index = next(_INDICES) if index is None else index
    return Trajectory(problem, index, before, None if prompt is None else tuple(prompt), after)


def limits(prompt: int, reference: int, rollout: int, overlong: str = "drop") -> dict[str, Any]:
    return {
        "data": {"max_prompt_tokens": prompt, "max_reference_tokens": reference, "overlong": overlong},
        "sampler": {"max_rollout_tokens": rollout},
    }


# What a sample is


def test_a_refined_sample_is_the_vanilla_prompt_the_refinement_prompt_and_the_refinement() -> None:
    made = builder("trd-opsd")
    before, after = completion(answer(45)), completion(answer(46))
    prompt = made.refine_prompt(PROBLEM, before)
    assert prompt == made.prompts.ids("refine_reference", PROBLEM.problem, PROBLEM.reference, before.body)
    (sample,) = made.samples([trajectory(before, after, prompt=prompt)])
    assert list(sample.student_prompt) == made.prompts.ids("vanilla", PROBLEM.problem)
    assert list(sample.teacher_prompt) == prompt
    assert (sample.response, sample.sampler_log_probs) == (after.tokens, after.log_probs)
    assert sample.response[-1] == EOS, "end-of-sequence is trained where it was sampled"


@pytest.mark.parametrize(("method", "context"), [("opd-forward-kl", "vanilla"), ("opsd-jsd", "reference")])
def test_a_raw_sample_is_the_rollout_under_the_teacher_s_own_context(method: str, context: Any) -> None:
    made = builder(method)
    rollout = completion(answer(45))
    (sample,) = made.samples([trajectory(rollout, prompt=None)])
    assert list(sample.student_prompt) == made.prompts.ids("vanilla", PROBLEM.problem)
    assert list(sample.teacher_prompt) == made.prompts.ids(context, PROBLEM.problem, PROBLEM.reference)
    assert (sample.response, sample.sampler_log_probs) == (rollout.tokens, rollout.log_probs)


def test_opd_refines_without_the_reference() -> None:
    made = builder("trd-opd")
    prompt = made.refine_prompt(PROBLEM, completion(answer(45)))
    assert prompt is not None
    assert PROBLEM.reference not in tokenizer().decode(prompt)


@pytest.mark.parametrize(("normalize", "weights"), [("sequence", [1 / 2 / 3, 1 / 2 / 9]), ("token", [1 / 12, 1 / 12])])
def test_weights_are_normalised_over_the_samples_that_are_kept(normalize: str, weights: list[float]) -> None:
    made = builder("opd-forward-kl", loss={"normalize": normalize})
    kept = [Completion((7,) * count, (0.0,) * count, truncated=False) for count in (3, 9)]
    dropped = Completion((7,) * 5, (0.0,) * 5, truncated=True)
    samples = made.samples([trajectory(rollout, prompt=None) for rollout in (kept[0], dropped, kept[1])])
    assert [sample.weight for sample in samples] == pytest.approx(weights)
    assert sum(sample.weight * len(sample.response) for sample in samples) == pytest.approx(1.0)


def test_nothing_to_train_on_is_an_empty_list() -> None:
    made = builder("trd-opsd")
    empty = Completion((), (), truncated=False)
    rollout = completion("x")
    assert made.samples([]) == []
    assert made.samples([trajectory(rollout, None, prompt=None)]) == [], "its refinement prompt was dropped"
    assert made.samples([trajectory(rollout, empty)]) == [], "no token to learn from"


# Truncated responses


@pytest.mark.parametrize(("overlong", "kept"), [("drop", 1), ("cut", 2)])
@pytest.mark.parametrize("method", ["trd-opsd", "opd-forward-kl"])
def test_truncated_responses_are_dropped_or_kept_and_counted(overlong: str, kept: int, method: str) -> None:
    made = builder(method, data={"overlong": overlong})
    refines = method == "trd-opsd"
    whole, broken = completion(answer(46)), completion("So", truncated=True)
    trajectories = [
        trajectory(whole if refines else response, response if refines else None) for response in (whole, broken)
    ]
    samples = made.samples(trajectories)
    assert len(samples) == kept
    metrics = made.metrics(trajectories, samples)
    assert metrics["overflow/refinement" if refines else "overflow/rollout"] == 1
    assert metrics["overflow/rollout" if refines else "overflow/refinement"] == 0
    assert metrics["samples/trained"] == kept


def test_a_truncated_rollout_may_be_refined_and_its_refinement_trained_on() -> None:
    made = builder("trd-opsd")
    trajectories = [trajectory(completion("So", truncated=True), completion(answer(46)))]
    samples = made.samples(trajectories)
    assert len(samples) == 1
    assert made.metrics(trajectories, samples)["overflow/rollout"] == 1


# Over-long prompts


LONG = Problem(1, "What is 12 + 34? " * 30, "46", "It is 46.")
VERBOSE = Problem(2, "What is 12 + 34?", "46", "It is 46, indeed. " * 50)
# A teacher prompt's own words are some tokens longer than the vanilla prompt's.
ROOM = len(encode(PromptBuilder(tokenizer()).text("refine_reference", "", "")))


@pytest.mark.parametrize("overlong", ["drop", "cut"])
@pytest.mark.parametrize("method", ["trd-opsd", "trd-opd", "opd-forward-kl", "opsd-forward-kl"])
def test_a_problem_too_long_is_dropped_never_cut_and_counted_once(method: str, overlong: str) -> None:
    made = builder(method, **limits(200, 60, 20, overlong))
    problems, prompts, too_long = made.begin([PROBLEM, LONG, PROBLEM])
    assert problems == [PROBLEM, PROBLEM]
    assert prompts == [made.prompts.ids("vanilla", PROBLEM.problem)] * 2
    assert too_long == 1


def test_a_problem_that_is_rolled_out_several_times_is_counted_once() -> None:
    made = builder(**limits(200, 60, 20), rollouts_per_problem=3)
    problems, prompts, too_long = made.begin([PROBLEM, LONG])
    assert (problems, too_long) == ([PROBLEM] * 3, 1)
    assert prompts == [made.prompts.ids("vanilla", PROBLEM.problem)] * 3


def test_the_count_of_too_long_problems_begins_anew_each_step() -> None:
    made = builder("opsd-jsd", **limits(200, 60, 20))
    assert made.begin([LONG, LONG])[2] == 2
    assert made.begin([PROBLEM, LONG])[2] == 1


def test_a_reference_too_long_drops_the_problem_and_is_counted_once() -> None:
    made = builder("opsd-forward-kl", **limits(200, 60, 20, "drop"))
    problems, _, too_long = made.begin([VERBOSE, PROBLEM])
    assert problems == [PROBLEM]
    assert too_long == 1


def test_a_reference_too_long_is_cut_to_fit_and_is_counted_once() -> None:
    made = builder("opsd-forward-kl", **limits(200, 60, 20, "cut"))
    problems, _, too_long = made.begin([VERBOSE, PROBLEM])
    assert problems == [VERBOSE, PROBLEM]
    assert too_long == 1
    trajectories = [trajectory(completion(answer(46)), None, problem, prompt=None) for problem in problems]
    samples = made.samples(trajectories)
    assert len(samples) == 2
    cut = list(samples[0].teacher_prompt)
    shown = made.prompts.cut(VERBOSE.reference, made.prompts.count(VERBOSE.reference) - 60)
    assert 57 <= made.prompts.count(shown) <= 60, "cut, and no more than needed"
    assert cut == made.prompts.ids("reference", VERBOSE.problem, shown)
    text = tokenizer().decode(cut)
    assert VERBOSE.problem in text
    assert "It is 46, indeed. It is 46" in text
    assert VERBOSE.reference not in text
    assert "Solve the problem in your own words" in text, "the words after the reference are not cut off"
    assert list(samples[1].teacher_prompt) == made.prompts.ids("reference", PROBLEM.problem, PROBLEM.reference)


def test_methods_that_do_not_show_the_reference_do_not_mind_its_length() -> None:
    made = builder("opd-forward-kl", **limits(200, 60, 20))
    problems, _, too_long = made.begin([VERBOSE])
    assert (problems, too_long) == ([VERBOSE], 0)


@pytest.mark.parametrize("tokens", [(7, EOS), (EOS, EOS), (EOS, 7), (EOS,), ids_of("<think>", END_OF_TEXT)])
def test_a_rollout_is_shown_without_the_token_that_ended_it(tokens: Sequence[int]) -> None:
    """A model may have several such tokens, special or not; a rollout that was cut off was ended by none of them."""
    made = builder("trd-opd")
    for truncated, shown in ((False, tokens[:-1]), (True, tokens)):
        prompt = made.refine_prompt(PROBLEM, Completion(tuple(tokens), (0.0,) * len(tokens), truncated))
        assert prompt == made.prompts.ids("refine", PROBLEM.problem, None, shown)


@pytest.mark.parametrize("ended", [True, False])
def test_a_rollout_too_long_is_cut_inside_the_refinement_prompt(ended: bool) -> None:
    made = builder("trd-opd", **limits(ROOM + 20, 1, 10, "cut"))
    tokens = tuple(range(100, 250))
    rollout = Completion((*tokens, EOS) if ended else tokens, (0.0,) * (150 + ended), truncated=not ended)
    prompt = made.refine_prompt(PROBLEM, rollout)
    room = prompt_limit(made.config, "refine") - len(made.prompts.ids("refine", PROBLEM.problem, None, []))
    assert 0 < room < 150
    assert prompt == made.prompts.ids("refine", PROBLEM.problem, None, tokens[:room]), "cut, and no more than needed"
    assert made.metrics([trajectory(rollout, prompt=prompt)], [])["overflow/refinement_prompt"] == 1


def test_a_rollout_too_long_drops_the_refinement_where_the_configuration_says_so() -> None:
    made = builder("trd-opd", **limits(ROOM + 20, 1, 10, "drop"))
    rollout = Completion(tuple(range(100, 250)), (0.0,) * 150, truncated=True)
    assert made.refine_prompt(PROBLEM, rollout) is None
    dropped = trajectory(rollout, None, prompt=None)
    assert made.samples([dropped]) == []
    assert made.metrics([dropped], [])["overflow/refinement_prompt"] == 1


def test_a_reference_has_a_limit_of_its_own_whatever_room_a_short_rollout_leaves() -> None:
    """Or which problems are trained on would depend on the length of their rollouts, and references eat those up."""
    dropping, cutting = (builder("trd-opsd", **limits(200, 60, 500, overlong)) for overlong in ("drop", "cut"))
    problems, prompts, too_long = dropping.begin([VERBOSE, PROBLEM])
    assert (problems, len(prompts), too_long) == ([PROBLEM], 1, 1), "not sampled for nothing"
    rollout = completion(answer(45))
    assert dropping.refine_prompt(VERBOSE, rollout) is None
    assert cutting.begin([VERBOSE, PROBLEM])[::2] == ([VERBOSE, PROBLEM], 1)
    prompt = cutting.refine_prompt(VERBOSE, rollout)
    shown = cutting.prompts.cut(VERBOSE.reference, cutting.prompts.count(VERBOSE.reference) - 60)
    assert prompt == cutting.prompts.ids("refine_reference", VERBOSE.problem, shown, rollout.body)


@pytest.mark.parametrize("repeated", [1, 300])  # more is over than the rollout has, and less than twice that
def test_a_reference_is_cut_further_after_the_rollout_is_used_up(repeated: int) -> None:
    made = builder("trd-opsd", **limits(ROOM - 30, len(encode(VERBOSE.reference)), 10, "cut"))
    rollout = completion(answer(45) * repeated)
    prompt = made.refine_prompt(VERBOSE, rollout)
    assert prompt is not None
    limit = prompt_limit(made.config, "refine_reference")
    assert limit - 3 <= len(prompt) <= limit
    text = tokenizer().decode(prompt)
    assert VERBOSE.problem in text
    assert "It is 46, indeed." in text
    assert "boxed{45}" not in text


def test_a_refinement_prompt_that_cannot_be_cut_to_fit_is_dropped() -> None:
    made = builder("trd-opsd", **limits(10, 1, 1, "cut"))
    assert made.refine_prompt(VERBOSE, completion(answer(45))) is None


@pytest.mark.parametrize("overlong", ["drop", "cut"])
def test_overlong_refinement_prompts_of_other_ranks_are_counted_here(overlong: str) -> None:
    fields = limits(ROOM + 20, 1, 10, overlong)
    elsewhere, here = builder("trd-opd", **fields), builder("trd-opd", **fields)
    rollout = Completion(tuple(range(100, 250)), (0.0,) * 150, truncated=True)
    made = trajectory(rollout, None, prompt=elsewhere.refine_prompt(PROBLEM, rollout))
    short = trajectory(Completion((7,), (0.0,), truncated=False), None, prompt=(5,))
    other = dataclasses.replace(made, index=0)
    assert here.metrics([made, short, other], [])["overflow/refinement_prompt"] == 2


def test_a_prompt_of_just_the_limit_is_neither_cut_nor_counted() -> None:
    size = len(PromptBuilder(tokenizer()).ids("vanilla", PROBLEM.problem))
    exact, below = (builder("opd-forward-kl", data={"max_prompt_tokens": limit}) for limit in (size, size - 1))
    problems, _, too_long = exact.begin([PROBLEM])
    assert (problems, too_long) == ([PROBLEM], 0)
    problems, _, too_long = below.begin([PROBLEM])
    assert (problems, too_long) == ([], 1)


@pytest.mark.parametrize("method", ["trd-opd", "opd-forward-kl"])
def test_each_model_is_asked_in_the_words_of_its_own_chat_template(method: str) -> None:
    """A base model's teacher is an instructed one, or the other way round."""
    made = builder(method, teacher=tokenizer(chat=False))
    refined = made.config.method == "trd-opd"
    prompt = made.refine_prompt(PROBLEM, completion("a slip")) if refined else None
    sample = made.sample(trajectory(completion("a slip"), completion(answer(46)) if refined else None, prompt=prompt))
    assert sample is not None
    (first,) = ids_of(END_OF_TEXT)
    assert sample.teacher_prompt[0] == first
    assert list(sample.student_prompt) == PromptBuilder(tokenizer()).ids("vanilla", PROBLEM.problem)


# Corpus ablations: (rollout right, refinement right)


CORNERS = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize(
    ("corpus", "kept"),
    [
        ("all", CORNERS),
        ("rollout_wrong", [(False, False), (False, True)]),
        ("refinement_right", [(False, True), (True, True)]),
        ("corrected", [(False, True)]),
    ],
)
def test_a_corpus_keeps_the_samples_it_is_named_for(corpus: str, kept: list[tuple[bool, bool]]) -> None:
    made = builder("trd-opsd", corpus=corpus)
    trajectories = [
        # a word more for each corner: every refinement is told by its length
        trajectory(completion(answer(46 if before else 45)), completion("x " * index + answer(46 if after else 44)))
        for index, (before, after) in enumerate(CORNERS)
    ]
    refinements = {corner: item.refinement for corner, item in zip(CORNERS, trajectories, strict=True)}
    responses = [sample.response for sample in made.samples(trajectories)]
    assert responses == [refinement.tokens for corner in kept if (refinement := refinements[corner])]


def corpus_of(rank: int, world: int, corpus: str) -> list[int]:
    """Rank function: which of `CORNERS` are kept, where no comparison of another rank than the first ends in time."""
    made = builder("trd-opsd", corpus=corpus)
    trajectories = [
        trajectory(completion(answer(46 if before else 45)), completion(answer(46 if after else 44)), index=index)
        for index, (before, after) in enumerate(CORNERS)
    ]
    of_no_use = mock.Mock(side_effect=lambda _, responses: [False] * len(responses))
    with mock.patch("megatron_trd.training.samples.are_correct", of_no_use if rank else are_correct):
        return [kept.index for kept in made._corpus(trajectories)]


def test_a_corpus_is_the_same_on_every_rank() -> None:
    assert run_ranks(corpus_of, 2, "corrected") == [[CORNERS.index((False, True))]] * 2


# Metrics


def test_metrics_of_hand_made_trajectories() -> None:
    made = builder("trd-opsd")
    other = Problem(1, "What is 1 + 1?", "2", "2")
    trajectories = [
        # wrong, then right; one of two lines kept on each side
        trajectory(completion(f"line\n{answer(45)}"), completion(f"line\n{answer(46)}")),
        # right and copied
        trajectory(completion(answer(46)), completion(answer(46))),
        # wrong, its refinement too long
        trajectory(completion("no idea"), completion("still none", truncated=True), problem=other),
        # right, its refinement prompt dropped
        trajectory(completion(answer(2)), None, problem=other, prompt=None),
    ]
    samples = made.samples(trajectories)
    found = made.metrics(trajectories, samples)
    before = [len(item.rollout.tokens) for item in trajectories]
    after = [len(item.refinement.tokens) for item in trajectories if item.refinement]
    assert found == pytest.approx(
        {
            "samples/trained": 2,
            "tokens/trained": after[0] + after[1],
            "overflow/refinement_prompt": 0,
            "overflow/rollout": 0,
            "overflow/refinement": 1,
            "length/rollout": sum(before) / 4,
            "length/refinement": sum(after) / 3,
            "right/rollout": 2 / 4,
            "right/refinement": 2 / 3,
            # 3 lines, 2 of them kept; a copy; nothing in common
            "edit_ratio": (1 / 3 + 0 + 1) / 3,
        }
    )


def test_metrics_of_a_step_without_trajectories_have_counts_and_no_means() -> None:
    found = builder("trd-opsd").metrics([], [])
    assert found["samples/trained"] == found["tokens/trained"] == 0
    assert not any(key.startswith(("length/", "right/", "edit")) for key in found)


def test_problems_without_an_answer_are_not_graded() -> None:
    made = builder("trd-opsd")
    item = trajectory(completion(answer(46)), completion(answer(46)), problem=Problem(0, "q", None, "r"))
    found = made.metrics([item], [])
    assert not any(key.startswith("right/") for key in found)
    assert made.right(item) == (None, None)


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [
        ("a\nb\nc\nd", "a\nb\nc\nd", 0.0),
        ("a\nb\nc\nd", "a\nB\nc\nd", 0.25),
        ("a", "b", 1.0),
        ("a\nb", "a\nb\nc\nd", 1 / 3),
        ("", "", 0.0),
    ],
)
def test_edit_ratio_is_the_share_of_lines_that_changed(before: str, after: str, ratio: float) -> None:
    item = trajectory(completion(before), completion(after))
    assert builder("trd-opsd").metrics([item], [])["edit_ratio"] == pytest.approx(ratio)


def test_a_rollout_that_was_refined_twice_is_counted_once() -> None:
    long = completion(answer(1), truncated=True)
    items = [trajectory(long, completion(answer(46)), index=0), trajectory(long, completion(answer(46)), index=0)]
    items.append(trajectory(completion(answer(46)), completion(answer(46)), index=1))
    found = builder("trd-opsd").metrics(items, [])
    assert (found["overflow/rollout"], found["right/rollout"], found["right/refinement"]) == (1, 0.5, 1.0)
    assert found["length/rollout"] == (len(long.tokens) + len(items[2].rollout.tokens)) / 2


@needs_sandbox
def test_programs_are_graded_by_their_tests_and_once() -> None:
    made = builder("trd-opsd", data={"task": "code"}, corpus="corrected")
    wrong, right = (completion(f"So it is\n```python\ndef half(x):\n    return x {sign} 2\n```") for sign in ("*", "/"))
    problem = Problem(0, "Write half.", ProgramTests(code="assert half(3) == 1.5").to_json(), "x / 2")
    other = Problem(1, "Write double.", ProgramTests(code="assert half(3) == 6").to_json(), "x * 2")
    items = [trajectory(wrong, right, problem), trajectory(right, right, problem), trajectory(wrong, wrong, other)]
    with mock.patch("megatron_trd.training.samples.are_correct", side_effect=are_correct) as graded:
        assert [sample.response for sample in made.samples(items)] == [right.tokens]
        found = made.metrics(items, [])
        pairs = [made.pair(item) for item in items]
    assert [len(call.args[1]) for call in graded.call_args_list if call.args[1]] == [3]
    assert (found["right/rollout"], found["right/refinement"]) == (2 / 3, 1.0)
    assert [(pair["rollout_right"], pair["refinement_right"]) for pair in pairs] == [(False, True), *[(True, True)] * 2]
    assert {pair["answer"] for pair in pairs} == {None}


@pytest.mark.parametrize(("lines", "ordered"), [(10, True), (2000, False)])
def test_texts_that_repeat_a_few_lines_are_not_compared_in_order(
    lines: int, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes hours of thousands of equal lines, in which all ranks wait."""
    compared = []
    original = difflib.SequenceMatcher
    monkeypatch.setattr(difflib, "SequenceMatcher", lambda *args, **more: compared.append(1) or original(*args, **more))
    before, after = (text * lines for text in ("Wait, I check that again.\n\n", "So it is right.\n\n"))
    found = builder("trd-opsd").metrics([trajectory(completion(before), completion(after))], [])
    assert found["edit_ratio"] == pytest.approx(0.5)
    assert bool(compared) == ordered


def test_a_kept_pair_shows_both_texts_and_whether_they_are_right() -> None:
    made = builder("trd-opsd")
    pair = made.pair(trajectory(completion(answer(45)), completion(answer(46))))
    assert pair == {
        "problem": PROBLEM.problem,
        "reference": PROBLEM.reference,
        "answer": "46",
        "rollout": answer(45),  # without its end-of-sequence token
        "refinement": answer(46),
        "rollout_right": False,
        "refinement_right": True,
    }
    raw = builder("opd-forward-kl").pair(trajectory(completion(answer(46)), None, prompt=None))
    assert (raw["refinement"], raw["refinement_right"], raw["rollout_right"]) == (None, None, True)
