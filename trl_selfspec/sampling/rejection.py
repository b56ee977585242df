"""Which drafted tokens are accepted, and the token that follows them.

Two rules. Rejection sampling (Leviathan, Kalman, Matias 2023, arXiv 2211.17192) accepts most and keeps the
distribution. Coupling (Daliri, Musco, Suresh 2024, arXiv 2408.07978) keeps the very samples. Neither syncs with the
host.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def residual(
    target_probs: Tensor,  # (..., V)
    draft_probs: Tensor,  # (..., V)
) -> Tensor:  # (..., V)
    """The residual distribution: the normalised positive part of `target - draft`, which recovered tokens come from.

    Where the two are equal no mass is left and no draft is rejected, except by rounding: then the target itself.
    A draft distribution with NaN gives the target too.
    """
    excess = (target_probs - draft_probs).clamp_min_(0)
    mass = excess.sum(-1, keepdim=True)
    return torch.where(mass > 0, excess.div_(mass), target_probs)


def verify_rejection(
    draft_tokens: Tensor,  # (B, γ) int64, γ >= 1, drawn from draft_probs
    draft_probs: Tensor,  # (B, γ, V) fp32
    target_probs: Tensor,  # (B, γ+1, V) fp32
    accept_uniforms: Tensor,  # (B, γ) float64
    draw: Callable[[Tensor, Tensor], Tensor],  # tokens (B,) from probabilities (B, V), `num_accepted` places ahead
) -> tuple[Tensor, Tensor]:  # num_accepted (B,) int64, tokens (B, γ+1) int64
    """Accepts drafts from left to right while `u q(x) < p(x)`, then draws one more token.

    Row b yields `tokens[b, : num_accepted[b] + 1]`: accepted drafts, then the recovered or bonus token.

    Lossless: at one position, with the prefix given, x is drafted and accepted with probability
    `q(x) min(1, p(x)/q(x)) = min(p(x), q(x))`. A rejection has probability `1 - Σ min(p, q)`, which is the mass of
    `(p - q)⁺`, and then draws from that positive part, normalised, so it adds `(p(x) - q(x))⁺`. The two add up to
    `p(x)`. After γ acceptances the bonus token comes from the target. By induction every yielded token has the target
    distribution given the tokens before it, whatever the draft.

    Three conditions. `<` is strict, or a token of target probability 0 passes when u is 0. At one position the numbers
    for drafting, accepting and recovering are independent. What is kept must not depend on numbers of later positions;
    so those of a discarded position may serve again in the next round.

    No condition is on q: it may be any distribution that is known without the numbers of its position, one that is
    given false tokens for the prefix among them. Only, it has to be the one that the draft was drawn from.
    """
    gamma = draft_tokens.shape[1]
    drafted = draft_tokens.unsqueeze(-1)
    q = draft_probs.gather(-1, drafted).squeeze(-1).double()
    p = target_probs[:, :gamma].gather(-1, drafted).squeeze(-1).double()
    num_accepted = _leading(accept_uniforms * q < p)

    row = torch.arange(len(draft_tokens), device=draft_tokens.device)
    rejected_probs = draft_probs[row, num_accepted.clamp(max=gamma - 1)]
    # Nothing is drafted at position γ: against an empty draft distribution the residual is the target itself.
    rejected_probs = rejected_probs.masked_fill((num_accepted == gamma).unsqueeze(-1), 0)
    token = draw(residual(target_probs[row, num_accepted], rejected_probs), num_accepted)
    return num_accepted, pad(draft_tokens, (0, 1)).scatter(1, num_accepted.unsqueeze(-1), token.unsqueeze(-1))


def verify_coupled(
    draft_tokens: Tensor,  # (B, γ) int64
    target_tokens: Tensor,  # (B, γ+1) int64
) -> tuple[Tensor, Tensor]:  # num_accepted (B,) int64, tokens (B, γ+1) int64
    """Accepts drafts while they equal the target's own draws, which are the output.

    The target draws with noise keyed by position, so its token after a true prefix is the one that plain sampling
    gives; the first difference is where the prefix stops being true. With noise shared by both, `argmax(log q + g)`
    equals `argmax(log p + g)` with probability at least `(1 - TV) / (1 + TV)`.
    """
    return _leading(draft_tokens == target_tokens[:, :-1]), target_tokens


def _leading(accepted: Tensor) -> Tensor:
    """Counts the leading True of each row."""
    return accepted.long().cumprod(1).sum(1)
