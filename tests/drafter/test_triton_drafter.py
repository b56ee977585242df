"""The drafter on Triton's kernels: projections of one input are rows of one quantized layer."""

import pytest
import torch
from adapted import adapted, stir
from decoding import decoded, relative_error, unfused
from tiny_models import ragged_prompts, scale_weights, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationConfig
from triton_cases import DEVICE, forced

from trl_selfspec.drafter.linear_backends import TritonInt4
from trl_selfspec.drafter.quantized_drafter import (
    QuantizedRows,
    drafter_bytes,
    make_drafter,
    quantized_layers,
    requantize,
)
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.policy.replica import PolicyReplica


PAGE = 16
TOLERANCE = 1e-4  # fp32 sums in another order
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def _kernels_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch)


def drafter(replica: PolicyReplica, qtype: str = "qint8", joined: bool = True) -> nn.Module:
    with pytest.MonkeyPatch.context() as patch:
        if not joined:
            patch.setattr(gpu, "runs_triton", lambda device: False)
        tree = make_drafter(replica, qtype)
        requantize(tree, replica)
        return tree


def wholes(tree: nn.Module) -> dict[nn.Module, list[QuantizedRows]]:
    parts: dict[nn.Module, list[QuantizedRows]] = {}
    for module in tree.modules():
        if isinstance(module, QuantizedRows):
            parts.setdefault(module.whole, []).append(module)
    return parts


def dequantized(tree: nn.Module) -> dict[str, Tensor]:
    return {
        name: layer.whole.dequantize()[layer.rows] if isinstance(layer, QuantizedRows) else layer.dequantize()
        for name, layer in quantized_layers(tree)
    }


@pytest.mark.parametrize("qtype", ["qint4", "qint8", "qfloat8"])
def test_joining_changes_no_code(qtype: str) -> None:
    """Scales belong to rows: a layer quantized with others is quantized as alone, after every change."""
    model = tiny_model("qwen2").to(DEVICE)
    replica = PolicyReplica(model)
    tree = drafter(replica, qtype)
    assert [len(parts) for parts in wholes(tree).values()] == [3, 2, 3, 2]
    for seed in (1, 2):
        apart = dequantized(drafter(replica, qtype, joined=False))
        joined = dequantized(tree)
        assert joined.keys() == apart.keys()
        assert all(torch.equal(joined[name], apart[name]) for name in apart)
        scale_weights(model, seed)
        replica.refresh()
        requantize(tree, replica)


def test_a_joined_drafter_gives_what_its_modules_give() -> None:
    """Biases included, which are copied where the layer is not the policy's alone."""
    model = tiny_model("qwen2").to(DEVICE)
    replica = PolicyReplica(model)
    tree = drafter(replica)
    for seed in (1, 2):
        scale_weights(model, seed)
        replica.refresh()
        requantize(tree, replica)
        actual = decoded(tree, 1, 2, PAGE)
        apart = unfused(drafter(replica, joined=False))  # type: ignore[arg-type]
        assert relative_error(actual, decoded(apart, 1, 2, PAGE)) <= TOLERANCE
    biases = [whole.bias for whole in wholes(tree) if whole.bias is not None]
    assert len(biases) == 2
    with torch.no_grad():
        biases[0].zero_()
    assert relative_error(decoded(tree, 1, 2, PAGE), actual) > 0.1, "negative control"


def test_a_part_is_quantized_when_it_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA policy trains some of the projections; and the drafter holds no byte more than apart, biases aside."""
    policy = adapted(target_modules=["q_proj", "v_proj"]).to(DEVICE)
    replica = PolicyReplica(policy)
    tree, calls = drafter(replica), []
    original = QuantizedRows.requantize_

    def recorded(part: QuantizedRows, weight: Tensor, repack: bool = True) -> None:
        calls.append(part)
        original(part, weight, repack)

    monkeypatch.setattr(QuantizedRows, "requantize_", recorded)
    stir(policy, seed=5)
    replica.refresh()
    requantize(tree, replica)
    expected = [tree.get_submodule(f"model.layers.{i}.self_attn.{n}_proj") for i in range(2) for n in "qv"]
    assert calls == expected
    biases = sum(whole.bias.nbytes for whole in wholes(tree) if whole.bias is not None)
    assert drafter_bytes(tree) == drafter_bytes(drafter(replica, joined=False)) + biases


@pytest.mark.parametrize("rows", [1, 5, 600])
def test_the_int4_backend_multiplies_by_the_quantized_weight(rows: int) -> None:
    """More rows than the kernel is made for go by the dequantized weight, unseen. Negative control: no bias."""
    dtype, bias = torch.float16, nn.Parameter(10 * torch.randn(70, device=DEVICE).half(), requires_grad=False)
    layer = QuantizedLinear(160, 70, bias, "qint4", dtype, DEVICE, TritonInt4)
    x = torch.randn(2, rows, 160, device=DEVICE).to(dtype)
    for scale in (1.0, 3.0):
        layer.requantize_(scale * torch.randn(70, 160, device=DEVICE))
        product, y = F.linear(x.double(), layer.dequantize().double()), layer(x).double()
        assert y.shape == (2, rows, 70)
        assert (y - product - bias.double()).norm() < 1e-3 * product.norm()
        assert (y - product).norm() > 1e-2 * product.norm()


def test_the_engine_speculates_with_them() -> None:
    """Prefill, drafts and verification through the same pages: greedy rows are the policy's own."""
    model = tiny_model("qwen2").to(DEVICE)
    options = SelfSpecOptions("qint8", num_speculative_tokens=2, max_active_sequences=8)
    engine = SelfSpecEngine(model, options)
    prompts = ragged_prompts([3, 7])
    output = engine.generate(prompts, GenerationConfig(max_new_tokens=5, do_sample=False), seed=0)
    assert output.stats.num_draft_tokens > 0 and output.stats.alpha > 0
    assert not engine.prefix_cache.cache.storage_in_rounds, "captured rounds would not outlive their pages"
    for prompt, tokens in zip(prompts, output.completion_ids, strict=True):
        ids = torch.tensor([prompt + tokens], device=DEVICE)
        with torch.no_grad():
            assert model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == tokens
