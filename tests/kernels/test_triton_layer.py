"""Whole decoder layers on Triton's kernels against the modules whose place they take: on a GPU, else interpreted."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoding import decoded, fast_forwards, relative_error, without_fast_forwards
from tiny_models import scale_weights, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from triton_cases import BF16, DEVICE, FP16, FP32, forced

from trl_selfspec.kernels import elementwise, gpu_layer
from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kernels.gpu_layer import GpuDecoderLayer, JoinedLinear, _joined
from trl_selfspec.kernels.norm import FastRMSNorm
from trl_selfspec.kv_cache.attention import _causal_attention, bind_cache
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.policy.replica import PolicyReplica, ReplicaLinear


# Sums in another order and other exponentials, through two layers and the head.
TOLERANCE = {FP32: 1e-4, FP16: 0.02, torch.bfloat16: 0.1}
PAGE = 16
# The interpreter's way to a loop's bounds.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.fixture(autouse=True)
def _kernels_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def policy(family: str = "llama", **values) -> PreTrainedModel:
    return tiny_model(family, **values).to(DEVICE)


def gpu_layers(tree: nn.Module) -> list[GpuDecoderLayer]:
    found = [forward.layer for forward in fast_forwards(tree)]
    assert all(isinstance(layer, GpuDecoderLayer) for layer in found)
    return found  # type: ignore[return-value]


def steps(model: PreTrainedModel, num_steps: int = 2, dtype: torch.dtype | None = None) -> Tensor:
    return decoded(model, num_steps, num_rows=2, page_size=PAGE, dtype=dtype)


def reference(replica: PolicyReplica, num_steps: int = 2) -> Tensor:
    """What the replica's modules give without Triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "runs_triton", lambda device: False)
        tree = without_fast_forwards(replica.tree())
        return steps(tree, num_steps, replica.autocast_dtype)


@pytest.mark.parametrize(
    ("family", "dtype", "num_steps"),
    [
        ("llama", FP32, 1),
        ("qwen2", FP16, 3),
        ("qwen3", FP32, 3),
        ("qwen3", FP16, 3),
        ("mistral", FP32, 3),
        ("smollm3", FP32, 2),
        *(
            pytest.param(family, torch.bfloat16, num_steps, marks=pytest.mark.gpu)
            for family in ("llama", "qwen2", "qwen3", "mistral", "smollm3")
            for num_steps in (1, 9, 17)
        ),
    ],
)
def test_a_layer_gives_what_its_modules_give(family: str, dtype: torch.dtype, num_steps: int) -> None:
    """Catches a wrong rotation, rounding, window or residual, and ragged rows that see each other."""
    replica = PolicyReplica(policy(family, dtype=dtype))
    assert len(gpu_layers(replica.model)) == 2
    actual = steps(replica.model, num_steps)
    assert relative_error(actual, reference(replica, num_steps)) <= TOLERANCE[dtype]
    scale_weights(replica.base, seed=1)
    replica.refresh()
    assert relative_error(actual, reference(replica, num_steps)) > 0.5, "negative control: other weights"


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(DEVICE, dtype=dtype, cache_enabled=False)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_an_fp32_policy_under_autocast(family: str, dtype: torch.dtype) -> None:
    """TRL's default: residuals and norms in fp32, projections in 16 bits, side by side in memory."""
    replica = PolicyReplica(policy(family), autocast_dtype=dtype)
    found = gpu_layers(replica.model)
    assert [layer.parts.hidden_dtype for layer in found] == [FP32, FP32]
    assert {layer.parts.dtype for layer in found} == {dtype}
    assert all(joined_weight(group) is not None for layer in found for group in (layer._qkv, layer._gate_up))
    with autocast(dtype):
        actual, expected = steps(replica.model, dtype=dtype), reference(replica)
    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    assert relative_error(actual, reference(PolicyReplica(replica.base))) > relative_error(actual, expected), (
        "negative control"
    )


def joined_weight(group: JoinedLinear) -> Tensor | None:
    return _joined([layer.weight for layer in group.layers])  # type: ignore[attr-defined]


def test_joined_projections_follow_the_policy() -> None:
    """Parts of one buffer are refreshed one by one; a copy that stays behind is noticed."""
    model = policy("qwen2")
    replica = PolicyReplica(model, autocast_dtype=FP16)
    scale_weights(model, seed=5)
    attention, source = replica.model.model.layers[1].self_attn, model.model.layers[1].self_attn
    assert not torch.equal(attention.k_proj.weight, source.k_proj.weight.half())
    replica.refresh()
    for name in ("q_proj", "k_proj", "v_proj"):
        for attribute in ("weight", "bias"):
            ours, theirs = (getattr(getattr(part, name), attribute) for part in (attention, source))
            assert torch.equal(ours, theirs.half())
    x = randn(3, 64).half()
    (layer, *_) = gpu_layers(replica.model)
    attention = replica.model.model.layers[0].self_attn
    expected = [linear(x) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    for actual, apart in zip(layer._qkv(x), expected, strict=True):
        torch.testing.assert_close(actual, apart)


def test_weights_of_the_policys_dtype_are_neither_copied_nor_moved() -> None:
    """An optimizer steps on the policy's own storage."""
    model = policy("qwen2")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    replica = PolicyReplica(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before
    assert {name: p.data_ptr() for name, p in replica.model.named_parameters()} == before
    (layer, *_) = gpu_layers(replica.model)
    assert joined_weight(layer._qkv) is None and len(layer._qkv(randn(2, 64))) == 3


def test_what_is_no_part_of_the_next_is_multiplied_apart() -> None:
    """Tensors of one storage that overlap, or lie in another order or apart, are not one matrix."""
    buffer = torch.arange(60.0).view(10, 6)
    first, second, third = buffer[:2], buffer[2:5], buffer[5:]
    whole = _joined([first, second, third])
    assert whole is not None and torch.equal(whole, buffer) and whole.data_ptr() == buffer.data_ptr()
    for tensors in ([second, first], [first, third], [first, first], [first, second.clone()], [first, None]):
        assert _joined(tensors) is None
    assert _joined([buffer[:, :3], buffer[:, 3:]]) is None


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("granite", {}),  # multiplies its residuals
        ("llama", {"hidden_act": "gelu"}),
        ("olmo2", {}),
    ],
)
def test_other_layers_keep_their_modules(family: str, overrides: dict) -> None:
    """Same parts do not make the same function: only a trial shows a multiplier or another activation."""
    assert not fast_forwards(PolicyReplica(policy(family, num_hidden_layers=1, **overrides)).model)


@pytest.mark.parametrize("broken", ["silu_mul", "rotate_and_write", "add_rms_norm"])
def test_a_kernel_that_goes_wrong_is_not_used(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that ran the twin alone would not see what the compiler made of the kernels."""
    from trl_selfspec.kernels.triton import elementwise as triton_elementwise

    original = getattr(triton_elementwise, broken)

    def wrong(*args: object) -> object:
        result = original(*args)
        return (result[0], 1.1 * result[1]) if isinstance(result, tuple) else 1.1 * result

    monkeypatch.setattr(triton_elementwise, broken, wrong)
    assert not fast_forwards(PolicyReplica(policy("llama", num_hidden_layers=1)).model)


def test_a_twin_that_rounds_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits close is not enough: the law is that of modules which round at given places."""

    def unrounded(gate: Tensor, up: Tensor) -> Tensor:
        return (nn.functional.silu(gate.float()) * up).to(gate.dtype)

    model = policy("llama", num_hidden_layers=1, dtype=FP16)
    assert len(fast_forwards(PolicyReplica(model).model)) == 1
    monkeypatch.setattr(elementwise, "silu_mul", unrounded)
    assert not fast_forwards(PolicyReplica(model).model)


@pytest.mark.parametrize("autocast_dtype", [None, FP16])
def test_a_step_is_few_launches(autocast_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kernel between products; a layer's last sum goes with the next norm, also with the one before the head."""
    from trl_selfspec.kernels.triton import elementwise as triton_elementwise

    replica = PolicyReplica(policy("llama"), autocast_dtype)
    launches: Counter[str] = Counter()
    for name in ("add_rms_norm", "rms_norm", "rotate_and_write", "silu_mul"):
        original = getattr(triton_elementwise, name)
        monkeypatch.setattr(triton_elementwise, name, counted(launches, name, original))
    monkeypatch.setattr(ReplicaLinear, "forward", counted(launches, "apart", ReplicaLinear.forward))
    monkeypatch.setattr(gpu_layer, "linear", counted(launches, "joined", gpu_layer.linear))
    cache = PagedCache(2, 1, PAGE, PAGE, autocast_dtype, DEVICE)
    cache.reserve(0, PAGE)
    bind_cache(replica.model, cache)
    for position in range(2):  # the first allocates, in the layers' own modules
        launches.clear()
        positions = torch.tensor([[position]], device=DEVICE)
        cache.begin(positions, PAGE)
        with torch.no_grad():
            replica.model(input_ids=positions + 5, position_ids=positions, past_key_values=cache, use_cache=True)
    products = {"joined": 2 * 2, "apart": 2 * 2 + 1} if autocast_dtype else {"apart": 2 * 7 + 1}
    assert launches == {"add_rms_norm": 1 + 2 * 2, "rotate_and_write": 2, "silu_mul": 2} | products


def counted(counter: Counter[str], name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        counter[name] += 1
        return original(*args, **kwargs)

    return call


def test_a_norm_in_advance_is_that_of_the_very_tensor() -> None:
    """A model may change hidden states between its layers, in place or not."""
    norm = FastRMSNorm(nn.Parameter(randn(16)), 1e-6)
    x = randn(2, 16)
    foreseen, fresh = torch.zeros(2, 16), norm(x)
    norm.foresee(x, foreseen)
    assert norm(x) is foreseen
    assert torch.equal(norm(x), fresh), "once"
    norm.foresee(x, foreseen)
    assert torch.equal(norm(x.clone()), fresh)
    norm.foresee(x, foreseen)
    x += 1
    assert torch.equal(norm(x), FastRMSNorm(norm.weight, 1e-6)(x))
    with torch.inference_mode():
        y = randn(2, 16)
        norm.foresee(y, foreseen)
        assert norm(y) is not foreseen


def test_a_kernel_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Layers that run module by module take twice as long, and nothing else would tell why."""
    from trl_selfspec.kernels.triton import elementwise as kernels

    def broken(*args) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(kernels, "silu_mul", broken)
    assert not gpu_layers(PolicyReplica(policy()).model)
    (told,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "LlamaDecoderLayer runs module by module" in told and "out of resources" in told


@pytest.mark.gpu
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16])
def test_a_captured_step_outlives_its_pages(autocast_dtype: torch.dtype | None) -> None:
    """Keys and values are freed for training and allocated anew; a host sync would fail the capture."""
    replica = PolicyReplica(policy("qwen3", dtype=FP32 if autocast_dtype else torch.bfloat16), autocast_dtype)
    cache = PagedCache(2, 2, PAGE, PAGE, torch.bfloat16, DEVICE)
    for row in range(2):
        cache.reserve(row, PAGE)
    bind_cache(replica.model, cache)
    positions = torch.tensor([[3], [5]], device=DEVICE)

    def step() -> Tensor:
        cache.begin(positions, PAGE)
        return replica.model(
            input_ids=positions + 5, position_ids=positions, past_key_values=cache, use_cache=True
        ).logits

    for _ in range(2):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    kept = []
    for pages in cache.pages_of:
        kept.append((pages.keys, pages.values))  # not to be taken by the next ones
        pages._put(pages.keys.roll(1, 0) + 1, pages.values.roll(1, 0) + 1)
    before = captured.clone()
    graph.replay()
    replayed = captured.clone()
    assert not torch.equal(replayed, before)
    assert relative_error(replayed, step()) <= TOLERANCE[torch.bfloat16]


@pytest.mark.gpu
def test_a_prefill_repeats_no_keys() -> None:
    """Seven copies of a long prompt's keys would be more memory than all else in a layer."""
    query, (key, value) = randn(1, 28, 4096, 128).bfloat16(), randn(2, 1, 4, 4096, 128).bfloat16()
    _causal_attention(query, key, value, 0.1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = _causal_attention(query, key, value, 0.1)
    assert torch.cuda.max_memory_allocated() - before < out.nbytes + 2 * key.nbytes
    repeated = (states.repeat_interleave(7, 1) for states in (key, value))
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True, scale=0.1)
    torch.testing.assert_close(out, expected, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("length", [1, 7, 40])
def test_grouped_heads_of_a_prefill_read_their_own_keys(dtype: torch.dtype, length: int) -> None:
    """Head h reads keys h // G, not h % K."""
    query, (key, value) = randn(2, 6, length, 16).to(dtype), randn(2, 2, 2, length, 16).to(dtype)
    repeated = [states.repeat_interleave(3, 1) for states in (key, value)]
    expected = nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=length > 1)
    out = _causal_attention(query, key, value, 0.25)
    torch.testing.assert_close(out, expected)
    assert not torch.allclose(out, _causal_attention(query, key.flip(1), value.flip(1), 0.25)), "negative control"
