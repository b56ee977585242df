"""What `SelfSpecGenerate` can't honour raises with its name: nothing that was asked for is dropped in silence."""

import inspect
from typing import Any

import pytest
import torch
from tiny_models import always_speculating, tiny_model
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TextStreamer,
)
from transformers.generation import MaxLengthCriteria
from trl_runs import make_tokenizer

from trl_selfspec import SelfSpecEngine, SelfSpecGenerate
from trl_selfspec.engine import custom_generate as generation


PAD = 0


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def speculative(llama: PreTrainedModel) -> SelfSpecGenerate:
    return SelfSpecGenerate(always_speculating(llama))


class _Nothing(MaxLengthCriteria):
    def __init__(self) -> None:
        super().__init__(max_length=1_000_000)


REFUSED: dict[str, dict[str, Any]] = {
    "logits_processor": {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(2.0)])},
    "stopping_criteria": {"stopping_criteria": StoppingCriteriaList([_Nothing()])},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda batch_id, ids: [5]},
    "streamer": {"streamer": TextStreamer(make_tokenizer()), "input_ids": torch.tensor([[5, 6]])},
    "negative_prompt_ids": {"negative_prompt_ids": torch.tensor([[5]])},
    "negative_prompt_attention_mask": {"negative_prompt_attention_mask": torch.tensor([[1]])},
    "num_beams": {"num_beams": 2},
    "guidance_scale": {"guidance_scale": 1.5},
    "max_time": {"max_time": 10.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "bad_words_ids": {"bad_words_ids": [[5, 6]]},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 2},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "position_ids": {"position_ids": torch.tensor([[4, 5, 6, 7]]), "input_ids": torch.tensor([[5, 6, 7, 8]])},
    "past_key_values": {"past_key_values": DynamicCache()},
    "max_new_tokens": {"max_new_tokens": 128},
    "stop strings": {"stop_strings": ["a"], "tokenizer": make_tokenizer()},  # refused by transformers, in its words
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:You have set `use_cache`:UserWarning")
def test_what_cannot_be_honoured_raises_with_its_name(
    llama: PreTrainedModel, speculative: SelfSpecGenerate, name: str
) -> None:
    """`generate` drops half of these before it calls us; a result without them would look like one with them."""
    arguments = {"input_ids": torch.tensor([[5, 6], [7, 8]]), "max_new_tokens": 4, "pad_token_id": PAD} | REFUSED[name]
    with pytest.raises(ValueError, match=name):
        llama.generate(**arguments, custom_generate=speculative)


def test_without_the_refusal_nothing_would_be_heard_of_the_argument(
    llama: PreTrainedModel, speculative: SelfSpecGenerate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: transformers itself does not object to what it does not pass on."""
    monkeypatch.setattr(generation, "REFUSED_ARGUMENTS", ())
    arguments: dict[str, Any] = {"max_new_tokens": 4, "pad_token_id": PAD, "custom_generate": speculative}
    ids = torch.tensor([[5, 6]])
    assert torch.equal(
        llama.generate(ids, **arguments, **REFUSED["stopping_criteria"]), llama.generate(ids, **arguments)
    )
    llama.generate(**arguments, **REFUSED["streamer"])


def test_an_assistant_is_refused(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="assistant_model"):
        llama.generate(
            ids, max_new_tokens=4, pad_token_id=PAD, assistant_model=tiny_model(seed=1), custom_generate=speculative
        )


def test_embeddings_are_refused(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    embeddings = torch.zeros(1, 2, llama.config.hidden_size)
    with pytest.raises(ValueError, match="inputs_embeds"):
        llama.generate(inputs_embeds=embeddings, max_new_tokens=4, pad_token_id=PAD, custom_generate=speculative)


@pytest.mark.parametrize("mask", [[[1, 1, 0], [1, 1, 1]], [[1, 0, 1], [1, 1, 1]]], ids=["right", "hole"])
def test_only_left_padding_is_taken(
    llama: PreTrainedModel, speculative: SelfSpecGenerate, mask: list[list[int]]
) -> None:
    """Tokens that are dropped from inside a prompt leave another prompt."""
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with pytest.raises(ValueError, match="padding_side='left'"):
        llama.generate(
            ids, attention_mask=torch.tensor(mask), max_new_tokens=4, pad_token_id=PAD, custom_generate=speculative
        )


def test_a_prompt_of_padding_alone_is_refused(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    mask = torch.tensor([[1, 1], [0, 0]])
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        llama.generate(
            torch.full((2, 2), 5), attention_mask=mask, max_new_tokens=4, pad_token_id=PAD, custom_generate=speculative
        )


def test_the_limit_of_the_context_is_reached_but_not_passed(
    llama: PreTrainedModel, speculative: SelfSpecGenerate
) -> None:
    """The engine ends rows at the context, plain `generate` goes on: short output would be silent."""
    ids = torch.tensor([[5, 6, 7]])
    output = llama.generate(ids, max_new_tokens=125, pad_token_id=PAD, custom_generate=speculative)
    assert torch.equal(output, llama.generate(ids, max_new_tokens=125, pad_token_id=PAD))
    with pytest.raises(ValueError, match="use at most 125"):
        llama.generate(ids, max_new_tokens=126, pad_token_id=PAD, custom_generate=speculative)


def test_another_model_is_refused(speculative: SelfSpecGenerate) -> None:
    """The engine would answer with its own model's tokens."""
    with pytest.raises(ValueError, match="one per model"):
        tiny_model("llama", seed=1).generate(torch.tensor([[5]]), max_new_tokens=2, custom_generate=speculative)


def test_an_autocast_that_the_engine_does_not_follow_is_refused(
    llama: PreTrainedModel, speculative: SelfSpecGenerate
) -> None:
    """Plain `generate` would compute in bf16 there."""
    ids = torch.tensor([[5, 6]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ValueError, match=r"autocast_dtype=torch\.bfloat16"):
            llama.generate(ids, max_new_tokens=2, pad_token_id=PAD, custom_generate=speculative)
        engine = SelfSpecEngine(llama, autocast_dtype=torch.bfloat16)
        llama.generate(ids, max_new_tokens=2, pad_token_id=PAD, custom_generate=SelfSpecGenerate(engine))


def test_a_direct_call_is_refused(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    """Without `generate` nobody prepared the config, and nobody can tell what was asked for."""
    with pytest.raises(ValueError, match=r"model\.generate"):
        speculative(llama, torch.tensor([[5]]), [], [], llama.generation_config)


def test_every_argument_of_generate_is_accounted_for() -> None:
    """An argument that a newer transformers adds would be dropped in silence."""
    honoured = {"self", "inputs", "generation_config", "custom_generate", "kwargs"}
    nothing_to_do = {"synced_gpus"}  # decoding is not collective
    parameters = set(inspect.signature(GenerationMixin.generate).parameters)
    assert parameters == honoured | nothing_to_do | set(generation.REFUSED_ARGUMENTS)
