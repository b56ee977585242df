"""States of rows against a model that keeps each row's tokens: whatever rows do, a state covers their tokens."""

import random

import pytest
import torch
from torch import Tensor

from trl_selfspec.kv_cache.paged_cache import PagedCache


ROWS, WINDOW, STEPS = 5, 3, 60


class Rows:
    """Rows of tokens, and a cache with two states per row: the last tokens, and a number that depends on all of them.

    A forward does what a layer of transformers does.
    """

    def __init__(self, page_size: int | None) -> None:
        self.cache = PagedCache(1, ROWS, 256, page_size)
        self.tokens: list[list[int]] = [[] for _ in range(ROWS)]
        self.prompts = [0] * ROWS  # tokens at whose end a state is kept

    def forward(self, tokens: list[list[int]], rows: list[int] | None, starts: list[int], fresh: bool) -> None:
        new = torch.tensor(tokens)
        positions = torch.tensor(starts)[:, None] + torch.arange(new.shape[1])
        self.cache.begin(positions, 256, None if rows is None else torch.tensor(rows), fresh=fresh)
        inputs = new[:, None].float()  # (B, 1, T)
        state = self.cache.get_conv_state(0)
        if state is not None:
            assert new.shape[1] == 1
            state.copy_(torch.cat([state, inputs], -1)[..., -WINDOW:])
        else:
            seen = self.cache.update_conv_state(inputs, 0, conv_kernel_size=WINDOW)
            assert torch.equal(seen[..., -new.shape[1] :], inputs)
        number = self.cache.get_recurrent_state(0)
        number = torch.zeros(len(new), 1, dtype=torch.float64) if number is None else number
        if self.cache.verifies:
            self.cache.defer(0, lambda state, counts: advanced(state, new, counts))
        self.cache.update_recurrent_state(advanced(number, new, torch.full((len(new),), new.shape[1])), 0)

    def check(self, active: int) -> None:
        """Compares the states of all active rows with their tokens."""
        self.cache.begin(torch.zeros(active, 1, dtype=torch.int64), 256)
        windows, numbers = self.cache.get_conv_state(0), self.cache.get_recurrent_state(0)
        for row in range(active):
            ids = self.tokens[row]
            if windows is None or numbers is None:
                assert not ids
                continue
            assert windows[row, 0].tolist() == [0.0] * max(WINDOW - len(ids), 0) + [float(t) for t in ids[-WINDOW:]]
            expected = advanced(torch.zeros(1, 1, dtype=torch.float64), torch.tensor([ids]), torch.tensor([len(ids)]))
            assert numbers[row].item() == pytest.approx(expected.item(), rel=1e-12)


def advanced(states: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """A recurrence whose result tells the order and the number of tokens."""
    for t in range(tokens.shape[1]):
        after = states * 0.9 + tokens[:, t : t + 1]
        states = torch.where((t < counts)[:, None], after, states)
    return states


def play_all() -> None:
    for seed in range(8):
        play(seed, None)


def play(seed: int, page_size: int | None) -> None:
    """Rows enter, share prompts, go on, end and move, by chance."""
    rng, rows, active = random.Random(seed), Rows(page_size), 0

    def some(count: int) -> list[int]:
        return [rng.randrange(1, 90) for _ in range(count)]

    for _ in range(STEPS):
        rows.check(active)
        choice = rng.choice(["enter", "share", "plain", "verify", "verify", "leave", "start over"])
        if choice in ("enter", "share") and active < ROWS:
            source = rng.randrange(active) if choice == "share" and active else None
            length = rng.randrange(6) if source is None else rows.prompts[source]
            rows.tokens[active] = some(length) if source is None else rows.tokens[source][:length]
            rows.cache.reserve(active, 1)
            rows.cache.move_states({active: (active, 0) if source is None else (source, length)})
            if source is None and length:
                rows.forward([rows.tokens[active]], [active], [0], fresh=True)
            rows.cache.mark_prompts([active], [length])
            rows.prompts[active] = length
            if rng.random() < 0.3:  # a row that resumes: more tokens behind its prompt, in one forward
                more = some(rng.randrange(1, 4))
                rows.forward([more], [active], [length], fresh=False)
                rows.tokens[active] += more
            active += 1
        elif choice in ("plain", "verify") and active:
            width = 1 if choice == "plain" else rng.randrange(2, 6)
            new = [some(width) for _ in range(active)]
            counts = [1 if width == 1 else rng.randrange(width + 1) for _ in range(active)]
            rows.forward(new, None, [len(ids) for ids in rows.tokens[:active]], fresh=False)
            rows.cache.commit(torch.tensor(counts))
            for row, (tokens, count) in enumerate(zip(new, counts, strict=True)):
                rows.tokens[row] += tokens[:count]
        elif choice == "leave" and active:
            row, last = rng.randrange(active), active - 1
            ahead = rng.randrange(3)  # the host may count tokens that were rejected
            moves = {last: (row, 0)}
            if row != last:
                moves[row] = (
                    last,
                    len(rows.tokens[last]) + (ahead if len(rows.tokens[last]) > rows.prompts[last] else 0),
                )
            rows.cache.move_states(moves)
            rows.tokens[row], rows.prompts[row] = rows.tokens[last], rows.prompts[last]
            active -= 1
        elif choice == "start over" and active:  # a finished row is taken over by the next request of its prompt
            row = rng.randrange(active)
            rows.cache.move_states({row: (row, rows.prompts[row])})
            rows.tokens[row] = rows.tokens[row][: rows.prompts[row]]


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])
@pytest.mark.parametrize("seed", range(8))
def test_states_cover_the_tokens_of_their_rows(seed: int, page_size: int | None) -> None:
    """Prevents a state that misses a token, has one too many, or is another row's."""
    play(seed, page_size)


@pytest.mark.parametrize("method", ["commit", "move_states", "mark_prompts"])
def test_a_state_that_is_left_as_it_was_is_seen(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Negative control."""
    if method == "mark_prompts":
        replacement = lambda self, rows, lengths: self._prompt_keys.__setitem__(rows[0], lengths[0])  # noqa: E731
    else:
        replacement = lambda self, *args: None  # noqa: E731
    monkeypatch.setattr(PagedCache, method, replacement)
    with pytest.raises(AssertionError):
        play_all()


def test_a_forward_that_was_given_up_commits_nothing() -> None:
    """Prevents the commit of a verification that failed before it was judged."""
    rows = Rows(None)
    rows.tokens[0] = [4, 5]
    rows.forward([[4, 5]], [0], [0], fresh=True)
    rows.forward([[6, 7]], None, [2], fresh=False)
    rows.cache.begin(torch.tensor([[2]]), 256)
    rows.cache.commit(torch.tensor([2]))
    rows.check(1)
