"""PEFT laws: the mirror computes what the policy does with its active adapters, follows them, and leaves it alone."""

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from mirrored import logits_of, mirror_logits, policy_logits
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ragged_prompts, tiny_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec import adapters
from trl_selfspec.drafter import LiveLoraLinear, make_drafter, requantize
from trl_selfspec.engine import SelfSpecEngine
from trl_selfspec.mirror import Mirror, UnsupportedModelError
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.quantize import QuantizedLinear


FP32_TOLERANCE = 1e-4  # a merged layer sums in another order; logits are of size 5
MATTERS = 0.05  # an adapter moves logits by more than this, or a test of it proves nothing
LAYERS = ["q_proj", "v_proj", "down_proj"]


def stir(policy: nn.Module, seed: int = 3, std: float = 0.15) -> None:
    """Moves all that is trained: PEFT initialises most adapters to none at all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def adapted(
    family: str = "qwen2",
    config: peft.PeftConfig | None = None,
    model_values: dict[str, Any] | None = None,
    **values: Any,
) -> PeftModel:
    model = tiny_model(family, **(model_values or {}))
    defaults = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    policy = get_peft_model(model, config or LoraConfig(**defaults | values))
    stir(policy)
    return policy


def snapshot(policy: nn.Module) -> dict[str, Any]:
    """All of a policy that a mirror must leave as it was, bit for bit."""
    tensors = [*policy.named_parameters(remove_duplicate=False), *policy.named_buffers(remove_duplicate=False)]
    return {
        name: (tensor.data_ptr(), tensor._version, tensor.requires_grad, tensor.detach().clone().numpy().tobytes())
        for name, tensor in tensors
    } | {
        f"{name} (module)": (
            module.training,
            type(module),
            tuple(getattr(module, "merged_adapters", ())),
            sorted(vars(module)),
        )
        for name, module in policy.named_modules()
    }


def difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


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
def test_the_mirror_is_the_adapted_policy_and_leaves_it_alone(form: str) -> None:
    """Prevents rollouts that leave out a part of the adapter, and an adapter that is merged for good, or drifts."""
    policy = adapted(**FORMS[form])
    theirs = policy_logits(policy)
    before = snapshot(policy)
    mirror = Mirror(policy)
    mirror.refresh()
    ours = mirror_logits(mirror)
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
def test_a_mirror_without_the_adapter_is_noticed(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
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


def two_adapters(**values: Any) -> PeftModel:
    policy = adapted(**values)
    policy.add_adapter("ref", copy.deepcopy(policy.peft_config["default"]))
    policy.set_adapter("ref")
    stir(policy, seed=4)
    policy.set_adapter("default")
    return policy


SWITCHES: dict[str, Callable[[PeftModel], Any]] = {
    "set_adapter": lambda policy: policy.set_adapter("ref"),
    "both": lambda policy: policy.base_model.set_adapter(["default", "ref"]),
    "disabled": lambda policy: policy.base_model.disable_adapter_layers(),
    "scaled": lambda policy: [m.scale_layer(3.0) for m in policy.modules() if hasattr(m, "scale_layer")],
    "merged": lambda policy: policy.merge_adapter(),
    "deleted": lambda policy: policy.delete_adapter("default"),
}


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
@pytest.mark.parametrize("saved_head", [False, True], ids=["lora", "saved_head"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_another_active_adapter_is_noticed_and_followed(switch: str, saved_head: bool) -> None:
    """Prevents rollouts from the adapter that was active before: no parameter changes, nor its version."""
    if saved_head and switch == "both":
        pytest.skip("PEFT allows one saved copy of a module at a time")
    policy = two_adapters(modules_to_save=["lm_head"] if saved_head else None)
    mirror = Mirror(policy)
    assert not mirror.stale
    before = mirror_logits(mirror)
    SWITCHES[switch](policy)
    assert mirror.stale
    mirror.refresh()
    assert not mirror.stale
    assert difference(mirror_logits(mirror), policy_logits(policy)) < FP32_TOLERANCE
    if switch != "merged":
        assert difference(mirror_logits(mirror), before) > MATTERS


def test_versions_do_not_see_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the state of the adapters the switch above goes unnoticed."""
    from trl_selfspec import mirror as mirrors

    monkeypatch.setattr(mirrors, "adapter_state", lambda base: ())
    policy = two_adapters()
    mirror = Mirror(policy)
    policy.set_adapter("ref")
    assert not mirror.stale


def test_switching_there_and_back_is_no_change() -> None:
    """Prevents a refresh after every use of the reference adapter."""
    policy = two_adapters()
    mirror = Mirror(policy)
    policy.set_adapter("ref")
    policy_logits(policy)
    policy.set_adapter("default")
    with policy.disable_adapter():
        policy_logits(policy)
    assert not mirror.stale


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
    mirror = Mirror(policy, autocast_dtype)
    tensors = [*mirror.model.named_parameters(), *mirror.model.named_buffers()]
    before = {name: tensor.data_ptr() for name, tensor in tensors}
    first = mirror_logits(mirror)
    for change in (stir, SWITCHES["set_adapter"], SWITCHES["disabled"]):
        change(policy)
        assert mirror.stale
        mirror.refresh()
    assert {name: tensor.data_ptr() for name, tensor in tensors} == before
    assert difference(mirror_logits(mirror), first) > MATTERS


def test_adapters_may_come_and_go_under_a_mirror() -> None:
    """Prevents a mirror that reads layers which PEFT has wrapped or unwrapped since it was built."""
    model = tiny_model("qwen2")
    mirror = Mirror(model)
    policy = get_peft_model(model, LoraConfig(target_modules=LAYERS))
    stir(policy)
    for unwrap in (lambda: policy, policy.merge_and_unload):
        current = unwrap()
        assert mirror.stale
        mirror.refresh()
        assert difference(mirror_logits(mirror), policy_logits(current)) < FP32_TOLERANCE


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
        Mirror(adapted("llama", **values))


def test_a_forward_that_was_replaced_is_refused() -> None:
    """Prevents rollouts without X-LoRA's mixture, which lives in functions put in place of the layers' own."""
    policy = adapted()
    layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    layer.forward = layer.base_layer.forward
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        Mirror(policy)


def test_merged_and_disabled_at_once_is_refused() -> None:
    """Prevents rollouts from merged weights that PEFT's next forward would take back."""
    policy = adapted()
    mirror = Mirror(policy)
    policy.merge_adapter()
    policy.base_model.disable_adapter_layers()
    with pytest.raises(UnsupportedModelError, match="merged and disabled"):
        mirror.refresh()


@pytest.mark.parametrize("qtype", ["qint8", "qint4"])
def test_a_policy_that_is_quantized_already_is_refused(qtype: str) -> None:
    """Prevents kernels from reading codes as if they were weights."""
    from optimum.quanto import freeze, quantize

    model = tiny_model("llama")
    quantize(model, weights=qtype)
    freeze(model)
    with pytest.raises(UnsupportedModelError, match="quantized"):
        Mirror(model)


def test_a_trained_adapter_of_16_bit_weights_is_rounded_once() -> None:
    """Prevents drift: PEFT's own merge rounds the adapter first, then the sum."""
    policy = adapted(model_values={"dtype": torch.bfloat16})
    layer = policy.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    exact = layer.base_layer.weight.double() + layer.get_delta_weight("default").double()
    merged = adapters.effective_tensor(layer, "weight")
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, exact.to(torch.bfloat16))


def greedy(engine: SelfSpecEngine) -> tuple[list[list[int]], float]:
    output = engine.generate(ragged_prompts([3, 7, 12]), GenerationConfig(max_new_tokens=12, do_sample=False))
    return output.completion_ids, output.stats.alpha


def speculating(policy: PreTrainedModel | PeftModel) -> SelfSpecEngine:
    return SelfSpecEngine(policy, SelfSpecOptions("qint8", num_speculative_tokens=3, max_active_sequences=8))  # type: ignore[arg-type]


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


def codes(tree: nn.Module) -> dict[str, Tensor]:
    layers = {name: module for name, module in tree.named_modules() if isinstance(module, QuantizedLinear)}
    return {f"{name}.{key}": buffer for name, layer in layers.items() for key, buffer in layer.named_buffers()}


@pytest.fixture
def requantized(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedLinear]:
    """Collects the layers that are quantized."""
    layers: list[QuantizedLinear] = []
    original = QuantizedLinear.requantize_

    def recorded(layer: QuantizedLinear, weight: Tensor) -> None:
        layers.append(layer)
        original(layer, weight)

    monkeypatch.setattr(QuantizedLinear, "requantize_", recorded)
    return layers


@pytest.mark.parametrize("live", [False, True])
def test_only_layers_that_changed_are_quantized_again(live: bool, requantized: list[QuantizedLinear]) -> None:
    """Prevents a refresh that quantizes frozen weights over and over, and one that skips what is trained."""
    policy = adapted(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    mirror = Mirror(policy)
    tree = make_drafter(mirror, "qint8", live_adapters=live)
    requantize(tree, mirror)
    assert len(requantized) == 15
    requantized.clear()
    stir(policy, seed=5)
    mirror.refresh()
    requantize(tree, mirror)
    assert len(requantized) == (1 if live else 5)
    fresh = make_drafter(mirror, "qint8", live_adapters=live)
    requantize(fresh, mirror)
    assert all(map(torch.equal, codes(tree).values(), codes(fresh).values()))
    assert difference(draft_logits(tree), draft_logits(fresh)) == 0


def test_trained_weights_are_always_quantized_again(requantized: list[QuantizedLinear]) -> None:
    """Prevents a drafter that stays behind an optimizer which writes past the version counters."""
    model = tiny_model("llama")
    mirror = Mirror(model)
    tree = make_drafter(mirror, "qint8")
    for _ in range(2):
        requantize(tree, mirror)
        model.lm_head.weight.data.add_(1.0)
    assert len(requantized) == 30


@torch.no_grad()
def draft_logits(tree: nn.Module) -> Tensor:
    """A drafter without its cache: the first Linear layers stand for all."""
    layers = [module for module in tree.modules() if isinstance(module, QuantizedLinear)]
    generator = torch.Generator().manual_seed(2)
    inputs = (torch.randn(3, layer.in_features, generator=generator, dtype=layer.dtype) for layer in layers)
    return torch.cat([layer(x).flatten().float() for layer, x in zip(layers, inputs, strict=True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_adapters_add_what_merging_adds(dtype: torch.dtype) -> None:
    """Prevents a drafter of the base model, or of the adapter of the step before."""
    policy = adapted(model_values={"dtype": dtype}, use_rslora=True)
    mirror = Mirror(policy)
    tree = make_drafter(mirror, "qint8", live_adapters=True)
    requantize(tree, mirror)
    for seed in (5, 6):
        for name, layer in tree.named_modules():
            if isinstance(layer, LiveLoraLinear):
                source = adapters.find_module(mirror.base, name)
                merged = mirror.model.get_submodule(name).weight.float()
                apart = layer.dequantize().float() + layer.up.float() @ layer.down.float()
                rounding = (layer.dequantize().float() - source.base_layer.weight.float()).abs().max()
                assert difference(apart, merged) < rounding + 0.02 * merged.abs().max()
                x = torch.randn(5, layer.in_features).to(dtype)
                expected = x.float() @ apart.T + (0 if layer.bias is None else layer.bias.float())
                assert difference(layer(x).float(), expected) < 0.02 * expected.abs().max()
        stir(policy, seed)
        mirror.refresh()
        requantize(tree, mirror)
    assert any(isinstance(module, LiveLoraLinear) for module in tree.modules())


def test_live_adapters_follow_switches(requantized: list[QuantizedLinear]) -> None:
    """Prevents a drafter with the adapter that was active before, or with its leftovers on top of a merged weight."""
    policy = two_adapters()
    mirror = Mirror(policy)
    tree = make_drafter(mirror, "qint8", live_adapters=True)
    requantize(tree, mirror)
    for change in ("set_adapter", "scaled", "disabled", "enabled", "merged"):
        (SWITCHES | {"enabled": lambda policy: policy.base_model.enable_adapter_layers()})[change](policy)
        mirror.refresh()
        requantize(tree, mirror)
        fresh = make_drafter(mirror, "qint8", live_adapters=True)
        requantize(fresh, mirror)
        assert difference(draft_logits(tree), draft_logits(fresh)) < FP32_TOLERANCE, change


def test_the_engine_drafts_with_live_adapters() -> None:
    """Prevents a form that is never accepted: live adapters are not quantized, so it drafts no worse than merged."""
    policy = adapted()
    engines = [speculating(policy) for _ in range(3)]
    for live, engine in zip((False, True, True), engines, strict=True):
        engine._drafter = make_drafter(engine._mirror, engine.draft_qtype, live_adapters=live)
    expected, merged = greedy(engines[0])
    tokens, alpha = greedy(engines[1])
    assert tokens == expected
    assert alpha > merged - 0.1
    requantize(engines[2]._drafter, engines[2]._mirror)
    for module in engines[2]._drafter.modules():
        if isinstance(module, LiveLoraLinear):
            module.up.neg_()
    engines[2]._drafter_version = engines[2]._wanted_version
    tokens, broken = greedy(engines[2])
    assert tokens == expected
    assert broken < alpha - 0.2, "negative control: adapters of the wrong sign draft badly"
