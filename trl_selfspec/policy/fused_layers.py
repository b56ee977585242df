"""Decoder layers in one go, in place of modules that are shown to compute the same.

A decode step is dozens of tiny operations per layer, and a drafter's weights are read in less time than those take to
launch. Layers built like Llama's are replaced; any other stays as it is. What counts as such is tried out, with random
weights: attributes tell nothing of multipliers, activations or layers without positions.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from trl_selfspec.kernels import DecoderLayer, DecoderParts, FastRMSNorm, prepare_decoder_layer
from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kv_cache.paged_cache import PagedCache


logger = logging.getLogger(__name__)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
JOINABLE = PROJECTIONS[0][:3], PROJECTIONS[1][:2]  # each group reads one input
TRIAL_LENGTHS, TRIAL_STEPS = (9, 6), 2
# Both ways round at the same places; only the exponentials of the activation differ, in the last bit.
MAX_SHARE_OF_OTHER_ROUNDINGS = 0.05
RELATIVE_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 1e-4}


class FastForward:
    """A decoder layer's forward with decode steps in one go; the module's own does what that can't."""

    def __init__(
        self,
        module: nn.Module,
        layer: DecoderLayer,
        compute: Callable[..., Tensor] | None = None,  # in the place of `layer`
    ) -> None:
        self.modules_own, self.attention, self.layer = module.forward, module.self_attn, layer
        self.compute = compute or layer

    def __call__(
        self,
        hidden_states: Tensor,  # (B, T, hidden)
        *args: object,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: object,
    ) -> Tensor:
        cache: PagedCache | None = self.attention.paged_cache  # type: ignore[assignment]
        if not args and position_embeddings is not None and cache is not None:
            pages = cache.pages_of[self.attention.layer_idx]  # type: ignore[index]
            if pages.is_initialized and self.layer.takes(hidden_states, position_embeddings[0], pages):
                return self.compute(hidden_states, *position_embeddings, pages)
        return self.modules_own(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)


def use_fast_forwards(
    layers: dict[str, nn.Module],  # a tree's, in order
    names: Sequence[str],  # those of `computing_the_same`, of this tree or of its twin
    hidden_dtype: torch.dtype,
    last_norm: nn.Module | None,  # what sees the output of the last layer
) -> None:
    """Decodes in one go from here on."""
    fast: dict[str, DecoderLayer] = {}
    for name in names:
        if (layer := _prepared(layers[name], hidden_dtype)) is not None:
            layers[name].forward = FastForward(layers[name], layer)  # type: ignore[method-assign]
            fast[name] = layer
    for name, following in pairwise([*layers, None]):
        if name not in fast:
            continue
        if following is None and isinstance(last_norm, FastRMSNorm):
            fast[name].precede(last_norm, None)
        elif following in fast:
            fast[name].precede(fast[following].parts.norms[0], fast[following].parts.dtype)


def computing_the_same(layers: dict[str, nn.Module], hidden_dtype: torch.dtype) -> list[str]:
    """Names of the decoder layers that have Llama's parts and no others, and give the same in one go."""
    verdicts: dict[tuple[object, ...], bool] = {}
    names = []
    for name, module in layers.items():
        layer = _prepared(module, hidden_dtype)
        if layer is None:
            continue
        if (make := _make(module)) not in verdicts:
            verdicts[make] = _computes_the_same(module, layer)
        if verdicts[make]:
            names.append(name)
    return names


def joinable_projections(tree: nn.Module) -> Iterator[list[str]]:
    """Names of linear layers that read one input, together."""
    for name, module in tree.named_modules():
        for group in JOINABLE:
            if all(isinstance(getattr(module, part, None), nn.Module) for part in group):
                yield [f"{name}.{part}" for part in group]


def _make(module: nn.Module) -> tuple[object, ...]:
    """What tells layers of one model apart, their index and weights aside."""
    parts = [part for part in module.modules() if not list(part.parameters(recurse=False))]
    settings = [(k, v) for part in parts for k, v in vars(part).items() if isinstance(v, int | float | str | None)]
    return type(module), tuple(setting for setting in settings if setting[0] != "layer_idx")


def _prepared(module: nn.Module, hidden_dtype: torch.dtype) -> DecoderLayer | None:
    """The layer in one go, if it has Llama's parts and no other, and a kernel takes them."""
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
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
    parts = [*linears, *norms]
    known = {id(tensor) for part in parts if part is not None for tensor in [*part.parameters(), *part.buffers()]}
    if known != {id(tensor) for tensor in [*module.parameters(), *module.buffers()]}:
        return None
    rotary = bool(getattr(attention, "use_rope", True))
    return prepare_decoder_layer(
        DecoderParts(tuple(linears), norms, head_dim, scaling, window, rotary, hidden_dtype)  # type: ignore[arg-type]
    )


@torch.no_grad()
def _computes_the_same(module: nn.Module, layer: DecoderLayer) -> bool:
    """Ragged rows, several tokens, random weights in the place of the layer's own."""
    fast = FastForward(module, layer)
    generator = torch.Generator(layer.parts.norms[0].weight.device).manual_seed(0)
    parameters = list(module.parameters())
    own = [parameter.data for parameter in parameters]
    bound = getattr(fast.attention, "paged_cache", None)
    try:
        for parameter in parameters:
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.data = torch.empty_like(parameter).uniform_(-2 * spread, 2 * spread, generator=generator)
        expected, actual = _decode(fast, fast.modules_own), _decode(fast, fast)
        rounded = actual if layer.twin is None else _decode(fast, FastForward(module, layer, layer.twin))
    except gpu.errors() as error:
        if gpu.runs_triton(parameters[0].device):  # where a kernel was expected to run
            reason = f"{type(error).__name__}: {error}"[:500]
            logger.warning("trl_selfspec: %s runs module by module, more slowly: %s", type(module).__name__, reason)
        return False
    finally:
        fast.attention.paged_cache = bound  # type: ignore[assignment]
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data
    dtype = layer.parts.dtype
    close = all(_close(x, y, RELATIVE_TOLERANCE[dtype]) for x, y in zip(actual, expected, strict=True))
    alike = dtype is torch.float32 or all(map(_rounds_alike, rounded, expected))
    if not close or not alike:
        what = "rounds otherwise" if close else "computes something else"
        logger.info("trl_selfspec: %s runs module by module: it %s", type(module).__name__, what)
    return close and alike


def _decode(fast: FastForward, layer: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer gives for a step, and the keys and values in the cache after it."""
    parts, device = fast.layer.parts, fast.layer.parts.norms[0].weight.device
    generator = torch.Generator(device).manual_seed(1)
    layer_idx: int = fast.attention.layer_idx  # type: ignore[assignment]
    capacity = max(TRIAL_LENGTHS) + TRIAL_STEPS
    cache = PagedCache(layer_idx + 1, len(TRIAL_LENGTHS), capacity, dtype=parts.dtype, device=device)
    fast.attention.paged_cache = cache  # type: ignore[assignment]
    pages = cache.pages_of[layer_idx]

    def step(layer: Callable[..., Tensor], positions: Tensor, **kwargs: object) -> Tensor:
        def noise(size: int) -> Tensor:
            shape = *positions.shape, size
            return torch.randn(shape, generator=generator, device=device).to(parts.hidden_dtype)

        cache.begin(positions, cache.row_capacity, **kwargs)  # type: ignore[arg-type]
        hidden_states, angles = noise(parts.hidden_size), (noise(parts.head_dim), noise(parts.head_dim))
        assert cache.fresh or fast.layer.takes(hidden_states, angles[0], pages)
        return layer(
            hidden_states,
            attention_mask=None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=angles,
        )

    lengths, slots = torch.tensor(TRIAL_LENGTHS, device=device), torch.arange(capacity, device=device)
    prompt = slots[: max(TRIAL_LENGTHS)].expand(len(lengths), -1)
    step(fast.modules_own, prompt, lengths=lengths, fresh=True)
    output = step(layer, lengths[:, None] + slots[:TRIAL_STEPS])
    return output, pages.keys[1:], pages.values[1:]


def _close(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    if not isinstance(expected, Tensor) or actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().mean().item())


def _rounds_alike(actual: Tensor, expected: Tensor) -> bool:
    return (actual != expected).float().mean().item() <= MAX_SHARE_OF_OTHER_ROUNDINGS
