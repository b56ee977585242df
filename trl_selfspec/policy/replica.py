"""The replica: an inference copy of the policy that shares its weights.

The policy module carries hooks, autocast wrappers, dropout, gradient checkpointing and sharding; generating with it
means working around all of them. Instead `type(policy)(config)` is built on the meta device. Each of its tensors is
*aliased* to the policy's where dtype and placement allow, else *copied* and refreshed in place. The replica is the
target; the drafter is the replica with its Linear weights quantized. A refresh changes no storage address.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_selfspec.kernels import OpaqueLinear, PreparedLinear, fast_norm, prepare_linear
from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kv_cache.attention import IMPLEMENTATION
from trl_selfspec.kv_cache.family_attention import prepare_attention
from trl_selfspec.policy.fused_layers import fuse_layers, fused_layers, joinable_projections
from trl_selfspec.policy.peft_weights import (
    adapter_state,
    base_model,
    effective_tensor,
    find_module,
    inner_module,
    is_quantized,
    is_sharded,
)
from trl_selfspec.policy.recurrent_layers import adapt_recurrent_layers, is_recurrent
from trl_selfspec.policy.refusals import USE_TRL, UnsupportedModelError, refuse_unsupported
from trl_selfspec.policy.sharding import fingerprint, gathered_partitions
from trl_selfspec.utils import failures_raised_as


WINDOWS = ("sliding_window", "attention_chunk_size")  # a config's names for how far back a layer sees


class LayoutChangedError(RuntimeError):
    """A tensor of the policy has another shape, dtype, device or layout than before: the replica is built anew."""


class FusedRows(NamedTuple):
    """A projection's place in the fused weights of all that read its input."""

    weight: nn.Parameter  # (rows of all, in_features)
    bias: nn.Parameter | None
    rows: slice


class ReplicaLinear(OpaqueLinear):
    """A Linear layer of the target replica: casts its input to the weight's dtype, as autocast would."""

    fused: FusedRows | None = None  # what a compiled layer multiplies by, once for all parts
    computes_fused = False  # whether the module does so too, for its rounding
    keeps_weight = False  # whether every tree has this layer itself, because attention reads its weight

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias, self.dtype = weight, bias, weight.dtype
        self.out_features, self.in_features = weight.shape
        self.multiply = prepare_linear(weight, bias)

    @property
    def kernel(self) -> PreparedLinear | None:
        """The kernel that computes the whole layer, if there is one."""
        return self.multiply if isinstance(self.multiply, PreparedLinear) else None

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling() and not isinstance(self.multiply, PreparedLinear)
        if self.fused is not None and (compiling or self.computes_fused):
            return F.linear(x.to(self.dtype), self.fused.weight, self.fused.bias)[..., self.fused.rows]
        return F.linear(x.to(self.dtype), self.weight, self.bias) if compiling else super().forward(x)


class BitsAndBytesLinear(ReplicaLinear):
    """A dequantized 4-bit layer, which gives back the dtype it was given."""

    @property
    def kernel(self) -> None:
        """None: no kernel does the cast of the output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class PolicyReplica:
    """The target replica: computes the policy's next-token distributions without the policy module.

    Args:
        policy: a transformers causal LM, or a PEFT model around one.
        autocast_dtype: dtype in which the training forward computes its Linear layers under autocast; `None` where
            it runs in the parameters' own dtype.
        param_dtype: dtype to which FSDP's mixed precision casts every parameter for the forward; `None` for none.

    Raises:
        UnsupportedModelError: the model can't be built from its config, or an adapter can't be merged.
    """

    def __init__(
        self,
        policy: nn.Module,
        autocast_dtype: torch.dtype | None = None,
        param_dtype: torch.dtype | None = None,
    ) -> None:
        self.base = base_model(policy)
        self.autocast_dtype, self.param_dtype = autocast_dtype, param_dtype
        self.version = 0
        self._copies: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self._aliases: list[tuple[nn.Parameter, Callable[[], Tensor]]] = []
        self._layouts: dict[tuple[str, str], tuple[object, ...]] = {}  # of the policy's tensors at construction
        self._state = self._policy_state()
        refuse_unsupported(self.base)
        name = type(self.base).__name__
        with failures_raised_as(UnsupportedModelError, f"{name} can't be built from its config, on the meta device: "):
            self.model = _meta_tree(self.base, IMPLEMENTATION)
        for name, module in list(self.model.named_modules()):
            self._replicate_module(name, module)
        if gpu.runs_triton(self.embeddings.device):
            self._join_copies()
        self.refresh()
        self._embedding_dtype = _embedding_dtype(self.base)
        self._complete(self.model)

    @property
    def stale(self) -> bool:
        """Whether the policy changed since the last `refresh`: a step, a load, a write to `.data`, an adapter."""
        return self._state != self._policy_state()

    @property
    def has_window(self) -> bool:
        """Whether layers see a bounded number of tokens back."""
        config = self.base.config.get_text_config(decoder=True)
        return any(getattr(config, name, None) for name in WINDOWS)

    def policy_modules(self, policy: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The policy's modules without PEFT's wrappers, under the names that they have in the replica."""
        yield "", policy
        for name, _ in self.model.named_modules():
            if name:
                yield name, inner_module(find_module(self.base, name))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which Linear layers compute; embeddings, norms and a head may have others."""
        layers = (module for module in self.model.modules() if isinstance(module, ReplicaLinear))
        first = next((layer.weight for layer in layers), self.embeddings)
        return self.autocast_dtype or first.dtype

    @property
    def embeddings(self) -> Tensor:
        """The input embeddings, `(V, hidden)`."""
        return self.model.get_input_embeddings().weight  # type: ignore[return-value]

    @property
    def fast_layers(self) -> list[str]:
        """Names of the decoder layers that decode fused, as far as is known."""
        return fused_layers(self.model)

    @property
    def is_recurrent(self) -> bool:
        """Whether layers keep a state besides keys and values."""
        return is_recurrent(self.model)

    @property
    def num_layers(self) -> int:
        return self.base.config.get_text_config(decoder=True).num_hidden_layers

    @torch.no_grad()
    def refresh(self) -> bool:
        """Renews every copy and every alias whose source has moved; returns whether one had.

        Copies are renewed whatever `stale` says: sampling from old weights is the worst fault there can be.

        Raises:
            LayoutChangedError: a tensor has another shape, dtype or layout than when the replica was built.
        """
        state, moved = self._policy_state(), False
        for parameter, read in self._aliases:
            if parameter.data_ptr() != (source := read()).data_ptr():
                parameter.data, moved = source.detach(), True
        for storage, read in self._copies:
            storage.copy_(read())
        if state != self._state:
            self._state = state  # not before all has come to its end
            self.version += 1
        return moved

    def mark_current(self) -> None:
        """Marks the replica as current with the policy. FSDP2's first forward moves shards but changes no weight."""
        self._state = self._policy_state()

    def tree(
        self,
        attention: str = IMPLEMENTATION,
        linear: Callable[[str, ReplicaLinear], nn.Module] = lambda name, layer: layer,
        window: int | None = None,
    ) -> PreTrainedModel:
        """Another module tree with this replica's tensors.

        Args:
            attention: name of the attention function; with one of transformers', other modules are its own too.
            linear: maps a name and the replica's Linear layer to the layer in the new tree; by default the same one.
            window: shortens windows to at most this many tokens.
        """
        tree = _adopt(_meta_tree(self.base, attention, window), self.model)
        for name, module in self.model.named_modules():
            if isinstance(module, ReplicaLinear):
                _replace(tree, name, module if module.keeps_weight else linear(name, module))
        return self._complete(tree)

    def with_short_window(self, window: int) -> tuple[PreTrainedModel, PreTrainedModel]:
        """The replica with a window of at most `window` tokens, and its reference on transformers' attention.

        For the self-check, whose few tokens never fill the model's own window.
        """
        stock = self.base.config._attn_implementation or "eager"
        return self.tree(window=window), self.tree(stock, window=window)

    def _complete(self, tree: PreTrainedModel) -> PreTrainedModel:
        """Adds what a tree needs besides its tensors: kernels, and the cast of the embeddings' output."""
        if tree.config._attn_implementation == IMPLEMENTATION:
            prepare_attention(tree)
            adapt_recurrent_layers(tree)
            self._use_fast_modules(tree)
        if (dtype := self._embedding_dtype) is not None:
            tree.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(dtype))
        return tree

    def _use_fast_modules(self, tree: PreTrainedModel) -> None:
        """Replaces norms, then layers, by fused ones that an equivalence test passes."""
        for name, module in list(tree.named_modules()):
            if (norm := fast_norm(module)) is not None:
                _replace(tree, name, norm)
        fuse_layers(tree)

    def _policy_state(self) -> tuple[object, ...]:
        return fingerprint(self.base), adapter_state(self.base)

    def _replicate_module(self, name: str, module: nn.Module) -> None:
        for attribute, _ in list(_own_tensors(module)):
            self._replicate_tensor(module, name, attribute)
        if type(module) is nn.Linear:
            quantized = is_quantized(inner_module(find_module(self.base, name)))
            linear = BitsAndBytesLinear if quantized else ReplicaLinear
            _replace(self.model, name, linear(module.weight, module.bias))  # type: ignore[arg-type]

    def _read(self, name: str, attribute: str) -> Tensor:
        try:
            source = find_module(self.base, name)  # anew each time: PEFT may have wrapped or unwrapped it since
            with gathered_partitions(source):
                return effective_tensor(source, attribute)  # type: ignore[return-value]
        except (AttributeError, NotImplementedError) as error:  # no such module or tensor; no merged form
            raise UnsupportedModelError(
                f"{type(self.base).__name__} can't be replicated at `{name}`: {error}; {USE_TRL}"
            ) from error

    def _read_again(self, name: str, attribute: str) -> Tensor:
        tensor = self._read(name, attribute)
        if _layout(tensor) != self._layouts[name, attribute]:
            raise LayoutChangedError(f"`{name}.{attribute}` is no longer what the replica was built from")
        return tensor

    def _replicate_tensor(self, module: nn.Module, name: str, attribute: str) -> None:
        tensor = self._read(name, attribute)
        self._layouts[name, attribute] = _layout(tensor)
        read = functools.partial(self._read_again, name, attribute)
        dtype = self._dtype_in_forward(module, attribute, tensor)
        if isinstance(tensor, nn.Parameter) and tensor.dtype == dtype and tensor.is_contiguous():
            alias = nn.Parameter(tensor.detach(), requires_grad=False)
            _assign(module, attribute, alias)
            self._aliases.append((alias, read))
            return
        # Buffers are copied too: some rotary embeddings rewrite theirs, which must not reach the policy.
        storage = torch.empty_like(tensor, dtype=dtype, requires_grad=False, memory_format=torch.contiguous_format)
        _assign(module, attribute, storage)
        self._copies.append((getattr(module, attribute), read))

    def _join_copies(self) -> None:
        """Puts copied projections of one input next to each other in memory, so that kernels can fuse them."""
        copied = {id(tensor) for tensor, _ in self._copies}
        for names in joinable_projections(self.model):
            layers = [self.model.get_submodule(name) for name in names]
            if not all(isinstance(layer, ReplicaLinear) and id(layer.weight) in copied for layer in layers):
                continue
            biases = [layer.bias for layer in layers if layer.bias is not None]
            if biases and len(biases) < len(layers):
                continue
            weight, bias = _put_together([layer.weight for layer in layers]), None  # type: ignore[misc]
            if biases:
                aliased = {id(bias) for bias in biases}
                self._copies += [entry for entry in self._aliases if id(entry[0]) in aliased]
                self._aliases = [entry for entry in self._aliases if id(entry[0]) not in aliased]
                bias = _put_together(biases)  # type: ignore[arg-type]
            end = 0
            for layer in layers:
                start, end = end, end + layer.out_features  # type: ignore[operator]
                layer.fused = FusedRows(weight, bias, slice(start, end))  # type: ignore[assignment]

    def _dtype_in_forward(self, module: nn.Module, attribute: str, tensor: Tensor) -> torch.dtype:
        if self.param_dtype is not None and attribute in module._parameters and tensor.is_floating_point():
            return self.param_dtype
        cast = isinstance(module, nn.Linear) and self.autocast_dtype is not None and tensor.dtype != torch.float64
        return self.autocast_dtype if cast else tensor.dtype  # type: ignore[return-value]


def _layout(tensor: Tensor) -> tuple[object, ...]:
    """The properties of a tensor that aliases and copies rely on; a merged weight has a new address each time."""
    return tensor.shape, tensor.dtype, tensor.device, tensor.is_contiguous()


def _meta_tree(base: PreTrainedModel, attention: str, window: int | None = None) -> PreTrainedModel:
    config = copy.deepcopy(base.config)
    text_config = config.get_text_config(decoder=True)
    if window is not None:
        for name in WINDOWS:
            if getattr(text_config, name, None):
                setattr(text_config, name, min(window, getattr(text_config, name)))
    config._attn_implementation = attention
    try:
        with torch.device("meta"):
            return type(base)(config).eval()
    except KeyError as error:
        if error.args != (IMPLEMENTATION,):
            raise
        raise UnsupportedModelError(
            f"{type(base).__name__} chooses its attention by name from a table of its own instead of transformers' "
            f"registry, so it can't run the engine's attention; {USE_TRL}"
        ) from error


@torch.no_grad()
def _embedding_dtype(base: PreTrainedModel) -> torch.dtype | None:
    """The dtype a hook gives the embeddings' output (TRL's `cast_lm_head_to_fp32` on tied weights), if one does."""
    embeddings = inner_module(base.get_input_embeddings())
    if not embeddings._forward_hooks or is_sharded(embeddings):
        return None
    weight: Tensor = embeddings.weight  # type: ignore[assignment]
    training = embeddings.training
    embeddings.eval()  # NEFTune's hook adds its noise in training only
    try:
        dtype = embeddings(torch.zeros(1, 1, dtype=torch.int64, device=weight.device)).dtype
    finally:
        embeddings.train(training)
    return None if dtype == weight.dtype else dtype


def _adopt(tree: PreTrainedModel, donor: nn.Module) -> PreTrainedModel:
    """Points every tensor of `tree` that is still on meta at the donor's of the same name."""
    for name, module in tree.named_modules():
        for attribute, tensor in list(_own_tensors(module)):
            if tensor.is_meta:
                _assign(module, attribute, getattr(donor.get_submodule(name), attribute))
    return tree.requires_grad_(False)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _assign(module: nn.Module, attribute: str, tensor: Tensor) -> None:
    """Sets a parameter or buffer without `register_*`'s checks on shape, device and class."""
    if attribute in module._parameters:
        is_parameter = isinstance(tensor, nn.Parameter)
        module._parameters[attribute] = tensor if is_parameter else nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor


def _put_together(tensors: list[Tensor]) -> nn.Parameter:
    """Makes tensors of one dtype, equal but for their first dimension, views of the one that is returned."""
    first = tensors[0]
    whole = first.new_empty((sum(map(len, tensors)), *first.shape[1:]))
    for tensor, part in zip(tensors, whole.split([len(tensor) for tensor in tensors]), strict=True):
        tensor.data = part
    return nn.Parameter(whole, requires_grad=False)


def _replace(tree: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(tree.get_submodule(parent), child, module)
