"""The engine hears of every completion of a generation once: whole conversations, and those of all processes."""

import json
import pickle
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from launching import TESTS, TORCHRUN, run_to_end
from tool_runs import MAX_COMPLETION, Doubler, double, make_tool_tokenizer, tool_dataset, tool_policy, tool_rollout
from trl_runs import ALWAYS_SPECULATE, Recorder, make_trainer, train

from trl_selfspec import SelfSpecEngine, SelfSpecOptions, SelfSpecRLOOConfig, SelfSpecRLOOTrainer
from trl_selfspec.trainer import metrics, mixin


pytestmark = pytest.mark.filterwarnings("ignore:You are using '(rollout_func|environment_factory)':UserWarning")

WAYS: dict[str, dict[str, Any]] = {
    "tools": {"tools": [double]},
    "environment": {"environment_factory": Doubler},
    "rollout_func": {"rollout_func": tool_rollout},
}
Rows = tuple[list[list[int]], list[list[int]]]


def ids(rows: Any) -> list[list[int]]:
    return [list(row) for row in rows]


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """Prompts and completions that the engine was told, call by call."""
    calls: list[Rows] = []

    def remember(self: SelfSpecEngine, prompt_ids: Any, completion_ids: Any) -> None:
        calls.append((ids(prompt_ids), ids(completion_ids)))

    monkeypatch.setattr(SelfSpecEngine, "remember", remember)
    return calls


@pytest.fixture
def gathers(monkeypatch: pytest.MonkeyPatch) -> list[Rows]:
    """What was gathered, call by call."""
    calls: list[Rows] = []
    gathered_rows = metrics.gathered_rows

    def gather(*rows: Any) -> Any:
        calls.append(rows)
        return gathered_rows(*rows)

    monkeypatch.setattr(mixin, "gathered_rows", gather)
    return calls


def tool_run(folder: Path, way: str, **overrides: Any) -> tuple[Any, Recorder]:
    """A trainer after a step of greedy conversations, of which the most have several turns."""
    reward = Recorder()
    options = {"max_completion_length": MAX_COMPLETION, "shuffle_dataset": False, "max_steps": 1}
    greedy = {"generation_kwargs": {"do_sample": False}}
    kwargs = {"processing_class": make_tool_tokenizer(), **WAYS[way]}
    trainer = make_trainer(
        folder,
        model=tool_policy(),
        train_dataset=tool_dataset(),
        reward=reward,
        trainer_kwargs=kwargs,
        **ALWAYS_SPECULATE | options | greedy | overrides,
    )
    train(trainer)
    return trainer, reward


@pytest.mark.parametrize("way", WAYS)
def test_conversations_are_remembered_whole_under_their_first_prompts(
    tmp_path: Path, remembered: list[Rows], way: str
) -> None:
    """What a turn said, under that turn's prompt, is of no use: the next epoch begins with the first prompt."""
    trainer, reward = tool_run(tmp_path, way)
    prompts, completions = remembered[-1]
    chats = [example["prompt"] for example in tool_dataset().select(range(2)) for _ in range(3)]
    expected = trainer.processing_class.apply_chat_template(
        chats, tools=[double], add_generation_prompt=True, return_dict=False
    )
    assert prompts == expected
    assert completions == reward.completion_ids[0]
    assert all("t:" in text for text in trainer.processing_class.batch_decode(completions))


def test_one_process_gathers_no_single_turns(tmp_path: Path, remembered: list[Rows], gathers: list[Rows]) -> None:
    """`engine.generate` has seen them whole."""
    train(make_trainer(tmp_path, max_steps=1))
    assert gathers == []


@pytest.mark.parametrize("options", [{"selfspec_history": False}, {"use_selfspec": False}], ids=str)
def test_nothing_is_gathered_that_no_draft_can_use(
    tmp_path: Path, remembered: Any, gathers: list[Rows], options: dict[str, Any]
) -> None:
    """Stock runs must stay stock, and users who switch the history off want none of its cost."""
    tool_run(tmp_path, "tools", **options)
    assert gathers == []


def test_what_is_not_gathered_above_is_gathered_by_default(
    tmp_path: Path, remembered: Any, gathers: list[Rows]
) -> None:
    """Negative control of the two tests above: the same run with the default options."""
    tool_run(tmp_path, "tools")
    assert len(gathers) == 1


def test_an_engine_that_failed_in_a_rollout_still_takes_part(
    tmp_path: Path, remembered: Any, gathers: list[Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks do not know of the failure yet, and would wait for ever."""

    def failing(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(SelfSpecEngine, "generate", failing)
    tool_run(tmp_path, "tools", max_steps=2)
    assert len(gathers) == 1, "in the second step no rank has an engine"


def test_rloo_rows_are_found_too(tmp_path: Path, remembered: list[Rows], monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's trainers return different things, and all begin with prompts and completions."""
    monkeypatch.setattr(SelfSpecRLOOTrainer, "_has_turns", True)
    reward = Recorder()
    options = {"beta": 0.0, "max_steps": 1}
    trainer = make_trainer(tmp_path, SelfSpecRLOOTrainer, SelfSpecRLOOConfig, reward=reward, **options)
    train(trainer)
    prompts, completions = remembered[-1]
    assert completions == reward.completion_ids[0]
    assert len(set(map(tuple, prompts))) == 2


@pytest.mark.parametrize(
    "options", [{"history": False}, {"drafter": "quantized"}, {"num_speculative_tokens": 0}], ids=str
)
def test_no_history_is_kept_for_options_that_never_read_it(options: dict[str, Any]) -> None:
    """It would take 256 MB of every host, and a collective, for nothing."""
    assert not SelfSpecOptions(**options).keeps_history
    assert SelfSpecOptions(drafter="suffix").keeps_history
    assert SelfSpecOptions().keeps_history


def test_equal_prompts_travel_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group's prompt can be longer than all its completions."""
    sent: list[Any] = []
    monkeypatch.setattr(metrics, "gather_object", lambda rows: sent.append(pickle.dumps(rows)) or [*rows, *rows])
    prompt = list(range(5000))
    prompts, completions = metrics.gathered_rows([prompt, list(prompt), [9]], [[1], [2], [3]])
    assert (ids(prompts), ids(completions)) == ([prompt, prompt, [9]] * 2, [[1], [2], [3]] * 2)
    assert 20_000 < len(sent[0]) < 21_000
    with pytest.raises(ValueError, match="shorter"):
        metrics.gathered_rows([[1], [2]], [[3]])


# Two processes

GROUP = 4


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What both ranks reported, by scenario of `distributed_worker.py`."""
    folder = tmp_path_factory.mktemp("history")
    run_to_end(*TORCHRUN, TESTS / "distributed_worker.py", "history", folder)
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


def known_and_expected(ranks: list[Any]) -> list[list[tuple[list[list[int]], list[list[int]]]]]:
    """By rank, for each prompt that it had in the second epoch: what its history held, and what both had drawn."""
    last: dict[tuple[int, ...], list[list[int]]] = {}
    found: list[list[Any]] = [[], []]
    for generations in zip(*(rank["generations"] for rank in ranks), strict=True):
        for pairs, generation in zip(found, generations, strict=True):
            pairs += [(known, last[tuple(p)]) for p, known in generation["known"] if tuple(p) in last]
        drawn = defaultdict(list)
        for generation in generations:
            for prompt, completion in generation["rows"]:
                drawn[tuple(prompt)].append(completion)
        last |= drawn
    assert len(last) == 12
    assert all(len(group) == GROUP for group in last.values())
    return found


def hit_share(pairs: list[tuple[list[list[int]], list[list[int]]]]) -> float:
    """The share of the last epoch's completions that a rank's history held."""
    return sum(len(known) for known, _ in pairs) / (GROUP * len(pairs))


@pytest.mark.slow
def test_every_rank_knows_what_all_said_in_the_last_epoch(outcome: dict[str, list[Any]]) -> None:
    """Prompts move between ranks from epoch to epoch: a rank that knows its own rows alone finds half of them."""
    for pairs in known_and_expected(outcome["two_epochs"]):
        assert len(pairs) >= 6
        assert all(known == expected for known, expected in pairs)
        assert hit_share(pairs) == 1
    for pairs in known_and_expected(outcome["each_rank_remembers_its_own"]):  # negative control
        assert 0.25 < hit_share(pairs) < 0.75


@pytest.mark.slow
def test_ranks_without_a_history_or_an_engine_wait_for_nobody(outcome: dict[str, list[Any]]) -> None:
    """A collective on one rank alone hangs; here the launch has ended, and each run took the path it was meant to."""
    for rank in outcome["without_history"]:
        assert not any(known for generation in rank["generations"] for _, known in generation["known"])
        assert [entry["selfspec/fallback"] for entry in rank["log"]] == [0] * 8
    for rank in outcome["a_rollout_fails_on_one_rank"]:
        assert [entry["selfspec/fallback"] for entry in rank["log"]] == [0, 0.5, 1]
    first, second = (rank["weights"] for rank in outcome["a_rollout_fails_on_one_rank"])
    assert first == second
