"""PEFT laws: the replica computes what the policy does with its active adapters, follows them, and leaves it alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted import LAYERS, SWITCHES, adapted, difference, greedy, snapshot, speculating, stir, two_adapters
from peft import LoraConfig, get_peft_model
from replicas import logits_of, policy_logits, replica_logits
from tiny_models import tiny_model
from trl_runs import ALWAYS_SPECULATE, FP32_LOGP_TOLERANCE, make_trainer, train, weights

from trl_selfspec.policy import peft_weights as adapters
from trl_selfspec.policy import replica as replicas
from trl_selfspec.policy.refusals import UnsupportedModelError
from trl_selfspec.policy.replica import PolicyReplica


FP32_TOLERANCE = 1e-4  # a merged layer sums in another order; logits are of size 5
MATTERS = 0.05  # an adapter moves logits by more than this, or a test of it proves nothing


FORMS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora_embedding": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
    "every_linear": {"target_modules": "all-linear"},
    "trained_biases": {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
    "bias_of_the_adapter": {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
    "rank_pattern": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 16}},
    "some_layers": {"layers_to_transform": [1]},
    "saved_head": {"modules_to_save": ["lm_head"]},
    "saved_embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "saved_block": {"modules_to_save": ["mlp"], "target_modules": ["q_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
@pytest.mark.parametrize("form", FORMS)
def test_the_replica_is_the_adapted_policy_and_leaves_it_alone(form: str) -> None:
    """Prevents rollouts that leave out a part of the adapter, and an adapter that is merged for good, or drifts."""
    policy = adapted(**FORMS[form])
    theirs = policy_logits(policy)
    before = snapshot(policy)
    replica = PolicyReplica(policy)
    replica.refresh()
    ours = replica_logits(replica)
    assert snapshot(policy) == before
    assert difference(ours, theirs) < FP32_TOLERANCE
    with policy.disable_adapter():
        assert difference(policy_logits(policy), theirs) > MATTERS


def test_what_merges_into_the_policy_itself_is_noticed() -> None:
    """Negative control: the snapshot above sees PEFT's own merge, even one that is undone."""
    policy = adapted()
    before = snapshot(policy)
    policy.merge_adapter()
    assert snapshot(policy) != before
    policy.unmerge_adapter()
    assert snapshot(policy) != before


@pytest.mark.parametrize("form", ["lora", "dora", "bias_of_the_adapter", "saved_head"])
def test_a_replica_without_the_adapter_is_noticed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the comparison above sees an adapter that is left out."""
    policy = adapted(**FORMS[form])
    monkeypatch.setattr(adapters, "_contributing", lambda module: [])
    monkeypatch.setattr(adapters, "_active_copy", lambda wrapper: wrapper.original_module)
    assert difference(logits_of(policy), policy_logits(policy)) > MATTERS


OTHERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "ia3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": lambda: peft.LoHaConfig(target_modules=LAYERS),
    "lokr": lambda: peft.LoKrConfig(target_modules=LAYERS),
    "oft": lambda: peft.OFTConfig(target_modules=LAYERS),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj", "o_proj"]),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's, about its own norm tuning
@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_merge_on_a_copy(method: str) -> None:
    """Prevents a bias that stays as it was, and a merge that reaches the policy."""
    policy = adapted(config=OTHERS[method]())
    theirs, before = policy_logits(policy), snapshot(policy)
    assert difference(logits_of(policy), theirs) < FP32_TOLERANCE
    assert snapshot(policy) == before
    with policy.disable_adapter():
        assert difference(policy_logits(policy), theirs) > MATTERS


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("llama", {"target_modules": LAYERS}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gemma3_text", {"target_modules": ["embed_tokens", "q_proj"]}),
        (
            "qwen3_moe",
            {"target_modules": ["q_proj"], "lora_dropout": 0.0, "target_parameters": ["mlp.experts.down_proj"]},
        ),
        (
            "qwen3_moe",
            {
                "target_modules": [],
                "lora_dropout": 0.0,
                "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "q_proj.weight"],
            },
        ),
    ],
    ids=["linear", "conv1d", "scaled_embeddings", "experts", "nested_experts"],
)
def test_adapters_fit_other_kinds_of_layers(family: str, values: dict[str, Any]) -> None:
    """Prevents a transposed update, a scale that counts twice, and experts whose adapter is lost."""
    policy = adapted(family, **values)
    theirs, before = policy_logits(policy), snapshot(policy)
    assert difference(logits_of(policy), theirs) < FP32_TOLERANCE
    assert snapshot(policy) == before
    with policy.disable_adapter():
        assert difference(policy_logits(policy), theirs) > MATTERS


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")  # PEFT's, about what is tested here
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=lambda values: ",".join(f"{k}={'+'.join(v)}" for k, v in values.items()) or "untouched",
)
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_tied_weights_may_be_adapted_on_one_side(values: dict[str, Any], autocast_dtype: torch.dtype | None) -> None:
    """Prevents an adapter of the embeddings that reaches the head, or the reverse, through the shared tensor."""
    policy = adapted(model_values={"tie_word_embeddings": True, "std": 0.05}, **values)
    ours, theirs = logits_of(policy, autocast_dtype), policy_logits(policy, autocast_dtype)
    exact = policy_logits(policy)
    rounding = difference(theirs, exact) if autocast_dtype else 0.0
    assert difference(ours, exact) < max(FP32_TOLERANCE, 2 * rounding)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.parametrize("saved_head", [False, True], ids=["lora", "saved_head"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_another_active_adapter_is_noticed_and_followed(switch: str, saved_head: bool) -> None:
    """Prevents rollouts from the adapter that was active before: no parameter changes, nor its version."""
    if saved_head and switch == "both":
        pytest.skip("PEFT allows one saved copy of a module at a time")
    policy = two_adapters(modules_to_save=["lm_head"] if saved_head else None)
    replica = PolicyReplica(policy)
    assert not replica.stale
    before = replica_logits(replica)
    SWITCHES[switch](policy)
    assert replica.stale
    replica.refresh()
    assert not replica.stale
    assert difference(replica_logits(replica), policy_logits(policy)) < FP32_TOLERANCE
    if switch != "merged":
        assert difference(replica_logits(replica), before) > MATTERS


def test_versions_do_not_see_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the state of the adapters the switch above goes unnoticed."""
    monkeypatch.setattr(replicas, "adapter_state", lambda base: ())
    policy = two_adapters()
    replica = PolicyReplica(policy)
    policy.set_adapter("ref")
    assert not replica.stale


def test_switching_there_and_back_is_no_change() -> None:
    """Prevents a refresh after every use of the reference adapter."""
    policy = two_adapters()
    replica = PolicyReplica(policy)
    policy.set_adapter("ref")
    policy_logits(policy)
    policy.set_adapter("default")
    with policy.disable_adapter():
        policy_logits(policy)
    assert not replica.stale


def test_the_reference_adapter_is_not_sampled_from() -> None:
    """Prevents a rollout from `ref`, and an update of `ref` that costs a refresh of its own law."""
    policy = two_adapters()
    before = logits_of(policy)
    assert difference(before, policy_logits(policy)) < FP32_TOLERANCE
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".ref." in name:
                parameter.zero_()
    assert torch.equal(logits_of(policy), before)


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_storage_stays_where_it_is_over_updates_and_switches(autocast_dtype: torch.dtype | None) -> None:
    """Prevents captured graphs from reading freed memory."""
    policy = two_adapters()
    replica = PolicyReplica(policy, autocast_dtype)
    tensors = [*replica.model.named_parameters(), *replica.model.named_buffers()]
    before = {name: tensor.data_ptr() for name, tensor in tensors}
    first = replica_logits(replica)
    for change in (stir, SWITCHES["set_adapter"], SWITCHES["disabled"]):
        change(policy)
        assert replica.stale
        replica.refresh()
    assert {name: tensor.data_ptr() for name, tensor in tensors} == before
    assert difference(replica_logits(replica), first) > MATTERS


def test_adapters_may_come_and_go_under_a_replica() -> None:
    """Prevents a replica that reads layers which PEFT has wrapped or unwrapped since it was built."""
    model = tiny_model("qwen2")
    replica = PolicyReplica(model)
    policy = get_peft_model(model, LoraConfig(target_modules=LAYERS))
    stir(policy)
    for unwrap in (lambda: policy, policy.merge_and_unload):
        current = unwrap()
        assert replica.stale
        replica.refresh()
        assert difference(replica_logits(replica), policy_logits(current)) < FP32_TOLERANCE


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "trainable_tokens": ({"trainable_token_indices": [3, 4]}, "TrainableTokensWrapper"),
    "bias_without_a_place": ({"lora_bias": True}, "lora_bias"),
    "activated_lora": ({"alora_invocation_tokens": [3]}, "aLoRA"),
}


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("form", REFUSED)
def test_what_has_no_merged_form_is_refused_by_name(form: str) -> None:
    """Prevents rollouts that leave the adapter out, and an error from the middle of a run."""
    values, name = REFUSED[form]
    with pytest.raises(UnsupportedModelError, match=name):
        PolicyReplica(adapted("llama", **values))


def test_a_forward_that_was_replaced_is_refused() -> None:
    """Prevents rollouts without X-LoRA's mixture, which lives in functions put in place of the layers' own."""
    policy = adapted()
    layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.forward = layer.base_layer.forward
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        PolicyReplica(policy)


def test_merged_and_disabled_at_once_is_refused() -> None:
    """Prevents rollouts from merged weights that PEFT's next forward would take back."""
    policy = adapted()
    replica = PolicyReplica(policy)
    policy.merge_adapter()
    policy.base_model.disable_adapter_layers()
    with pytest.raises(UnsupportedModelError, match="merged and disabled"):
        replica.refresh()


@pytest.mark.parametrize("qtype", ["qint8", "qint4"])
def test_a_policy_that_is_quantized_already_is_refused(qtype: str) -> None:
    """Prevents kernels from reading codes as if they were weights."""
    from optimum.quanto import freeze, quantize

    model = tiny_model("llama")
    quantize(model, weights=qtype)
    freeze(model)
    with pytest.raises(UnsupportedModelError, match="quantized"):
        PolicyReplica(model)


def test_a_trained_adapter_of_16_bit_weights_is_rounded_once() -> None:
    """Prevents drift: PEFT's own merge rounds the adapter first, then the sum."""
    policy = adapted(model_values={"dtype": torch.bfloat16})
    layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    merged = adapters.effective_tensor(layer, "weight")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.bfloat16))


def test_the_engine_follows_a_switch() -> None:
    """Prevents the engine from refusing, or sampling from the other adapter, after `set_adapter`."""
    policy = two_adapters()
    engine = speculating(policy)
    first, _ = greedy(engine)
    policy.set_adapter("ref")
    with pytest.raises(RuntimeError, match=r"engine\.refresh\(\)"):
        greedy(engine)
    engine.refresh()
    second, alpha = greedy(engine)
    assert (second, alpha) == greedy(speculating(policy))
    assert first != second


TRAINED: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"lora_dropout": 0.3},
    "saved_head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("form", TRAINED)
def test_each_form_trains(tmp_path: Path, form: str) -> None:
    """Each reaches the optimizer, the checkpoints' hooks and the engine by another way."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **TRAINED[form])
    trainer = make_trainer(
        tmp_path, trainer_kwargs={"peft_config": config}, disable_dropout=form == "dropout", **ALWAYS_SPECULATE
    )
    before = weights(trainer)
    for entry in train(trainer):
        assert entry["selfspec/fallback"] == 0
        assert entry["selfspec/alpha"] > 0
        assert entry["sampling/sampling_logp_difference/max"] < FP32_LOGP_TOLERANCE
    trained = ("lora_", "modules_to_save")
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]) != any(part in name for part in trained), name
