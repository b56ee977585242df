"""Prefix cache: keys and values of finished rows, reused by later prompts that begin with the same tokens.

A tool loop calls the engine once per turn, and each prompt is an earlier one, its completion and what a tool said.
Cached rows cost no memory of their own: they lie in rows of the paged cache that no request needs, and are evicted as
soon as one does.
"""

from bisect import bisect_left
from collections.abc import Container, Iterable, Mapping

from trl_selfspec.kv_cache.paged_cache import PagedCache


Tokens = tuple[int, ...]


class PrefixCache:
    """The tokens whose keys lie in the idle rows of `cache`, computed with the weights of the time."""

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        self._tokens: dict[int, Tokens] = {}  # by row
        self._sorted: list[tuple[Tokens, int]] | None = None

    def __len__(self) -> int:
        return len(self._tokens)

    def insert(self, row: int, tokens: Tokens) -> None:
        """Registers an idle row that holds the keys of `tokens`."""
        self._tokens[row], self._sorted = tokens, None

    def clear(self) -> None:
        """Frees all cached rows."""
        self.cache.rearrange({row: (row, 0) for row in self._tokens})
        self._drop(list(self._tokens))

    def longest_prefix(self, prompt: Tokens) -> tuple[int, int]:
        """The row that shares most tokens with `prompt`, and how many. The key of the last token is of no use."""
        if self._sorted is None:
            self._sorted = sorted((tokens, row) for row, tokens in self._tokens.items())
        # In lexicographic order, the longest common prefix is that of a neighbour.
        at = bisect_left(self._sorted, (prompt[:-1], -1))
        neighbours = self._sorted[max(at - 1, 0) : at + 1]
        shared = ((row, _common_prefix(tokens, prompt[:-1])) for tokens, row in neighbours)
        return max(shared, key=lambda match: match[1], default=(0, 0))

    def assign(self, sources: Mapping[int, tuple[int, int]]) -> None:
        """Makes row t, which becomes active, a copy of the first n slots of row s, for all `{t: (s, n)}`."""
        self.cache.rearrange(sources)
        self._drop(sources)

    def evict(self, spare: Container[int] = ()) -> bool:
        """Frees the row that was cached first, but none of `spare`; returns whether there was one."""
        row = next((row for row in self._tokens if row not in spare), None)
        if row is None:
            return False
        self.assign({row: (row, 0)})
        return True

    def move_to(self, cache: PagedCache, prompts: Iterable[Tokens]) -> "PrefixCache":
        """Moves what these prompts can use to an empty cache, as far as that has room, and frees the old one."""
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
            moved.insert(row, tokens)
        return moved

    def _drop(self, rows: Iterable[int]) -> None:
        for row in rows:
            self._tokens.pop(row, None)
        self._sorted = None


def _common_prefix(a: Tokens, b: Tokens) -> int:
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
