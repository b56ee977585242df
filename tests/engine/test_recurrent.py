"""Models with recurrent states beside keys and values: their samples are those of `model.generate` and plain rounds.

One family for each kind of recurrence, and the others under `slow`. Rows share prompts, wait, move, pause and end at
different times, so that states have to be copied, and drafts are accepted and rejected.
"""

import functools
import logging
from collections.abc import Callable
from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from laws import FALSE_ALARM, chi_square, joint_counts, joint_law
from pairwise import pairwise
from recorded_graph import record
from sweep.configs import small_config
from sweep_families import small_model
from test_coupled import assert_same
from test_greedy_identity import generate_with_transformers
from test_kv_budget import give_pages
from test_suffix_drafts import Adversary
from tiny_models import Schedule, built_once, force_page_size, ragged_prompts, scale_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trl_selfspec.drafter.protocol import Batch
from trl_selfspec.engine import engine as engine_module
from trl_selfspec.engine.engine import RolloutOutput, SelfSpecEngine
from trl_selfspec.engine.kv_budget import state_bytes_per_row
from trl_selfspec.engine.rollout import Rollout
from trl_selfspec.kernels.cpu import build
from trl_selfspec.kv_cache.recurrent_state import StateCache
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.policy.replica import PolicyReplica


KINDS = ["lfm2", "qwen3_next", "falcon_h1"]  # short convolution, gated delta rule, Mamba-2 in the layers that attend
MORE = ["bamba", "granitemoehybrid", "kimi_linear", "lfm2_moe", "nemotron_h", "olmo_hybrid", "qwen3_5_text"]
REPEATED = ["lfm2", *(pytest.param(family, marks=pytest.mark.slow) for family in KINDS[1:])]
FAMILIES = [*KINDS, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)]
SEED = 5
# Prompts of one token, of one fewer than a convolution's window, and some that several rows share.
PROMPTS = [*[prompt for prompt in ragged_prompts([9, 1, 14]) for _ in range(2)], *ragged_prompts([3, 20], seed=1)]
EOS = list(range(20, 28))
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.7}

model_of = functools.cache(small_model)  # no test here changes one


def make_engine(
    model: PreTrainedModel,
    *draft_lengths: int,
    drafter: Literal["suffix", "auto", "quantized"] = "suffix",
    drafters: tuple[str, ...] = (),
    capture: Callable | None = None,
    autocast_dtype: torch.dtype | None = None,
    **options: Any,
) -> SelfSpecEngine:
    chosen = SelfSpecOptions(drafter=drafter, max_speculative_tokens=8, **options)
    controller = Schedule(*draft_lengths, drafters=drafters)
    return SelfSpecEngine(model, chosen, autocast_dtype, controller=controller, capture=capture)


plain_engine = built_once(make_engine)


def config(parameters: dict[str, Any]) -> GenerationConfig:
    values = {"max_new_tokens": 18, "top_k": 0, "eos_token_id": EOS, "pad_token_id": 0}
    return GenerationConfig(**values | parameters)


def sample(engine: SelfSpecEngine, parameters: dict[str, Any] = SAMPLED, **values: Any) -> RolloutOutput:
    prompts = values.pop("prompts", PROMPTS)
    return engine.generate(prompts, config(parameters), seed=SEED, **values)


def half_wrong(engine: SelfSpecEngine, plain: RolloutOutput) -> SelfSpecEngine:
    """Gives the engine drafts that are what plain rounds draw, but for about every third token."""
    texts = [[*p, *c, *[3] * 30] for p, c in zip(PROMPTS, plain.completion_ids, strict=True)]

    def draft(batch: Batch, gamma: int) -> Tensor:
        rows = []
        for row_id, length in zip(batch.row_ids.tolist(), batch.lengths.tolist(), strict=True):
            positions = range(length, length + gamma)
            rows.append([texts[row_id][p] + (7 * row_id + 5 * p + length) % 3 // 2 for p in positions])
        return torch.tensor(rows) % 96

    engine.drafters["adversary"] = Adversary(draft)
    return engine


@built_once
def _wrong_engine(model: PreTrainedModel, *draft_lengths: int, **options: Any) -> SelfSpecEngine:
    plain = sample(plain_engine(model, 0))
    return half_wrong(make_engine(model, *draft_lengths, drafters=("adversary",), **options), plain)


def wrong_engine(family: str, *draft_lengths: int, **options: Any) -> SelfSpecEngine:
    """Drafts for samples of `SAMPLED`."""
    return _wrong_engine(model_of(family), *draft_lengths, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("draft_lengths", [(0,), (3,), (8, 0, 2)], ids=str)
def test_greedy_rows_are_those_of_generate(
    monkeypatch: pytest.MonkeyPatch, family: str, draft_lengths: tuple[int, ...]
) -> None:
    """In a second rollout most drafts are accepted. Prevents a state of another row or another time."""
    expected = generate_with_transformers(model_of(family), PROMPTS, config(GREEDY))
    assert len(set(map(len, expected))) > 2, "rows must end at different times"
    force_page_size(monkeypatch, 4 if draft_lengths[0] == 3 else None)
    engine = make_engine(model_of(family), *draft_lengths, max_batch_size=3 if draft_lengths[0] == 8 else None)
    assert sample(engine, GREEDY).completion_ids == expected
    output = sample(engine, GREEDY)
    assert output.completion_ids == expected
    assert any(draft_lengths) == (output.stats.num_accepted_tokens > 0)


@pairwise(
    family=KINDS,
    draft_lengths=[(1,), (3,), (8,), (4, 0, 2), (7, 0, 1, 0, 0)],
    verification=["rejection", "coupled"],
    max_batch_size=[None, 1, 3],
    page_size=[None, 4],
    ahead=[0, 1],
)
def test_tokens_are_those_of_plain_sampling(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    draft_lengths: tuple[int, ...],
    verification: Literal["rejection", "coupled"],
    max_batch_size: int | None,
    page_size: int | None,
    ahead: int,
) -> None:
    """Drafts that are often wrong, rows that wait and move. Prevents a rejected draft that leaves a trace."""
    plain = sample(plain_engine(model_of(family), 0))
    force_page_size(monkeypatch, page_size)
    monkeypatch.setitem(engine_module.ROUNDS_AHEAD, "cpu", ahead)
    output = sample(wrong_engine(family, *draft_lengths, verification=verification, max_batch_size=max_batch_size))
    assert_same(output, plain)
    assert output.stats.alpha is not None
    assert 0.2 < output.stats.alpha < 0.9, "drafts must be accepted and rejected"


@pytest.mark.parametrize("family", REPEATED)
def test_rows_do_not_see_their_neighbours(family: str) -> None:
    """Prevents a state that depends on the size of the batch, or on padding of shorter prompts."""
    engine = plain_engine(model_of(family), 0)
    together = sample(engine)
    for count in (1, 3, 7):
        first = sample(engine, prompts=PROMPTS[:count])
        assert first.completion_ids == together.completion_ids[:count]


@pytest.mark.parametrize("family", KINDS)
def test_rows_that_pause_keep_their_tokens(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Prevents a row that resumes from a state of the time before, and others that start from where it paused."""
    plain = sample(plain_engine(model_of(family), 0))
    force_page_size(monkeypatch, 4)
    engine = wrong_engine(family, 4, 0, 2)
    give_pages(monkeypatch, engine, 14)
    engine._memory.row_bytes = 0  # the budget is for pages alone
    output = sample(engine)
    assert output.stats.paused_rows > 0
    assert_same(output, plain)


@pytest.mark.parametrize("family", REPEATED)
def test_captured_rounds_give_the_same(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Prevents a state that moves under a captured round, and a commit that Python decided."""
    plain = sample(plain_engine(model_of(family), 0))
    force_page_size(monkeypatch, 4)
    monkeypatch.setattr(build, "_library", lambda: None)  # C kernels are no operations of torch
    engine = make_engine(model_of(family), 3, 0, 1, 3, capture=record, max_batch_size=3)
    for _ in range(3):
        assert_same(sample(engine), plain)
        engine.release()
    assert len(engine.graphs) >= 4, "few rounds were replayed"


@pytest.mark.parametrize("family", REPEATED)
def test_conversations_are_computed_anew(family: str) -> None:
    """A state serves no prefix of its row. Prevents a turn that starts from the end of the one before."""
    plain, engine = plain_engine(model_of(family), 0), make_engine(model_of(family), 4)
    prompts = PROMPTS
    for _ in range(2):
        expected, output = sample(plain, prompts=prompts), sample(engine, prompts=prompts, keep=True)
        assert_same(output, expected)
        assert output.stats.reused_prompt_tokens == 0
        prompts = [[*p, *c, 11, 12] for p, c in zip(prompts, expected.completion_ids, strict=True)][::2]


@pairwise(family=KINDS, autocast=[True, False])
def test_in_16_bits_drafts_change_little(family: str, autocast: bool) -> None:
    """Rounding may turn a token, as it does for any batch size. Prevents a state in another dtype than the layer's."""
    model: Any = small_model(family)
    model = model if autocast else model.to(torch.bfloat16)
    dtype = torch.bfloat16 if autocast else None
    plain = sample(make_engine(model, 0, autocast_dtype=dtype))
    engine = half_wrong(make_engine(model, 3, 0, drafters=("adversary",), autocast_dtype=dtype), plain)
    output = sample(engine)
    same = [a == b for a, b in zip(output.completion_ids, plain.completion_ids, strict=True)]
    assert sum(same) >= len(same) / 2
    assert output.stats.num_accepted_tokens > 0


# Negative controls


def commits(change: Callable[[Tensor], Tensor]) -> Callable:
    commit = StateCache.commit
    return lambda self, num_tokens: commit(self, change(num_tokens))


def of_the_first_row(self: StateCache, key: Any, read: Callable = StateCache._read) -> Tensor | None:
    states = read(self, key)
    if states is not None and len(states) > 1:
        states[1] = states[0]
    return states


def as_if_at_prompts(self: StateCache, rows: list[int], lengths: list[int]) -> None:
    for row, length in zip(rows, lengths, strict=True):
        self._prompt_keys[row] = length


FAULTS: dict[str, tuple[str, Callable]] = {
    "a rejected draft leaves a trace": ("commit", commits(lambda num_tokens: (num_tokens + 1).clamp(max=4))),
    "a state one step behind": ("commit", commits(lambda num_tokens: (num_tokens - 1).clamp(min=0))),
    "a verification that is not committed": ("commit", lambda self, num_tokens: self._deferred.clear()),
    "a state that two rows share": ("_read", of_the_first_row),
    "states stay where rows move": ("move_states", lambda self, sources: None),
    "no state at the end of a prompt": ("mark_prompts", as_if_at_prompts),
}


@pytest.mark.parametrize(
    ("fault", "family"),
    [
        pytest.param(fault, family, marks=[pytest.mark.slow] if family != "lfm2" and method != "commit" else [])
        for fault, (method, _) in FAULTS.items()
        for family in KINDS
    ],
)
def test_faults_of_states_are_seen(monkeypatch: pytest.MonkeyPatch, family: str, fault: str) -> None:
    """Negative controls of the tests above."""
    engine = wrong_engine(family, 3, max_batch_size=3)
    plain = sample(plain_engine(model_of(family), 0))
    assert_same(sample(engine), plain)
    engine.release()
    monkeypatch.setattr(StateCache, *FAULTS[fault])
    with pytest.raises(AssertionError):
        assert_same(sample(engine), plain)


def test_padding_that_reaches_a_state_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: prompts of several lengths in one forward, as for other models."""
    prompts = ragged_prompts([9, 2, 14, 3, 20])
    expected = generate_with_transformers(model_of("lfm2"), prompts, config(GREEDY))
    engine = make_engine(model_of("lfm2"), 0)
    assert sample(engine, GREEDY, prompts=prompts).completion_ids == expected
    prefill_batches = Rollout._prefill_batches

    def padded(self: Rollout, spans: list) -> Any:
        self.recurrent = False
        return prefill_batches(self, spans)

    monkeypatch.setattr(Rollout, "_prefill_batches", padded)
    assert sample(engine, GREEDY, prompts=prompts).completion_ids != expected


# Distribution

VOCAB = 8


def few_words(family: str) -> PreTrainedModel:
    values = small_config(family)
    values.vocab_size = VOCAB
    model = AutoModelForCausalLM.from_config(values).eval()
    model.generation_config.eos_token_id = None
    scale_weights(model, seed=0)
    return model


@pytest.mark.parametrize("family", REPEATED)
def test_samples_follow_the_policy(family: str) -> None:
    """Three tokens jointly, drafted by a copy of other samples. A new seed fails with odds of 1e-4 per family."""
    model, prompt, rows = few_words(family), [3, 5, 4], 3000
    engine = make_engine(model, 2, max_batch_size=500)
    law = GenerationConfig(max_new_tokens=3, do_sample=True, top_k=0, eos_token_id=None, pad_token_id=0)
    output = engine.generate([prompt] * rows, law, seed=SEED)
    assert output.stats.num_accepted_tokens > rows / 20
    conditionals = []
    for known in range(3):
        prefixes = list(product(range(VOCAB), repeat=known))
        ids = torch.tensor([[*prompt, *prefix] for prefix in prefixes])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        conditionals.append(logits.double().softmax(-1).numpy().reshape([VOCAB] * (known + 1)))
    counts = joint_counts(np.array(output.completion_ids), VOCAB)
    assert chi_square(counts, joint_law(conditionals)) > FALSE_ALARM
    shifted = np.roll(counts, 1, axis=2)
    assert chi_square(shifted, joint_law(conditionals)) < FALSE_ALARM, "the negative control"


# What is offered, and what it costs


@pytest.mark.parametrize("drafter", ["auto", "quantized"])
def test_no_quantized_drafter_is_offered(
    caplog: pytest.LogCaptureFixture, drafter: Literal["auto", "quantized"]
) -> None:
    """It would need a state of its own. Prevents drafts that advance the policy's."""
    with caplog.at_level(logging.WARNING, logger="trl_selfspec"):
        engine = SelfSpecEngine(model_of("lfm2"), SelfSpecOptions(drafter=drafter, num_speculative_tokens=3))
    assert list(engine.drafters) == (["suffix"] if drafter == "auto" else [])
    assert "Lfm2ForCausalLM keeps a recurrent state" in caplog.text
    output = sample(engine, GREEDY)
    assert output.completion_ids == generate_with_transformers(model_of("lfm2"), PROMPTS, config(GREEDY))
    assert (output.stats.num_rounds_speculative > 0) == (drafter == "auto")


@pytest.mark.parametrize(
    ("family", "values_per_row"),
    [
        ("lfm2", 2 * 64 * 3),  # layers, channels, window
        ("qwen3_next", 2 * (128 * 4 + 4 * 16 * 16)),  # and heads, sizes of a key and a value
        ("falcon_h1", 4 * (144 * 4 + 4 * 32 * 8)),
        ("qwen3", 0),
    ],
)
def test_the_budget_counts_states(family: str, values_per_row: int) -> None:
    """Of the present, and of the end of the prompt. Prevents a batch that does not fit."""
    replica = PolicyReplica(model_of(family))
    measured = state_bytes_per_row(replica.model, replica.num_layers, None, torch.device("cpu"))
    assert measured == 2 * 4 * values_per_row


@pytest.mark.parametrize("page_size", [None, 4], ids=["dense", "pages"])
def test_rows_are_as_many_as_their_states_fit(monkeypatch: pytest.MonkeyPatch, page_size: int | None) -> None:
    force_page_size(monkeypatch, page_size)
    engine = make_engine(model_of("qwen3_next"), 0)
    plain = sample(engine)
    engine.release()
    engine._memory.row_bytes = 10**9
    monkeypatch.setattr("trl_selfspec.engine.kv_budget.free_bytes", lambda device: 9 * 10**9)
    engine._prefix_cache = None
    output = sample(engine)
    assert engine.prefix_cache is not None
    assert engine.prefix_cache.cache.max_rows == (4 if page_size is None else 2)
    assert_same(output, plain)
