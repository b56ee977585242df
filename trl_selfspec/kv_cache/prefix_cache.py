"""Finished rows whose keys stay in the cache: a later prompt that begins like one of them is not computed again.

A tool loop calls the engine once per turn, and each prompt is an earlier one, its completion and what a tool said.
Kept rows cost no memory: they lie in rows that no request needs, and give way as soon as one does.
"""

from bisect import bisect_left
from collections.abc import Container, Iterable, Sequence

from trl_selfspec.kv_cache.paged_cache import PagedCache


Tokens = tuple[int, ...]


class PrefixCache:
    """Which tokens' keys lie in the cache's idle rows. The keys are those of the weights they were computed with."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self._tokens: dict[int, Tokens] = {}  # by row
        self._sorted: list[tuple[Tokens, int]] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def keep(self, row: int, tokens: Tokens) -> None:
        """Remembers an idle row that holds the keys of `tokens`."""
        self._tokens[row], self._sorted = tokens, None

    def forget(self, rows: Iterable[int] | None = None) -> None:
        """Forgets what these rows hold; `None`: all rows."""
        for row in list(self._tokens) if rows is None else rows:
            self._tokens.pop(row, None)
        self._sorted = None

    def longest_prefix(self, prompt: Tokens) -> tuple[int, int]:
        """The row that shares most tokens with `prompt`, and how many; the last token's keys are never of use."""
        if self._sorted is None:
            self._sorted = sorted((tokens, row) for row, tokens in self._tokens.items())
        # In lexicographic order, the longest common prefix is that of a neighbour.
        at = bisect_left(self._sorted, (prompt[:-1], -1))
        neighbours = self._sorted[max(at - 1, 0) : at + 1]
        shared = ((row, _common_prefix(tokens, prompt[:-1])) for tokens, row in neighbours)
        return max(shared, key=lambda match: match[1], default=(0, 0))

    def seat(self, rows: Sequence[int], prompts: Sequence[Tokens]) -> list[int]:
        """Gives rows that become active the keys of their prompts' longest kept prefixes; returns their lengths."""
        found = [self.longest_prefix(prompt) for prompt in prompts]
        self.cache.rearrange(dict(zip(rows, found, strict=True)))
        self.forget(rows)
        return [num_tokens for _, num_tokens in found]

    def evict(self, spare: Container[int] = ()) -> bool:
        """Gives up the row that was kept first, but none of `spare`; returns whether there was one."""
        row = next((row for row in self._tokens if row not in spare), None)
        if row is None:
            return False
        self.cache.rearrange({row: (row, 0)})
        self.forget([row])
        return True

    def move_to(self, cache: PagedCache, prompts: Iterable[Tokens]) -> "PrefixCache":
        """Moves what these prompts can use to an empty cache, as far as that has room; the old one loses all."""
        used: dict[int, Tokens] = {}
        for prompt in prompts:
            row, num_tokens = self.longest_prefix(prompt)
            if num_tokens > len(used.get(row, ())):
                used[row] = prompt[:num_tokens]
        moved, rows, num_free = PrefixCache(cache), [], cache.num_free
        for row, tokens in used.items():
            num_free -= 0 if cache.dense else cache.pages_for(len(tokens))
            if len(rows) < cache.max_rows and num_free >= 0:
                rows.append((row, tokens))
        cache.adopt(self.cache, [(row, len(tokens)) for row, tokens in rows])
        for row, (_, tokens) in enumerate(rows):
            moved.keep(row, tokens)
        return moved


def _common_prefix(a: Tokens, b: Tokens) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
