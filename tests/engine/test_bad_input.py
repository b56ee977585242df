"""Bad input is refused with advice, and a rollout that fails leaves everything as it was."""

from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import CONTEXT_LENGTH, VOCAB_SIZE, Schedule, ragged_prompts, scale_weights, spoil, tiny_model
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.engine.engine import Progress, SelfSpecEngine
from trl_selfspec.kernels.cpu import build
from trl_selfspec.options import SelfSpecOptions


PROMPTS = ragged_prompts([1, 20, 2, 5, 9, 14])
CONFIG = GenerationConfig(max_new_tokens=12, do_sample=True, top_k=0)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def engine(model: PreTrainedModel) -> SelfSpecEngine:
    return make_engine(model)


def make_engine(model: PreTrainedModel, **values: Any) -> SelfSpecEngine:
    defaults = {"draft_qtype": "qint8", "num_speculative_tokens": 3, "max_active_sequences": 64}
    return SelfSpecEngine(model, SelfSpecOptions(**defaults | values))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5, 6], []], "Prompt 1 is empty"),
        ([[5], list(range(3, 3 + 90)) * 2], f"Prompt 1 has 180 tokens.* context has {CONTEXT_LENGTH}"),
        ([[5] * CONTEXT_LENGTH], "no room for a completion"),
        ([[5, VOCAB_SIZE]], f"token id {VOCAB_SIZE}.*vocabulary has {VOCAB_SIZE}"),
        ([[5, -1]], "token id -1"),
        ([[5, 6.0]], "holds float"),
        ([["a"]], "holds str"),
        ([torch.tensor([5, 6])], r"holds Tensor.*tolist\(\)"),
        ([np.array([5, 6])], r"tolist\(\)"),
        ([[True, 5]], "holds bool"),
        ([5, 6], "list of lists"),
        ("ab", "list of lists"),
        ([[[5, 6]]], "holds list"),
    ],
)
def test_a_bad_prompt_is_refused(engine: SelfSpecEngine, prompts: Any, message: str) -> None:
    """Prevents an IndexError from inside, or a completion of something else."""
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, CONFIG, seed=0)
    assert len(engine.generate(PROMPTS, CONFIG, seed=0).completion_ids) == len(PROMPTS)


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([4], "1 entries for 6 prompts"),
        ([4, 4, 0, 4, 4, 4], "Prompt 2 may generate 0 tokens"),
        ([4, 4, 4, -3, 4, 4], "Prompt 3 may generate -3 tokens"),
        ([4, 4, 4, 4, 2.5, 4], "Prompt 4.*2.5"),
    ],
)
def test_a_bad_budget_is_refused(engine: SelfSpecEngine, budgets: list[Any], message: str) -> None:
    """Prevents a rollout that never ends or ends elsewhere."""
    with pytest.raises(ValueError, match=message):
        engine.generate(PROMPTS, CONFIG, max_new_tokens=budgets)


@pytest.mark.parametrize("seed", ["1", 1.5, 2**64, -(2**64)])
def test_a_bad_seed_is_refused(engine: SelfSpecEngine, seed: Any) -> None:
    """Prevents a seed that is rounded or overflows."""
    with pytest.raises(ValueError, match="seed"):
        engine.generate(PROMPTS, CONFIG, seed=seed)


def test_a_maximum_length_below_the_prompt_is_refused(engine: SelfSpecEngine) -> None:
    """Prevents the negative budget of a prompt that is longer than `max_length`."""
    with pytest.raises(ValueError, match="Prompt 1 may generate -10 tokens"):
        engine.generate(PROMPTS, GenerationConfig(max_length=10, do_sample=True))


@pytest.mark.parametrize("name", ["num_beams", "guidance_scale", "stop_strings"])
def test_a_parameter_that_cannot_be_honoured_is_named(engine: SelfSpecEngine, name: str) -> None:
    """Prevents a parameter that is dropped without a word."""
    value = {"num_beams": 3, "guidance_scale": 1.5, "stop_strings": ["x"]}[name]
    with pytest.raises(ValueError, match=name):
        engine.generate(PROMPTS, GenerationConfig(max_new_tokens=4, do_sample=True, **{name: value}))


@pytest.mark.parametrize(
    "values",
    [
        {"draft_qtype": "int4"},
        {"num_speculative_tokens": -1},
        {"num_speculative_tokens": "3"},
        {"num_speculative_tokens": True},
        {"num_speculative_tokens": 17},
        {"max_speculative_tokens": 0},
        {"max_active_sequences": 0},
        {"max_active_sequences": 2.0},
        {"verification": "typical"},
        {"refresh_interval": 0},
        {"max_batch_size": 0},
        {"cuda_graphs": "yes"},
    ],
    ids=str,
)
def test_a_bad_option_is_refused(values: dict[str, Any]) -> None:
    """Prevents an option that is accepted and means something else; the message names it and its value."""
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"`{name}={value!r}` is not supported: "):
        SelfSpecOptions(**values)


def test_nothing_to_do_is_no_error(engine: SelfSpecEngine) -> None:
    """Prevents the failure of a rank that has no prompts left."""
    output = engine.generate([], CONFIG)
    assert output.completion_ids == output.logprobs == output.policy_logprobs == []


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("gamma", [0, 3])
def test_a_policy_of_nan_is_refused_and_can_be_repaired(
    monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, gamma: int, do_sample: bool
) -> None:
    """Prevents training on noise after a diverged step, and NaN that stays in the cache afterwards."""
    monkeypatch.setattr(build, "_library", lambda: None)  # SDPA multiplies masked values by 0; our kernel skips them
    engine = make_engine(model, num_speculative_tokens=gamma)
    config = GenerationConfig(max_new_tokens=12, do_sample=do_sample)
    short = [[5, 6], [7]]  # leaves the slots behind it as the failed rollout wrote them
    expected = make_engine(model, num_speculative_tokens=gamma).generate(short, config, seed=0).completion_ids
    engine.generate(PROMPTS, config, seed=0)
    weight = model.model.layers[0].self_attn.v_proj.weight
    sound = weight.detach().clone()
    with torch.no_grad():
        weight[0, 0] = torch.nan
    engine.refresh()
    with pytest.raises(ValueError, match="policy's logits are not finite"):
        engine.generate(PROMPTS, config, seed=0)
    with pytest.raises(ValueError, match="logits that are not finite"):
        make_engine(model)
    with torch.no_grad():
        weight.copy_(sound)
    engine.refresh()
    assert engine.generate(short, config, seed=0).completion_ids == expected


@pytest.mark.parametrize("verification", ["rejection", "coupled"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_drafter_of_nan_leaves_the_rollout_to_the_target(
    model: PreTrainedModel, verification: str, value: float
) -> None:
    """Prevents a quantizer's overflow from ending a training run, or from being silent."""
    engine = make_engine(model, verification=verification)
    engine.controller = Schedule(0, 0, 3)
    spoil(engine, noise=value)
    output = engine.generate(PROMPTS, CONFIG, seed=0)
    assert output.stats.draft_nan_rounds == 1
    assert output.stats.num_rounds_speculative == 1
    assert output.stats.num_accepted_tokens < 3
    assert [len(tokens) for tokens in output.completion_ids] == [12] * len(PROMPTS)
    if verification == "coupled":
        plain = make_engine(model, verification=verification, num_speculative_tokens=0)
        assert output.completion_ids == plain.generate(PROMPTS, CONFIG, seed=0).completion_ids


class Interruption(Exception):
    pass


def interrupt(progress: Progress) -> None:
    if progress.completed_tokens > 20:
        raise Interruption


def state_of(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a policy that generation could disturb."""
    modules = {
        name: (
            module.training,
            sorted(vars(module)),
            [len(getattr(module, hooks)) for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")],
        )
        for name, module in model.named_modules()
    }
    parameters = {
        name: (
            parameter.requires_grad,
            parameter.data_ptr(),
            parameter._version,
            None if parameter.grad is None else parameter.grad.data_ptr(),
        )
        for name, parameter in model.named_parameters()
    }
    config = model.config.to_dict() | {"attention": model.config._attn_implementation}
    return {
        "modules": modules,
        "parameters": parameters,
        "config": config,
        "generation_config": model.generation_config.to_dict(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize("fails", [False, True])
def test_the_policy_is_left_as_it_was(model: PreTrainedModel, fails: bool) -> None:
    """Prevents a rollout, finished or not, from changing what is trained."""
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model(torch.tensor([PROMPTS[1]])).logits.sum().backward()
    model.lm_head.weight.requires_grad_(False)
    before = state_of(model)
    engine = make_engine(model, max_batch_size=4)
    if fails:
        with pytest.raises(Interruption):
            engine.generate(PROMPTS, CONFIG, seed=0, on_round=interrupt)
        assert engine.prefix_cache is None, "the memory of a failed rollout is given back"
    else:
        engine.generate(PROMPTS, CONFIG, seed=0)
    assert state_of(model) == before
    assert all(not parameter.requires_grad for parameter in engine._replica.model.parameters())


def test_the_engine_is_usable_after_a_failure(engine: SelfSpecEngine) -> None:
    """Prevents rows, pages or drafts of a failed rollout from reaching the next one."""
    expected = engine.generate(PROMPTS, CONFIG, seed=0).completion_ids
    with pytest.raises(Interruption):
        engine.generate(PROMPTS, CONFIG, seed=0, on_round=interrupt)
    assert engine.generate(PROMPTS, CONFIG, seed=0).completion_ids == expected


def test_a_change_of_the_policy_is_noticed(model: PreTrainedModel) -> None:
    """Negative control: `state_of` sees each kind of change."""
    before = state_of(model)
    changes = [
        lambda: model.model.layers[0].train(),
        lambda: model.lm_head.weight.requires_grad_(False),
        lambda: setattr(model.config, "use_cache", not model.config.use_cache),
        lambda: scale_weights(model, seed=1),
        lambda: model.lm_head.register_forward_hook(lambda *args: None),
    ]
    for change in changes:
        change()
        after = state_of(model)
        assert after != before
        before = after
