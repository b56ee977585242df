"""Logits processing for several positions per row: from raw logits to the scores that a token is drawn from.

`BatchedLogitsProcessor` applies what `generate` would apply for a generation config, to (B, T) positions at once, each
with its own history, so that draft and target are processed identically. The processors are transformers' own objects
in transformers' order; those that read a history or wait for the device are rewritten here. What cannot be honoured
exactly, and without waiting for the device, is refused by name; nothing is dropped. Drawing tokens and stopping belong
elsewhere.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process as hf


# fmt: off
HONOURED_FIELDS = frozenset({
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "bad_words_ids", "sequence_bias", "suppress_tokens", "remove_invalid_values",
    "renormalize_logits", "eos_token_id", "min_length", "min_new_tokens", "max_length", "max_new_tokens",
})
_LENGTHS = {"max_length", "max_new_tokens"}  # of no concern to logits
# These ask for nothing about which tokens are drawn from a decoder-only model with one beam and no assistant.
IRRELEVANT_FIELDS = frozenset({
    # How generate stores, compiles and returns things.
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "prefill_chunk_size", "continuous_batching_config", "low_memory", "output_attentions", "output_hidden_states",
    "output_scores", "output_logits", "return_dict_in_generate", "transformers_version",
    # Read by beam search only, which `num_beams` refuses.
    "early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty",
    # Read by assisted generation only, which the fields that switch it on refuse.
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
    "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    # Padding, empty prompts, encoder-decoder models.
    "pad_token_id", "bos_token_id", "decoder_start_token_id",
})
# fmt: on

# Name -> the values that ask for nothing.
REFUSED_FIELDS: dict[str, tuple[Any, ...]] = {
    # Their processors read each row's history on the host.
    "no_repeat_ngram_size": (None, 0),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "begin_suppress_tokens": (None,),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "guidance_scale": (None, 1),
    "watermarking_config": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0),
    "dola_layers": (None,),
    "stop_strings": (None,),
    "max_time": (None,),
    "token_healing": (None, False),
    "use_mtp": (None, False),
    "is_assistant": (None, False),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "assistant_ensemble_weight": (None,),
    "speculation_type": (None,),
}

_POSITION_FREE = {
    hf.TemperatureLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
}
_BIASES = {hf.SequenceBiasLogitsProcessor, hf.NoBadWordsLogitsProcessor}  # free of position if of single tokens

Processor = Callable[[Any, Tensor], Tensor]


def effective_generation_config(
    model: PreTrainedModel, generation_config: GenerationConfig | None
) -> GenerationConfig:
    """Returns the config `model.generate` would use: unset fields come from the model's own, then from the defaults.

    If nothing sets a length, `max_new_tokens` is transformers' default of 20.
    """
    lengths = [config.max_length for config in (generation_config, model.generation_config) if config is not None]
    # The only call of this private method: there is no public way to see what `generate` fills in.
    effective, _ = model._prepare_generation_config(generation_config)  # pyright: ignore[reportCallIssue]
    if effective.max_new_tokens is None and all(length is None for length in lengths):
        effective.max_new_tokens = effective.max_length
    return effective


def unsupported_parameters(generation_config: GenerationConfig) -> list[str]:
    """Names the parameters set in `generation_config` that the engine cannot honour.

    A field that this module does not know (a newer transformers) counts as unsupported once it leaves its default.
    So do `bad_words_ids` and `sequence_bias` with sequences of several tokens, whose effect depends on the history.
    Attributes that transformers does not declare are not looked at: `generate` does not read them either.
    """
    defaults = GenerationConfig._get_default_generation_params()
    names = []
    for name in {**REFUSED_FIELDS, **vars(GenerationConfig())}:
        if name.startswith("_") or name in HONOURED_FIELDS or name in IRRELEVANT_FIELDS:
            continue
        if getattr(generation_config, name, None) not in REFUSED_FIELDS.get(name, (None, defaults.get(name))):
            names.append(name)
    for name in ("bad_words_ids", "sequence_bias"):
        if any(len(tokens) > 1 for tokens in _sequences(getattr(generation_config, name, None))):
            names.append(name)
    return names


def _sequences(biases: Any) -> list[Any]:
    """The token sequences of `bad_words_ids` (lists) or `sequence_bias` (a dict, or pairs of a list and a bias)."""
    if isinstance(biases, list):
        given = [pair for pair in biases if isinstance(pair, list | tuple) and pair]
        return [pair[0] if isinstance(pair[0], list | tuple) else pair for pair in given]
    return list(biases or ())


@dataclass(frozen=True)
class _Prefixes:
    """Position k of row b has the history `tokens[b, : lengths[b] + k]`, which begins with the row's prompt."""

    tokens: Tensor  # (B, S) int64
    lengths: Tensor  # (B,)
    prompt_lengths: Tensor  # (B,)

    def seen(self, num_positions: int, vocab_size: int) -> Tensor:
        """Returns which tokens each position's history holds, (B, T, V) bool; unknown ids go to a spare column."""
        tokens, lengths = self.tokens.clamp(max=vocab_size), self.lengths[:, None]
        slots = torch.arange(tokens.shape[1], device=tokens.device)
        seen = torch.zeros(tokens.shape[0], vocab_size + 1, dtype=torch.bool, device=tokens.device)
        masks = [seen.scatter_(1, tokens.masked_fill(slots >= lengths, vocab_size), True)]
        for k in range(1, num_positions):
            masks.append(masks[-1].scatter(1, tokens.gather(1, lengths + k - 1), True))
        return torch.stack(masks, dim=1)[..., :vocab_size]


Step = Callable[[Tensor, _Prefixes], Tensor]


@dataclass(frozen=True)
class _Flat:
    processor: Processor

    def __call__(self, scores: Tensor, prefixes: _Prefixes) -> Tensor:
        # No ids: a processor that reads its history must fail here, not read another row's.
        return self.processor(None, scores.flatten(0, 1)).view(scores.shape)


@dataclass(frozen=True)
class _RepetitionPenalty:
    penalty: float

    def __call__(self, scores: Tensor, prefixes: _Prefixes) -> Tensor:
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(prefixes.seen(*scores.shape[1:]), penalised, scores)


@dataclass(frozen=True)
class _NoEosBefore:
    min_length: int
    counts_prompt: bool
    eos_token_ids: Tensor

    def __call__(self, scores: Tensor, prefixes: _Prefixes) -> Tensor:
        length = prefixes.lengths if self.counts_prompt else prefixes.lengths - prefixes.prompt_lengths
        length = length[:, None] + torch.arange(scores.shape[1], device=scores.device)
        is_eos = torch.isin(torch.arange(scores.shape[-1], device=scores.device), self.eos_token_ids)
        return scores.masked_fill((length < self.min_length)[..., None] & is_eos, -torch.inf)


@dataclass(frozen=True)
class _EtaCutoff:
    """As transformers' own, whose entropy waits for the device to validate its arguments."""

    epsilon: Tensor  # ()

    def __call__(self, scores: Tensor, prefixes: _Prefixes) -> Tensor:
        probs = scores.softmax(-1)
        eta = torch.min(self.epsilon, self.epsilon.sqrt() * torch.exp(-_entropy(scores)))[..., None]
        return scores.masked_fill((probs < eta) & (scores < scores.amax(-1, keepdim=True)), -torch.inf)


@dataclass(frozen=True)
class _TopH:
    """As transformers' own, whose entropy waits for the device to validate its arguments."""

    top_h: float
    top_n: int

    def __call__(self, scores: Tensor, prefixes: _Prefixes) -> Tensor:
        top_scores, top_tokens = scores.topk(min(self.top_n, scores.shape[-1]), dim=-1)
        probs = (top_scores - top_scores.logsumexp(-1, keepdim=True)).softmax(-1)
        kept = (-probs * probs.log()).cumsum(-1) <= self.top_h * _entropy(top_scores)[..., None]
        kept[..., 0] = True
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, top_tokens, kept)
        return scores.masked_fill(~mask, -torch.inf)


def _entropy(scores: Tensor) -> Tensor:
    """In the order of `torch.distributions.Categorical`."""
    logprobs = scores - scores.logsumexp(-1, keepdim=True)
    return -(logprobs.clamp(min=torch.finfo(scores.dtype).min) * logprobs.softmax(-1)).sum(-1)


def _steps(model: Any, config: GenerationConfig, device: torch.device) -> list[Step]:
    """What `generate` would apply. Which processors, and in which order, is transformers' to say."""
    # The only call of this private method. What depends on a prompt's length is rewritten here to read each row's own.
    processors = model._get_logits_processor(config, input_ids_seq_length=1, device=str(device))
    return [_step(model, processor) for processor in processors]


def _step(model: Any, processor: Any) -> Step:
    kind = type(processor)
    if kind in _POSITION_FREE or kind in _BIASES:
        return _Flat(processor)
    if kind is hf.EtaLogitsWarper:
        return _EtaCutoff(processor.epsilon)
    if kind is hf.TopHLogitsWarper:
        return _TopH(processor.top_h, processor.top_n)
    if kind is hf.RepetitionPenaltyLogitsProcessor:
        return _RepetitionPenalty(processor.penalty)
    if kind is hf.MinLengthLogitsProcessor:
        return _NoEosBefore(processor.min_length, True, processor.eos_token_id)
    if kind is hf.MinNewTokensLengthLogitsProcessor:
        return _NoEosBefore(processor.min_new_tokens, False, processor.eos_token_id)
    raise ValueError(
        f"{type(model).__name__} adds the logits processor {kind.__name__}, which the engine cannot apply to "
        "several positions at once. Remove what asks for it, or use the model's own generate."
    )


class BatchedLogitsProcessor:
    """What `generate` does to logits before a token is drawn, for many positions at once.

    Rows carry no padding here, so each is processed as `generate` would process it alone. In a padded batch `generate`
    also counts a row's left padding for `min_length` and `max_length`.

    Attributes:
        greedy: Take the argmax of the processed scores; transformers then skips temperature, top-k, top-p and so on.
        temperature: The config's; it is not applied where `greedy`.
        eos_token_ids: Empty if generation ends by length alone.
        is_full_softmax: The processed log-probabilities are `log_softmax(logits / temperature)`.
        signature: Equal for processors that do the same to logits.
    """

    def __init__(
        self, steps: list[Step], greedy: bool, temperature: float, eos_token_ids: tuple[int, ...], signature: str
    ) -> None:
        self._steps = steps
        self.signature = signature
        self.greedy = greedy
        self.temperature = temperature
        self.eos_token_ids = eos_token_ids
        only_temperature = all(
            isinstance(step, _Flat) and isinstance(step.processor, hf.TemperatureLogitsWarper) for step in steps
        )
        self.is_full_softmax = only_temperature and (not greedy or temperature == 1.0)

    @classmethod
    def from_generation_config(
        cls, model: PreTrainedModel, generation_config: GenerationConfig, device: torch.device | str
    ) -> "BatchedLogitsProcessor":
        """Builds the processor of an effective config (see `effective_generation_config`), which is not changed.

        Raises:
            ValueError: The config asks for something that the engine cannot honour exactly, or that is invalid.
        """
        if names := unsupported_parameters(generation_config):
            given = ", ".join(f"{name}={getattr(generation_config, name)!r}" for name in names)
            raise ValueError(
                f"The engine cannot honour {given}. Unset it in the generation config (or in the model's own, which "
                "fills unset fields), or use the model's own generate."
            )
        config = copy.copy(generation_config)
        # The only call of this private method: processors read the EOS tensor that it leaves on the config.
        model._prepare_special_tokens(config, device=torch.device(device))  # pyright: ignore[reportCallIssue]
        if config.min_new_tokens is not None:
            config.min_length = 0  # which it overrides
        eos = config._eos_token_tensor
        eos_token_ids = () if eos is None else tuple(eos.tolist())
        asked = {name: getattr(config, name) for name in sorted(HONOURED_FIELDS - _LENGTHS)}
        return cls(
            _steps(model, config, torch.device(device)),
            greedy=not config.do_sample,
            temperature=1.0 if config.temperature is None else float(config.temperature),
            eos_token_ids=eos_token_ids,
            signature=repr([value.tolist() if isinstance(value, Tensor) else value for value in asked.values()]),
        )

    def process(
        self,
        logits: Tensor,  # (B, T, V)
        tokens: Tensor,  # (B, S) int64
        lengths: Tensor,  # (B,) int64
        prompt_lengths: Tensor,  # (B,) int64
    ) -> Tensor:
        """Returns the processed scores, (B, T, V) fp32; treat them as read-only, for they may be `logits` itself.

        The history of position k of row b is `tokens[b, : lengths[b] + k]`, so provisional tokens must be in `tokens`;
        what lies behind is not read. `logits` is not changed. Host syncs: none, except for `bad_words_ids` and
        `sequence_bias` at their first call.
        """
        scores, prefixes = logits.float(), _Prefixes(tokens, lengths, prompt_lengths)
        for step in self._steps:
            scores = step(scores, prefixes)
        return scores
