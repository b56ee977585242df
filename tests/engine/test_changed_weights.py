"""Every way in which a policy's weights change is followed, or the engine says that they changed."""

import copy
from collections.abc import Callable

import pytest
import torch
from tiny_models import ragged_prompts, scale_weights, tiny_model
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec import SelfSpecEngine, SelfSpecGenerate, SelfSpecOptions


PROMPTS = ragged_prompts([3, 9, 5, 14])
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False)
OPTIONS = SelfSpecOptions(num_speculative_tokens=3, max_active_sequences=64)
Change = Callable[[PreTrainedModel], object]


def other_weights(model: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(model)
    scale_weights(other, seed=9)
    return other


def in_place(model: PreTrainedModel) -> None:
    scale_weights(model, seed=9)


def through_data(model: PreTrainedModel) -> None:
    for parameter, new in zip(model.parameters(), other_weights(model).parameters(), strict=True):
        parameter.data.copy_(new.data)


def data_replaced(model: PreTrainedModel) -> None:
    for parameter, new in zip(model.parameters(), other_weights(model).parameters(), strict=True):
        parameter.data = new.data


def one_matrix_through_data(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.1.mlp.down_proj").weight.data.mul_(-1.0)  # type: ignore[operator]


def loaded(model: PreTrainedModel) -> None:
    model.load_state_dict(other_weights(model).state_dict())


def resized(model: PreTrainedModel) -> None:
    model.resize_token_embeddings(104, mean_resizing=False)
    scale_weights(model, seed=9)


def transposed_in_memory(model: PreTrainedModel) -> None:
    in_place(model)
    weight = model.get_submodule("model.layers.0.mlp.down_proj").weight
    weight.data = weight.data.t().contiguous().t()  # type: ignore[operator]


CHANGES = [in_place, through_data, data_replaced, one_matrix_through_data, loaded, resized, transposed_in_memory]


def plain(model: PreTrainedModel) -> list[list[int]]:
    rows = [model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0] for prompt in PROMPTS]  # type: ignore[operator]
    return [row[len(prompt) :].tolist() for row, prompt in zip(rows, PROMPTS, strict=True)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_and_followed(change: Change) -> None:
    """Prevents samples from old weights: writes through `.data` move no version counter."""
    model = tiny_model("llama")
    engine = SelfSpecEngine(model, OPTIONS)
    before = engine.generate(PROMPTS, GREEDY, seed=0).completion_ids
    change(model)
    assert engine.stale
    with pytest.raises(RuntimeError, match=r"engine\.refresh\(\)"):
        engine.generate(PROMPTS, GREEDY, seed=0)
    engine.refresh()
    assert not engine.stale
    output = engine.generate(PROMPTS, GREEDY, seed=0)
    assert output.completion_ids == plain(model) != before
    assert output.stats.num_draft_tokens > 0


def test_nothing_is_stale_by_itself() -> None:
    """The control: a check that always says so would requantize before every rollout."""
    model = tiny_model("llama")
    engine = SelfSpecEngine(model, OPTIONS)
    model(torch.tensor([PROMPTS[1]])).logits.sum().backward()
    engine.generate(PROMPTS, GREEDY, seed=0)
    assert not engine.stale


@pytest.mark.parametrize("change", CHANGES)
def test_generate_with_the_engine_follows_by_itself(change: Change) -> None:
    """`SelfSpecGenerate` gave tokens of the old weights."""
    model = tiny_model("llama")
    speculative = SelfSpecGenerate(SelfSpecEngine(model, OPTIONS))
    ids = torch.tensor([PROMPTS[1]])
    model.generate(ids, generation_config=GREEDY, custom_generate=speculative)  # type: ignore[operator]
    change(model)
    theirs = model.generate(ids, generation_config=GREEDY)  # type: ignore[operator]
    assert torch.equal(model.generate(ids, generation_config=GREEDY, custom_generate=speculative), theirs)  # type: ignore[operator]


@pytest.mark.parametrize("change", [through_data, one_matrix_through_data])
def test_copies_are_renewed_whatever_the_counters_say(change: Change, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the target's weights are copies; an EMA swapped in and out poisoned the next training rollout."""
    model = tiny_model("llama")
    engine = SelfSpecEngine(model, OPTIONS, autocast_dtype=torch.bfloat16)
    monkeypatch.setattr("trl_selfspec.policy.replica.fingerprint", lambda policy: 0)  # a write that no sample sees
    change(model)
    engine.refresh()
    expected = SelfSpecEngine(model, OPTIONS, autocast_dtype=torch.bfloat16).generate(PROMPTS, GREEDY, seed=0)
    assert engine.generate(PROMPTS, GREEDY, seed=0).logprobs == expected.logprobs


def test_a_model_that_changed_its_dtype_is_followed() -> None:
    """Addresses, shapes and kernels all depend on it."""
    model = tiny_model("llama")
    engine = SelfSpecEngine(model, OPTIONS)
    engine.generate(PROMPTS, GREEDY, seed=0)
    model.to(torch.bfloat16)
    engine.refresh()
    expected = SelfSpecEngine(model, OPTIONS).generate(PROMPTS, GREEDY, seed=0)
    assert engine.generate(PROMPTS, GREEDY, seed=0).completion_ids == expected.completion_ids
