"""Laws of the drafter: what is quantized when, that it drafts from the current policy, and that it ends no run."""

from typing import Any

import pytest
import torch
from adapted import SWITCHES, adapted, difference, stir, two_adapters
from peft import PeftModel
from tiny_models import Schedule, quantized_drafter, ragged_prompts, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig

from trl_selfspec.drafter import quantized_drafter as drafters
from trl_selfspec.drafter.quantized_drafter import (
    DraftError,
    QuantizedDrafter,
    QuantizedRows,
    drafter_bytes,
    make_drafter,
    quantized_layers,
    requantize,
)
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.engine.engine import RolloutOutput, SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.policy.replica import PolicyReplica


PROMPTS = ragged_prompts([3, 7, 12])
CONFIG = GenerationConfig(max_new_tokens=12, do_sample=True, top_k=0)


def buffers(tree: nn.Module) -> list[Tensor]:
    return [buffer for module in tree.modules() if isinstance(module, QuantizedLinear) for buffer in module.buffers()]


@pytest.fixture
def requantized(monkeypatch: pytest.MonkeyPatch) -> list[QuantizedLinear]:
    """Collects the layers that are quantized."""
    layers: list[QuantizedLinear] = []
    original = QuantizedLinear.requantize_

    def recorded(layer: QuantizedLinear, weight: Tensor, first_row: int = 0, repack: bool = True) -> None:
        layers.append(layer)
        original(layer, weight, first_row, repack)

    monkeypatch.setattr(QuantizedLinear, "requantize_", recorded)
    return layers


def test_only_layers_that_changed_are_quantized_again(requantized: list[QuantizedLinear]) -> None:
    """Prevents a refresh that quantizes frozen weights over and over, and one that skips what is trained."""
    policy = adapted(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    replica = PolicyReplica(policy)
    tree = make_drafter(replica, "qint8")
    requantize(tree, replica)
    assert len(requantized) == 15
    requantized.clear()
    stir(policy, seed=5)
    replica.refresh()
    requantize(tree, replica)
    assert len(requantized) == 5
    fresh = make_drafter(replica, "qint8")
    requantize(fresh, replica)
    assert all(map(torch.equal, buffers(tree), buffers(fresh)))


def test_trained_weights_are_always_quantized_again(requantized: list[QuantizedLinear]) -> None:
    """Prevents a drafter that stays behind an optimizer which writes past the version counters."""
    model = tiny_model("llama")
    replica = PolicyReplica(model)
    tree = make_drafter(replica, "qint8")
    for _ in range(2):
        requantize(tree, replica)
        model.lm_head.weight.data.add_(1.0)
    assert len(requantized) == 30


def test_a_drafter_has_the_weights_of_the_adapters_that_count() -> None:
    """Prevents a drafter with the adapter that was active before, or without any."""
    policy = two_adapters()
    replica = PolicyReplica(policy)
    tree = make_drafter(replica, "qint8")
    requantize(tree, replica)
    before = {name: layer.weight for name, layer in quantized_layers(tree)}
    for change in ("set_adapter", "scaled", "disabled", "enabled", "merged"):
        (SWITCHES | {"enabled": lambda policy: policy.base_model.enable_adapter_layers()})[change](policy)
        replica.refresh()
        requantize(tree, replica)
        now = {name: layer.weight for name, layer in quantized_layers(tree)}
        for name, weight in now.items():
            merged = replica.model.get_submodule(name).weight
            assert difference(weight, merged) < 0.01 * merged.abs().max(), (change, name)
        adapted_layer = "model.layers.0.self_attn.q_proj"
        moved = difference(now[adapted_layer], before[adapted_layer])
        assert (moved > 0.01) == (change != "merged"), "negative control: what the last adapters gave"
        before = now


def drafting(policy: PeftModel, draft_length: int = 3) -> SelfSpecEngine:
    """An engine that drafts in every round."""
    engine = SelfSpecEngine(policy, SelfSpecOptions("qint8", verification="coupled"))
    engine.controller = Schedule(draft_length)  # type: ignore[assignment]
    return engine


def sample(engine: SelfSpecEngine) -> RolloutOutput:
    engine.refresh()
    return engine.generate(PROMPTS, CONFIG, seed=7)


def test_samples_are_those_of_plain_sampling_whatever_the_adapters() -> None:
    """Prevents a drafter that changes what the policy says, or stays behind; adapters change before each rollout."""
    policy = two_adapters()
    engine, plain = drafting(policy), drafting(policy, draft_length=0)
    texts = []
    for change in (lambda policy: None, stir, SWITCHES["set_adapter"], SWITCHES["disabled"], SWITCHES["scaled"]):
        change(policy)
        output = sample(engine)
        assert output.completion_ids == sample(plain).completion_ids
        assert output.stats.draft_steps == 3 * output.stats.num_rounds_speculative > 0
        assert output.stats.alpha > 0.5, "the drafter has the policy's weights"
        texts.append(output.completion_ids)
    assert texts[0] != texts[1] != texts[2] != texts[3]


def test_a_drafter_that_is_left_behind_drafts_badly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the acceptance above tells a drafter that is kept current from one that is not."""
    policy = two_adapters()
    engine = drafting(policy)
    good = sample(engine).stats.alpha
    monkeypatch.setattr(drafters, "requantize", lambda drafter, replica: None)
    stir(policy, std=0.5)
    assert sample(engine).stats.alpha < good - 0.2


def test_what_a_drafter_shares_is_not_counted() -> None:
    """Prevents copies of embeddings and norms, and a figure that leaves out what is held."""
    engine = drafting(adapted())
    assert engine.drafter_bytes == 0
    output = sample(engine)
    drafter = quantized_drafter(engine).module
    assert drafter is not None
    own = {name: parameter.data_ptr() for name, parameter in drafter.named_parameters()}
    target = {name: parameter.data_ptr() for name, parameter in engine._replica.model.named_parameters()}
    assert own
    assert own.items() <= target.items()
    held = sum(buffer.nbytes for buffer in buffers(drafter))
    assert output.stats.drafter_bytes == engine.drafter_bytes == held + engine.drafters["suffix"].nbytes


def test_a_drafter_is_built_once_and_quantized_when_asked_for(requantized: list[QuantizedLinear]) -> None:
    """Prevents a price that every rollout pays, and drafts from weights of many steps ago."""
    model = tiny_model("llama")
    replica = PolicyReplica(model)
    manager = QuantizedDrafter(replica, "qint8")
    assert (manager.module, manager.is_ready, manager.nbytes) == (None, False, 0)
    seconds, was_there = manager.prepare()
    assert seconds > 0
    assert (was_there, manager.is_ready, len(requantized)) == (False, True, 15)
    module = manager.module
    assert module is not None
    assert manager.nbytes == drafter_bytes(module) > 0
    assert manager.prepare()[1]
    assert len(requantized) == 15
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    replica.refresh()
    assert manager.is_ready, "older weights may draft until new ones are asked for"
    manager.request_update()
    assert not manager.is_ready
    assert manager.prepare()[1]
    assert (manager.module, manager.is_ready, len(requantized)) == (module, True, 30)


class OfSomeCompiler(Exception):
    """No class of Python's or torch's."""


ERRORS = [
    torch.OutOfMemoryError("20 GiB"),
    NotImplementedError("no such op"),
    AttributeError("x"),
    OfSomeCompiler("y"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["make_drafter", "requantize"])
def test_whatever_fails_is_a_draft_error(error: Exception, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents the end of a run that needs no drafter; it can be tried again, with weights that are all current."""
    manager = QuantizedDrafter(PolicyReplica(tiny_model("llama")), "qint8")
    manager.prepare()
    manager.module, manager.wanted_version = None if place == "make_drafter" else manager.module, 99

    def failing(*args: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(drafters, place, failing)
        with pytest.raises(DraftError, match=f"{type(error).__name__}: ") as raised:
            manager.prepare()
    assert raised.value.__cause__ is error
    assert (manager.module, manager.is_ready) == (None, False)
    assert not manager.prepare()[1]
    assert manager.is_ready


def test_an_interrupt_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl+C while the drafter is quantized must stop the run."""

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(drafters, "requantize", interrupt)
    with pytest.raises(KeyboardInterrupt):
        QuantizedDrafter(PolicyReplica(tiny_model("llama")), "qint8").prepare()


@pytest.mark.parametrize("qtype", ["qint4", "qint8"])
def test_the_price_of_quantizing_is_that_of_all_weights(qtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prevents a gate that opens at the price of one layer, or at that of importing quanto."""
    replica = PolicyReplica(tiny_model("llama"))
    manager = QuantizedDrafter(replica, qtype)
    assert 0 < manager.estimate_seconds() < 60
    quantized: list[int] = []

    class FakeClock:
        def __init__(self, device: torch.device) -> None: ...

        def mark(self) -> None: ...

        def laps(self) -> list[float]:
            return [5.0, 2.0, 3.0]

    def recorded(weight: nn.Module, source: Tensor) -> None:
        quantized.append(source.numel())

    monkeypatch.setattr(drafters, "Clock", FakeClock)
    monkeypatch.setattr("trl_selfspec.drafter.quantized_weight.QuantizedWeight.quantize_", recorded)
    total = sum(
        replica.model.get_submodule(name).weight.numel() for name, _ in quantized_layers(make_drafter(replica, qtype))
    )
    assert manager.estimate_seconds() == pytest.approx(2.0 * total / quantized[0])
    assert len(quantized) == drafters.TIMED_CALLS


def test_a_part_presents_the_weight_that_it_computes_with() -> None:
    """Prevents drafts from another weight in models that read it themselves, as some routers do."""
    x, bias = torch.randn(5, 64), nn.Parameter(torch.randn(24), requires_grad=False)
    whole = QuantizedLinear(64, 24, bias, "qint8", torch.float32, "cpu")
    whole.requantize_(torch.randn(24, 64))
    part = QuantizedRows(whole, 8, 16)
    torch.testing.assert_close(part(x), F.linear(x, part.weight, part.bias))
    torch.testing.assert_close(whole(x), F.linear(x, whole.weight, whole.bias))
