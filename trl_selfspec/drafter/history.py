"""What earlier rollouts said: the newest completions of each prompt, and which prompts are turns of one conversation.

Suffix drafts copy from here when a prompt comes again in the next epoch. Drafts never change a sample, so nothing of
this needs to be saved, and what is lost costs speed alone. All of it is host memory.
"""

from array import array
from bisect import bisect_right, insort
from collections import OrderedDict
from collections.abc import Sequence
from zlib import crc32


class CompletionHistory:
    """The newest completions of each prompt, as many as one rollout draws of it.

    Args:
        max_tokens: bound on the tokens of all prompts and completions, of 4 bytes each. The prompts that were added
            longest ago leave first.
    """

    def __init__(self, max_tokens: int = 64 * 2**20) -> None:
        self.max_tokens = max_tokens
        self._num_tokens = 0
        # By the bytes of the prompt's ids, in the order in which prompts were last added to.
        self._completions: OrderedDict[bytes, list[array[int]]] = OrderedDict()

    def add(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
        """Adds one whole generation, rows in any order; empty completions are skipped.

        A prompt keeps its newest max(G, earlier G) completions, where G is how many it has in this call. Ranks may add
        their own rows before those of all ranks: the larger call replaces the smaller.
        """
        groups: dict[bytes, list[array[int]]] = {}
        for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
            if completion:
                groups.setdefault(_key(prompt), []).append(array("i", completion))
        for key, new in groups.items():
            old = self._remove(key)
            self._insert(key, (old + new)[-max(len(old), len(new)) :])

    def get(self, prompt: Sequence[int]) -> list["array[int]"]:
        """The completions of a prompt, oldest first; none if it is unknown."""
        return list(self._completions.get(_key(prompt), ()))

    def clear(self) -> None:
        self._completions.clear()
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def num_prompts(self) -> int:
        return len(self._completions)

    def _insert(self, key: bytes, completions: list["array[int]"]) -> None:
        size = _size(key, completions)
        if size > self.max_tokens:  # it would drive all others out, and then leave itself
            return
        while self._num_tokens + size > self.max_tokens:
            self._remove(next(iter(self._completions)))
        self._completions[key] = completions
        self._num_tokens += size

    def _remove(self, key: bytes) -> list["array[int]"]:
        completions = self._completions.pop(key, None)
        if completions is None:
            return []
        self._num_tokens -= _size(key, completions)
        return completions


class Conversations:
    """The first-turn prompts of one rollout, so that siblings of a prompt stay one group in later turns.

    A later turn's prompt is the first turn's, its completion, what a tool said, and so on.
    """

    def __init__(self) -> None:
        self._roots: set[tuple[int, ...]] = set()
        # A lookup takes one pass over a prompt, however many lengths there are: checksums go on from length to length.
        self._lengths: list[int] = []  # of roots, ascending, each once
        self._checksums: set[tuple[int, int]] = set()  # (length, checksum of the ids) of roots

    def root_of(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """The longest known first-turn prompt that `prompt` begins with; if there is none, `prompt` becomes one.

        Among several new prompts, ask for the longest first: else one that begins another takes that one's place.
        """
        if prompt in self._roots:
            return prompt
        ids, start, checksum, lengths = memoryview(array("i", prompt)), 0, 0, []
        for length in self._lengths[: bisect_right(self._lengths, len(prompt))]:
            checksum, start = crc32(ids[start:length], checksum), length
            if (length, checksum) in self._checksums:
                lengths.append(length)
        for length in reversed(lengths):
            if (root := prompt[:length]) in self._roots:  # checksums can be equal by chance
                return root
        self._roots.add(prompt)
        self._checksums.add((len(prompt), crc32(ids[start:], checksum)))
        if start < len(prompt):
            insort(self._lengths, len(prompt))
        return prompt

    def clear(self) -> None:
        self._roots.clear()
        self._lengths.clear()
        self._checksums.clear()


def _key(prompt: Sequence[int]) -> bytes:
    return array("i", prompt).tobytes()


def _size(key: bytes, completions: list["array[int]"]) -> int:
    """Tokens of a prompt and its completions."""
    return len(key) // array("i").itemsize + sum(map(len, completions))
