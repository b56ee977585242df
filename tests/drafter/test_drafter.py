"""Laws of the drafter's two forms: what is quantized when, and that both draft from the current policy."""

import pytest
import torch
from adapted import SWITCHES, adapted, difference, greedy, speculating, stir, two_adapters
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from trl_selfspec.drafter.drafter import LiveLoraLinear, QuantizedRows, drafter_bytes, make_drafter, requantize
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.policy import peft_weights as adapters
from trl_selfspec.policy.replica import PolicyReplica


FP32_TOLERANCE = 1e-4


def codes(tree: nn.Module) -> dict[str, Tensor]:
    layers = {name: module for name, module in tree.named_modules() if isinstance(module, QuantizedLinear)}
    return {f"{name}.{key}": buffer for name, layer in layers.items() for key, buffer in layer.named_buffers()}


@pytest.fixture
def requantized(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedLinear]:
    """Collects the layers that are quantized."""
    layers: list[QuantizedLinear] = []
    original = QuantizedLinear.requantize_

    def recorded(layer: QuantizedLinear, weight: Tensor, first_row: int = 0, derive: bool = True) -> None:
        layers.append(layer)
        original(layer, weight, first_row, derive)

    monkeypatch.setattr(QuantizedLinear, "requantize_", recorded)
    return layers


@pytest.mark.parametrize("live", [False, True])
def test_only_layers_that_changed_are_quantized_again(live: bool, requantized: list[QuantizedLinear]) -> None:
    """Prevents a refresh that quantizes frozen weights over and over, and one that skips what is trained."""
    policy = adapted(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    replica = PolicyReplica(policy)
    tree = make_drafter(replica, "qint8", live_adapters=live)
    requantize(tree, replica)
    assert len(requantized) == 15
    requantized.clear()
    stir(policy, seed=5)
    replica.refresh()
    requantize(tree, replica)
    assert len(requantized) == (1 if live else 5)
    fresh = make_drafter(replica, "qint8", live_adapters=live)
    requantize(fresh, replica)
    assert all(map(torch.equal, codes(tree).values(), codes(fresh).values()))
    assert difference(draft_logits(tree), draft_logits(fresh)) == 0


def test_trained_weights_are_always_quantized_again(requantized: list[QuantizedLinear]) -> None:
    """Prevents a drafter that stays behind an optimizer which writes past the version counters."""
    model = tiny_model("llama")
    replica = PolicyReplica(model)
    tree = make_drafter(replica, "qint8")
    for _ in range(2):
        requantize(tree, replica)
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
    replica = PolicyReplica(policy)
    tree = make_drafter(replica, "qint8", live_adapters=True)
    requantize(tree, replica)
    for seed in (5, 6):
        for name, layer in tree.named_modules():
            if isinstance(layer, LiveLoraLinear):
                source = adapters.find_module(replica.base, name)
                merged = replica.model.get_submodule(name).weight.float()
                apart = layer.dequantize().float() + layer.up.float() @ layer.down.float()
                rounding = (layer.dequantize().float() - source.base_layer.weight.float()).abs().max()
                assert difference(apart, merged) < rounding + 0.02 * merged.abs().max()
                x = torch.randn(5, layer.in_features).to(dtype)
                expected = x.float() @ apart.T + (0 if layer.bias is None else layer.bias.float())
                assert difference(layer(x).float(), expected) < 0.02 * expected.abs().max()
        stir(policy, seed)
        replica.refresh()
        requantize(tree, replica)
    assert any(isinstance(module, LiveLoraLinear) for module in tree.modules())


def test_live_adapters_follow_switches(requantized: list[QuantizedLinear]) -> None:
    """Prevents a drafter with the adapter that was active before, or with its leftovers on top of a merged weight."""
    policy = two_adapters()
    replica = PolicyReplica(policy)
    tree = make_drafter(replica, "qint8", live_adapters=True)
    requantize(tree, replica)
    for change in ("set_adapter", "scaled", "disabled", "enabled", "merged"):
        (SWITCHES | {"enabled": lambda policy: policy.base_model.enable_adapter_layers()})[change](policy)
        replica.refresh()
        requantize(tree, replica)
        fresh = make_drafter(replica, "qint8", live_adapters=True)
        requantize(fresh, replica)
        assert difference(draft_logits(tree), draft_logits(fresh)) < FP32_TOLERANCE, change


def test_the_engine_drafts_with_live_adapters() -> None:
    """Prevents a form that is never accepted: live adapters are not quantized, so it drafts no worse than merged."""
    policy = adapted()
    engines = [speculating(policy) for _ in range(3)]
    for live, engine in zip((False, True, True), engines, strict=True):
        engine._drafter = make_drafter(engine._replica, engine.draft_qtype, live_adapters=live)
    expected, merged = greedy(engines[0])
    tokens, alpha = greedy(engines[1])
    assert tokens == expected
    assert alpha > merged - 0.1
    requantize(engines[2]._drafter, engines[2]._replica)
    for module in engines[2]._drafter.modules():
        if isinstance(module, LiveLoraLinear):
            module.up.neg_()
    engines[2]._drafter_version = engines[2]._wanted_version
    tokens, broken = greedy(engines[2])
    assert tokens == expected
    assert broken < alpha - 0.2, "negative control: adapters of the wrong sign draft badly"


def test_live_adapters_count_as_the_drafters_memory() -> None:
    """Prevents a figure that leaves them out."""
    replica = PolicyReplica(adapted())
    merged, live = (make_drafter(replica, "qint8", live_adapters=flag) for flag in (False, True))
    for tree in (merged, live):
        requantize(tree, replica)
    factors = [f for m in live.modules() if isinstance(m, LiveLoraLinear) for f in (m.down, m.up)]
    assert drafter_bytes(live) - drafter_bytes(merged) == sum(factor.nbytes for factor in factors) > 0


def test_layers_present_the_weight_that_they_compute_with() -> None:
    """Prevents drafts from another weight in models that read it themselves, as some routers do."""
    x, bias = torch.randn(5, 64), nn.Parameter(torch.randn(24), requires_grad=False)
    whole = LiveLoraLinear(64, 24, bias, "qint8", torch.float32, "cpu")
    whole.requantize_(torch.randn(24, 64))
    part = QuantizedRows(whole, 8, 16)
    torch.testing.assert_close(part(x), F.linear(x, part.weight, part.bias))
    base = whole.weight
    whole.follow((torch.randn(2, 64), torch.randn(24, 2)))
    assert not torch.equal(whole.weight, base)
    torch.testing.assert_close(whole(x), F.linear(x, whole.weight, whole.bias))
