"""Policies whose base is in 4 bits: the replica is the law of the dequantized weights, adapters merged."""

from typing import Any

import pytest
import torch
from adapted import difference, snapshot, stir
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from replicas import logits_of, policy_logits
from tiny_models import ragged_prompts, tiny_model
from torch import nn
from transformers import GenerationConfig

from trl_selfspec.drafter.quantized_drafter import make_drafter, requantize
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.policy import replica
from trl_selfspec.policy.refusals import UnsupportedModelError
from trl_selfspec.policy.replica import PolicyReplica


bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes, which quantizes the base")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:bitsandbytes", "ignore::UserWarning:bitsandbytes")

KINDS: dict[str, dict[str, Any] | None] = {"base": None, "lora": {}, "dora": {"use_dora": True}}
# Largest error of a logit in units of their spread: merged, a weight is rounded once; apart, base and adapter are.
ROUNDING = 0.1


def in_4_bits(dtype: torch.dtype, adapter: dict[str, Any] | None = None, prepared: bool = False) -> nn.Module:
    """What `BitsAndBytesConfig(load_in_4bit=True)` makes of a checkpoint: all Linear layers but the head."""
    model: Any = tiny_model("qwen2", dtype=dtype)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name != "lm_head":
            small = bitsandbytes.nn.Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
            )
            small.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
            small.bias = layer.bias
            replica._replace(model, name, small.to("cpu"))
    model.is_loaded_in_4bit = True
    if prepared:
        model = prepare_model_for_kbit_training(model)
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **adapter))
        stir(model)
    return model


@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_replica_is_the_4_bit_policy(kind: str, prepared: bool, autocast_dtype: torch.dtype | None) -> None:
    """Prevents codes that are read as weights, and the law of the weights before they were quantized."""
    policy = in_4_bits(torch.bfloat16, KINDS[kind], prepared)
    theirs, before = policy_logits(policy, autocast_dtype), snapshot(policy)
    ours = logits_of(policy, autocast_dtype)
    assert snapshot(policy) == before
    assert difference(ours, theirs) < (1e-4 if kind == "base" else ROUNDING * theirs.std())
    whole = logits_of(tiny_model("qwen2", dtype=torch.bfloat16), autocast_dtype)
    assert difference(whole, theirs) > 2 * ROUNDING * theirs.std(), "negative control"


@pytest.mark.filterwarnings("ignore:Merge lora module to 4-bit:UserWarning")  # PEFT's, about what is tested here
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_in_fp32_only_the_order_of_sums_differs(kind: str) -> None:
    """Prevents a merge that rounds the sum to 4 bits again, as PEFT's own does."""
    policy = in_4_bits(torch.float32, KINDS[kind])
    theirs = policy_logits(policy)
    assert difference(logits_of(policy), theirs) < 1e-4
    policy.merge_adapter()
    assert difference(policy_logits(policy), theirs) > 1e-2, "negative control: PEFT's merge"


def test_the_engine_samples_from_a_4_bit_policy_and_follows_it() -> None:
    """Prevents a base that is quantized again with every step, and a rollout from the adapter of the step before."""
    policy = in_4_bits(torch.float32, {})
    engine = SelfSpecEngine(policy, SelfSpecOptions("qint8", 3, max_active_sequences=8))
    for seed in (5, 6):
        prompts = ragged_prompts([3, 7, 12])
        output = engine.generate(prompts, GenerationConfig(max_new_tokens=8, do_sample=False))
        assert output.stats.num_accepted_tokens > 0
        for prompt, tokens in zip(prompts, output.completion_ids, strict=True):
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == tokens
        stir(policy, seed)
        engine.refresh()


def test_a_drafter_has_the_dequantized_base_and_the_adapter() -> None:
    """Prevents a drafter of codes, or of the base alone."""
    policy = in_4_bits(torch.float32, {})
    target = PolicyReplica(policy)
    tree = make_drafter(target, "qint8")
    requantize(tree, target)
    name = "model.layers.0.self_attn.q_proj"
    merged, ours = target.model.get_submodule(name).weight, tree.get_submodule(name).weight
    assert difference(ours, merged) < 0.02 * merged.abs().max()
    policy.base_model.disable_adapter_layers()
    target.refresh()
    assert difference(ours, merged) > 0.1 * merged.abs().max(), "negative control: without the adapter"


def test_8_bit_layers_are_refused() -> None:
    """Prevents a law without the rounding of activations that is part of theirs."""
    model = tiny_model("qwen2")
    layer = bitsandbytes.nn.Linear8bitLt(64, 64, bias=True, has_fp16_weights=False)
    replica._replace(model, "model.layers.0.self_attn.q_proj", layer)
    with pytest.raises(UnsupportedModelError, match="Int8Params"):
        PolicyReplica(model)
