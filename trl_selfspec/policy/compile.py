"""Decoder layers compiled by torch, for decode steps on CUDA: what lies between matrix products becomes few kernels.

One program serves all layers of a kind: weights, and the layer's part of the cache, are its inputs, and attention and
quantized products are operators that it calls. Numbers of rows, tokens and slots are dynamic. Results are rounded
where eager torch rounds them.
"""

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config
from transformers import Cache

from trl_selfspec.kv_cache.attention import can_attend_on_gpu, paged_states
from trl_selfspec.kv_cache.paged_cache import PagedLayer


Program = Callable[..., Tensor]
Backend = Callable[[torch.fx.GraphModule, Sequence[Tensor]], Callable[..., object]]
PRODUCTS = F.linear, torch.ops.trl_selfspec.linear.default, "to"  # and the cast of their input
symbolic_shapes: Any = _config
ALL_DYNAMIC = {"use_duck_shape": False, "backed_size_oblivious": True}  # sizes that are equal by chance, or 1


class CompiledLayer:
    """A layer's forward in a decode step: for any rows and few tokens, on pages."""

    def __init__(self, module: nn.Module, program: Program) -> None:
        self.module, self._program = module, program

    def takes(self, pages: PagedLayer, x: Tensor, *args: object, **kwargs: object) -> bool:
        return not x.is_cuda or can_attend_on_gpu(x.shape[1], pages.keys, pages.values)

    def __call__(self, pages: PagedLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return self._program(self.module, x, *args, **kwargs | {"attention_mask": paged_states(pages)})


def compiled_program(backend: Backend | None = None) -> Program:
    """A program for one kind of layers of one tree; it is compiled when it first runs.

    torch keeps what it compiled with the code of a function, and so many variants at most. A copy of the code leaves
    other trees' programs out of account.
    """
    forward = FunctionType(_forward.__code__.replace(), globals())
    program = torch.compile(forward, backend=backend or inductor, fullgraph=True, dynamic=True)

    def run(*args: object, **kwargs: object) -> Tensor:
        # A module's floats are constants.
        with torch._dynamo.config.patch(specialize_float=True), symbolic_shapes.patch(**ALL_DYNAMIC):
            return program(*args, **kwargs)

    return run


def _forward(module: nn.Module, x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return type(module).forward(module, x, *args, **kwargs)


def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
    from torch._inductor.compile_fx import compile_fx

    compute_once(graph)
    return compile_fx(graph, inputs, config_patches={"emulate_precision_casts": True})  # type: ignore[arg-type]


def compute_once(graph: torch.fx.GraphModule) -> None:
    """Fused projections: q, k and v ask for the same product of all three, and take their part."""
    known: dict[object, torch.fx.Node] = {}  # nothing that they read is written to in a layer
    for node in list(graph.graph.nodes):
        if node.target in PRODUCTS:
            first = known.setdefault((node.target, node.args, tuple(node.kwargs.items())), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.graph.erase_node(node)
    graph.recompile()
