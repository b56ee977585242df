"""Which request has which row: nothing lost, nothing twice, rows dense, order kept, each prompt computed once."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_selfspec.engine.request import Request
from trl_selfspec.engine.scheduler import Admission, Scheduler
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.kv_cache.prefix_cache import PrefixCache


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
            if (successor := scheduler.take_over(row)) is not None:
                assert successor.prompt == request.prompt
                assert scheduler.active[row] is successor
                started.append(successor.row_id)
                continue
            moved = scheduler.active[-1]
            last = scheduler.retire(row)
            assert last == scheduler.num_active
            assert row == last or scheduler.active[row] is moved
        for request in scheduler.active:
            owner = scheduler.prefix_owner(request.prompt)
            assert owner is not None and scheduler.active[owner].prompt == request.prompt
    assert started == list(range(len(prompts)))
    assert sorted(finished) == started


def admit(scheduler: Scheduler) -> tuple[list[int], Admission]:
    admission = Admission(scheduler, PrefixCache(PagedCache(1, scheduler.max_rows, 9)))
    return scheduler.admit(admission.fits), admission


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 6), st.integers(0, 2**32))
def test_each_prompt_has_one_owner(prompts: list[int], num_old: int, seed: int) -> None:
    """Prevents a prompt that is prefilled twice, and a row that gets keys of another prompt, or none yet."""
    scheduler = Scheduler(requests(prompts), max_rows=num_old)
    admit(scheduler)
    random = Random(seed)
    while scheduler.num_active and random.random() < 0.5:  # rows move
        scheduler.retire(random.randrange(scheduler.num_active))
    old = {request.prompt for request in scheduler.active}
    scheduler.max_rows = 12
    new, admission = admit(scheduler)
    assert sorted([*admission.cached, *admission.shared]) == new
    computed = [scheduler.active[row].prompt for row in admission.cached]
    assert len(set(computed)) == len(computed)
    assert not old & set(computed)
    for row, (owner, num_tokens) in admission.shared.items():
        assert scheduler.active[owner].prompt == scheduler.active[row].prompt
        assert num_tokens == 1
        assert owner in admission.cached or owner not in new, "its keys are there when they are shared"


def test_an_owner_without_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the newest row of a prompt is one that itself waits for its keys."""
    monkeypatch.setattr(
        Scheduler, "prefix_owner", lambda self, prompt: next(reversed(self._rows_by_prompt[prompt]), None)
    )
    with pytest.raises(AssertionError):
        test_each_prompt_has_one_owner()
