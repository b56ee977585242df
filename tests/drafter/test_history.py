"""A history of completions is a dict of lists with a bound; conversations find the prompt that they began with."""

import random
from array import array
from types import ModuleType
from typing import Any

import pytest
from laws import mutant

from trl_selfspec.drafter import history
from trl_selfspec.drafter.history import CompletionHistory, Conversations


Tokens = tuple[int, ...]
# Prompts that begin one another, that end in zeros, and whose ids share bytes (256 is 1 shifted by one byte).
PROMPTS: list[Tokens] = [(1,), (1, 2), (1, 2, 0), (1, 2, 3), (2,), (256,), (0, 1), (256, 0), (0,), (0, 0), (70_000, 2)]


def lists(completions: list[Any]) -> list[list[int]]:
    return [list(completion) for completion in completions]


class Naive:
    """The same by its definition: prompts from the one added to longest ago to the newest."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.groups: list[tuple[Tokens, list[list[int]]]] = []

    def get(self, prompt: Tokens) -> list[list[int]]:
        return dict(self.groups).get(prompt, [])

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt) + sum(map(len, group)) for prompt, group in self.groups)

    def add(self, rows: list[tuple[Tokens, list[int]]]) -> None:
        rows = [(prompt, completion) for prompt, completion in rows if completion]
        for prompt in dict.fromkeys(prompt for prompt, _ in rows):
            new = [completion for other, completion in rows if other == prompt]
            group = self.get(prompt) + new
            while len(group) > max(len(new), len(self.get(prompt))):
                del group[0]
            self.groups = [entry for entry in self.groups if entry[0] != prompt]
            if len(prompt) + sum(map(len, group)) <= self.max_tokens:
                self.groups.append((prompt, group))
            while self.num_tokens > self.max_tokens:
                del self.groups[0]


def generation(rng: random.Random) -> list[tuple[Tokens, list[int]]]:
    """Rows of some prompts in any order. A completion's first token tells which prompt it answers."""
    rows = []
    for number in rng.sample(range(len(PROMPTS)), rng.randint(1, 4)):
        for _ in range(rng.randint(1, 4)):
            length = rng.choice([0, 1, 2, 5])
            rows.append((PROMPTS[number], [number, *(rng.randrange(2**31) for _ in range(length - 1))][:length]))
    rng.shuffle(rows)
    return rows


def differences(module: ModuleType, seed: int) -> list[str]:
    """In what a history of `module` differs from the naive one over many random generations."""
    rng, found = random.Random(seed), set()
    max_tokens = rng.choice([12, 40, 1000])
    ours, naive = module.CompletionHistory(max_tokens), Naive(max_tokens)
    for _ in range(60):
        rows = generation(rng)
        ours.add(*zip(*rows, strict=True))
        naive.add(rows)
        answers = {prompt: lists(ours.get(prompt)) for prompt in PROMPTS}
        if answers != {prompt: naive.get(prompt) for prompt in PROMPTS}:
            found.add("completions")
        if any(row[:1] != [number] for number, prompt in enumerate(PROMPTS) for row in answers[prompt]):
            found.add("another prompt's")
        if ours.num_tokens > max_tokens:
            found.add("bound")
        if (ours.num_tokens, ours.num_prompts) != (naive.num_tokens, len(naive.groups)):
            found.add("counts")
    return sorted(found)


SEEDS = range(30)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_history_is_a_bounded_dict_of_lists(seed: int) -> None:
    """Prevents a lost or stale completion, a wrong count, and one prompt's completion under another's."""
    assert differences(history, seed) == []


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("prompt).tobytes()", "prompt[:2]).tobytes()", "another prompt's"),
        ("prompt).tobytes()", 'prompt).tobytes().rstrip(b"\\0")', "another prompt's"),
        ("(old + new)[-max(len(old), len(new)) :]", "(old + new)[-len(new) :]", "completions"),
        ("(old + new)[-max(len(old), len(new)) :]", "(old + new)[: max(len(old), len(new))]", "completions"),
        ("(old + new)[-max(len(old), len(new)) :]", "(new + old)[-max(len(old), len(new)) :]", "completions"),
        ("next(iter(self._completions))", "next(reversed(self._completions))", "completions"),
        ("while self._num_tokens + size > self.max_tokens:", "while self._num_tokens > self.max_tokens:", "bound"),
        ("sum(map(len, completions))", "len(completions)", "counts"),
        ("            if completion:\n", "            if True:\n", "completions"),
    ],
)
def test_a_broken_history_is_noticed(old: str, new: str, difference: str) -> None:
    """Negative controls: keys that lose ids or zeros, groups cut wrongly, the newest leaving, a loose bound."""
    broken = mutant(history, (old, new))
    assert any(difference in differences(broken, seed) for seed in SEEDS)


def test_a_group_keeps_its_size_and_its_newest() -> None:
    """An evaluation with fewer samples must not throw away what training drew; one with more is kept whole."""
    store = CompletionHistory()
    store.add([(1, 2)] * 2, [[10], [11]])
    store.add([(1, 2)], [[12]])
    assert lists(store.get([1, 2])) == [[11], [12]]
    store.add([(1, 2)] * 3, [[13], [14], [15]])
    assert lists(store.get((1, 2))) == [[13], [14], [15]]
    store.add([(1, 2)] * 2, [[16], [17]])
    assert lists(store.get((1, 2))) == [[15], [16], [17]]
    assert (store.num_prompts, store.num_tokens) == (1, 5)


def test_own_rows_before_those_of_all_ranks_are_not_kept_twice() -> None:
    """An engine remembers what it generated, and then hears of it again among the rows of all ranks."""
    store = CompletionHistory()
    for epoch in (0, 10):
        own, others = [[epoch], [epoch + 1]], [[epoch + 2], [epoch + 3]]
        store.add([(1,)] * 2, own)
        store.add([(1,)] * 4, own + others)
        assert lists(store.get((1,))) == own + others


def test_the_prompts_that_were_added_to_longest_ago_leave_first() -> None:
    """A prompt that comes in every epoch stays; one that is gone makes room."""
    store = CompletionHistory(max_tokens=9)
    store.add([(1,), (2,), (3,)], [[7, 7]] * 3)
    store.add([(1,)], [[8, 8]])
    store.add([(4,)], [[9, 9]])
    assert [lists(store.get((token,))) for token in (1, 2, 3, 4)] == [[[8, 8]], [], [[7, 7]], [[9, 9]]]
    assert (store.num_prompts, store.num_tokens) == (3, 9)


def test_a_prompt_larger_than_the_bound_drives_no_other_out() -> None:
    """One endless completion would otherwise empty the history and then leave itself."""
    store = CompletionHistory(max_tokens=6)
    store.add([(1,), (2,)], [[7], [7]])
    store.add([(3,)], [[7] * 6])
    assert [len(store.get((token,))) for token in (1, 2, 3)] == [1, 1, 0]
    store.add([(2,)], [[7] * 6])  # it has grown too large
    assert [len(store.get((token,))) for token in (1, 2)] == [1, 0]
    assert (store.num_prompts, store.num_tokens) == (1, 2)


def test_a_history_is_compact_and_its_own() -> None:
    """Python ints take 8 times the bytes; and a list that a caller changes later is not the history's."""
    store, completion = CompletionHistory(), [5, 6]
    store.add([[1]], [completion])
    completion.append(7)
    found = store.get([1])
    assert found == [array("i", [5, 6])]
    found.clear()
    assert len(store.get([1])) == 1
    store.clear()
    assert (store.get([1]), store.num_tokens, store.num_prompts) == ([], 0, 0)


# Conversations


def wrong_roots(module: ModuleType, seed: int) -> int:
    """How many answers differ from the definition, over random conversations of a small alphabet."""
    rng, wrong = random.Random(seed), 0
    conversations, known = module.Conversations(), set()
    for _ in range(150):
        begin = rng.choice(sorted(known)) if known and rng.random() < 0.6 else ()
        prompt = begin + tuple(rng.choices((0, 1, 256), k=rng.randint(not begin, 6)))
        prefixes = [root for root in known if prompt[: len(root)] == root]
        expected = max(prefixes, key=len, default=prompt)
        wrong += conversations.root_of(prompt) != expected
        known.add(expected)
    return wrong


@pytest.mark.parametrize("seed", SEEDS)
def test_a_conversation_has_the_longest_known_prompt_that_it_begins_with(seed: int) -> None:
    """Prevents a later turn that is drafted from another prompt's group."""
    assert wrong_roots(history, seed) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("for length in reversed(lengths):", "for length in lengths:"),
        ("bisect_right(self._lengths, len(prompt))", "bisect_right(self._lengths, len(prompt) - 2)"),
        ("crc32(ids[start:length], checksum), length", "crc32(ids[start:length], checksum), start"),
        ("if (root := prompt[:length]) in self._roots:", "if root := prompt[:length]:"),
    ],
)
def test_a_broken_search_is_noticed(old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative controls: the shortest prefix, one that is overlooked, checksums that start anew, and trust in them."""
    broken = mutant(history, (old, new))
    monkeypatch.setattr(broken, "crc32", few_checksums if "root :=" in new else history.crc32)
    assert any(wrong_roots(broken, seed) for seed in SEEDS)


def few_checksums(ids: memoryview, checksum: int) -> int:
    return (checksum + sum(ids)) % 2


def test_equal_checksums_of_different_prompts_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """They happen once in 4 billion pairs, and nobody would find the run in which they did."""
    monkeypatch.setattr(history, "crc32", few_checksums)
    assert not any(wrong_roots(history, seed) for seed in SEEDS)


def test_a_prompt_that_begins_another_is_no_root_of_it_if_the_longer_was_asked_first() -> None:
    """A prompt that begins another is not a turn of its conversation; the order is the caller's part."""
    short, long = (1, 2), (1, 2, 3)
    conversations = Conversations()
    assert [conversations.root_of(prompt) for prompt in (long, short)] == [long, short]
    assert conversations.root_of((*long, 4)) == long
    assert conversations.root_of((*short, 4)) == short
    conversations.clear()
    assert [conversations.root_of(prompt) for prompt in (short, long)] == [short, short]


def test_siblings_of_a_conversation_have_one_root() -> None:
    """Each sibling says something else, and a tool answers; a new rollout knows none of it."""
    prompt = tuple(range(50))
    conversations = Conversations()
    assert {conversations.root_of(prompt) for _ in range(4)} == {prompt}
    turns = [(*prompt, completion, 7, 7) for completion in range(4)]
    assert {conversations.root_of(turn) for turn in turns} == {prompt}
    conversations.clear()
    assert [conversations.root_of(turn) for turn in turns] == turns
