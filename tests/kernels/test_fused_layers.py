"""Decoder layers in one call against the modules whose place they take."""

import copy

import pytest
import torch
from decoding import CAPACITY, LENGTHS, decoded, fused_forwards, relative_error, unfused
from pairwise import pairwise
from tiny_models import tiny_model
from torch import Tensor, nn

from trl_selfspec import kernels
from trl_selfspec.drafter.quantized_drafter import make_drafter, requantize
from trl_selfspec.kernels.cpu import machine
from trl_selfspec.kernels.cpu.layer import MAX_TOKENS
from trl_selfspec.kv_cache.attention import bind_cache
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.policy import fused_layers as layers
from trl_selfspec.policy.replica import PolicyReplica


BF16, FP32 = torch.bfloat16, torch.float32
# Exponentials that differ in the last bit, through two layers and the head.
TOLERANCE = {FP32: 1e-5, BF16: 0.03}

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no C compiler or no AVX2")


@pytest.mark.usefixtures("instruction_set")
@pairwise(
    indirect=["instruction_set"],
    instruction_set=["avx2", "avx512_bf16"],
    family=["llama", "qwen2", "qwen3", "mistral", "smollm3"],
    dtype=[FP32, BF16],
    num_steps=[1, 2, 6],
)
def test_a_layer_in_one_call_gives_what_its_modules_give(family: str, dtype: torch.dtype, num_steps: int) -> None:
    """Catches a wrong rotation, rounding, window or residual, and ragged rows that see each other."""
    replica = PolicyReplica(tiny_model(family, dtype=dtype))
    actual = decoded(replica.model, num_steps)
    assert len(fused_forwards(replica.model)) == 2
    expected = decoded(unfused(replica.tree()), num_steps)
    assert relative_error(actual, expected) <= TOLERANCE[dtype]
    other = decoded(unfused(PolicyReplica(tiny_model(family, seed=1, dtype=dtype)).model), num_steps)
    assert relative_error(actual, other) > 0.5  # negative control: other weights


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_drafters_layer_in_one_call_gives_what_its_modules_give(dtype: torch.dtype) -> None:
    """int4 weights, scales and head sizes go through the same call."""
    replica = PolicyReplica(tiny_model("qwen2", dtype=dtype))
    drafter = make_drafter(replica, "qint4")
    requantize(drafter, replica)
    actual = decoded(drafter, 2)
    assert len(fused_forwards(drafter)) == 2
    assert relative_error(actual, decoded(unfused(drafter), 2)) <= TOLERANCE[dtype]
    assert relative_error(actual, decoded(replica.model, 2)) > TOLERANCE[dtype]  # negative control: not quantized


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_row_does_not_see_its_neighbours(dtype: torch.dtype) -> None:
    """A row's tokens would depend on the batch it happens to be in."""
    model = PolicyReplica(tiny_model("qwen2", dtype=dtype)).model
    together = decoded(model, 2, 1)
    torch.set_num_threads(3)
    try:
        assert torch.equal(together, decoded(model, 2, 1))
    finally:
        torch.set_num_threads(1)
    cache = PagedCache(2, len(LENGTHS), CAPACITY)
    bind_cache(model, cache)
    hidden = torch.randn(len(LENGTHS), 2, 64).to(dtype)
    angles = torch.randn(len(LENGTHS), 2, 16).to(dtype)

    def step(rows: slice) -> Tensor:
        positions = torch.arange(2).expand(len(hidden[rows]), 2)
        cache.begin(positions, CAPACITY)
        return model.model.layers[0](hidden[rows], position_embeddings=(angles[rows], angles[rows]))

    cache.pages_of[0].lazy_initialization(*[torch.zeros(1, 2, 1, 16, dtype=dtype)] * 2)
    everyone = step(slice(None))
    for count in range(1, len(LENGTHS)):
        assert torch.equal(step(slice(count)), everyone[:count])


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("granite", {}),  # multiplies its residuals
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 8}),  # half a head is no whole vector
        ("gemma2", {"num_hidden_layers": 2}),
        ("olmo2", {}),
        ("qwen3_moe", {}),
    ],
)
def test_other_layers_keep_their_modules(family: str, overrides: dict) -> None:
    """Same parts do not make the same function: only a trial shows a multiplier or another activation."""
    tree = PolicyReplica(tiny_model(family, **overrides)).model
    decoded(tree, 2)
    assert not fused_forwards(tree)


def test_parts_that_start_out_neutral_are_noticed() -> None:
    """A parameter that is zero today passes every trial, and is trained tomorrow."""

    class Gated(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.__dict__.update(copy.copy(layer).__dict__)
            self._parameters = {"gate": nn.Parameter(torch.zeros(1))}

    layer = unfused(PolicyReplica(tiny_model("llama")).model).model.layers[0]
    assert layers._cpu_layer(layer) is not None
    assert layers._cpu_layer(Gated(layer)) is None


def test_the_trial_leaves_weights_as_they_were() -> None:
    """It runs with random weights in the place of the replica's, which are the policy's own."""
    policy = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    replica = PolicyReplica(policy)
    decoded(replica.model, 2)
    assert fused_forwards(replica.model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    source = policy.model.layers[0].self_attn.q_proj.weight
    assert replica.model.model.layers[0].self_attn.q_proj.weight.data_ptr() == source.data_ptr()


def test_a_layer_follows_weights_that_move() -> None:
    """An optimizer may put a parameter elsewhere: a remembered address would read freed memory."""
    policy = tiny_model("qwen3")
    replica = PolicyReplica(policy)
    before = decoded(replica.model, 2)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.data = parameter * 1.5
    replica.refresh()
    after = decoded(replica.model, 2)
    assert relative_error(after, decoded(unfused(replica.tree()), 2)) <= TOLERANCE[FP32]
    assert relative_error(after, before) > 0.1  # negative control


@pytest.mark.parametrize("instructions", machine.InstructionSet)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_many_tokens_and_prefills_run_the_modules(
    instructions: machine.InstructionSet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call would be right for them too, but slower than large matrix products; few take it on every CPU."""
    monkeypatch.setattr(machine, "instruction_set", lambda: instructions)
    model = PolicyReplica(tiny_model("llama", dtype=dtype)).model
    most = min(MAX_TOKENS, machine.MAX_ROWS[instructions, dtype]) // len(LENGTHS)
    decoded(model, most)  # tries the layers out
    fast = fused_forwards(model)[0]
    calls: list[int] = []
    own = fast.modules_own
    fast.modules_own = lambda *args, **kwargs: calls.append(args[0].shape[1]) or own(*args, **kwargs)
    decoded(model, most)
    assert most > 1 and calls == [max(LENGTHS)]
    decoded(model, most + 1)
    assert calls[1:] == [max(LENGTHS)] + [most + 1] * 2
