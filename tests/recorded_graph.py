"""What a CUDA graph does, on any device: a function's operations, recorded once and run again on the same tensors.

Python does not run in a replay, so whatever it decided while recording stays decided: a number read from a tensor, a
tensor made anew each time, a list that was appended to. A test that passes with recordings would pass with graphs.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


aten = torch.ops.aten
HOST_SYNCS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
}


class Recorder(TorchDispatchMode):
    """Notes every operation, and what tensors held before one wrote to them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple, dict, Any]] = []
        self.overwritten: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        from_host = func is aten.lift_fresh.default and args[0].dim()  # `torch.tensor(list)`; a scalar is an argument
        if func in HOST_SYNCS or from_host:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        self.overwritten += [(tensor, tensor.clone()) for tensor in _written(func, args, kwargs)]
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Records `function` and undoes what it did, since a capture does nothing; returns the replay."""
    recorder = Recorder()
    with recorder:
        result = function()
    for tensor, before in reversed(recorder.overwritten):
        tensor.copy_(before)

    def replay() -> Tensor:
        for func, args, kwargs, recorded in recorder.calls:
            inputs = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
            outputs = zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True)
            for old, new in outputs:
                if _is_tensor(old) and old.untyped_storage().data_ptr() not in inputs:  # neither view nor in place
                    old.copy_(new)
        return result

    return replay


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Tensor)


def _written(func: Any, args: tuple, kwargs: dict) -> Iterator[Tensor]:
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.name in kwargs else args[i] if i < len(args) else None
            yield from (leaf for leaf in tree_leaves(value) if _is_tensor(leaf))
