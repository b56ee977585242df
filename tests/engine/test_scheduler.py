"""Which prompt is in which row: nothing lost, nothing twice, rows dense, order kept."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selfspec.engine.request import Request
from trl_selfspec.engine.scheduler import Scheduler


def requests(prompts: list[int]) -> list[Request]:
    return [Request(row_id, (prompt, prompt), 9) for row_id, prompt in enumerate(prompts)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(1, 5), st.integers(0, 2**32))
def test_every_request_is_served_once_and_in_order(prompts: list[int], max_rows: int, seed: int) -> None:
    """Prevents a prompt that is lost when rows move, and one that overtakes."""
    random = Random(seed)
    scheduler, started, finished = Scheduler(requests(prompts), max_rows), [], []
    while scheduler.num_unfinished:
        new = scheduler.admit()
        started += [scheduler.active[row].row_id for row in new]
        assert new == list(range(scheduler.num_active - len(new), scheduler.num_active))
        assert scheduler.num_active == min(max_rows, scheduler.num_unfinished)
        assert scheduler.lengths == [len(request.prompt) for request in scheduler.active]
        for row in range(scheduler.num_active - 1, -1, -1):
            if random.random() < 0.5:
                continue
            request = scheduler.active[row]
            finished.append(request.row_id)
            if (sibling := scheduler.waiting_sibling(row)) is not None:
                assert sibling.prompt == request.prompt
                scheduler.replace(row, sibling)
                started.append(sibling.row_id)
                continue
            moved = scheduler.active[-1]
            last = scheduler.retire(row)
            assert last == scheduler.num_active
            assert row == last or scheduler.active[row] is moved
    assert started == list(range(len(prompts)))
    assert sorted(finished) == started


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 6))
def test_each_prompt_has_one_holder(prompts: list[int], num_old: int) -> None:
    """Prevents a prompt that is prefilled twice, and a row that is handed another prompt's keys."""
    scheduler = Scheduler(requests(prompts), max_rows=12)
    scheduler.admit()
    num_old = min(num_old, len(prompts))
    new = list(range(num_old, len(prompts)))
    groups = scheduler.prefix_groups(new)
    covered = [row for holder, members in groups for row in [holder, *members] if row >= num_old]
    assert sorted(covered) == new
    assert len({holder for holder, _ in groups}) == len(groups) == len({prompts[row] for row in new})
    for holder, members in groups:
        assert all(prompts[row] == prompts[holder] for row in members)
        assert holder == prompts.index(prompts[holder]), "the first row that has the prompt holds its keys"
        assert all(row > holder for row in members)
