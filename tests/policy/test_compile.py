"""Compiled decoder layers against the modules whose place they take, by Inductor on the CPU; and their trial."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decoding import decoded, fused_forwards, relative_error, unfused
from tiny_models import scale_weights, tiny_model
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.utils import counters
from transformers import PreTrainedModel
from transformers.utils import logging

from trl_selfspec.drafter.quantized_drafter import make_drafter, requantize
from trl_selfspec.kernels.cpu import build
from trl_selfspec.policy import compile as compiling
from trl_selfspec.policy.fused_layers import fuse_layers, fused_layers
from trl_selfspec.policy.replica import PolicyReplica


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Sums in another order, and in 16 bits the few results that they round otherwise, through three layers and the head.
TOLERANCE = {FP32: 1e-5, FP16: 0.02, BF16: 0.1}
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's
PAGE = 4  # slots, so that rows have several


@pytest.fixture(autouse=True)
def _counts() -> Iterator[None]:
    counters.clear()
    with torch.no_grad():
        yield


def compiled(tree: PreTrainedModel, program: Callable[[], Callable[..., Tensor]] | None = None) -> PreTrainedModel:
    fuse_layers(unfused(tree), compiled=True, program=program or compiling.compiled_program)
    return tree


def traced() -> Callable[..., Tensor]:
    """A program that is compiled, and run eagerly: without Inductor's seconds."""

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        compiling.compute_once(graph)
        return graph

    return compiling.compiled_program(backend)


def num_compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("family", "dtype", "kinds", "overrides"),
    [
        ("llama", FP32, 1, {}),
        ("qwen2", BF16, 1, {"num_hidden_layers": 3}),  # biases
        ("gemma2", BF16, 2, {}),  # another norm, soft-cap, every other layer with a window
    ],
)
def test_compiled_layers_give_what_their_modules_give(
    family: str, dtype: torch.dtype, kinds: int, overrides: dict[str, Any]
) -> None:
    """Catches a wrong rounding, window, page or residual, and programs that are compiled anew for every layer, batch
    or number of tokens: seconds in the middle of a rollout.
    """
    replica = PolicyReplica(tiny_model(family, dtype=dtype, **overrides))
    tree, reference = compiled(replica.tree()), unfused(replica.tree())
    for num_steps, num_rows in ((2, 5), (1, 5), (1, 1), (6, 3), (3, 1)):
        actual = decoded(tree, num_steps, num_rows, PAGE)
        expected = decoded(reference, num_steps, num_rows, PAGE)
        assert relative_error(actual, expected) <= TOLERANCE[dtype]
    other = unfused(PolicyReplica(tiny_model(family, seed=1, dtype=dtype, **overrides)).model)
    assert relative_error(actual, decoded(other, 3, 1)) > 0.5, "negative control: other weights"
    assert len(fused_forwards(tree)) == tree.config.num_hidden_layers
    assert num_compilations() == kinds
    assert not counters["inductor"]["possibly_missed_reinplacing_opportunities"], "a copy of the cache in every step"


@pytest.mark.parametrize(
    "family",
    [
        "mistral",
        "gemma3_text",
        "gpt_neox",
        "deepseek_v3",
        "llama4_text",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "olmo2", "granite", "qwen3_moe")),
    ],
)
def test_every_family_is_one_graph(family: str) -> None:
    """A break in the graph, or a name of an argument that one family has, would leave it to its modules."""
    replica = PolicyReplica(tiny_model(family))
    tree, reference = compiled(replica.tree(), traced), unfused(replica.tree())
    for num_steps in (2, 1):
        actual = decoded(tree, num_steps, page_size=PAGE)
        assert relative_error(actual, decoded(reference, num_steps, page_size=PAGE)) <= TOLERANCE[FP32]
    assert len(fused_forwards(tree)) == 2
    assert num_compilations() == (2 if family in ("gemma3_text", "llama4_text") else 1)


def no_write(module: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    states = kwargs.pop("attention_mask")
    copies = states._replace(keys=states.keys.clone(), values=states.values.clone())
    return type(module).forward(module, x, attention_mask=copies, **kwargs)


def other_window(module: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    states = kwargs.pop("attention_mask")
    late = states._replace(positions=states.positions - 1)
    return type(module).forward(module, x, attention_mask=late, **kwargs)


def first_norm_twice(module: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return type(module).forward(module, module.input_layernorm(x), **kwargs)  # type: ignore[operator]


def sound(module: nn.Module, x: Tensor, **kwargs: Any) -> Tensor:
    return type(module).forward(module, x, **kwargs)


@pytest.mark.parametrize("program", [sound, no_write, other_window, first_norm_twice])
def test_a_layer_that_computes_something_else_is_refused(program: Callable[..., Tensor], no_kernels: None) -> None:
    """Nobody would notice otherwise: samples would only follow another distribution."""
    replica = PolicyReplica(tiny_model("llama", dtype=BF16, hidden_size=256, head_dim=64))
    tree = compiled(replica.tree(), lambda: program)
    actual = decoded(tree, 2, page_size=PAGE)
    assert len(fused_forwards(tree)) == (2 if program is sound else 0)
    assert torch.equal(actual, decoded(unfused(replica.tree()), 2, page_size=PAGE)), "the step itself is the modules'"


def test_results_that_are_rounded_later_are_refused() -> None:
    """A compiler keeps fp32 between operations unless told not to: more exact, and not what the policy computes."""

    from torch._inductor.compile_fx import compile_fx  # which warns

    def late() -> Callable[..., Tensor]:
        return compiling.compiled_program(lambda graph, inputs: compile_fx(graph, inputs))  # type: ignore[arg-type]

    sizes = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 8}
    tree = compiled(PolicyReplica(tiny_model("qwen2", dtype=BF16, **sizes)).model, late)
    decoded(tree, 2, page_size=PAGE)
    assert fused_layers(tree) == [] and num_compilations() == 1


def test_layers_that_do_not_compile_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning, and the samples of the modules."""
    warnings: list[str] = []
    monkeypatch.setattr(logging.get_logger("trl_selfspec.policy.fused_layers"), "warning_once", warnings.append)

    def broken() -> Callable[..., Tensor]:
        def forward(*args: object, **kwargs: object) -> Tensor:
            raise Unsupported("no such thing", case_name="test")

        return forward

    replica = PolicyReplica(tiny_model("llama"))
    tree = compiled(replica.tree(), broken)
    assert torch.equal(decoded(tree, 2), decoded(unfused(replica.tree()), 2))
    assert fused_layers(tree) == []
    assert len(warnings) == 1 and "no such thing" in warnings[0] and "LlamaDecoderLayer" in warnings[0]


def test_a_drafters_layers_compile_around_its_kernels() -> None:
    """Quantized products are operators of the graph: their layers' weights are requantized in place."""
    model = tiny_model("qwen2")
    replica = PolicyReplica(model)
    drafter = make_drafter(replica, "qint4")
    tree = compiled(drafter, traced)
    for seed in (1, 2):
        scale_weights(model, seed)
        replica.refresh()
        requantize(tree, replica)
        actual = decoded(tree, 2)
        assert len(fused_forwards(tree)) == 2 and num_compilations() == 1
        assert relative_error(actual, decoded(replica.model, 2)) > TOLERANCE[FP32], "negative control: not quantized"
        forwards = {module: module.__dict__.pop("forward") for module in tree.model.layers}
        assert relative_error(actual, decoded(tree, 2)) <= TOLERANCE[FP32]
        for module, forward in forwards.items():
            module.forward = forward


def test_weights_that_move_are_followed() -> None:
    """An optimizer may put a parameter elsewhere: nothing is compiled anew, and nothing remembered."""
    policy = tiny_model("qwen3")
    replica = PolicyReplica(policy)
    tree = compiled(replica.model, traced)
    before = decoded(tree, 2)
    for parameter in policy.parameters():
        parameter.data = parameter * 1.5
    replica.refresh()
    after = decoded(tree, 2)
    assert relative_error(after, before) > 0.1, "negative control"
    assert relative_error(after, decoded(unfused(replica.tree()), 2)) <= TOLERANCE[FP32]
    assert len(fused_forwards(tree)) == 2 and num_compilations() == 1


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own products, as on a GPU."""
    monkeypatch.setattr(build, "available", lambda: False)
    monkeypatch.setattr("trl_selfspec.kernels.cpu.norm.available", lambda: False)
    monkeypatch.setattr("trl_selfspec.kernels.cpu.attention.available", lambda: False)


def test_projections_that_lie_next_to_each_other_are_one_product(no_kernels: None) -> None:
    """Of copies, such as merged adapters; the trial's random weights must lie there too, and refreshed ones."""
    products: list[int] = []

    def counted() -> Callable[..., Tensor]:
        def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
            for _ in range(2):
                products.append(sum(node.target is F.linear for node in graph.graph.nodes))
                compiling.compute_once(graph)
            return graph

        return compiling.compiled_program(backend)

    policy = tiny_model("qwen2")
    replica = PolicyReplica(policy, autocast_dtype=FP16)
    with torch.autocast("cpu", dtype=FP16, cache_enabled=False):
        reference = decoded(unfused(replica.tree()), 2, dtype=FP16)
        replica._join_copies()
        replica.refresh()
        tree = compiled(replica.tree(), counted)
        for _ in range(2):
            assert relative_error(decoded(tree, 2, dtype=FP16), reference) <= TOLERANCE[FP16]
            scale_weights(policy, seed=1)
            replica.refresh()
            assert relative_error(decoded(tree, 2, dtype=FP16), reference) > 0.1, "negative control"
            reference = decoded(unfused(replica.tree()), 2, dtype=FP16)
    assert len(fused_forwards(tree)) == 2 and products == [7, 4]  # q with k and v, o, gate with up, down


def test_kinds_have_programs_of_their_own() -> None:
    """torch gives a function up after some variants: many models in one process must not share them."""
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            tree = compiled(PolicyReplica(tiny_model("llama", num_hidden_layers=1)).model, traced)
            decoded(tree, 1, 2)
            assert len(fused_forwards(tree)) == 1
