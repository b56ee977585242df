"""Decode steps of a tree over its own cache, with decoder layers in one go or in their own modules."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_selfspec.kv_cache.attention import bind_cache
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.policy.fused_layers import FusedForward


LENGTHS, CAPACITY = (9, 3, 14, 6, 1), 40


def fused_forwards(tree: nn.Module) -> list[FusedForward]:
    """Those of layers that decoded fused."""
    forwards = [getattr(module, "forward", None) for module in tree.modules()]
    fused = [forward for forward in forwards if isinstance(forward, FusedForward)]
    return [forward for forward in fused if forward.trials.passed and not forward.trials.refused]


def unfused(tree: PreTrainedModel) -> PreTrainedModel:
    for module in tree.modules():
        if isinstance(getattr(module, "forward", None), FusedForward):
            del module.forward
    return tree


@torch.no_grad()
def decoded(
    model: PreTrainedModel,
    num_steps: int,
    num_rows: int = len(LENGTHS),
    page_size: int | None = None,
    dtype: torch.dtype | None = None,  # of keys and values
) -> Tensor:
    """Logits of two decodes, after a prefill of ragged rows."""
    device = next(model.parameters()).device
    cache = PagedCache(model.config.num_hidden_layers, num_rows, CAPACITY, page_size, dtype, device)
    for row in range(num_rows if page_size else 0):
        cache.reserve(row, CAPACITY)
    bind_cache(model, cache)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor(LENGTHS[:num_rows], device=device)

    def forward(positions: Tensor, **kwargs: object) -> Tensor:
        ids = torch.randint(3, model.config.vocab_size, positions.shape, generator=generator).to(device)
        cache.begin(positions, CAPACITY, **kwargs)  # type: ignore[arg-type]
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits

    slots = torch.arange(max(*LENGTHS[:num_rows], num_steps), device=device)
    forward(slots[: max(LENGTHS[:num_rows])].expand(num_rows, -1), lengths=lengths, fresh=True)
    steps = [lengths[:, None] + start + slots[:num_steps] for start in (0, num_steps)]
    return torch.cat([forward(positions) for positions in steps], dim=1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).abs().max() / expected.float().std()).item()
