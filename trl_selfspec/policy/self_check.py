"""The start-up check: the engine's next-token distributions against those of the policy's own forward.

It runs a few ragged rows of random tokens. Some architectures ignore the attention registry, need a mask (BLOOM) or
keep a recurrent state; some policies have hooks, patched forwards or layers that compute something else. No attribute
says so reliably, so the policy's own forward is the reference.

The statistic is the total variation between two next-token distributions. It lies in 0..1 for any vocabulary. Its
limit is a multiple of the difference between stock ways of computing them on this policy (cached steps, eager
attention), because rounding grows with the depth for these too.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trl_selfspec.kv_cache.attention import bind_cache
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.policy.recurrent_layers import is_recurrent
from trl_selfspec.policy.refusals import USE_TRL, UnsupportedModelError
from trl_selfspec.policy.replica import PolicyReplica
from trl_selfspec.utils import failures_raised_as


PROMPT_LENGTHS = (5, 11)
STEPS, STEP_TOKENS = 3, 3
STEP_SIZES = (1, 2, 3, 3, 3, 3)  # of the reference's cached steps, after the shorter prompt
WINDOW = 7  # below the longer prompt: some architectures apply theirs in a mask, which the engine does not build
# Sound policies stay below a quarter of the limit, faults begin at 5 times it (measured, docs/LOG.md 2026-11-30).
LIMIT_IN_NOISES = 4.0
LEAST_LIMIT = 1e-4  # in fp32: faults differ by 1e-3 and more, even where distributions are all but uniform
MOST_LIMIT = 0.5
MOST_DISAGREEMENT = 8.0  # between the noises of stock ways; sound ones have about the same noise
MAX_SUSPECTS = 3  # modules named in a refusal

Logits = list[Tensor]  # (T, V) fp32 per row, of the positions that are compared


@dataclass(frozen=True)
class Calibration:
    """What the check measured on this policy.

    Attributes:
        noise: total variation between stock ways of computing the same distribution.
        distance: total variation between the engine's distribution and the policy's.
        limit: the largest `distance` that passes.
        logprob_noise: mean |difference| of a drawn token's log-probability, of stock ways or of the engine.
    """

    noise: float
    distance: float
    limit: float
    logprob_noise: float


@torch.no_grad()
def self_check(replica: PolicyReplica, policy: nn.Module, context: contextlib.AbstractContextManager) -> Calibration:
    """Compares ragged cached steps with rejected drafts against the policy's own forward.

    Args:
        replica: the target replica, with weights as they are now.
        policy: the model in training, wrappers and hooks included; its forward is collective where it is sharded.
        context: the autocast in which the policy is trained.

    Raises:
        UnsupportedModelError: the distributions differ, or the model fails on the way.
        ValueError: the policy's own logits are NaN.
    """
    name = type(replica.base).__name__
    generator = torch.Generator().manual_seed(0)
    shape = len(PROMPT_LENGTHS), max(PROMPT_LENGTHS) + STEPS * STEP_TOKENS
    tokens = torch.randint(len(replica.embeddings), shape, generator=generator, device="cpu").to(
        replica.embeddings.device
    )
    on_tokens = failures_raised_as(UnsupportedModelError, f"{name} does not run on token ids alone: ")
    with on_tokens, torch.device(tokens.device), context, evaluating(policy):  # a caller's default device is not used
        expected = _compared(_plain_logits(policy, tokens))
    if any((logits.isnan() | (logits == torch.inf)).any() for logits in expected):
        raise ValueError(f"{name} gives logits that are not finite; check its weights before generating.")
    on_engine = failures_raised_as(UnsupportedModelError, f"{name} does not run on the engine's cache and attention: ")
    with on_engine, torch.device(tokens.device), context:
        noise, logprob_noise = _noise(replica, tokens)
        actual = _ragged_logits(replica.model, replica.num_layers, tokens)
        windowed = _with_short_window(replica, tokens)
    exact = replica.dtype in (torch.float32, torch.float64)
    rounding = torch.finfo(replica.dtype).eps * max(_spread(logits) for logits in expected)  # of logits of this dtype
    limit = min(LIMIT_IN_NOISES * max(noise, rounding), MOST_LIMIT)
    limit = max(limit, LEAST_LIMIT) if exact else limit
    distance = _distance(actual, expected, exact)
    if not distance <= limit:
        raise UnsupportedModelError(
            f"{name} gives other next-token distributions on the engine than in its own forward (total variation "
            f"{distance:.2g}, at most {limit:.2g} is rounding): {_cause(replica, policy)}."
        )
    if windowed is not None and not (distance := _distance(*windowed, exact)) <= limit:
        raise UnsupportedModelError(
            f"{name} does not apply its attention window on the engine (total variation {distance:.2g}, at most "
            f"{limit:.2g} is rounding)."
        )
    return Calibration(noise, distance, limit, max(logprob_noise, _logprob_difference(actual, expected)))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts all submodules into evaluation mode (no dropout, no NEFTune noise), and back into their own after it."""
    training = [submodule for submodule in module.modules() if submodule.training]
    module.eval()
    try:
        yield
    finally:
        for submodule in training:
            submodule.training = True


def _plain_logits(model: Callable[..., Any], tokens: Tensor) -> Logits:
    return list(model(input_ids=tokens, use_cache=False).logits.float())


def _compared(logits: Logits) -> Logits:
    """Selects, from logits at all positions, the positions that `_ragged_logits` returns."""
    return [row[_compared_positions(i).to(row.device)] for i, row in enumerate(logits)]


def _compared_positions(row: int) -> Tensor:
    accepted = 1 if row == 0 else STEP_TOKENS  # per step
    return PROMPT_LENGTHS[row] + torch.arange(STEPS * accepted)


def _noise(replica: PolicyReplica, tokens: Tensor) -> tuple[float, float]:
    """The difference between stock ways of computing the same: total variation, and that of log-probabilities."""
    attention = replica.base.config._attn_implementation or "eager"
    stock = replica.tree(attention)
    one_forward = _compared(_plain_logits(stock, tokens))
    ways = [_compared(_stepwise_logits(stock, tokens))]
    if attention != "eager":
        ways.append(_compared(_plain_logits(replica.tree("eager"), tokens)))
    exact = replica.dtype in (torch.float32, torch.float64)
    noises = [(_distance(way, one_forward, exact), _logprob_difference(way, one_forward)) for way in ways]
    least = min(noises)
    # A way that is far off is at fault itself: cached steps of RoBERTa's family count positions wrongly.
    noises = [way for way in noises if way[0] <= MOST_DISAGREEMENT * least[0]] or [least]
    return max(noise for noise, _ in noises), max(noise for _, noise in noises)


def _stepwise_logits(model: nn.Module, tokens: Tensor) -> Logits:
    """A few tokens at a time on the model's own cache, as assisted generation runs it."""
    first, *steps = tokens.split([min(PROMPT_LENGTHS), *STEP_SIZES], dim=1)
    output = model(input_ids=first, use_cache=True)
    if getattr(output, "past_key_values", None) is None:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no keys and values between forwards; {USE_TRL}")
    logits = [output.logits]
    for step in steps:
        output = model(input_ids=step, past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits)
    return list(torch.cat(logits, dim=1).float())


def _with_short_window(replica: PolicyReplica, tokens: Tensor) -> tuple[Logits, Logits] | None:
    """Logits of the engine and of transformers' modules with a window shorter than these rows; None without one."""
    if not replica.has_window:
        return None
    checked, reference = replica.with_short_window(WINDOW)
    return _ragged_logits(checked, replica.num_layers, tokens), _compared(_plain_logits(reference, tokens))


def _ragged_logits(model: nn.Module, num_layers: int, tokens: Tensor) -> Logits:
    """Logits of a prefill of ragged rows, then of steps of several tokens; row 0 accepts the first of each step."""
    num_rows, total = tokens.shape
    device = tokens.device
    page_size = None if device.type == "cpu" else 16
    cache = PagedCache(num_layers, num_rows, total + STEP_TOKENS, page_size, device=device)
    bound = [(module, module.paged_cache) for module in model.modules() if hasattr(module, "paged_cache")]
    bind_cache(model, cache)
    for row in range(num_rows):
        cache.reserve(row, total)
    lengths = torch.tensor(PROMPT_LENGTHS, device=device)

    def forward(ids: Tensor, positions: Tensor, **kwargs: object) -> Tensor:
        cache.begin(positions, total, **kwargs)  # type: ignore[arg-type]
        return model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits.float()

    try:
        prompt = torch.arange(max(PROMPT_LENGTHS), device=device).expand(num_rows, -1)
        if is_recurrent(model):  # no padding, as in a rollout
            for row, length in enumerate(PROMPT_LENGTHS):
                positions = prompt[row : row + 1, :length]
                forward(tokens[row : row + 1, :length], positions, rows=torch.tensor([row], device=device), fresh=True)
        else:
            forward(tokens.gather(1, prompt), prompt, lengths=lengths, fresh=True)
        logits: list[list[Tensor]] = [[] for _ in range(num_rows)]
        for _ in range(STEPS):
            positions = lengths[:, None] + torch.arange(STEP_TOKENS, device=device)
            ids = tokens.gather(1, positions)
            ids[0, 1:] = ids[0, 1:].flip(0)  # the rejected drafts
            step = forward(ids, positions)
            for row in range(num_rows):
                logits[row].append(step[row, : 1 if row == 0 else STEP_TOKENS])
            accepted = torch.tensor([1, *[STEP_TOKENS] * (num_rows - 1)], device=device)
            cache.commit(accepted)
            lengths = lengths + accepted
        return [torch.cat(parts) for parts in logits]
    finally:
        bind_cache(model, None)
        for module, before in bound:
            module.paged_cache = before  # type: ignore[assignment]


def _distance(actual: Logits, expected: Logits, exact: bool) -> float:
    """Total variation of next-token distributions, of the row with the largest.

    In fp32 it is the maximum over positions. In 16 bits it is the median: rounding flips a router at single positions.
    """
    rows = []
    for x, y in zip(actual, expected, strict=True):
        variation = (x.softmax(-1) - y.softmax(-1)).abs().sum(-1) / 2
        rows.append(variation.max() if exact else variation.median())
    return max(row.item() for row in rows)


def _logprob_difference(actual: Logits, expected: Logits) -> float:
    """Mean |difference| of the log-probability of a token drawn from `expected`."""
    rows = []
    for x, y in zip(actual, expected, strict=True):
        difference = (x.log_softmax(-1) - y.log_softmax(-1)).abs().nan_to_num(0.0, posinf=0.0)
        rows.append((y.softmax(-1) * difference).sum(-1).mean())
    return max(row.item() for row in rows)


def _spread(logits: Tensor) -> float:
    return logits[logits.isfinite()].std().item()


def _cause(replica: PolicyReplica, policy: nn.Module) -> str:
    """The likely cause of a difference: modules of the policy that compute something of their own."""
    suspects = []
    for name, module in replica.policy_modules(policy):
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        if any(not _is_harmless(hook) for hook in hooks):
            suspects.append(f"`{name}` has a forward hook")
        elif isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            suspects.append(f"`{name}` is a {type(module).__name__}")
        elif "forward" in vars(module) and not hasattr(module, "_hf_hook") and name:
            suspects.append(f"`{name}` has a forward of its own")
    if not suspects:
        return "the architecture probably does not use transformers' attention registry"
    more = f" and {len(suspects) - MAX_SUSPECTS} more" if len(suspects) > MAX_SUSPECTS else ""
    return "the engine does not run what is the policy's own: " + ", ".join(suspects[:MAX_SUSPECTS]) + more


def _is_harmless(hook: Any) -> bool:
    return getattr(hook, "__module__", "").startswith(("torch.", "accelerate.", "deepspeed.", "trl.", "transformers."))
