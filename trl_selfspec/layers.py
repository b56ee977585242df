"""Decoder layers in one call, in place of modules that are shown to compute the same.

A decode step of a small model is dozens of tiny operations per layer, and a drafter's weights are read in less time
than those take to launch. Layers built like Llama's are replaced; any other stays as it is. What counts as such is
tried out, with random weights: attributes tell nothing of multipliers, activations or layers without positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from trl_selfspec.cache import PagedCache
from trl_selfspec.kernels import DecoderWeights, FastRMSNorm, PreparedDecoderLayer, PreparedLinear


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
MAX_TOKENS = 64  # per forward; for more, a call more or less matters little
TRIAL_LENGTHS, TRIAL_STEPS = (9, 6), 2
# Both ways round at the same places; only the exponentials of the activation differ, in the last bit.
MAX_SHARE_OF_OTHER_ROUNDINGS, RELATIVE_TOLERANCE = 0.05, {torch.bfloat16: 2**-6, torch.float32: 1e-4}


class FastForward:
    """A decoder layer's forward with decode steps in one call; the module's own does what that can't."""

    def __init__(self, module: nn.Module, weights: DecoderWeights) -> None:
        self.modules_own, self.attention = module.forward, module.self_attn
        self.prepared = PreparedDecoderLayer(weights)

    def __call__(
        self,
        hidden_states: Tensor,  # (B, T, hidden)
        *args: object,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: object,
    ) -> Tensor:
        cache: PagedCache | None = self.attention.paged_cache  # type: ignore[assignment]
        if args or position_embeddings is None or cache is None or not self._takes(hidden_states, cache):
            return self.modules_own(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        layer = cache.pages_of[self.attention.layer_idx]  # type: ignore[index]
        storage = layer.keys, layer.values, cache.positions, cache.write_index, cache.num_slots
        return self.prepared(hidden_states, *position_embeddings, *storage)

    def _takes(self, hidden_states: Tensor, cache: PagedCache) -> bool:
        layer = cache.pages_of[self.attention.layer_idx]  # type: ignore[index]
        ready = cache.rows_in_place and layer.is_initialized
        few = hidden_states.shape[0] * hidden_states.shape[1] <= MAX_TOKENS
        return ready and few and layer.keys.dtype is hidden_states.dtype is self.prepared.weights.dtype


def use_fast_forward(module: nn.Module) -> None:
    """Decodes with one call per step from here on; for a layer of `computing_the_same`, or of another tree's twin."""
    if (weights := _weights(module)) is not None:
        module.forward = FastForward(module, weights)  # type: ignore[method-assign]


def computing_the_same(layers: dict[str, nn.Module]) -> list[str]:
    """Names of the decoder layers that have Llama's parts and no others, and give the same in one call."""
    verdicts: dict[tuple[object, ...], bool] = {}
    names = []
    for name, module in layers.items():
        weights = _weights(module)
        if weights is None:
            continue
        if (make := _make(module)) not in verdicts:
            verdicts[make] = _computes_the_same(module, FastForward(module, weights))
        if verdicts[make]:
            names.append(name)
    return names


def _make(module: nn.Module) -> tuple[object, ...]:
    """What tells layers of one model apart, their index and weights aside."""
    parts = [part for part in module.modules() if not list(part.parameters(recurse=False))]
    settings = [(k, v) for part in parts for k, v in vars(part).items() if isinstance(v, int | float | str | None)]
    return type(module), tuple(setting for setting in settings if setting[0] != "layer_idx")


def _weights(module: nn.Module) -> DecoderWeights | None:
    """The layer's parts, if it has Llama's and no other."""
    attention, mlp = getattr(module, "self_attn", None), getattr(module, "mlp", None)
    if not isinstance(attention, nn.Module) or not isinstance(mlp, nn.Module):
        return None
    named = [(attention, name) for name in PROJECTIONS[0]] + [(mlp, name) for name in PROJECTIONS[1]]
    linears = [getattr(part, name, None) for part, name in named]
    projections = tuple(getattr(linear, "kernel", None) for linear in linears)
    norms = (
        getattr(module, "input_layernorm", None),
        getattr(module, "post_attention_layernorm", None),
        getattr(attention, "q_norm", None),
        getattr(attention, "k_norm", None),
    )
    scaling, head_dim = getattr(attention, "scaling", None), getattr(attention, "head_dim", None)
    config = getattr(attention, "config", None)  # where Mistral's attention looks, which has no attribute of its own
    window = getattr(attention, "sliding_window", getattr(config, "sliding_window", None))
    if not all(isinstance(projection, PreparedLinear) for projection in projections):
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
    weights = DecoderWeights(projections, norms, head_dim, scaling, window, rotary)  # type: ignore[arg-type]
    return weights if weights.fits else None


@torch.no_grad()
def _computes_the_same(module: nn.Module, fast: FastForward) -> bool:
    """Ragged rows, several tokens, random weights in the place of the layer's own."""
    generator = torch.Generator().manual_seed(0)
    parameters = list(module.parameters())
    own = [parameter.data for parameter in parameters]
    bound = getattr(fast.attention, "paged_cache", None)
    try:
        for parameter in parameters:
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.data = torch.empty_like(parameter).uniform_(-2 * spread, 2 * spread, generator=generator)
        expected, actual = _decode(fast, module), _decode(fast, fast)
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError):
        return False
    finally:
        fast.attention.paged_cache = bound  # type: ignore[assignment]
        for parameter, data in zip(parameters, own, strict=True):
            parameter.data = data
    return all(map(_same, actual, expected))


def _decode(fast: FastForward, layer: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a layer gives for a step, and the keys and values in the cache after it."""
    weights, generator = fast.prepared.weights, torch.Generator().manual_seed(1)
    layer_idx: int = fast.attention.layer_idx  # type: ignore[assignment]
    cache = PagedCache(layer_idx + 1, len(TRIAL_LENGTHS), max(TRIAL_LENGTHS) + TRIAL_STEPS)
    cache.attention_writes = True
    fast.attention.paged_cache = cache  # type: ignore[assignment]

    def step(layer: Callable[..., Tensor], positions: Tensor, **kwargs: object) -> Tensor:
        def noise(size: int) -> Tensor:
            return torch.randn(*positions.shape, size, generator=generator).to(weights.dtype)

        cache.begin(positions, cache.row_capacity, **kwargs)  # type: ignore[arg-type]
        return layer(
            noise(weights.projections[0].k),
            attention_mask=None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            position_embeddings=(noise(weights.head_dim), noise(weights.head_dim)),
        )

    lengths = torch.tensor(TRIAL_LENGTHS)
    step(fast.modules_own, torch.arange(max(TRIAL_LENGTHS)).expand(len(lengths), -1), lengths=lengths, fresh=True)
    output = step(layer, lengths[:, None] + torch.arange(TRIAL_STEPS))
    pages = cache.pages_of[layer_idx]
    return output, pages.keys[1:], pages.values[1:]


def _same(actual: Tensor, expected: Tensor) -> bool:
    if not isinstance(expected, Tensor) or actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    tolerance = RELATIVE_TOLERANCE[expected.dtype]
    close = torch.allclose(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().mean().item())
    share = (actual != expected).float().mean().item()
    return close and (expected.dtype is torch.float32 or share <= MAX_SHARE_OF_OTHER_ROUNDINGS)
