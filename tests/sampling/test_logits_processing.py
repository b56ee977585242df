"""Logits are processed as by `generate`, position by position.

The oracle is transformers itself: `generate` is run on each row alone with a `custom_generate` that hands back the
processors it prepared, and these are called on every position's own history.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    TopHLogitsWarper,
)

from trl_selfspec.sampling import logits_processing
from trl_selfspec.sampling.logits_processing import (
    BatchedLogitsProcessor,
    effective_generation_config,
    unsupported_parameters,
)


VOCAB_SIZE = 12
NUM_POSITIONS = 4
PROMPT_LENGTHS = [1, 1, 2, 3, 3, 4, 5, 6]
LENGTHS = [1, 3, 2, 3, 5, 4, 8, 9]

POSITION_FREE: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"top_h": 0.4},
    {"typical_p": 0.5},
    {"epsilon_cutoff": 0.05},
    {"eta_cutoff": 0.3},
    {"suppress_tokens": [1, 5]},
    {"bad_words_ids": [[4], [7]]},
    {"sequence_bias": [[[4], 2.0], [[7], -3.0]]},
    {"remove_invalid_values": True},
    {"renormalize_logits": True},
]
READS_HISTORY: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.6},
    {"min_length": 7},
    {"min_new_tokens": 3},
    {"min_new_tokens": 3, "min_length": 9},
]
OVERRIDDEN: list[dict[str, Any]] = [{"min_new_tokens": 0, "min_length": 9}]
ALL = POSITION_FREE + READS_HISTORY
# fmt: off
COMBINATIONS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
    {"temperature": 1.3, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2, "min_new_tokens": 2},
    {"temperature": 0.9, "top_h": 0.7, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.02},
    {
        "sequence_bias": [[[3], 2.0]], "repetition_penalty": 1.2, "bad_words_ids": [[8]], "min_length": 5,
        "max_length": 11, "suppress_tokens": [9], "temperature": 0.8, "top_k": 8, "renormalize_logits": True,
    },
]
REFUSED: list[dict[str, Any]] = [
    {"num_beams": 2}, {"num_return_sequences": 2}, {"guidance_scale": 1.5}, {"watermarking_config": {"bias": 2.0}},
    {"constraints": ["x"]}, {"force_words_ids": [[1]]}, {"penalty_alpha": 0.6}, {"dola_layers": "low"},
    {"stop_strings": ["\n"]}, {"max_time": 3.0}, {"token_healing": True}, {"use_mtp": True}, {"is_assistant": True},
    {"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"assistant_ensemble_weight": 0.5},
    {"speculation_type": "dflash"}, {"no_repeat_ngram_size": 2}, {"encoder_no_repeat_ngram_size": 2},
    {"encoder_repetition_penalty": 1.8}, {"exponential_decay_length_penalty": (1, 1.5)}, {"forced_bos_token_id": 6},
    {"forced_eos_token_id": [2, 5]}, {"begin_suppress_tokens": [0, 3]},
]
OF_SEVERAL_TOKENS: list[dict[str, Any]] = [
    {"bad_words_ids": [[4], [5, 6]]}, {"sequence_bias": [[[3], 1.0], [[3, 4], 2.0]]}, {"sequence_bias": {(3, 4): 2.0}},
]
# fmt: on


def name_of(parameters: dict[str, Any]) -> str:
    return "+".join(parameters) or "none" if len(parameters) < 8 else "many"


@pytest.fixture
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    words = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **words, num_key_value_heads=1)).eval()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ragged rows: logits, tokens, lengths, prompt_lengths. Some rows are at their prompt's end, some behind it."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(len(LENGTHS), NUM_POSITIONS, VOCAB_SIZE, generator=generator)
    tokens = torch.randint(VOCAB_SIZE, (len(LENGTHS), 16), generator=generator)
    return logits, tokens, torch.tensor(LENGTHS), torch.tensor(PROMPT_LENGTHS)


def sampling_config(**parameters: Any) -> GenerationConfig:
    """An explicit neutral top_k, for an unset one means 50; a length, for `generate` warns without."""
    length = {} if "max_length" in parameters else {"max_new_tokens": 9}
    return GenerationConfig(**{"do_sample": True, "top_k": 0, "eos_token_id": [2, 5], **length, **parameters})


def build(model: Qwen2ForCausalLM, config: GenerationConfig) -> BatchedLogitsProcessor:
    return BatchedLogitsProcessor.from_generation_config(model, effective_generation_config(model, config), "cpu")


def prepared_processors(model: Qwen2ForCausalLM, config: GenerationConfig, prompt: Tensor) -> LogitsProcessorList:
    def hand_back(model: Any, input_ids: Tensor, logits_processor: Any, **kwargs: Any) -> LogitsProcessorList:
        return logits_processor

    mask = torch.ones_like(prompt)[None]
    return model.generate(prompt[None], generation_config=config, custom_generate=hand_back, attention_mask=mask)


def oracle(
    model: Qwen2ForCausalLM, config: GenerationConfig, batch: tuple[Tensor, ...], history_shift: int = 0
) -> Tensor:
    logits, tokens, lengths, prompt_lengths = batch
    processed = torch.empty(logits.shape)
    for b in range(logits.shape[0]):
        processors = prepared_processors(model, config, tokens[b, : prompt_lengths[b]])
        for k in range(logits.shape[1]):
            history = tokens[b, : lengths[b] + k + history_shift]
            processed[b, k] = processors(history[None], logits[b, k, None].to(torch.float32, copy=True))[0]
    return processed


@pytest.mark.parametrize("do_sample", [True, False], ids=["sample", "greedy"])
@pytest.mark.parametrize("parameters", ALL + OVERRIDDEN + COMBINATIONS, ids=name_of)
def test_every_position_is_processed_as_generate_would(model, batch, parameters, do_sample):
    """Prevents a law that differs from what users know: an omitted, reordered or misread processor."""
    config = sampling_config(**parameters, do_sample=do_sample)
    processor = build(model, config)
    assert processor.greedy is not do_sample
    assert torch.equal(processor.process(*batch), oracle(model, config, batch))


@pytest.mark.parametrize("parameters", READS_HISTORY, ids=name_of)
def test_a_history_off_by_one_is_noticed(model, batch, parameters):
    """Negative control: were histories shifted by one position, the comparison above would fail."""
    config = sampling_config(**parameters)
    assert not torch.equal(build(model, config).process(*batch), oracle(model, config, batch, history_shift=1))


@pytest.mark.parametrize("parameters", [{"min_new_tokens": 3}, {"min_new_tokens": 3, "min_length": 9}], ids=name_of)
def test_a_prompt_length_off_by_one_is_noticed(model, batch, parameters):
    """Negative control for what depends on where the prompt ends."""
    config = sampling_config(**parameters)
    shifted = (*batch[:3], (batch[3] - 1).clamp(min=1))
    assert not torch.equal(build(model, config).process(*batch), oracle(model, config, shifted))


@pytest.mark.parametrize("parameters", [p for p in POSITION_FREE if p], ids=name_of)
def test_every_parameter_is_felt(model, batch, parameters):
    """Negative control: parameters that change nothing here would prove nothing."""
    batch[0][0, 0, 0] = -torch.inf  # felt by remove_invalid_values
    processed = build(model, sampling_config(**parameters)).process(*batch)
    assert not torch.equal(processed, build(model, sampling_config()).process(*batch))


@pytest.mark.parametrize("parameters", READS_HISTORY + COMBINATIONS, ids=name_of)
def test_rows_and_positions_do_not_see_each_other(model, batch, parameters):
    """Prevents a draft's T=1 call from following another law than the verification of the whole block."""
    processor = build(model, sampling_config(**parameters))
    logits, tokens, lengths, prompt_lengths = batch
    whole = processor.process(*batch)
    for b in range(logits.shape[0]):
        row = slice(b, b + 1)
        for k in range(NUM_POSITIONS):
            alone = processor.process(logits[row, k : k + 1], tokens[row], lengths[row] + k, prompt_lengths[row])
            assert torch.equal(alone[0, 0], whole[b, k])


@pytest.mark.parametrize("parameters", READS_HISTORY + COMBINATIONS, ids=name_of)
def test_what_lies_behind_a_history_is_not_read(model, batch, parameters):
    """Prevents rejected drafts and uninitialised slots from leaking into the processor."""
    processor = build(model, sampling_config(**parameters))
    logits, tokens, lengths, prompt_lengths = batch
    expected = processor.process(*batch)
    behind = torch.arange(tokens.shape[1]) >= lengths[:, None] + NUM_POSITIONS - 1
    tokens = torch.where(behind, torch.tensor([-1, 10**9])[torch.arange(tokens.shape[1]) % 2], tokens)
    assert torch.equal(processor.process(logits, tokens, lengths, prompt_lengths), expected)


@pytest.mark.parametrize("parameters", ALL, ids=name_of)
def test_the_callers_logits_and_config_are_left_alone(model, batch, parameters):
    """Prevents the policy's log-probabilities, taken from the same logits, from being of processed scores."""
    config = effective_generation_config(model, sampling_config(**parameters))
    before, fields = batch[0].clone(), dict(vars(config))
    BatchedLogitsProcessor.from_generation_config(model, config, "cpu").process(*batch)
    assert torch.equal(batch[0], before)
    assert vars(config) == fields


def test_ids_outside_the_vocabulary_are_not_penalised(model, batch):
    """Prevents an index error where the embedding holds more words than the head."""
    logits, tokens, lengths, prompt_lengths = batch
    processor = build(model, sampling_config(repetition_penalty=1.7))
    expected = processor.process(*batch)
    expected[..., 3] = logits[..., 3]
    tokens = torch.where(tokens == 3, VOCAB_SIZE + 2, tokens)
    assert torch.equal(processor.process(logits, tokens, lengths, prompt_lengths), expected)


def test_low_precision_logits_are_processed_in_float32(model, batch):
    """Prevents top-p from cutting elsewhere than generate does, which raises logits to float32 first."""
    config = sampling_config(temperature=0.7, top_p=0.9)
    low = (batch[0].bfloat16(), *batch[1:])
    processed = build(model, config).process(*low)
    assert processed.dtype == torch.float32
    assert torch.equal(processed, oracle(model, config, low))


def test_temperature_one_costs_nothing(model, batch):
    """Prevents a copy of (B, T, V) per forward in the most common configuration."""
    assert build(model, sampling_config(temperature=1.0)).process(*batch) is batch[0]


@pytest.mark.parametrize("parameters", ALL + COMBINATIONS, ids=name_of)
def test_nothing_waits_for_the_device(model, batch, parameters):
    """Prevents a host sync per draft step, which fails the capture: reading a value of a fake tensor raises."""
    processor = build(model, sampling_config(**parameters))
    processor.process(*batch)  # `sequence_bias` and `bad_words_ids` are prepared on the host in their first call
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        processor.process(*map(mode.from_tensor, batch))


def test_waiting_for_the_device_is_noticed(monkeypatch, batch):
    """Negative control: transformers' own top-h validates its distribution on the host (dynamo turns it off)."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, pytest.raises(DataDependentOutputException):
        TopHLogitsWarper(0.5)(None, mode.from_tensor(batch[0][:, 0]))  # type: ignore[arg-type]


def test_full_softmax_means_that_only_temperature_applies(model, batch):
    """Prevents the engine from reusing processed log-probabilities as the policy's where they differ."""
    for temperature in (1.0, 0.7):
        processor = build(model, sampling_config(temperature=temperature))
        assert processor.is_full_softmax
        assert processor.temperature == temperature
        expected = (batch[0] / temperature).log_softmax(-1)
        torch.testing.assert_close(processor.process(*batch).log_softmax(-1), expected)
    for parameters in ALL[2:]:
        assert not build(model, sampling_config(**parameters)).is_full_softmax
    assert build(model, sampling_config(do_sample=False)).is_full_softmax
    assert not build(model, sampling_config(do_sample=False, temperature=0.7)).is_full_softmax


def test_the_models_own_config_fills_unset_fields(model, batch):
    """Prevents a law without the top_k and repetition_penalty that checkpoints ship and generate applies."""
    config = GenerationConfig(do_sample=True, max_new_tokens=4)
    assert effective_generation_config(model, config).top_k == 50
    default = build(model, config).process(*batch)
    model.generation_config.update(top_k=3, repetition_penalty=1.5, eos_token_id=[2, 7])
    processor = build(model, config)
    assert torch.equal(processor.process(*batch), oracle(model, config, batch))
    assert not torch.equal(processor.process(*batch), default)
    assert processor.eos_token_ids == (2, 7)


def test_a_length_set_by_nobody_is_twenty_new_tokens(model):
    """Prevents the default of 20 from counting the prompt, or from overriding a max_length that somebody set."""
    assert effective_generation_config(model, None).max_new_tokens == 20
    assert effective_generation_config(model, GenerationConfig(max_length=9)).max_new_tokens is None
    assert effective_generation_config(model, GenerationConfig(max_new_tokens=4)).max_new_tokens == 4
    model.generation_config.max_length = 9
    assert effective_generation_config(model, None).max_new_tokens is None


@pytest.mark.parametrize(("given", "expected"), [(None, ()), (2, (2,)), ([2, 5], (2, 5))])
def test_eos_token_ids_are_a_tuple(model, given, expected):
    """Prevents a missing or single EOS from needing special cases elsewhere."""
    model.generation_config.eos_token_id = None
    assert build(model, sampling_config(eos_token_id=given)).eos_token_ids == expected


@pytest.mark.parametrize("parameters", REFUSED + OF_SEVERAL_TOKENS, ids=name_of)
def test_what_cannot_be_honoured_is_refused_by_name(model, parameters):
    """Prevents a parameter from being dropped without a word."""
    config = sampling_config(**parameters)
    assert unsupported_parameters(config) == list(parameters)
    with pytest.raises(ValueError, match=next(iter(parameters))):
        build(model, config)


def test_neutral_values_are_accepted(model):
    """Negative control: refusing everything would pass the test above."""
    neutral = {name: values[-1] for name, values in logits_processing.REFUSED_FIELDS.items()}
    assert unsupported_parameters(effective_generation_config(model, GenerationConfig(**neutral))) == []


def test_every_field_of_generation_config_is_decided_once():
    """Prevents a field of a newer transformers from being ignored: it must be put on one of the three lists."""
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    lists = [
        set(logits_processing.HONOURED_FIELDS),
        set(logits_processing.REFUSED_FIELDS),
        set(logits_processing.IRRELEVANT_FIELDS),
    ]
    assert fields <= set().union(*lists)
    assert sum(map(len, lists)) == len(set().union(*lists))
    assert {next(iter(parameters)) for parameters in REFUSED} == set(logits_processing.REFUSED_FIELDS)
    tested = {name for p in ALL for name in p}
    untested = {"do_sample", "eos_token_id", "max_length", "max_new_tokens"}  # here, and of no concern to logits
    assert tested | untested == logits_processing.HONOURED_FIELDS


def test_a_field_from_the_future_is_refused_once_set(model, monkeypatch):
    """Prevents silence about parameters that did not exist when this was written; its default is accepted."""

    class FutureConfig(GenerationConfig):
        def __init__(self, **kwargs: Any):
            self.new_warper = kwargs.pop("new_warper", None)
            super().__init__(**kwargs)

        @staticmethod
        def _get_default_generation_params() -> dict[str, Any]:
            return {**GenerationConfig._get_default_generation_params(), "new_warper": 1.0}

    monkeypatch.setattr(logits_processing, "GenerationConfig", FutureConfig)
    assert unsupported_parameters(FutureConfig(new_warper=0.5)) == ["new_warper"]
    assert unsupported_parameters(FutureConfig(new_warper=1.0)) == []
    assert unsupported_parameters(FutureConfig()) == []


@pytest.mark.parametrize("parameters", [p for p in ALL if p], ids=name_of)
def test_signatures_tell_processors_apart(model, parameters):
    """Prevents a replay of rounds that were captured with other parameters; lengths change no logits."""
    signature = build(model, sampling_config(**parameters)).signature
    assert signature == build(model, sampling_config(**parameters)).signature
    assert signature != build(model, sampling_config()).signature
    longer = {"max_length": 90} if "max_length" in parameters else {"max_new_tokens": 90}
    assert signature == build(model, sampling_config(**parameters | longer)).signature


def test_a_processor_the_engine_does_not_know_is_refused(model):
    """Prevents a model class with a processor of its own from being sampled without it."""

    class HouseProcessor(LogitsProcessor):
        pass

    class HouseModel(Qwen2ForCausalLM):
        def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
            return LogitsProcessorList([*super()._get_logits_processor(*args, **kwargs), HouseProcessor()])

    with pytest.raises(ValueError, match=r"HouseModel.*HouseProcessor"):
        build(HouseModel(model.config), sampling_config())


@pytest.mark.parametrize(
    "parameters",
    [{"temperature": 0.0}, {"top_k": -1}, {"bad_words_ids": [3]}],
    ids=name_of,
)
def test_invalid_values_are_refused_when_the_processor_is_built(model, parameters):
    """Prevents a rollout that fails half-way, or samples at temperature zero."""
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=next(iter(parameters))):
        build(model, sampling_config(**parameters))
