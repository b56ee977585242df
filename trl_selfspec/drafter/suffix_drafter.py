"""Drafts copied from text: what a row, its siblings and earlier completions of its prompt said after the same tokens.

They cost nothing, and they are only guesses: the policy verifies them by its own draws, so the tokens are those of
plain sampling wherever a draft comes from. All texts lie on the device, and a round neither waits for the host nor
reads from it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trl_selfspec.control.drafters import DrafterTraits
from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.drafter.history import CompletionHistory, Conversations
from trl_selfspec.drafter.matching import MAX_MATCH, longest_suffix_match
from trl_selfspec.drafter.protocol import Batch, Drafter, DraftRunner
from trl_selfspec.utils import to_device


WIDTH_STEP = 512  # the width of a search is a multiple of this beyond the rows' own, so that captured steps repeat


class Text(NamedTuple):
    """What a slot holds at first, and from where other rows may copy."""

    tokens: Sequence[int]
    start: int


class SuffixDrafter(Drafter):
    """Drafts what followed the longest suffix of a row's text, in its own text or in one of its prompt.

    Every request has a slot for its text, for the whole rollout. The slots of one prompt lie side by side: completions
    of the history, then its requests.

    Args:
        history: where completions are kept for later rollouts; `None` for none.
        device: of the texts.
    """

    traits = DrafterTraits("suffix", per_round=True, prior_alpha=0.4, prior_cost=0.05)
    has_distribution = False

    def __init__(self, history: CompletionHistory | None, device: torch.device) -> None:
        self.history, self._device = history, device
        self._conversations = Conversations()
        self._roots: list[tuple[int, ...]] = []  # of each row id, the prompt of its first turn
        self._prompts: Sequence[Sequence[int]] = []
        self._num_with_history = self._group_size = self._history_width = 0
        self.release()

    def release(self) -> None:
        self._texts = torch.zeros((0, 0), dtype=torch.int32, device=self._device)  # (slots, width)
        self._lengths, self._starts = (torch.zeros(0, dtype=torch.int64, device=self._device) for _ in range(2))
        # By row id: its slot, the first slot of its prompt, and the slot behind the last one of its prompt.
        self._slots = torch.zeros((3, 0), dtype=torch.int64, device=self._device)

    @property
    def nbytes(self) -> int:
        return self._texts.nbytes

    @property
    def context(self) -> str:
        return "history" if 2 * self._num_with_history >= max(len(self._prompts), 1) else "no history"

    def begin_rollout(self, prompts: Sequence[Sequence[int]], width: int, keep: bool) -> bool:
        if not keep:
            self._conversations.clear()
        self._prompts, self._roots = prompts, [tuple(prompt) for prompt in prompts]
        for row_id in sorted(range(len(prompts)), key=lambda row_id: -len(prompts[row_id])):  # the longest first
            self._roots[row_id] = self._conversations.root_of(self._roots[row_id])
        texts, slots = self._layout(width)
        moved = self._reserve(max(len(texts), 2 * len(prompts)) + 1, width, len(prompts))  # history comes later
        self._write(texts)
        self._slots[:, : len(prompts)] = to_device(slots, self._device)
        return moved

    def _layout(self, width: int) -> tuple[list[Text], list[list[int]]]:
        """The texts by slot, and for `_slots` three lists by row id."""
        rows_of: dict[tuple[int, ...], list[int]] = {}
        for row_id, root in enumerate(self._roots):
            rows_of.setdefault(root, []).append(row_id)
        texts: list[Text] = []
        slots = [[0] * len(self._roots) for _ in range(3)]
        self._num_with_history = self._group_size = longest = 0
        for root, row_ids in rows_of.items():
            first, tail = len(texts), root[-MAX_MATCH:]
            for completion in [] if self.history is None else self.history.get(root):
                texts.append(Text([*tail, *completion][:width], len(tail)))
                longest = max(longest, len(texts[-1].tokens))
            self._num_with_history += len(row_ids) if len(texts) > first else 0
            texts += (Text(self._prompts[row_id], len(root)) for row_id in row_ids)
            self._group_size = max(self._group_size, len(texts) - first)
            for row_id, slot in zip(row_ids, range(len(texts) - len(row_ids), len(texts)), strict=True):
                slots[0][row_id], slots[1][row_id], slots[2][row_id] = slot, first, len(texts)
        self._group_size = 1 << (self._group_size - 1).bit_length()  # so that captured steps repeat
        self._history_width = min(-(-longest // WIDTH_STEP) * WIDTH_STEP, width)
        return texts, slots

    def _reserve(self, num_slots: int, width: int, num_rows: int) -> bool:
        """Makes room where there is too little, in static tensors that grow by factors of two."""
        held, held_width = self._texts.shape
        if num_slots <= held and width == held_width and num_rows <= self._slots.shape[1]:
            return False
        num_rows = max(num_rows, self._slots.shape[1])  # rows that are not active keep the ids of earlier rollouts
        num_slots, num_rows = (1 << (n - 1).bit_length() for n in (max(num_slots, held), num_rows))
        self._texts = torch.zeros((num_slots, width), dtype=torch.int32, device=self._device)
        self._lengths, self._starts = (
            torch.zeros(num_slots, dtype=torch.int64, device=self._device) for _ in range(2)
        )
        self._slots = torch.zeros((3, num_rows), dtype=torch.int64, device=self._device)
        return True

    def _write(self, texts: list[Text]) -> None:
        padded = torch.zeros((len(texts), max(len(text.tokens) for text in texts)), dtype=torch.int32, device="cpu")
        for row, text in zip(padded, texts, strict=True):
            row[: len(text.tokens)] = torch.tensor(text.tokens, dtype=torch.int32, device="cpu")
        self._texts[: len(texts), : padded.shape[1]] = padded.to(self._device)
        self._lengths[: len(texts)] = to_device([len(text.tokens) for text in texts], self._device)
        self._starts[: len(texts)] = to_device([text.start for text in texts], self._device)

    def num_steps(self, gamma: int) -> int:
        return 1

    @property
    def program(self) -> str:
        return f"match {self._group_size}x{self._history_width}"

    def step(self, runner: DraftRunner, batch: Batch, num_slots: int, gamma: int) -> Tensor:
        """Matches and copies, for all rows at once."""
        drafts = self.match(batch, num_slots, gamma)
        positions = batch.lengths[:, None] + torch.arange(gamma, device=drafts.device)
        batch.tokens.scatter_(1, positions, drafts)
        return drafts

    def match(self, batch: Batch, num_slots: int, gamma: int, recent: Tensor | None = None) -> Tensor:
        """What followed each row's last tokens, γ tokens; they are those of its text, or `recent` (B, MAX_MATCH)."""
        slots, first, end = self._slots[:, batch.row_ids]
        width = min(max(num_slots, self._history_width), self._texts.shape[1])
        sizes = gamma, self._group_size, width
        return longest_suffix_match(self._texts, self._lengths, self._starts, slots, first, end, *sizes, recent)

    def observe(self, batch: Batch, positions: Tensor, tokens: Tensor, emitted: Tensor) -> None:
        """Adds a round's tokens to the rows' texts. Rows that got none write to the last slot, which nobody reads."""
        slots = torch.where(emitted > 0, self._slots[0, batch.row_ids], len(self._texts) - 1)
        self._texts[slots[:, None], positions.clamp(max=self._texts.shape[1] - 1)] = tokens.int()
        self._lengths[slots] = batch.lengths

    def end_rollout(self, completions: Sequence[Sequence[int]], stats: RolloutStats) -> None:
        if self.history is not None:
            stats.history_rows = self._num_with_history
            turns = zip(self._prompts, self._roots, completions, strict=True)
            self.history.add(self._roots, [[*prompt[len(root) :], *new] for prompt, root, new in turns])
            stats.history_tokens = self.history.num_tokens
