"""Latents that are never expanded, chunks and queries scaled by position: what the policy's own attention computes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import Schedule, force_page_size, quantized_drafter, ragged_prompts, spoil, tiny_model
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec import SelfSpecEngine, SelfSpecOptions
from trl_selfspec.engine.engine import RolloutOutput
from trl_selfspec.kv_cache import attention, family_attention
from trl_selfspec.kv_cache.family_attention import Temperature, absorbed_query, scaled_by_position, values_of_latents
from trl_selfspec.kv_cache.paged_cache import visibility_bias
from trl_selfspec.policy.replica import PolicyReplica


PROMPTS = ragged_prompts([1, 20, 2, 5, 9, 14, 9, 9])
SAMPLED = GenerationConfig(max_new_tokens=20, do_sample=True, top_k=0, eos_token_id=[20, 21, 22, 23], pad_token_id=0)
GREEDY = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
FP64 = torch.float64
FAMILIES = ["deepseek_v3", "llama4_text"]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Latents:
    """An attention module, queries of 3 steps, and latents of 7 tokens, in float64."""

    def __init__(self) -> None:
        model = tiny_model("deepseek_v3", dtype=FP64)
        self.module: nn.Module = model.model.layers[0].self_attn
        torch.manual_seed(0)
        self.query = torch.randn(2, 4, 3, 24, dtype=FP64)
        self.rotated, self.latents = torch.randn(2, 1, 7, 8, dtype=FP64), torch.randn(2, 1, 7, 24, dtype=FP64)

    def expanded(self) -> Tensor:
        """As the policy does it, `(B, T, H, Dv)`."""
        keys, values = self.module.expand_kv(self.latents, self.rotated)  # type: ignore[operator]
        return scaled_dot_product_attention(self.query, keys, values, scale=0.3).transpose(1, 2)

    def absorbed(self, query: Tensor) -> Tensor:
        keys, values = torch.cat([self.rotated, self.latents], -1), self.latents
        out = scaled_dot_product_attention(query, keys, values, scale=0.3, enable_gqa=True)
        return values_of_latents(self.module, out.transpose(1, 2))


def test_attention_to_latents_is_attention_to_what_they_expand_to() -> None:
    """Prevents a head that has another's part of the projection, or a rotated part in the place of the other one."""
    case = Latents()
    query = absorbed_query(case.module, case.query)
    assert query.shape == (2, 4, 3, 8 + 24)
    torch.testing.assert_close(case.absorbed(query), case.expanded(), rtol=0, atol=1e-12)
    swapped = absorbed_query(case.module, case.query.roll(8, -1)), absorbed_query(case.module, case.query.flip(1))
    for wrong in swapped:  # negative controls: parts, then heads
        assert (case.absorbed(wrong) - case.expanded()).abs().max() > 0.01


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_chunk_ends_where_the_next_begins(num_steps: int) -> None:
    """Prevents a window in the place of a chunk, and a draft that lies in two chunks and sees one."""
    positions = torch.tensor([[4], [11], [12]]) + torch.arange(num_steps)
    bias = visibility_bias(positions, torch.arange(20), 6, 1, torch.float32, chunked=True)[:, 0]
    expected = [[[s // 6 == p // 6 and s <= p for s in range(20)] for p in row] for row in positions.tolist()]
    assert torch.equal(bias == 0, torch.tensor(expected))
    assert not torch.equal(bias, visibility_bias(positions, torch.arange(20), 6, 1, torch.float32)[:, 0])


def test_queries_are_scaled_by_their_own_position() -> None:
    """As Llama 4's module does it, which counts positions from the length of the cache: rows have their own here."""
    positions, temperature = torch.tensor([[0, 3, 4], [98, 99, 8192]]), Temperature(4, 0.3)
    query = torch.ones(2, 5, 3, 2)
    scales = torch.log1p(torch.floor((positions + 1) / 4)) * 0.3 + 1.0
    scaled = scaled_by_position(query, positions, temperature)
    torch.testing.assert_close(scaled, scales[:, None, :, None].expand_as(query))
    assert scaled[0, 0, 0, 0] == 1.0 and scaled[0, 0, 1, 0] != 1.0


def make_engine(model: PreTrainedModel, *draft_lengths: int, **values: object) -> SelfSpecEngine:
    options = SelfSpecOptions(draft_qtype="qint4", verification="coupled", **values)  # type: ignore[arg-type]
    engine = SelfSpecEngine(model, options, controller=Schedule(*draft_lengths))
    spoil(engine, noise=0.1)
    return engine


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])
@pytest.mark.parametrize("family", FAMILIES)
def test_samples_are_those_of_plain_sampling(
    monkeypatch: pytest.MonkeyPatch, family: str, page_size: int | None
) -> None:
    """With groups of a prompt that share its pages, rows that wait, and drafts of every length."""
    model = tiny_model(family)
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]

    def sample(*draft_lengths: int, **values: object) -> RolloutOutput:
        return make_engine(model, *draft_lengths, **values).generate(prompts, SAMPLED, seed=5)

    plain = sample(0)
    force_page_size(monkeypatch, page_size)
    speculative = sample(4, 1, 0, 3, max_batch_size=5)
    assert 0.1 < (speculative.stats.alpha or 0.0) < 0.98, "drafts must be accepted and rejected"
    assert speculative.completion_ids == plain.completion_ids
    for row, expected in zip(speculative.policy_logprobs, plain.policy_logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(expected), rtol=0, atol=1e-4)


def test_a_later_turn_starts_from_the_latents_of_the_earlier_ones() -> None:
    """Prevents a prefill behind cached tokens that takes latents for keys."""
    model = tiny_model("deepseek_v3")
    engine = make_engine(model, 3)
    first = engine.generate(PROMPTS, GREEDY, keep=True)
    longer = [prompt + ids + [7, 8, 9] for prompt, ids in zip(PROMPTS, first.completion_ids, strict=True)]
    second = engine.generate(longer, GREEDY, keep=True)
    assert second.stats.reused_prompt_tokens > len(longer) * GREEDY.max_new_tokens  # type: ignore[operator]
    assert second.completion_ids == make_engine(model, 0).generate(longer, GREEDY).completion_ids


def test_the_drafter_reads_the_latents_with_the_policys_own_weight() -> None:
    """Attention reads that weight, and does not call the layer: quantized, it would be dequantized in every step."""
    engine = make_engine(tiny_model("deepseek_v3"), 2)
    drafter, target = quantized_drafter(engine).module, engine._replica.model
    assert drafter is not None
    attentions = zip(drafter.model.layers, target.model.layers, strict=True)
    for ours, theirs in ((drafted.self_attn, layer.self_attn) for drafted, layer in attentions):
        assert ours.kv_b_proj is theirs.kv_b_proj and ours.kv_a_proj_with_mqa is not theirs.kv_a_proj_with_mqa


def values_of_another_head(monkeypatch: pytest.MonkeyPatch) -> None:
    values = family_attention.values_of_latents
    monkeypatch.setattr(attention, "values_of_latents", lambda module, out: values(module, out.roll(1, 2)))


def latents_not_attended(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(module: nn.Module, query: Tensor) -> Tensor:
        absorbed = absorbed_query(module, query)
        absorbed[..., 8:] = 0
        return absorbed

    monkeypatch.setattr(attention, "absorbed_query", without)


def windows_for_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = attention.PagedCache.bias
    monkeypatch.setattr(attention.PagedCache, "bias", lambda self, *arguments: bias(self, *arguments[:3]))


def positions_from_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(query: Tensor, positions: Tensor, temperature: Temperature) -> Tensor:
        return scaled_by_position(query, positions[:1].expand_as(positions), temperature)

    monkeypatch.setattr(attention, "scaled_by_position", scaled)


@pytest.mark.parametrize(
    ("family", "sabotage"),
    [
        ("deepseek_v3", values_of_another_head),
        ("deepseek_v3", latents_not_attended),
        ("llama4_text", windows_for_chunks),
        ("llama4_text", positions_from_the_batch),
    ],
)
def test_broken_attention_is_noticed(
    monkeypatch: pytest.MonkeyPatch, family: str, sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative controls: the comparison with `generate`, row by row, sees each of these."""
    model = tiny_model(family)
    generate: Any = model.generate
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS]
    expected = [generate(ids, generation_config=GREEDY)[0, ids.shape[1] :].tolist() for ids in prompts]
    engine = make_engine(model, 3)
    assert engine.generate(PROMPTS, GREEDY).completion_ids == expected
    sabotage(monkeypatch)
    wrong = [a != b for a, b in zip(engine.generate(PROMPTS, GREEDY).completion_ids, expected, strict=True)]
    assert sum(wrong) >= 2


def test_policies_keep_modules_of_their_own() -> None:
    """Prevents training on attention that was prepared for the engine."""
    for family in FAMILIES:
        model = tiny_model(family)
        replica = PolicyReplica(model)
        prepared = [set(vars(layer.self_attn)) for layer in replica.model.model.layers]
        own = [set(vars(layer.self_attn)) for layer in model.model.layers]
        assert prepared != own
        assert not any(names & {"expand_kv", "attention_chunk", "temperature"} for names in own)
