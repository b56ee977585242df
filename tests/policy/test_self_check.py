"""The start-up check: sound policies pass in every dtype, each kind of fault is refused, also in 16 bits."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, ragged_prompts, tiny_model
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.integrations.neftune import activate_neftune
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_selfspec import SelfSpecEngine, SelfSpecOptions
from trl_selfspec.kv_cache.attention import IMPLEMENTATION, selfspec_attention
from trl_selfspec.policy import refusals, replica
from trl_selfspec.policy import self_check as selfcheck
from trl_selfspec.policy.refusals import UnsupportedModelError
from trl_selfspec.policy.replica import PolicyReplica
from trl_selfspec.policy.self_check import Calibration, self_check


BF16, FP32 = torch.bfloat16, torch.float32
GREEDY = GenerationConfig(max_new_tokens=8, do_sample=False)
HEADROOM = 0.75  # of the limit: what sound policies stay below, so that no rounding of another CPU refuses them


def check(model: PreTrainedModel, autocast: torch.dtype | None = None) -> Calibration:
    context = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None, cache_enabled=False)
    return self_check(PolicyReplica(model, autocast), model, context)


@pytest.mark.parametrize("mode", ["bf16", "autocast"])  # fp32 is what every other test of a family runs in
@pytest.mark.parametrize("family", FAMILIES)
def test_sound_policies_pass_with_room_to_spare(family: str, mode: str) -> None:
    """Prevents a run that loses the engine to rounding: a limit that a sound policy comes near is no limit."""
    model = tiny_model(family, dtype=BF16 if mode == "bf16" else FP32)
    calibration = check(model, BF16 if mode == "autocast" else None)
    assert calibration.distance < HEADROOM * calibration.limit


@pytest.mark.parametrize("std", [pytest.param(0.02, marks=pytest.mark.slow), 0.12])
def test_a_deep_policy_of_a_large_vocabulary_passes(std: float) -> None:
    """A maximum over 152k logits refused these: the statistic grew with the vocabulary, and the limit did not."""
    sizes = {"vocab_size": 151_936, "num_hidden_layers": 64, "hidden_size": 64, "intermediate_size": 96}
    model = tiny_model("qwen2", std=std, dtype=BF16, **sizes)
    calibration = check(model)
    assert calibration.distance < HEADROOM * calibration.limit
    with_hook(model)
    with pytest.raises(UnsupportedModelError, match="forward hook"):
        check(model)


# Faults of the engine


@contextlib.contextmanager
def tampered_attention(tamper: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Lets `tamper` change the keyword arguments of the engine's attention; layers run module by module."""

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **arguments: Any) -> Any:
        arguments["module"] = module
        tamper(arguments)
        arguments.pop("module", None)
        return selfspec_attention(module, query, key, value, mask, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, attention)
        patch.setattr(replica, "fuse_layers", lambda *args: None)
        yield


def without_window(arguments: dict[str, Any]) -> None:
    arguments["sliding_window"] = None


def without_softcap(arguments: dict[str, Any]) -> None:
    arguments["softcap"] = None


def without_mask(arguments: dict[str, Any]) -> None:
    cache = arguments["module"].paged_cache
    if not cache.fresh:
        cache.positions = torch.full_like(cache.positions, cache.num_slots - 1)


def nothing(arguments: dict[str, Any]) -> None:
    """The control's control: routing attention through `tampered_attention` changes nothing by itself."""


FAULTS: dict[str, tuple[str, dict[str, Any], Callable[[dict[str, Any]], object]]] = {
    "window_ignored": ("mistral", {"sliding_window": 6}, without_window),
    "window_ignored_in_some_layers": ("gemma3_text", {}, without_window),
    "softcap_dropped": ("gemma2", {"attn_logit_softcapping": 0.2, "query_pre_attn_scalar": 1}, without_softcap),
    "mask_ignored": ("llama", {}, without_mask),
}


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_attention_is_refused(fault: str, dtype: torch.dtype) -> None:
    """Negative controls: without them a limit that follows the policy's own rounding could let anything pass."""
    family, options, tamper = FAULTS[fault]
    model = tiny_model(family, dtype=dtype, **options)
    with tampered_attention(nothing):
        check(model)
    with tampered_attention(tamper), pytest.raises(UnsupportedModelError, match=r"next-token distributions|window"):
        check(model)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_positions_that_are_off_by_one_are_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A step that counts from the wrong slot turns its queries away from the keys before it."""
    model = tiny_model("llama", dtype=dtype)
    make = PolicyReplica._complete

    def shifted(self: PolicyReplica, tree: PreTrainedModel) -> PreTrainedModel:
        def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            if not kwargs["past_key_values"].fresh:
                kwargs["position_ids"] = kwargs["position_ids"] + 1
            return args, kwargs

        if tree.config._attn_implementation == IMPLEMENTATION:
            tree.register_forward_pre_hook(shift, with_kwargs=True)
        return make(self, tree)

    monkeypatch.setattr(PolicyReplica, "_complete", shifted)
    with pytest.raises(UnsupportedModelError, match="next-token distributions"):
        check(model)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_wrong_share_of_rotary_dimensions_is_refused(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A replica of a config that lost `partial_rotary_factor` would rotate all of each head."""
    model = tiny_model("gpt_neox", dtype=dtype)
    make = PolicyReplica._complete

    def forgetful(self: PolicyReplica, tree: PreTrainedModel) -> PreTrainedModel:
        if tree.config._attn_implementation == IMPLEMENTATION:
            rotary: Any = tree.base_model.rotary_emb
            head_dim = tree.config.hidden_size // tree.config.num_attention_heads
            assert 2 * len(rotary.inv_freq) < head_dim
            rotary.inv_freq = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        return make(self, tree)

    check(model)
    monkeypatch.setattr(PolicyReplica, "_complete", forgetful)
    with pytest.raises(UnsupportedModelError, match="next-token distributions"):
        check(model)


# Policies that compute something of their own


def flip(module: nn.Module, args: Any, output: Any) -> Any:
    return -output


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_hook(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.0.mlp").register_forward_hook(flip)


def with_subclass(model: PreTrainedModel) -> None:
    model.get_submodule("model.layers.1.self_attn.o_proj").__class__ = Doubling


def with_patched_forward(model: PreTrainedModel) -> None:
    norm: Any = model.get_submodule("model.norm")
    forward = norm.forward
    norm.forward = lambda x: 3 * forward(x)


OWN = {
    "hook": (with_hook, "`model.layers.0.mlp` has a forward hook"),
    "subclass": (with_subclass, "`model.layers.1.self_attn.o_proj` is a Doubling"),
    "patched": (with_patched_forward, "`model.norm` has a forward of its own"),
}


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("kind", OWN)
def test_what_the_replica_does_not_run_is_refused_by_name(kind: str, mode: str) -> None:
    """The check used to compare the replica with itself: such policies were sampled from another distribution."""
    model = tiny_model("llama", dtype=BF16 if mode == "bf16" else FP32)
    change, cause = OWN[kind]
    change(model)
    with pytest.raises(UnsupportedModelError, match=re.escape(cause)):
        check(model, BF16 if mode == "autocast" else None)


def test_quanto_layers_that_are_not_frozen_are_refused() -> None:
    """They quantize in their forward; the weight that the replica shares is not the one that counts."""
    from optimum.quanto import qint4, quantize

    model = tiny_model("llama")
    quantize(model, weights=qint4)
    with pytest.raises(UnsupportedModelError, match="QLinear"):
        SelfSpecEngine(model)


def test_a_model_in_training_mode_is_checked_without_its_noise_and_left_as_it_was() -> None:
    """NEFTune's hook crashed the check, and dropout would have failed it."""
    model = tiny_model("qwen2", attention_dropout=0.5).train()
    activate_neftune(model, 5.0)
    model.get_submodule("model.layers.1").eval()
    before = [module.training for module in model.modules()]
    engine = SelfSpecEngine(model)
    assert [module.training for module in model.modules()] == before
    assert engine.generate([[5, 6, 7]], GREEDY, seed=0).completion_ids == plain(model.eval(), [[5, 6, 7]])


def test_tokens_that_are_ruled_out_by_the_head_are_never_drawn() -> None:
    """`-inf` in a head's bias is a distribution like any other; it was refused as not finite."""
    model = tiny_model("phi", partial_rotary_factor=0.5)
    with torch.no_grad():
        model.lm_head.bias[48:] = -torch.inf
    engine = SelfSpecEngine(model, SelfSpecOptions(num_speculative_tokens=3, max_active_sequences=64))
    prompts = ragged_prompts([3, 9, 5])
    assert engine.generate(prompts, GREEDY, seed=0).completion_ids == plain(model, prompts)
    sampled = engine.generate(prompts, GenerationConfig(max_new_tokens=32, do_sample=True), seed=0)
    assert max(map(max, sampled.completion_ids)) < 48
    assert all(math.isfinite(value) for row in sampled.logprobs for value in row)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_of_their_own(value: float) -> None:
    """A policy that diverged must not read as an architecture that does not fit."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(ValueError, match="not finite") as error:
        check(model)
    assert not isinstance(error.value, UnsupportedModelError)


def test_offloaded_weights_are_refused_by_name() -> None:
    """`accelerate.cpu_offload` leaves weights on the meta device, and random numbers in their place."""
    from accelerate import cpu_offload

    model = cpu_offload(tiny_model("llama"), execution_device="cpu")
    with pytest.raises(UnsupportedModelError, match="cpu_offload"):
        SelfSpecEngine(model)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_other_accelerators_are_refused_by_name(device: str) -> None:
    """They have no float64, which the random numbers need; a TypeError in the first round says nothing of that."""
    parameter = SimpleNamespace(device=SimpleNamespace(type=device))
    with pytest.raises(UnsupportedModelError, match=f"on {device}"):
        refusals._refuse_device(SimpleNamespace(parameters=lambda: [parameter], modules=list))  # type: ignore[arg-type]


def test_the_statistic_does_not_grow_with_the_vocabulary() -> None:
    """The former one, the largest difference of a logit, does: the negative control."""
    generator = torch.Generator().manual_seed(0)

    def measured(vocab_size: int) -> tuple[float, float]:
        logits = torch.randn(200, vocab_size, generator=generator)
        other = logits + 0.03 * torch.randn(200, vocab_size, generator=generator)
        return selfcheck._distance([other], [logits], exact=False), (other - logits).abs().amax(-1).median().item()

    (small, small_maximum), (large, large_maximum) = measured(512), measured(65_536)
    assert large < 1.1 * small
    assert large_maximum > 1.3 * small_maximum


def plain(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    rows = [model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0] for prompt in prompts]  # type: ignore[operator]
    return [row[len(prompt) :].tolist() for row, prompt in zip(rows, prompts, strict=True)]
