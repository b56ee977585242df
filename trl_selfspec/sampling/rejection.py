"""Which drafted tokens stand, and the token that follows them.

Two rules. Rejection sampling (Leviathan, Kalman, Matias 2023, arXiv 2211.17192) accepts most and keeps the law.
Coupling (Daliri, Musco, Suresh 2024, arXiv 2408.07978) keeps the very samples. Neither syncs with the host.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from trl_selfspec.sampling.rng import sample_inverse_cdf


class Verdict(NamedTuple):
    """The outcome of a speculative round: row b yields `tokens[b, : num_accepted[b] + 1]`."""

    num_accepted: Tensor  # (B,) int64
    tokens: Tensor  # (B, γ+1) int64: accepted drafts, the recovered or bonus token; what follows means nothing


def residual(
    target_probs: Tensor,  # (..., V)
    draft_probs: Tensor,  # (..., V)
) -> Tensor:  # (..., V)
    """The normalised positive part of `target - draft`: what rejected drafts leave to be drawn.

    Where the laws are equal no mass is left and no draft is rejected, except by rounding: then the target itself.
    A draft law with NaN gives the target too.
    """
    excess = (target_probs - draft_probs).clamp_min_(0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, excess.div_(mass), target_probs)


def verify_rejection(
    draft_tokens: Tensor,  # (B, γ) int64, γ >= 1, drawn from draft_probs
    draft_probs: Tensor,  # (B, γ, V) fp32
    target_probs: Tensor,  # (B, γ+1, V) fp32
    accept_uniforms: Tensor,  # (B, γ) float64
    resample_uniforms: Tensor,  # (B, γ+1) float64
) -> Verdict:
    """Accepts drafts from left to right while `u q(x) < p(x)`, then draws one more token.

    Lossless: at one position, with the prefix given, x is drafted and accepted with probability
    `q(x) min(1, p(x)/q(x)) = min(p(x), q(x))`. A rejection has probability `1 - Σ min(p, q)`, which is the mass of
    `(p - q)⁺`, and then draws from that positive part, normalised, so it adds `(p(x) - q(x))⁺`. The two add up to
    `p(x)`. After γ acceptances the bonus token comes from the target. By induction every yielded token has the target
    law given the tokens before it, whatever the draft.

    Three conditions. `<` is strict, or a token of target probability 0 passes when u is 0. At one position the numbers
    for drafting, accepting and resampling are independent. What is kept must not depend on numbers of later positions;
    so those of a discarded position may serve again in the next round.
    """
    gamma = draft_tokens.shape[1]
    drafted = draft_tokens.unsqueeze(-1)
    q = draft_probs.gather(-1, drafted).squeeze(-1).double()
    p = target_probs[:, :gamma].gather(-1, drafted).squeeze(-1).double()
    num_accepted = _leading(accept_uniforms * q < p)

    row = torch.arange(len(draft_tokens), device=draft_tokens.device)
    draft_law = draft_probs[row, num_accepted.clamp(max=gamma - 1)]
    # Nothing is drafted at position γ: against an empty draft law the residual is the target itself.
    draft_law = draft_law.masked_fill((num_accepted == gamma).unsqueeze(-1), 0)
    law = residual(target_probs[row, num_accepted], draft_law)

    at = num_accepted.unsqueeze(-1)
    token = sample_inverse_cdf(law, resample_uniforms.gather(1, at).squeeze(1))
    return Verdict(num_accepted, pad(draft_tokens, (0, 1)).scatter(1, at, token.unsqueeze(-1)))


def verify_coupled(
    draft_tokens: Tensor,  # (B, γ) int64
    target_tokens: Tensor,  # (B, γ+1) int64
) -> Verdict:
    """Accepts drafts while they equal the target's own draws, which are the output.

    The target draws with noise keyed by position, so its token after a true prefix is the one that plain sampling
    gives; the first difference is where the prefix stops being true. With noise shared by both, `argmax(log q + g)`
    equals `argmax(log p + g)` with probability at least `(1 - TV) / (1 + TV)`.
    """
    return Verdict(_leading(draft_tokens == target_tokens[:, :-1]), target_tokens)


def _leading(accepted: Tensor) -> Tensor:
    """Counts the leading True of each row."""
    return accepted.long().cumprod(1).sum(1)
