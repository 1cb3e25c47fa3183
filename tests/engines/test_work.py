"""Sharing out a step's requests: limits are kept, the longest come first, and no group idles while another has more."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_trd.engines.work import Capacity, Expectation, Load, Task, assign, at_once

TASKS = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 50)), max_size=20)
LOADS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200)), min_size=1, max_size=4)


def refinements(sizes: list[tuple[int, int]]) -> list[Task]:
    return [
        Task("refinement", index, 0, (0,) * prompt, limit=50, length=length)
        for index, (prompt, length) in enumerate(sizes)
    ]


@settings(max_examples=200, deadline=None)
@given(TASKS, LOADS, st.integers(1, 8), st.none() | st.integers(1, 400))
def test_every_task_goes_to_a_group_with_room_or_waits(
    sizes: list[tuple[int, int]], loads: list[tuple[int, int]], most: int, tokens: int | None
) -> None:
    tasks, capacity = refinements(sizes), Capacity(most, tokens)
    before = [Load(*load) for load in loads]
    given = assign(tasks, before, capacity, Expectation(1))
    taken = [task for group in given for task in group]
    assert len(set(taken)) == len(taken)
    left = [task for task in tasks if task not in taken]
    for load, group in zip(before, given, strict=True):
        after = Load(load.requests + len(group), load.tokens + sum(task.tokens for task in group))
        if group and not (load.requests == 0 and len(group) == 1):
            assert after.requests <= most
            assert tokens is None or after.tokens <= tokens
        assert not any(capacity.admits(after, task) for task in left), "it had room for one that waits"
    if tokens is None and left:
        assert min(task.length or 0 for task in taken or left) >= max(task.length or 0 for task in left) or not taken


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 40), st.integers(1, 5))
def test_equal_groups_get_equal_shares(count: int, groups: int) -> None:
    given = assign(refinements([(3, 7)] * count), [Load()] * groups, Capacity(100, None), Expectation(1))
    shares = [len(group) for group in given]
    assert sum(shares) == count
    assert max(shares) - min(shares) <= 1


def test_longest_expected_first() -> None:
    tasks = refinements([(1, 10), (1, 30), (1, 20)])
    [first] = assign(tasks, [Load()], Capacity(2, None), Expectation(1))
    assert [task.length for task in first] == [30, 20]
    # a rollout is followed by a refinement of about its length: together they are as long as the mean says, twice
    rollout = Task("rollout", 9, 0, (0,), limit=50)
    assert assign([*tasks, rollout], [Load()], Capacity(1, None), Expectation(1, [14, 14])) == [[tasks[1]]]
    assert assign([*tasks, rollout], [Load()], Capacity(1, None), Expectation(1, [16, 16])) == [[rollout]]
    assert assign([*tasks, rollout], [Load()], Capacity(1, None), Expectation(0, [16, 16])) == [[tasks[1]]]
    assert assign([*tasks, rollout], [Load()], Capacity(1, None), Expectation(1)) == [[rollout]], "nothing known yet"


def test_a_task_too_large_for_any_group_runs_alone() -> None:
    [large, small] = refinements([(40, 30), (1, 1)])
    capacity = Capacity(8, 65)
    assert assign([large, small], [Load(1, 10), Load()], capacity, Expectation(1)) == [[small], [large]]
    assert assign([large], [Load(1, 10)], capacity, Expectation(1)) == [[]]


def test_a_refinement_begins_at_once_unless_others_have_room_or_a_longer_task_waits() -> None:
    [short, mean, long] = refinements([(1, 10), (1, 20), (1, 30)])
    rollout, expected = Task("rollout", 9, 0, (0,), limit=50), Expectation(1, [10, 10])
    room = Capacity(8, None).with_share(3)
    assert at_once(short, Load(2, 40), room, [], expected)
    assert not at_once(short, Load(3, 40), room, [], expected)
    assert not at_once(short, Load(2, 40), room, [rollout], expected), "with its refinement it is expected to be 20"
    assert at_once(mean, Load(2, 40), room, [short, rollout], expected)
    assert not at_once(mean, Load(2, 40), room, [short, long], expected)


def test_what_begins_at_once_keeps_the_limits() -> None:
    [task] = refinements([(1, 10)])
    expected = Expectation(1, [10])
    assert at_once(task, Load(2, 40), Capacity(8, 40 + task.tokens).with_share(3), [], expected)
    assert not at_once(task, Load(2, 40), Capacity(8, 39 + task.tokens).with_share(3), [], expected)
    assert not at_once(task, Load(2, 40), Capacity(2, None).with_share(3), [], expected)
