"""Recurrent states by row, beside the pages: of short convolutions, gated delta rules and state space models.

transformers' recurrent layers ask their cache for a state and hand it the next one. Here the state of row r lies in
`states[r]` and covers the tokens whose keys the row has. A plain round and a prefill write it. A verification, which
reads several tokens of each row, leaves it as it was, and `commit` advances it by each row's own number of tokens.
Rows take their state along when they move, and a copy of it as it was at the end of their prompt, from which other
rows with that prompt start. No other prefix of a row can be reused.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from trl_selfspec.utils import to_device


Key = tuple[int, str, int]  # layer, what kind of state, and which one of them
Advance = Callable[[Tensor, Tensor], Tensor]  # (B, ...) states and (B,) numbers of tokens to the states after these


class StateCache(Cache):
    """The part of a cache that holds recurrent states, for up to `max_rows` rows. It holds none for other models.

    States are allocated when a layer first writes one, and stay where they are, since captured rounds read them.
    """

    # Current forward.
    rows: Tensor | None  # (B,) int64, of a prefill; None: rows 0..B-1
    positions: Tensor  # (B, T)
    fresh: bool  # starts from nothing

    def __init__(self, layers: Sequence[Any], max_rows: int) -> None:
        super().__init__(layers=list(layers))
        self._num_rows = max_rows
        self._states: dict[Key, Tensor] = {}  # (max_rows, ...)
        self._at_prompt: dict[Key, Tensor] = {}  # the same, at the end of each row's prompt
        self._prompt_keys = [0] * max_rows  # tokens that these cover
        self._deferred: list[Callable[[Tensor], None]] = []  # of a verification: take the rows' numbers of tokens

    @property
    def verifies(self) -> bool:
        """Whether this forward reads tokens some of which may be rejected."""
        return self.rows is None and not self.fresh and self.positions.shape[1] > 1

    @property
    def state_bytes(self) -> int:
        return sum(states.nbytes for held in (self._states, self._at_prompt) for states in held.values())

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """In a plain round the rows' last inputs `(B, C, K)`, to be updated in place; else see `update_conv_state`."""
        in_place = self.rows is None and self.positions.shape[1] == 1
        return self._read((layer_idx, "conv", state_idx)) if in_place else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The current rows' states `(B, ...)`; `None`: they begin with this forward."""
        return self._read((layer_idx, "recurrent", state_idx))

    def is_recording_past(self, layer_idx: int, state_idx: int = 0) -> bool:
        return False

    def update_conv_state(
        self,
        conv_states: Tensor,  # (B, C, T): inputs of the convolution
        layer_idx: int,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: object,
    ) -> Tensor:
        """Returns the inputs behind those before them, `(B, C, K + T)`; at least `(B, C, K)` where rows begin."""
        key, size = (layer_idx, "conv", state_idx), conv_kernel_size or conv_states.shape[-1]
        self._allocate(key, conv_states[..., :1].expand(*conv_states.shape[:-1], size))
        if self.fresh:
            inputs = F.pad(conv_states, (max(size - conv_states.shape[-1], 0), 0))
        else:
            before = self._read(key)
            assert before is not None
            inputs = torch.cat([before, conv_states], dim=-1)
        if self.verifies:
            self._deferred.append(partial(self._commit, key, partial(_window, inputs)))
        else:
            self._write(key, inputs[..., -size:])
        return inputs

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **kwargs: object
    ) -> Tensor:
        key = layer_idx, "recurrent", state_idx
        self._allocate(key, recurrent_states)
        if not self.verifies:  # else `defer` was called
            self._write(key, recurrent_states)
        return recurrent_states

    def defer(self, layer_idx: int, advance: Advance, state_idx: int = 0) -> None:
        """In a verification: computes a layer's state from the present one, once it is known what was accepted."""
        self._deferred.append(partial(self._commit, (layer_idx, "recurrent", state_idx), advance))

    def commit(self, num_tokens: Tensor) -> None:  # (B,) int64
        """Advances the states of rows 0..B-1 by the first tokens of the verification before; else does nothing."""
        for advance in self._deferred:
            advance(num_tokens)
        self._deferred.clear()

    def mark_prompts(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Copies the states of these rows, which cover `lengths` tokens and are at the end of the rows' prompts."""
        index = to_device(list(rows), self._device)
        for key, states in self._states.items():
            self._prompt_states(key)[index] = states[index]
        for row, length in zip(rows, lengths, strict=True):
            self._prompt_keys[row] = length

    def move_states(self, sources: Mapping[int, tuple[int, int]]) -> None:
        """Gives row t the state of row s after n tokens, for all `{t: (s, n)}` at once.

        That is the one at the end of its prompt if this had n tokens, the present one if n is larger, and nothing,
        as at the beginning of a row, if n is 0. An n behind the row's last token means the present one.
        """
        lengths = [self._prompt_keys[row] if n else 0 for row, n in sources.values()]
        assert all(n >= length for length, (_, n) in zip(lengths, sources.values(), strict=True))
        for row, length in zip(sources, lengths, strict=True):
            self._prompt_keys[row] = length
        if not self._states or not sources:
            return
        moves = zip(sources.items(), lengths, strict=True)
        flags = [[row, source, n > length, n > 0] for (row, (source, n)), length in moves]
        targets, rows, is_present, is_any = to_device(flags, self._device).unbind(1)
        for key, states in self._states.items():
            prompts = self._prompt_states(key)
            wide = [flag.view(-1, *[1] * (states.dim() - 1)) > 0 for flag in (is_present, is_any)]
            moved = torch.where(wide[0], states[rows], prompts[rows])
            prompts[targets] = prompts[rows].masked_fill(~wide[1], 0)
            states[targets] = moved.masked_fill(~wide[1], 0)

    def free_prompts(self) -> None:
        """Frees the states at the end of prompts, which captured rounds don't read. All rows are empty then."""
        self._at_prompt.clear()
        self._prompt_keys = [0] * self._num_rows

    @property
    def _device(self) -> torch.device:
        return next((states.device for states in self._states.values()), torch.device("cpu"))

    def _allocate(self, key: Key, like: Tensor) -> None:  # (B, ...)
        if key not in self._states:
            self._states[key] = like.new_zeros(self._num_rows, *like.shape[1:])

    def _prompt_states(self, key: Key) -> Tensor:
        if key not in self._at_prompt:
            self._at_prompt[key] = torch.zeros_like(self._states[key])
        return self._at_prompt[key]

    def _read(self, key: Key) -> Tensor | None:
        if self.fresh or key not in self._states:
            return None
        states = self._states[key]
        return states[: len(self.positions)] if self.rows is None else states[self.rows]

    def _write(self, key: Key, states: Tensor) -> None:
        if self.rows is None:
            self._states[key][: len(states)] = states
        else:
            self._states[key][self.rows] = states.to(self._states[key].dtype)

    def _commit(self, key: Key, advance: Advance, num_tokens: Tensor) -> None:
        states = self._states[key][: len(num_tokens)]
        states.copy_(advance(states, num_tokens))


def _window(
    inputs: Tensor,  # (B, C, K + T)
    states: Tensor,  # (B, C, K)
    num_tokens: Tensor,  # (B,)
) -> Tensor:
    """The last K inputs after each row's number of tokens."""
    columns = num_tokens[:, None] + torch.arange(states.shape[-1], device=inputs.device)
    return inputs.gather(2, columns[:, None].expand(-1, inputs.shape[1], -1))
