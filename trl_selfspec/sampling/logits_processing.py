"""The sampling law: from raw logits to the scores that a token is drawn from.

`BatchedLogitsProcessor` applies what `generate` would apply for a generation config, to (B, T) positions at once, each
with its own history, so that draft and target are processed identically. The processors are transformers' own
objects in transformers' order; only those that would be needlessly slow position by position are vectorised here.
What cannot be honoured exactly is refused by name; nothing is dropped. Drawing tokens and stopping belong elsewhere.
"""

import copy
import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import logits_process as hf


# fmt: off
HONOURED_FIELDS = frozenset({
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "exponential_decay_length_penalty",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "renormalize_logits", "eos_token_id",
    "min_length", "min_new_tokens", "max_length", "max_new_tokens",
})
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
    hf.TopHLogitsWarper,
    hf.TopKLogitsWarper,
    hf.TopPLogitsWarper,
    hf.MinPLogitsWarper,
    hf.TypicalLogitsWarper,
    hf.EpsilonLogitsWarper,
    hf.EtaLogitsWarper,
    hf.SuppressTokensLogitsProcessor,
    hf.InfNanRemoveLogitsProcessor,
    hf.LogitNormalization,
}
_READS_PREFIX = {hf.NoRepeatNGramLogitsProcessor, hf.ForcedBOSTokenLogitsProcessor}
_READS_PREFIX_IF_LONG = {hf.SequenceBiasLogitsProcessor, hf.NoBadWordsLogitsProcessor}
_READS_PREFIX_AND_PROMPT = {
    hf.EncoderRepetitionPenaltyLogitsProcessor,
    hf.EncoderNoRepeatNGramLogitsProcessor,
    hf.ForcedEOSTokenLogitsProcessor,
    hf.ExponentialDecayLengthPenalty,
    hf.SuppressTokensAtBeginLogitsProcessor,
}

_SYNCS = {hf.TopHLogitsWarper, hf.EtaLogitsWarper}

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
    Attributes that transformers does not declare are not looked at: `generate` does not read them either.
    """
    defaults = GenerationConfig._get_default_generation_params()
    names = []
    for name in {**REFUSED_FIELDS, **vars(GenerationConfig())}:
        if name.startswith("_") or name in HONOURED_FIELDS or name in IRRELEVANT_FIELDS:
            continue
        if getattr(generation_config, name, None) not in REFUSED_FIELDS.get(name, (None, defaults.get(name))):
            names.append(name)
    return names


@dataclass(frozen=True)
class _Prefixes:
    """Position k of row b has the history `tokens[b, : lengths[b] + k]`, which begins with the row's prompt."""

    tokens: Tensor  # (B, S) int64
    lengths: Tensor  # (B,)
    prompt_lengths: Tensor  # (B,)

    def seen(self, num_positions: int, vocab_size: int) -> Tensor:
        """Returns which words each position's history holds, (B, T, V) bool; unknown ids go to a spare column."""
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
class _RowByRow:
    """Calls transformers' processor once per position: slow (host syncs), exact."""

    processor_for: Callable[[Tensor], Processor]  # of a prompt, (P,)

    def __call__(self, scores: Tensor, prefixes: _Prefixes) -> Tensor:
        processed = scores.clone()
        lengths, prompt_lengths = prefixes.lengths.tolist(), prefixes.prompt_lengths.tolist()
        for b, row in enumerate(prefixes.tokens):
            processor = self.processor_for(row[: prompt_lengths[b]])
            for k in range(scores.shape[1]):
                processed[b, k] = processor(row[None, : lengths[b] + k], scores[b, k, None])[0]
        return processed


class _Factory:
    """Builds transformers' processor list as `generate` would for a batch that holds this one prompt."""

    def __init__(self, model: PreTrainedModel, generation_config: GenerationConfig, device: torch.device):
        self.model: Any = model
        self.device = device
        self.config = copy.copy(generation_config)
        # The only call of this private method: processors read the EOS tensor that it leaves on the config.
        self.model._prepare_special_tokens(self.config, device=device)
        self._cache: dict[tuple[int, tuple[int, ...]], Processor] = {}

    def build(self, prompt: tuple[int, ...]) -> hf.LogitsProcessorList:
        config = copy.copy(self.config)
        if config.max_new_tokens is not None:
            config.max_length = len(prompt) + config.max_new_tokens
        if config.min_new_tokens is not None:
            config.min_length = len(prompt) + config.min_new_tokens
        # The only call of this private method: which processors apply, and in which order, is transformers' to say.
        return self.model._get_logits_processor(
            config,
            input_ids_seq_length=len(prompt),
            encoder_input_ids=torch.tensor([prompt], device=self.device),
            device=str(self.device),
        )

    def cached(self, index: int, prompt: Tensor) -> Processor:
        key = index, tuple(prompt.tolist())
        if key not in self._cache:
            self._cache[key] = self.build(key[1])[index]
        return self._cache[key]

    def steps(self) -> list[Step]:
        steps = (self._step(index, processor) for index, processor in enumerate(self.build((0,))))
        return [step for step in steps if step is not None]

    def _step(self, index: int, processor: Any) -> Step | None:
        kind = type(processor)
        if kind in _POSITION_FREE:
            return _Flat(processor)
        if kind is hf.RepetitionPenaltyLogitsProcessor:
            return _RepetitionPenalty(processor.penalty)
        if kind is hf.MinLengthLogitsProcessor:
            # `min_new_tokens` overrides `min_length`, and has a processor of its own.
            overridden = self.config.min_new_tokens is not None
            return None if overridden else _NoEosBefore(processor.min_length, True, processor.eos_token_id)
        if kind is hf.MinNewTokensLengthLogitsProcessor:
            return _NoEosBefore(processor.min_new_tokens, False, processor.eos_token_id)
        if kind in _READS_PREFIX_IF_LONG and all(len(words) == 1 for words in processor.sequence_bias):
            return _Flat(processor)
        if kind in _READS_PREFIX | _READS_PREFIX_IF_LONG:
            return _RowByRow(lambda prompt: processor)
        if kind in _READS_PREFIX_AND_PROMPT:
            return _RowByRow(lambda prompt: self.cached(index, prompt))
        raise ValueError(
            f"{type(self.model).__name__} adds the logits processor {kind.__name__}, which the engine cannot apply to "
            "several positions at once. Remove what asks for it, or use the model's own generate."
        )


def _value(thing: Any) -> Hashable:
    """What a processor consists of, to be compared."""
    if isinstance(thing, Tensor):
        return tuple(thing.shape), tuple(thing.flatten().tolist())
    if isinstance(thing, dict):
        return tuple((key, _value(value)) for key, value in thing.items())
    if isinstance(thing, list | tuple):
        return tuple(map(_value, thing))
    if hasattr(thing, "__dict__"):
        return type(thing), _value(vars(thing))
    return thing


class BatchedLogitsProcessor:
    """What `generate` does to logits before a token is drawn, for many positions at once.

    Rows carry no padding here, so each is processed as `generate` would process it alone. In a padded batch `generate`
    also counts a row's left padding for `min_length`, `max_length` and `forced_bos_token_id`, and reads it for
    `no_repeat_ngram_size` and the two `encoder_` parameters.

    Attributes:
        greedy: Take the argmax of the processed scores; transformers then skips temperature, top-k, top-p and so on.
        temperature: The config's; a greedy law does not apply it.
        eos_token_ids: Empty if generation ends by length alone.
        is_full_softmax: The processed log-probabilities are `log_softmax(logits / temperature)`.
    """

    def __init__(self, steps: list[Step], greedy: bool, temperature: float, eos_token_ids: tuple[int, ...]):
        self._steps = steps
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
        """Builds the law of an effective config (see `effective_generation_config`), which is not changed.

        Raises:
            ValueError: The config asks for something that the engine cannot honour exactly, or that is invalid.
        """
        if names := unsupported_parameters(generation_config):
            given = ", ".join(f"{name}={getattr(generation_config, name)!r}" for name in names)
            raise ValueError(
                f"The engine cannot honour {given}. Unset it in the generation config (or in the model's own, which "
                "fills unset fields), or use the model's own generate."
            )
        if generation_config.exponential_decay_length_penalty is not None and generation_config.eos_token_id is None:
            raise ValueError("exponential_decay_length_penalty needs an eos_token_id, which is not set. Set it.")
        factory = _Factory(model, generation_config, torch.device(device))
        eos = factory.config._eos_token_tensor
        return cls(
            factory.steps(),
            greedy=not generation_config.do_sample,
            temperature=1.0 if generation_config.temperature is None else float(generation_config.temperature),
            eos_token_ids=() if eos is None else tuple(eos.tolist()),
        )

    @property
    def needs_host(self) -> bool:
        """Whether `process` waits for the device: see there."""
        return any(
            isinstance(step, _RowByRow) or (isinstance(step, _Flat) and type(step.processor) in _SYNCS)
            for step in self._steps
        )

    @functools.cached_property
    def signature(self) -> Hashable:
        """Equal for laws that do the same to logits; for laws that don't need the host."""
        return self.greedy, self.temperature, self.eos_token_ids, _value(self._steps)

    def process(
        self,
        logits: Tensor,  # (B, T, V)
        tokens: Tensor,  # (B, S) int64
        lengths: Tensor,  # (B,) int64
        prompt_lengths: Tensor,  # (B,) int64
    ) -> Tensor:
        """Returns the processed scores, (B, T, V) fp32; treat them as read-only, for they may be `logits` itself.

        The history of position k of row b is `tokens[b, : lengths[b] + k]`, so provisional tokens must be in `tokens`;
        what lies behind is not read. `logits` is not changed. Host syncs: none, except for `top_h`, `eta_cutoff` and
        what is applied position by position: n-grams, biases of several words, forced tokens, suppression at the
        begin, exponential decay and the `encoder_` parameters.
        """
        scores, prefixes = logits.float(), _Prefixes(tokens, lengths, prompt_lengths)
        for step in self._steps:
            scores = step(scores, prefixes)
        return scores
