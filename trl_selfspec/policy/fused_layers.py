"""Fused decoder layers, used where a trial shows that they compute what the module computes.

A decode step is dozens of tiny operations per layer, which take longer to launch than the weights to read. On CUDA a
layer is compiled (`compile.py`), on CPUs one of Llama's family is a single call (`kernels/cpu`). The first decode step
of each kind of layer tries it out, with random weights: attributes tell nothing of multipliers, activations or layers
without positions, and a parameter that is neutral today is trained tomorrow.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers.utils import logging

from trl_selfspec import kernels
from trl_selfspec.kernels import FastRMSNorm
from trl_selfspec.kernels.cpu.layer import CpuDecoderLayer, DecoderParts
from trl_selfspec.kernels.triton_support import runs_triton
from trl_selfspec.kv_cache.paged_cache import PagedCache, PagedLayer
from trl_selfspec.policy.compile import CompiledLayer, compiled_program
from trl_selfspec.policy.recurrent_layers import is_recurrent


logger = logging.get_logger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
JOINABLE = PROJECTIONS[0][:3], PROJECTIONS[1][:2]  # each group reads one input
# Both ways round at the same places; sums in another order, and exponentials, differ in the last bit.
MAX_SHARE_OF_OTHER_ROUNDINGS = 0.05
RELATIVE_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}


class FusedLayer(Protocol):
    """What takes the place of a layer's forward in decode steps. Arguments but the first are the forward's."""

    def takes(self, pages: PagedLayer, x: Tensor, /, *args: object, **kwargs: object) -> bool:
        """Whether it computes this forward."""
        ...

    def __call__(self, pages: PagedLayer, x: Tensor, /, *args: object, **kwargs: object) -> Tensor:
        """Writes this step's keys and values, and gives the layer's output."""
        ...


@dataclass
class Trials:
    """What is known of a kind of layer. One row and one token are tried out apart: sizes of 1 are special."""

    passed: dict[tuple[bool, bool], bool] = field(default_factory=dict)  # by whether there is one row, and one token

    @property
    def refused(self) -> bool:
        return not all(self.passed.values())


class FusedForward:
    """A decoder layer's forward with fused decode steps; the module's own does what they can't."""

    def __init__(self, module: nn.Module, layer: FusedLayer, trials: Trials) -> None:
        self.module, self.layer, self.trials = module, layer, trials
        self.modules_own = module.forward
        self.attention = next(part for part in module.modules() if hasattr(part, "layer_idx"))

    def __call__(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        cache: PagedCache | None = getattr(self.attention, "paged_cache", None)
        if cache is None or cache.fresh or self.trials.refused:
            return self.modules_own(x, *args, **kwargs)
        pages = cache.pages_of[self.attention.layer_idx]  # type: ignore[index]
        if not pages.is_initialized or not self.layer.takes(pages, x, *args, **kwargs):
            return self.modules_own(x, *args, **kwargs)
        kind = x.shape[0] == 1, x.shape[1] == 1
        try:
            if kind not in self.trials.passed:
                self.trials.passed[kind] = self._computes_the_same(pages, x, args, kwargs)
            if self.trials.passed[kind]:
                return self.layer(pages, x, *args, **kwargs)
        except TorchDynamoException as error:
            self.trials.passed[kind] = False
            reason = f"{type(error).__name__}: {error}".split("\n\n")[0][:500]
            logger.warning_once(
                f"trl_selfspec: {type(self.module).__name__} runs module by module, more slowly: torch.compile failed "
                f"with {reason}"
            )
        return self.modules_own(x, *args, **kwargs)

    @torch.no_grad()
    def _computes_the_same(self, pages: PagedLayer, x: Tensor, args: tuple, kwargs: dict) -> bool:
        """Tries this step with other inputs. What it writes to the cache, the step itself overwrites."""
        generator = torch.Generator(x.device).manual_seed(0)
        noise = torch.randn(x.shape, generator=generator, device=x.device).to(x.dtype)
        random = contextlib.nullcontext() if self.trials.passed else _random_weights(self.module, generator)
        with random, _fused_products(self.module):
            expected = _outcome(self.modules_own(noise, *args, **kwargs), pages)
            for states in (pages.keys, pages.values):
                states.flatten(0, 1).index_fill_(0, pages.owner.write_index, 0.0)
            actual = _outcome(self.layer(pages, noise, *args, **kwargs), pages)
        pairs = list(zip(actual, expected, strict=True))
        tolerance = max(RELATIVE_TOLERANCE.get(tensor.dtype, 0.0) for tensor in expected)
        close = all(_close(*pair, tolerance) for pair in pairs)
        alike = close and all(_rounds_alike(*pair) for pair in pairs)
        if not alike:
            what = "rounds otherwise" if close else "computes something else"
            logger.info(f"trl_selfspec: {type(self.module).__name__} runs module by module: fused, it {what}.")
        return alike


def fuse_layers(
    tree: nn.Module,
    compiled: bool | None = None,  # by default on CUDA; else layers of Llama's family are a call of the CPU's kernels
    program: Callable[[], Callable[..., Tensor]] = compiled_program,
) -> None:
    """Decodes with fused layers from here on, as far as their trials pass."""
    kinds: dict[tuple[object, ...], tuple[Trials, Callable[..., Tensor]]] = {}
    for module in _decoder_layers(tree):
        if compiled is None:
            compiled = runs_triton(next(module.parameters()).device)
        kind = _kind(module)
        if kind not in kinds:
            kinds[kind] = Trials(), program()
        trials, function = kinds[kind]
        layer = CompiledLayer(module, function) if compiled else _cpu_layer(module)
        if layer is not None:
            module.forward = FusedForward(module, layer, trials)  # type: ignore[method-assign]


def fused_layers(tree: nn.Module) -> list[str]:
    """Names of the layers that decode fused, as far as is known."""
    forwards = {name: getattr(module, "forward", None) for name, module in tree.named_modules()}
    return [name for name, f in forwards.items() if isinstance(f, FusedForward) and not f.trials.refused]


def joinable_projections(tree: nn.Module) -> Iterator[list[str]]:
    """Names of linear layers that read one input, together."""
    for name, module in tree.named_modules():
        for group in JOINABLE:
            if all(isinstance(getattr(module, part, None), nn.Module) for part in group):
                yield [f"{name}.{part}" for part in group]


def _decoder_layers(tree: nn.Module) -> Iterator[nn.Module]:
    """The layers that a model runs through, each with one attention: that is what has an index in the cache.

    None with a recurrent state, which a trial would change.
    """
    for stack in tree.modules():
        for module in stack if isinstance(stack, nn.ModuleList) else ():
            indices = {part.layer_idx for part in module.modules() if hasattr(part, "layer_idx")}
            if len(indices) == 1 and not is_recurrent(module):
                yield module


def _kind(module: nn.Module) -> tuple[object, ...]:
    """What tells layers of one model apart, their index and weights aside."""
    parts = [part for part in module.modules() if not list(part.parameters(recurse=False))]
    settings = [(k, v) for part in parts for k, v in vars(part).items() if isinstance(v, int | float | str | None)]
    return type(module), tuple(setting for setting in settings if setting[0] != "layer_idx")


def _cpu_layer(module: nn.Module) -> CpuDecoderLayer | None:
    """The layer as one call, if it has Llama's parts and no other, and the kernel takes them."""
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if not kernels.available() or not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return None
    named = [(attention, name) for name in PROJECTIONS[0]] + [(mlp, name) for name in PROJECTIONS[1]]
    linears = [getattr(part, name, None) for part, name in named]
    norms = (
        getattr(module, "input_layernorm", None),
        getattr(module, "post_attention_layernorm", None),
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
    )
    scaling, head_dim = getattr(attention, "scaling", None), getattr(attention, "head_dim", None)
    config = getattr(attention, "config", None)  # where Mistral's attention looks, which has no attribute of its own
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    if not all(isinstance(getattr(linear, "dtype", None), torch.dtype) for linear in linears):
        return None
    if not all(isinstance(norm, FastRMSNorm) for norm in norms[:2] + tuple(n for n in norms[2:] if n is not None)):
        return None
    if not isinstance(scaling, float) or not isinstance(head_dim, int) or not isinstance(window, int | None):
        return None
    known = [tensor for part in (*linears, *norms) if part is not None for tensor in _tensors(part)]
    if set(map(id, known)) != set(map(id, _tensors(module))):
        return None
    rotary = bool(getattr(attention, "use_rope", True))
    parts = DecoderParts(tuple(linears), norms, head_dim, scaling, window, rotary)  # type: ignore[arg-type]
    return CpuDecoderLayer(parts) if CpuDecoderLayer.fits(parts) else None


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@contextlib.contextmanager
def _random_weights(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Parameters hold random numbers within; parts of fused projections stay parts of them."""
    parts = list(_parts_of_fused(module))
    whole = {id(whole): whole for _, whole, _ in parts}
    alone = [p for p in module.parameters() if id(p) not in {id(part) for part, _, _ in parts}]
    parameters = [*alone, *whole.values(), *(part for part, _, _ in parts)]
    own = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters[: len(alone) + len(whole)]:
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.data = torch.empty_like(parameter).uniform_(-2 * spread, 2 * spread, generator=generator)
        for part, fused, rows in parts:
            part.data = fused.data[rows]
        yield
    finally:
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data


@contextlib.contextmanager
def _fused_products(module: nn.Module) -> Iterator[None]:
    """Modules use the fused weights too: GPUs add up a larger product in another order."""
    linears = [part for part in module.modules() if hasattr(part, "computes_fused")]
    try:
        for linear in linears:
            linear.computes_fused = True  # type: ignore[assignment]
        yield
    finally:
        for linear in linears:
            linear.computes_fused = False  # type: ignore[assignment]


def _parts_of_fused(module: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter, slice]]:
    """Parameters that are rows of a fused projection's, with that and the rows."""
    for linear in module.modules():
        fused = getattr(linear, "fused", None)
        for name in ("weight", "bias") if fused is not None else ():
            if getattr(fused, name) is not None:
                yield getattr(linear, name), getattr(fused, name), fused.rows  # type: ignore[union-attr]


def _outcome(output: Tensor | tuple[Tensor, ...], pages: PagedLayer) -> list[Tensor]:
    """A copy of a step's output, and of the keys and values that it wrote, padding left out."""
    index = pages.owner.write_index
    real = index >= pages.owner.page_size  # the rest goes to the first page, whatever it is
    hidden = output if isinstance(output, Tensor) else output[0]
    written = [states.flatten(0, 1)[index[real]] for states in (pages.keys, pages.values)]
    return [hidden.flatten(0, 1)[real], *written]


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape or not expected.isfinite().all():
        return False
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().mean().item())


def _rounds_alike(actual: Tensor, expected: Tensor) -> bool:
    if actual.dtype is torch.float32:
        return True
    return (actual != expected).float().mean().item() <= MAX_SHARE_OF_OTHER_ROUNDINGS
