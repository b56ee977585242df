"""Does the engine's attention and cache reproduce this architecture? Two ragged random rows tell.

Some architectures ignore the attention registry (Falcon), need a mask (BLOOM), keep a recurrent state or compute
positions of their own. No attribute says so reliably; logits do.
"""

import contextlib

import torch
from torch import Tensor, nn

from trl_selfspec.attention import bind_cache
from trl_selfspec.cache import PagedCache
from trl_selfspec.mirror import Mirror, UnsupportedModelError


PROMPT_LENGTHS = (5, 11)
STEPS, STEP_TOKENS = 3, 3
WINDOW = 7  # below the longer prompt: some architectures apply theirs in a mask, which the engine does not build
# Largest error at any position, relative to the logits' spread. Sound architectures give 1e-6 to 1e-5 in fp32, broken
# ones 0.1 to 10.
FP32_TOLERANCE = 1e-3
# Median over positions: 16-bit rounding alone gives about 0.01, and flips a router at single positions.
LOW_PRECISION_TOLERANCE = 0.1


@torch.no_grad()
def self_check(mirror: Mirror, context: contextlib.AbstractContextManager) -> None:
    """Compares ragged cached steps with rejected drafts against transformers' plain forward.

    Raises:
        UnsupportedModelError: the logits differ, or the architecture fails on the way.
        ValueError: the policy's own logits are not finite.
    """
    name = type(mirror.base).__name__
    weight = mirror.embeddings
    total = max(PROMPT_LENGTHS) + STEPS * STEP_TOKENS
    generator = torch.Generator().manual_seed(0)
    shape = len(PROMPT_LENGTHS), total
    tokens = torch.randint(weight.shape[0], shape, generator=generator, device="cpu").to(weight.device)
    try:
        with context:
            checked, reference = mirror.shortsighted(WINDOW)
            expected = torch.stack(
                [reference(input_ids=row[None], use_cache=False).logits[0].float() for row in tokens]
            )
            if not expected.isfinite().all():
                raise ValueError(f"{name} gives logits that are not finite; check its weights before generating.")
            errors = _ragged_errors(checked, mirror.num_layers, tokens, expected)
    except (RuntimeError, TypeError, AttributeError, KeyError, IndexError, NotImplementedError) as error:
        raise UnsupportedModelError(f"{name} does not run on the engine's cache and attention: {error}") from error
    fp32 = mirror.dtype == torch.float32
    error = errors.max() if fp32 else errors.median()
    if error > (FP32_TOLERANCE if fp32 else LOW_PRECISION_TOLERANCE):
        raise UnsupportedModelError(
            f"{name} gives other logits on the engine's cache and attention than on its own (relative error "
            f"{error:.2g}); the architecture probably does not use transformers' attention registry."
        )


def _ragged_errors(model: nn.Module, num_layers: int, tokens: Tensor, expected: Tensor) -> Tensor:
    num_rows, total = tokens.shape
    device = tokens.device
    page_size = None if device.type == "cpu" else 16
    cache = PagedCache(num_layers, num_rows, total + STEP_TOKENS, page_size, device=device)
    bind_cache(model, cache)
    for row in range(num_rows):
        cache.reserve(row, total)
    spread = expected.std().clamp_min(1e-6)
    lengths = torch.tensor(PROMPT_LENGTHS, device=device)

    def forward(ids: Tensor, positions: Tensor, **kwargs: object) -> Tensor:
        cache.begin(positions, total, **kwargs)  # type: ignore[arg-type]
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits.float()

    prompt = torch.arange(max(PROMPT_LENGTHS), device=device).expand(num_rows, -1)
    forward(tokens.gather(1, prompt), prompt, lengths=lengths, fresh=True)
    errors = []
    for _ in range(STEPS):
        positions = lengths[:, None] + torch.arange(STEP_TOKENS, device=device)
        ids = tokens.gather(1, positions)
        ids[0, 1:] = ids[0, 1:].flip(0)  # row 0 keeps only its first token: the rest are rejected drafts
        logits = forward(ids, positions)
        kept = torch.ones_like(positions, dtype=torch.bool)
        kept[0, 1:] = False
        difference = logits - expected.gather(1, positions[..., None].expand(-1, -1, expected.shape[-1]))
        errors.append(difference[kept].abs().amax(-1) / spread)
        lengths = lengths + kept.sum(1)
    return torch.cat(errors)
