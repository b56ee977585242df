"""Rollouts whose completions are given: real text, and so real acceptance, on a model of any size.

The engine does all of its work, sampling included, and then writes the recorded token where it would write its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bench import report
from bench.engines import Engine, OwnEngine, StockEngine
from bench.traces import Recording, Trace
from bench.workload import Workload
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.sampling.rejection import verify_coupled
from trl_selfspec.sampling.rng import Purpose, random_key, uniform
from trl_selfspec.sampling.samplers import Draw, RejectionSampler, Sampler, VerifyResult


# Slowest first, roughly: the order of ratios. `suffix` has no history.
ARMS: dict[str, dict[str, Any]] = {
    "plain": {"num_speculative_tokens": 0, "history": False},
    "quantized": {"drafter": "quantized", "history": False},
    "suffix": {"drafter": "suffix", "history": False},
    "suffix_history": {"drafter": "suffix"},
    "auto": {"drafter": "auto"},
}
REPLAY_ENGINES = ("stock", *ARMS)
NEED_THE_MODEL = ("quantized", "auto")  # random weights know nothing of the text that they would accept


class ReplaySampler:
    """Does a sampler's work, then writes what was recorded in the place of what was drawn.

    A draft is accepted as long as it is what was recorded: the rule for drafts that the target's own draws judge.

    Args:
        inner: the sampler that does the work.
        texts: (R, W) int64, prompt and completion of each row id.
    """

    def __init__(self, inner: Sampler, texts: Tensor) -> None:
        self.inner, self.texts = inner, texts

    def draw(self, scores: Tensor, row_ids: Tensor, positions: Tensor) -> Draw:
        return self._replace(self.inner.draw(scores, row_ids, positions), scores, row_ids, positions)

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Draw:
        return self.inner.propose(scores, row_ids, positions, step)

    def propose_several(self, scores: Tensor, row_ids: Tensor, positions: Tensor, starts: Tensor) -> Draw:
        return self.inner.propose_several(scores, row_ids, positions, starts)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> VerifyResult:
        _, *drawn = self.inner.verify(drafts, scores, row_ids, positions)
        tokens, logprobs = self._replace(Draw(*drawn), scores, row_ids[:, None], positions)
        return VerifyResult(*verify_coupled(drafts, tokens), logprobs)

    def _replace(
        self,
        drawn: Draw,  # (...)
        scores: Tensor,  # (..., V), from which they were drawn
        row_ids: Tensor,
        positions: Tensor,  # (...)
    ) -> Draw:
        """The recorded tokens and their log-probabilities. Drafts may run past a recording, where nothing is kept."""
        tokens = self.texts[row_ids, positions.clamp(max=self.texts.shape[1] - 1)]
        drawn_score, score = scores.gather(-1, torch.stack([drawn.tokens, tokens], -1)).unbind(-1)
        return Draw(tokens, drawn.logprobs + (score - drawn_score))


class ReplayRejectionSampler(ReplaySampler):
    """The same for drafts that are drawn from a distribution q and verified by rejection sampling.

    A round yields x by an accepted draft with probability min(p(x), q(x)), and in all with p(x). So where x is what a
    rollout said, its draft had been accepted with probability min(1, q(x) / p(x)). Drafts are therefore the recorded
    tokens, accepted with that probability: tokens and acceptance together are distributed as in rollouts of the model
    that was recorded, and keys of accepted drafts are those of the text.
    """

    inner: RejectionSampler

    def propose(self, scores: Tensor, row_ids: Tensor, positions: Tensor, step: Tensor) -> Draw:
        return self._replace(self.inner.propose(scores, row_ids, positions, step), scores, row_ids, positions)

    def propose_several(self, scores: Tensor, row_ids: Tensor, positions: Tensor, starts: Tensor) -> Draw:
        draws = self.inner.propose_several(scores, row_ids, positions, starts)
        return self._replace(draws, scores, row_ids[:, None], positions)

    def verify(self, drafts: Tensor, scores: Tensor, row_ids: Tensor, positions: Tensor) -> VerifyResult:
        _, *drawn = self.inner.verify(drafts, scores, row_ids, positions)
        tokens, logprobs = self._replace(Draw(*drawn), scores, row_ids[:, None], positions)
        gamma = drafts.shape[1]
        draft_probs = self.inner.drafts.of(scores[:, 0])[:, :gamma]
        q = draft_probs.gather(-1, drafts[..., None])[..., 0].double()
        u = uniform(random_key(self.inner.seed, row_ids[:, None], positions[:, :gamma], Purpose.ACCEPT))
        accepted = u * logprobs[:, :gamma].double().exp() < q
        return VerifyResult(accepted.long().cumprod(1).sum(1), tokens, logprobs)


class ReplayEngine(SelfSpecEngine):
    """An engine that says what it is given.

    Args:
        model: as for `SelfSpecEngine`. Its end-of-sequence tokens must be unset: recordings have lengths.
        options: likewise.
        recordings: all that it will be given.
    """

    def __init__(self, model: PreTrainedModel, options: SelfSpecOptions, recordings: Sequence[Recording]) -> None:
        rows = max(len(recording.prompt_ids) for recording in recordings)
        width = max(max(map(len, texts_of(recording))) for recording in recordings)
        self.texts = torch.zeros(rows, width, dtype=torch.int64, device=model.device)
        super().__init__(model, options)

    def load(self, recording: Recording) -> None:
        """The next rollout is this one, with its history and no other."""
        for row, text in zip(self.texts, texts_of(recording), strict=False):
            row[: len(text)] = torch.tensor(text)
        if self.history is not None:  # else the last replay of this recording would be in it
            self.history.clear()
            self.remember([prompt for prompt, _ in recording.history], [said for _, said in recording.history])

    def _samplers(self, greedy: bool) -> tuple[Sampler, Sampler]:
        sampler, token_sampler = super()._samplers(greedy)
        assert isinstance(sampler, RejectionSampler), "acceptance by another rule would need its own replay"
        return ReplayRejectionSampler(sampler, self.texts), ReplaySampler(token_sampler, self.texts)


def texts_of(recording: Recording) -> list[list[int]]:
    pairs = zip(recording.prompt_ids, recording.completion_ids, strict=True)
    return [prompt + completion for prompt, completion in pairs]


class OwnReplay(OwnEngine):
    """Ours on recordings."""

    engine: ReplayEngine

    def rollout(self, workload: Workload, seed: int) -> list[list[int]]:
        assert isinstance(workload, Recording)
        self.engine.load(workload)
        completion_ids = super().rollout(workload, seed)
        if completion_ids != workload.completion_ids:
            raise RuntimeError("the completions of a replay are not the recorded ones")
        return completion_ids


def replay_makers(
    model: PreTrainedModel, recordings: Sequence[Recording], names: Sequence[str], options: SelfSpecOptions
) -> dict[str, Callable[[], Engine]]:
    """What builds the named arms. `stock` samples its own text, of the recorded lengths."""

    def own(values: dict[str, Any]) -> Callable[[], Engine]:
        return lambda: OwnReplay(model, lambda: ReplayEngine(model, replace(options, **values), recordings))

    makers: dict[str, Callable[[], Engine]] = {"stock": lambda: StockEngine(model)}
    makers |= {name: own(values) for name, values in ARMS.items()}
    return {name: makers[name] for name in names}


def replay_ratios(seconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """`auto/best`: auto against what it can choose from, the fastest by its median."""
    others = {name: values for name, values in seconds.items() if name not in ("stock", "auto")}
    if "auto" not in seconds or not others:
        return {}
    best = min(others, key=lambda name: report.median(others[name]))
    return {"auto/best": report.ratios({"best": others[best], "auto": seconds["auto"]})["auto/best"]}


def check_replay(trace: Trace, vocab_size: int, names: Sequence[str], epoch: int, random_weights: bool) -> None:
    """`ValueError` where a trace can't be replayed so."""
    if trace.largest_id >= vocab_size:
        raise ValueError(
            f"--replay: the trace has the token id {trace.largest_id}, the model {vocab_size} tokens; use the model "
            f"that was recorded ({trace.about['model']}) or a preset with a larger vocabulary"
        )
    if unfit := [name for name in NEED_THE_MODEL if name in names and random_weights]:
        raise ValueError(f"--replay on random weights: acceptance of {', '.join(unfit)} would mean nothing")
    if epoch == 1 and "suffix_history" in names:
        raise ValueError("--epoch 1 has no history: leave suffix_history out")
