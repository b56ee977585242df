"""Greedy output is `model.generate`'s, token for token, in fp32, for every architecture that the engine supports."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairwise import pairwise
from tiny_models import FAMILIES, Schedule, built_once, force_page_size, ragged_prompts, spoil, tiny_model
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.engine.model_runner import ModelRunner, PendingRound, RoundResult
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.sampling import samplers


LENGTHS = [1, 20, 2, 5, 9, 14, 1, 9] * 4
PROMPTS = ragged_prompts(LENGTHS)
NEW_TOKENS = 24
EOS = list(range(20, 32))  # so many that rows end at different times

model_of = functools.cache(tiny_model)  # no test here changes one


def greedy_config(eos: int | list[int] | None = None, new_tokens: int = NEW_TOKENS) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0)


def generate_with_transformers(
    model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig
) -> list[list[int]]:
    """`model.generate` on prompts of one length at a time: batches without padding. Once, however many tests ask."""
    return _completions(model, tuple(map(tuple, prompts)), config)


@functools.cache
def _completions(
    model: PreTrainedModel, prompts: tuple[tuple[int, ...], ...], config: GenerationConfig
) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in prompts]
    for length in {len(prompt) for prompt in prompts}:
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        ids = torch.tensor([prompts[row] for row in rows])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        for row, tokens in zip(rows, output[:, length:].tolist(), strict=True):
            completions[row] = cut_after_eos(tokens, config.eos_token_id)
    return completions


def cut_after_eos(tokens: list[int], eos: int | list[int] | None) -> list[int]:
    stops = [eos] if isinstance(eos, int) else eos or []
    end = next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[:end]


@built_once
def make_engine(model: PreTrainedModel, gamma: int, **values: Any) -> SelfSpecEngine:
    return SelfSpecEngine(model, options(gamma, **values))


def options(gamma: int, **values: object) -> SelfSpecOptions:
    """Speculates in every round, with the drafter that is the most often wrong."""
    defaults = {"num_speculative_tokens": gamma, "max_active_sequences": 64, "draft_qtype": "qint4"}
    return SelfSpecOptions(**defaults | values)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return model_of("llama")


@pytest.fixture
def speculative_rounds(monkeypatch: pytest.MonkeyPatch) -> list[RoundResult]:
    """Collects the result of every speculative round."""
    results: list[RoundResult] = []
    result = PendingRound.result

    def recorded(pending: PendingRound) -> RoundResult:
        (results if pending.choice.gamma else []).append(result(pending))
        return result(pending)

    monkeypatch.setattr(PendingRound, "result", recorded)
    return results


def cut_inside_a_draft(results: list[RoundResult]) -> int:
    """Row-rounds whose accepted drafts were cut short."""
    return sum(e <= a for result in results for e, a in zip(result.emitted, result.accepted, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_output_is_that_of_generate(family: str) -> None:
    """Prevents any difference of cache, positions, masks or acceptance, in each architecture's own way to go wrong."""
    model = model_of(family)
    expected = generate_with_transformers(model, PROMPTS, greedy_config())
    assert len({token for completion in expected for token in completion}) > 40, "too monotonous to prove anything"
    engine = SelfSpecEngine(model, options(7), controller=(schedule := Schedule(0)))
    for gamma in (0, 1, 3, 7):
        schedule.draft_lengths = (gamma,)
        output = engine.generate(PROMPTS, greedy_config())
        assert output.completion_ids == expected
        if gamma:
            assert 0.2 < output.stats.alpha < 0.98, "drafts must be accepted and rejected"
            assert output.stats.plain_rounds == 0


@pytest.mark.parametrize("gamma", [0, 1, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_greedy_output_does_not_depend_on_batch_and_draft_length(
    llama: PreTrainedModel, batch_size: int, gamma: int
) -> None:
    """Prevents a row from seeing its neighbours' padding or their rejected drafts."""
    prompts = PROMPTS[:batch_size]
    expected = generate_with_transformers(llama, prompts, greedy_config())
    assert make_engine(llama, gamma).generate(prompts, greedy_config()).completion_ids == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3", "llama4_text"])
@pytest.mark.parametrize("gamma", [0, 3, 7])
def test_an_end_token_inside_a_draft_ends_the_row_there(
    family: str, gamma: int, speculative_rounds: list[RoundResult]
) -> None:
    """Prevents tokens behind the end token, and an end token that is missed because it was drafted."""
    model = model_of(family)
    config = greedy_config(eos=EOS)
    expected = generate_with_transformers(model, PROMPTS, config)
    output = make_engine(model, gamma).generate(PROMPTS, config)
    assert output.completion_ids == expected
    ended = [len(completion) < NEW_TOKENS for completion in expected]
    assert any(ended)
    assert not all(ended)
    assert output.stats.completion_tokens == sum(map(len, expected))
    if gamma:
        assert cut_inside_a_draft(speculative_rounds) > 0, "no end token fell inside a draft"


@pytest.mark.parametrize("new_tokens", [1, 2, 6])
def test_the_length_limit_inside_a_draft_ends_the_row_there(
    llama: PreTrainedModel, new_tokens: int, speculative_rounds: list[RoundResult]
) -> None:
    """Prevents a row that is longer than asked for because its last draft was."""
    config = greedy_config(new_tokens=new_tokens)
    expected = generate_with_transformers(llama, PROMPTS, config)
    assert make_engine(llama, 7).generate(PROMPTS, config).completion_ids == expected
    assert cut_inside_a_draft(speculative_rounds) > 0, "no limit fell inside a draft"


def test_each_row_may_have_its_own_budget(llama: PreTrainedModel) -> None:
    """Prevents a budget applied to another row after rows have moved."""
    budgets = [1 + 5 * row % 23 for row in range(len(PROMPTS))]
    expected = generate_with_transformers(llama, PROMPTS, greedy_config())
    engine = make_engine(llama, 3, max_batch_size=5)
    output = engine.generate(PROMPTS, greedy_config(), max_new_tokens=budgets)
    assert output.completion_ids == [tokens[:budget] for tokens, budget in zip(expected, budgets, strict=True)]


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("gamma", [0, 3, 7])
def test_rows_end_at_the_models_context(family: str, gamma: int) -> None:
    """Prevents lookahead from reading positions the model does not have, or from writing behind the row."""
    model = model_of(family, max_position_embeddings=32)
    expected = generate_with_transformers(model, PROMPTS, greedy_config(new_tokens=12))
    output = SelfSpecEngine(model, options(gamma)).generate(PROMPTS, greedy_config(new_tokens=200))
    for prompt, tokens, reference in zip(PROMPTS, output.completion_ids, expected, strict=True):
        assert len(prompt) + len(tokens) == 32
        assert tokens[:12] == reference[: 32 - len(prompt)]


@pairwise(
    family=["llama", "mistral", "gemma2", "deepseek_v3", "llama4_text"], page_size=[None, 4], max_batch_size=[2, 5]
)
def test_rows_may_wait_move_and_take_over_from_others(
    monkeypatch: pytest.MonkeyPatch, family: str, page_size: int | None, max_batch_size: int
) -> None:
    """Prevents keys or tokens of a retired row from surviving in the row that takes its place."""
    force_page_size(monkeypatch, page_size)
    model, config, prompts = model_of(family), greedy_config(eos=EOS), PROMPTS[: 4 * max_batch_size]
    expected = generate_with_transformers(model, prompts, config)
    assert len(set(map(len, expected))) > max_batch_size, "rows must end at different times"
    engine = SelfSpecEngine(model, options(3, max_batch_size=max_batch_size))
    for _ in range(2):  # the second time on used pages
        assert engine.generate(prompts, config).completion_ids == expected
    assert engine.prefix_cache.cache.dense is (page_size is None)


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])
@pytest.mark.parametrize("max_batch_size", [None, 1, 3, 7])
def test_equal_prompts_are_prefilled_once(
    monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel, page_size: int | None, max_batch_size: int | None
) -> None:
    """Prevents a group of G samples from costing G prefills, and from sharing what they do not have in common."""
    force_page_size(monkeypatch, page_size)
    prefilled: list[int] = []
    prefill = ModelRunner.prefill

    def counted(self: ModelRunner, rows: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, *args: Any) -> None:
        prefilled.extend((ends - starts).tolist())
        prefill(self, rows, starts, ends, *args)

    monkeypatch.setattr(ModelRunner, "prefill", counted)
    unique = ragged_prompts([9, 1, 13, 2, 20])
    prompts = [prompt for prompt in unique for _ in range(5)]
    config = greedy_config(eos=EOS)
    engine = make_engine(llama, 3, max_batch_size=max_batch_size)
    budgets = [3 + 7 * row % 20 for row in range(len(prompts))]
    expected = generate_with_transformers(llama, prompts, config)
    output = engine.generate(prompts, config, max_new_tokens=budgets)
    assert output.completion_ids == [tokens[:budget] for tokens, budget in zip(expected, budgets, strict=True)]
    assert sorted(prefilled) == [1, 8, 12, 19]


def test_the_draft_length_may_change_from_round_to_round(llama: PreTrainedModel) -> None:
    """Prevents a plain round from trusting keys that the drafter wrote."""
    expected = generate_with_transformers(llama, PROMPTS, greedy_config())
    engine = SelfSpecEngine(llama, options(7), controller=Schedule(7, 0, 1, 0, 0, 3))
    assert engine.generate(PROMPTS, greedy_config()).completion_ids == expected


@pytest.mark.parametrize("noise", [0.0, 0.3, 30.0])
@pytest.mark.parametrize("qtype", ["qint4", "qint8", "qfloat8"])
def test_the_drafter_decides_speed_alone(llama: PreTrainedModel, qtype: str, noise: float) -> None:
    """Prevents any drafter, down to one that knows nothing, from changing the output."""
    engine = make_engine(llama, 3, draft_qtype=qtype)
    spoil(engine, noise)
    expected = generate_with_transformers(llama, PROMPTS, greedy_config())
    output = engine.generate(PROMPTS, greedy_config())
    assert output.completion_ids == expected
    if noise == 30.0:
        assert output.stats.alpha < 0.1


# What must not pass: each breaks the engine in one way that the law above is there to catch.


def accept_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(drafts: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((len(drafts),), drafts.shape[1]), torch.cat([drafts, tokens[:, -1:]], 1)

    monkeypatch.setattr(samplers, "verify_coupled", verify)


def accept_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def verify(drafts: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        accepted = (drafts == tokens[:, :-1]).long().cumprod(1).sum(1)
        return (accepted + 1).clamp(max=drafts.shape[1]), tokens

    monkeypatch.setattr(samplers, "verify_coupled", verify)


def show_one_slot_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = PagedCache.begin

    def shifted(self: PagedCache, positions: torch.Tensor, *args: object, **kwargs: object) -> None:
        begin(self, positions, *args, **kwargs)  # type: ignore[arg-type]
        if not self.fresh:
            self.positions = positions + 1

    monkeypatch.setattr(PagedCache, "begin", shifted)


def keep_the_drafters_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = PagedCache.begin

    def only_first_writes(self: PagedCache, positions: torch.Tensor, *args: object, **kwargs: object) -> None:
        begin(self, positions, *args, **kwargs)  # type: ignore[arg-type]
        if positions.shape[1] > 1 and not self.fresh:
            index = self.write_index.view(positions.shape).clone()
            index[:, :-1] = 0
            self.write_index = index.flatten()

    monkeypatch.setattr(PagedCache, "begin", only_first_writes)


def forget_to_move_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PagedCache, "rearrange", lambda *args: None)


def count_positions_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    run = ModelRunner._run

    def shifted(self: ModelRunner, model: object, tokens: torch.Tensor, positions: torch.Tensor, **kwargs: int):
        return run(self, model, tokens, positions + (positions > 12), **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ModelRunner, "_run", shifted)


@pytest.mark.parametrize(
    "sabotage",
    [
        accept_everything,
        accept_one_too_many,
        show_one_slot_too_many,
        keep_the_drafters_keys,
        forget_to_move_keys,
        count_positions_from_one,
    ],
)
def test_a_broken_engine_is_noticed(
    monkeypatch: pytest.MonkeyPatch, llama: PreTrainedModel, sabotage: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative controls: the comparison with `generate` sees each of these."""
    config = greedy_config(eos=EOS)
    expected = generate_with_transformers(llama, PROMPTS, config)
    engine = make_engine(llama, 3, max_batch_size=5)
    sabotage(monkeypatch)
    wrong = [a != b for a, b in zip(engine.generate(PROMPTS, config).completion_ids, expected, strict=True)]
    assert sum(wrong) >= 3
