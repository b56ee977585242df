"""Recurrent layers on the engine's cache: transformers' own code, but for how a verification runs the recurrence.

A verification reads several tokens of each row, of which some may be rejected. The projections, the convolution and
the norms take all of them at once. The recurrence goes token by token by the function that transformers decodes with,
and again on commit over the accepted tokens alone, from the inputs that it was given.

Layers without a recurrence (short convolutions) need nothing of this: the cache cuts out the window that was accepted.
"""

import inspect
from collections.abc import Callable, Iterator, Set
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trl_selfspec.kv_cache.paged_cache import PagedCache


Function = Callable[..., Any]
Replacements = tuple[Function, Function]  # what a layer calls in place of the two functions of its recurrence


def recurrent_layers(tree: nn.Module) -> Iterator[nn.Module]:
    """The modules that keep a state in the cache besides keys and values."""
    for module in tree.modules():
        if hasattr(module, "layer_idx") and _names(module) & {"update_conv_state", "update_recurrent_state"}:
            yield module


def is_recurrent(tree: nn.Module) -> bool:
    return next(recurrent_layers(tree), None) is not None


def unsupported_layers(tree: nn.Module) -> list[str]:
    """Classes of recurrent layers that the engine does not run."""
    layers = [layer for layer in recurrent_layers(tree) if "update_recurrent_state" in _names(layer)]
    return sorted({type(layer).__name__ for layer in layers if _recurrence(layer) is None})


def adapt_recurrent_layers(tree: nn.Module) -> None:
    """Makes the recurrent layers of `tree` verify on the engine's cache. Other trees of the same classes stay."""
    for layer in recurrent_layers(tree):
        recurrence = _recurrence(layer)
        if recurrence is None:
            continue
        forward = inspect.unwrap(type(layer).forward)
        names = forward.__globals__
        functions = recurrence.adapt(layer, names[recurrence.sequence], names[recurrence.step])
        own = dict(zip((recurrence.sequence, recurrence.step), functions, strict=True))
        function = FunctionType(
            forward.__code__, {**names, **own}, forward.__name__, forward.__defaults__, forward.__closure__
        )
        function.__kwdefaults__ = forward.__kwdefaults__
        layer.forward = MethodType(function, layer)


def _names(module: nn.Module) -> Set[str]:
    return set(inspect.unwrap(type(module).forward).__code__.co_names)


def _delta_rule(layer: nn.Module, sequence: Function, step: Function) -> Replacements:
    def run(
        query: Tensor,  # (B, T, H, D)
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,  # (B, T, H), or (B, T, H, D): the logarithm of a decay
        beta: Tensor,  # (B, T, H)
        **kwargs: Any,
    ) -> Any:
        cache: PagedCache = layer.paged_cache  # type: ignore[assignment]
        if not cache.verifies:
            return sequence(query, key, value, g=g, beta=beta, **kwargs)
        initial_state = kwargs.pop("initial_state")

        def advance(state: Tensor, num_tokens: Tensor) -> Tensor:
            rejected = torch.arange(g.shape[1], device=g.device) >= num_tokens[:, None]  # (B, T)
            decay = g.masked_fill(rejected.view(*rejected.shape, *[1] * (g.dim() - 2)), 0)  # by 1
            update = beta.masked_fill(rejected[..., None], 0)  # by nothing
            return step(query, key, value, g=decay, beta=update, initial_state=state, **kwargs)[1]

        cache.defer(layer.layer_idx, advance)  # type: ignore[arg-type]
        return step(query, key, value, g=g, beta=beta, initial_state=initial_state, **kwargs)

    return run, step


def _mamba2(layer: nn.Module, sequence: Function, step: Function) -> Replacements:
    def run(
        x: Tensor,  # (B, T, H, P)
        dt: Tensor,  # (B, T, H)
        A: Tensor,  # (H,)
        B: Tensor,  # (B, T, G, N)
        C: Tensor,  # (B, T, G, N)
        *,
        D: Tensor,
        dt_bias: Tensor,
        initial_states: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        cache: PagedCache = layer.paged_cache  # type: ignore[assignment]
        if not cache.verifies:
            return sequence(x, dt, A, B, C, D=D, dt_bias=dt_bias, initial_states=initial_states, **kwargs)
        num_rows, num_tokens, num_heads, size = x.shape
        by_size = A[:, None, None].expand(-1, size, B.shape[-1]).float()
        skip, bias = (part[:, None].expand(-1, size) for part in (D, dt_bias))

        def read(state: Tensor, t: int) -> Tensor:
            times = dt[:, t, :, None].expand(-1, -1, size)
            return step(state, x[:, t], times, by_size, B[:, t], C[:, t], skip, z=None, dt_bias=bias, dt_softplus=True)

        def advance(state: Tensor, counts: Tensor) -> Tensor:
            for t in range(num_tokens):
                after = state.clone()
                read(after, t)  # in place
                state = torch.where((t < counts)[:, None, None, None], after, state)
            return state

        cache.defer(layer.layer_idx, advance)  # type: ignore[arg-type]
        zeros = x.new_zeros((num_rows, num_heads, size, B.shape[-1]), dtype=torch.float32)
        state = zeros if initial_states is None else initial_states.clone()
        return torch.stack([read(state, t) for t in range(num_tokens)], dim=1), state

    def run_step(state: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        cache: PagedCache = layer.paged_cache  # type: ignore[assignment]
        output = step(state, *args, **kwargs)
        if cache.rows is not None:  # it has changed a copy of the rows' states
            cache.update_recurrent_state(state, layer.layer_idx)  # type: ignore[arg-type]
        return output

    return run, run_step


class Recurrence(NamedTuple):
    """A recurrence by the names of transformers' functions."""

    sequence: str  # over a sequence, in chunks
    step: str  # token by token
    adapt: Callable[[nn.Module, Function, Function], Replacements]


RECURRENCES = (
    Recurrence("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule", _delta_rule),
    Recurrence("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention", _delta_rule),
    Recurrence("mamba2_chunk_scan", "mamba2_selective_state_update", _mamba2),
)


def _recurrence(layer: nn.Module) -> Recurrence | None:
    return next((kind for kind in RECURRENCES if {kind.sequence, kind.step} <= _names(layer)), None)
