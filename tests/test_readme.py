"""What the README says is there, and its code runs."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from trl_runs import make_model, make_tokenizer

from trl_selfspec import SelfSpecGRPOConfig


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = ["README.md", "CONTRIBUTING.md"]
PATH = re.compile(r"`?((?:tests|scripts|recipes|experiments|docs|benchmarks)/[\w./-]+)")
OWN_FIELDS = [f.name for f in fields(SelfSpecGRPOConfig) if f.name.startswith("selfspec_")] + ["use_selfspec"]


def undocumented(names: list[str], text: str) -> list[str]:
    return [name for name in names if f"`{name}`" not in text]


def test_every_own_field_is_documented() -> None:
    """Prevents an option that nobody can find."""
    assert not undocumented(OWN_FIELDS, README)
    assert undocumented(["selfspec_not_there"], README)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_named_file_exists(document: str) -> None:
    """Prevents a document that points to what was renamed."""
    paths = [match.rstrip(".") for match in PATH.findall((ROOT / document).read_text())]
    assert len(paths) > 8
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_the_engine_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Prevents an example that nobody has run: the hub model is replaced by a local one, nothing else."""
    make_model().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    hub_id = "Qwen/Qwen2.5-1.5B-Instruct"
    assert hub_id in code
    exec(compile(code.replace(hub_id, str(tmp_path)), "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("[")


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200
