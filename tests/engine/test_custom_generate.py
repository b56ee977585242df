"""`model.generate(..., custom_generate=SelfSpecGenerate(engine))` returns what plain `generate` does, or raises."""

import doctest
import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from laws import chi_square, joint_counts, joint_law
from peft import LoraConfig, get_peft_model
from tiny_models import (
    FAMILIES,
    always_speculating,
    force_page_size,
    left_padded,
    ragged_prompts,
    scale_weights,
    tiny_model,
)
from torch import Tensor
from transformers import (
    PreTrainedModel,
)
from transformers.generation import GenerateDecoderOnlyOutput
from trl_runs import make_model, make_tokenizer

from trl_selfspec import SelfSpecGenerate, SelfSpecOptions
from trl_selfspec.engine import custom_generate as generation


PAD = 0
PROMPTS = ragged_prompts([1, 9, 5, 20, 2, 14])
EOS = list(range(20, 32))  # so many that rows end at different times
FALSE_ALARM = 1e-4
TYPICAL = ("llama", "gemma3_text", "gpt_neox", "qwen3_moe")  # test_greedy_identity.py has all of them, unpadded


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def speculative(llama: PreTrainedModel) -> SelfSpecGenerate:
    return SelfSpecGenerate(always_speculating(llama))


@pytest.mark.parametrize(
    "family", [name if name in TYPICAL else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_greedy_equals_plain_generate_padding_included(family: str) -> None:
    """Callers index the result by the prompt's width and trust what stands behind a row's EOS token."""
    overrides = {"attn_temperature_tuning": False} if family == "llama4_text" else {}  # its own counts padding
    model = tiny_model(family, **overrides)
    speculative = SelfSpecGenerate(always_speculating(model))
    arguments: dict[str, Any] = left_padded(PROMPTS) | {"max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": PAD}
    expected = model.generate(**arguments)
    actual = model.generate(**arguments, custom_generate=speculative)
    assert torch.equal(actual, expected)
    assert actual.dtype == expected.dtype
    assert speculative.stats is not None
    assert sum(speculative.stats.accepted_per_position) > 0
    assert len({(row != PAD).sum().item() for row in expected[:, 20:]}) > 1  # else no row was padded behind


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_new_tokens": 1},
        {"max_new_tokens": 24},
        {"max_length": 30},
        {"max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": EOS[0]},
        {"max_new_tokens": 24, "eos_token_id": EOS},
        {"max_new_tokens": 24, "eos_token_id": EOS, "min_new_tokens": 9},
        {"max_length": 40, "eos_token_id": EOS, "min_length": 28},
        {"max_new_tokens": 24, "repetition_penalty": 1.4},
        {"max_new_tokens": 24, "suppress_tokens": [40, 41, 42]},
        {"max_new_tokens": 24, "use_cache": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[1:2], PROMPTS[:1] * 3], ids=["ragged", "one", "equal"])
def test_greedy_options_equal_plain_generate(
    llama: PreTrainedModel, speculative: SelfSpecGenerate, arguments: dict[str, Any], prompts: list[list[int]]
) -> None:
    """`generate` counts left padding in every length; a budget per prompt would be another one."""
    inputs = left_padded(prompts)
    arguments = {"pad_token_id": PAD} | arguments
    expected = llama.generate(**inputs, **arguments, do_sample=False)
    assert torch.equal(llama.generate(**inputs, **arguments, do_sample=False, custom_generate=speculative), expected)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default:UserWarning")
def test_without_any_length_it_is_transformers_default(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    """Twenty new tokens behind the padded prompt."""
    inputs = left_padded(PROMPTS)
    expected = llama.generate(**inputs, pad_token_id=PAD)
    assert torch.equal(llama.generate(**inputs, pad_token_id=PAD, custom_generate=speculative), expected)
    assert expected.shape[1] == 40


def test_the_comparison_with_generate_sees_a_wrong_mask(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    """Negative control: rows that see their padding are other rows."""
    inputs = left_padded(PROMPTS, pad=5)
    arguments: dict[str, Any] = {"max_new_tokens": 24, "pad_token_id": PAD}
    expected = llama.generate(**inputs, **arguments)
    seen = {"input_ids": inputs["input_ids"], "attention_mask": torch.ones_like(inputs["attention_mask"])}
    assert torch.equal(llama.generate(**inputs, **arguments, custom_generate=speculative), expected)
    assert not torch.equal(llama.generate(**seen, **arguments, custom_generate=speculative), expected)


def test_a_mask_that_generate_infers_is_followed(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    """Without a mask, `generate` finds padding by the pad token."""
    ids = left_padded(PROMPTS)["input_ids"]
    arguments: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": PAD, "eos_token_id": EOS}
    expected = llama.generate(ids, **arguments)
    assert torch.equal(llama.generate(ids, **arguments, custom_generate=speculative), expected)


def test_the_generation_config_of_the_model_fills_what_is_unset() -> None:
    """A checkpoint's own sampling defaults apply, as in plain `generate`."""
    model = tiny_model("llama")
    model.generation_config.update(repetition_penalty=1.5, eos_token_id=EOS, max_new_tokens=18, pad_token_id=PAD)
    speculative = SelfSpecGenerate(always_speculating(model))
    expected = model.generate(**left_padded(PROMPTS))
    assert torch.equal(model.generate(**left_padded(PROMPTS), custom_generate=speculative), expected)
    plainer = model.generate(**left_padded(PROMPTS), custom_generate=speculative, repetition_penalty=1.0)
    assert plainer.shape != expected.shape or not torch.equal(plainer, expected)


@pytest.mark.parametrize(
    "arguments", [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5, "repetition_penalty": 1.3}]
)
def test_coupled_samples_do_not_depend_on_speculation(llama: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """The draft length may change the speed, never a token; the seed comes from torch's generator."""

    def sample(gamma: int, seed: int) -> Tensor:
        torch.manual_seed(seed)
        speculative = SelfSpecGenerate(always_speculating(llama, gamma, verification="coupled"))
        return llama.generate(
            **left_padded(PROMPTS),
            **arguments,
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=16,
            pad_token_id=PAD,
            custom_generate=speculative,
        )

    plain = sample(gamma=0, seed=1)
    assert plain.shape == (18, 36)
    assert torch.equal(sample(gamma=3, seed=1), plain)
    assert not torch.equal(sample(gamma=3, seed=2), plain)
    assert not torch.equal(plain[0], plain[1])  # the first two are samples of one prompt


def test_samples_of_a_padded_batch_follow_the_law() -> None:
    """Pairs of tokens at temperature 0.8 against the model's own probabilities; one new seed in 10,000 would fail."""
    size, temperature, repeats = 8, 0.8, 6000
    model = tiny_model("llama", vocab_size=size, pad_token_id=None, bos_token_id=None, std=0.2)
    prompts = [[3, 4, 5, 6], [7]]
    torch.manual_seed(0)
    output = model.generate(
        **left_padded(prompts),
        do_sample=True,
        temperature=temperature,
        top_k=0,
        num_return_sequences=repeats,
        max_new_tokens=2,
        pad_token_id=PAD,
        custom_generate=SelfSpecGenerate(always_speculating(model, gamma=2)),
    )
    for prompt, samples in zip(prompts, output[:, 4:].reshape(2, repeats, 2), strict=True):
        counts = joint_counts(samples.numpy(), size)
        assert chi_square(counts, pair_law(model, prompt, temperature)) > FALSE_ALARM / 2
        assert chi_square(counts, pair_law(model, prompt, temperature=1.0)) < FALSE_ALARM / 2  # negative control


def pair_law(model: PreTrainedModel, prompt: list[int], temperature: float) -> np.ndarray:  # (V, V)
    size = model.config.vocab_size
    with torch.no_grad():
        rows = torch.tensor([[*prompt, token] for token in range(size)])
        logits = model(rows).logits[:, -2:].double() / temperature
    probs = logits.softmax(-1).numpy()
    return joint_law([probs[0, 0], probs[:, 1]])


def test_a_dict_is_returned_where_asked_for(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    arguments = left_padded(PROMPTS) | {"max_new_tokens": 8, "pad_token_id": PAD, "return_dict_in_generate": True}
    output = llama.generate(**arguments, custom_generate=speculative)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert torch.equal(output.sequences, llama.generate(**arguments).sequences)
    assert output.scores is None


def test_greedy_draws_nothing_from_torchs_generator(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    """An evaluation in the middle of a seeded run must not change the run."""
    state = torch.get_rng_state()
    llama.generate(**left_padded(PROMPTS), max_new_tokens=4, pad_token_id=PAD, custom_generate=speculative)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_key_value_memory_is_kept(llama: PreTrainedModel, speculative: SelfSpecGenerate) -> None:
    """In a trainer the backward pass follows and needs the room."""
    llama.generate(**left_padded(PROMPTS), max_new_tokens=4, pad_token_id=PAD, custom_generate=speculative)
    assert speculative.engine.prefix_cache is None


def test_changed_weights_are_followed() -> None:
    """Samples of the weights from before an optimizer step look plausible and are wrong."""
    model = tiny_model("llama")
    speculative = SelfSpecGenerate(always_speculating(model))
    arguments: dict[str, Any] = left_padded(PROMPTS) | {"max_new_tokens": 24, "pad_token_id": PAD}
    before = model.generate(**arguments, custom_generate=speculative)
    scale_weights(model, seed=1)
    after = model.generate(**arguments, custom_generate=speculative)
    assert torch.equal(after, model.generate(**arguments))
    assert not torch.equal(after, before)


def test_a_peft_model_generates_with_its_adapter() -> None:
    """PEFT calls the inner model's `generate`: the engine has to know it as its own, adapter and all."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(tiny_model("llama"), config)
    speculative = SelfSpecGenerate(always_speculating(model))  # type: ignore[arg-type]
    arguments: dict[str, Any] = left_padded(PROMPTS) | {"max_new_tokens": 24, "pad_token_id": PAD}
    expected = model.generate(**arguments)
    assert torch.equal(model.generate(**arguments, custom_generate=speculative), expected)
    with model.disable_adapter():
        plain = model.generate(**arguments)
        assert torch.equal(model.generate(**arguments, custom_generate=speculative), plain)
    assert not torch.equal(plain, expected)


def test_nothing_keeps_a_model_alive_but_its_engine() -> None:
    """One engine per evaluation of a sweep would otherwise fill the memory."""
    model = tiny_model("llama")
    speculative = SelfSpecGenerate(always_speculating(model))
    model.generate(**left_padded(PROMPTS), max_new_tokens=4, pad_token_id=PAD, custom_generate=speculative)
    watched = weakref.ref(model), weakref.ref(speculative.engine)
    del model
    gc.collect()
    assert watched[0]() is not None
    del speculative
    gc.collect()
    assert watched[0]() is watched[1]() is None


def test_the_docstrings_example_runs() -> None:
    model, tokenizer = make_model(), make_tokenizer()
    names = vars(generation) | {"SelfSpecOptions": SelfSpecOptions, "model": model, "tokenizer": tokenizer}
    (example,) = doctest.DocTestFinder(recurse=False).find(SelfSpecGenerate, "SelfSpecGenerate", globs=names)
    assert doctest.DocTestRunner().run(example) == doctest.TestResults(failed=0, attempted=4)


@pytest.mark.parametrize("inside", ["build", "generate", "refresh"])
def test_a_callers_inference_mode_leaves_nothing_behind(inside: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors made in one can't be written to outside of it: the next refresh, or the next rollout, failed."""
    force_page_size(monkeypatch, 4)  # the state of rows outlives a rollout then
    model = tiny_model("llama")
    arguments: dict[str, Any] = left_padded(PROMPTS) | {"max_new_tokens": 8, "pad_token_id": PAD}
    with torch.inference_mode(inside == "build"):
        engine = always_speculating(model)
    with torch.inference_mode(inside == "generate"):
        model.generate(**arguments, custom_generate=SelfSpecGenerate(engine))
    scale_weights(model, seed=1)
    with torch.inference_mode(inside == "refresh"):
        engine.refresh()
    actual = model.generate(**arguments, custom_generate=SelfSpecGenerate(engine))
    assert torch.equal(actual, model.generate(**arguments))
