"""The config carries the engine's options under their own names, from Python, the command line and YAML."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig, TrlParser

from trl_selfspec import SelfSpecGRPOConfig, SelfSpecOptions
from trl_selfspec.trainer.config import SelfSpecConfigMixin


README = (Path(__file__).parents[2] / "README.md").read_text()
OWN_FIELDS = {field.name: field for field in dataclasses.fields(SelfSpecConfigMixin)}
BAD_VALUES = [
    ("selfspec_draft_qtype", "int4"),
    ("selfspec_drafter", "ngram"),
    ("selfspec_history", "no"),
    ("selfspec_num_speculative_tokens", "many"),
    ("selfspec_num_speculative_tokens", -1),
    ("selfspec_num_speculative_tokens", None),
    ("selfspec_max_speculative_tokens", 0),
    ("selfspec_max_active_sequences", 0),
    ("selfspec_verification", "typical"),
    ("selfspec_refresh_interval", 0),
    ("selfspec_max_batch_size", -2),
    ("selfspec_kv_memory_fraction", 1.0),
    ("selfspec_cuda_graphs", "sometimes"),
]


def make_config(tmp_path: Path, **values: Any) -> SelfSpecGRPOConfig:
    return SelfSpecGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **values)


def parse(tmp_path: Path, *arguments: str) -> SelfSpecGRPOConfig:
    (config,) = TrlParser(SelfSpecGRPOConfig).parse_args_and_config(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", *arguments]
    )
    return config


def test_every_option_has_a_field_with_its_default() -> None:
    """An option that is added to the engine and forgotten here could not be set from a training script."""
    defaults = {f"selfspec_{option.name}": option.default for option in dataclasses.fields(SelfSpecOptions)}
    assert {name: field.default for name, field in OWN_FIELDS.items() if name != "use_selfspec"} == defaults


def test_every_field_is_documented_with_its_default() -> None:
    """TRL's docs are built from the class docstring, `--help` from the metadata; the README is written by hand."""
    documentation = inspect.getdoc(SelfSpecConfigMixin) or ""
    for name, field in OWN_FIELDS.items():
        assert field.metadata["help"].split()[-1] in documentation
        (entry,) = [line for line in documentation.splitlines() if line.strip().startswith(f"{name} (`")]
        default = f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
        assert ("defaults to" not in entry) if field.default is None else (f"`{default}`" in entry), entry
        assert re.search(rf"^\| `{name}` \| `?{default}`? \|", README, flags=re.MULTILINE), name


def test_a_description_names_the_fields_of_this_config() -> None:
    """The engine's own names, without the prefix, are none that a user of the trainer can set."""
    own = "|".join(option.name for option in dataclasses.fields(SelfSpecOptions))
    texts = [field.metadata["help"] for field in OWN_FIELDS.values()]
    assert not [text for text in texts if re.search(rf"`({own})`", text)]
    assert any("`selfspec_max_batch_size`" in text for text in texts)
    assert any("the drafter's" in text for text in texts), "an option's name can be an ordinary word elsewhere"


def test_help_can_be_printed() -> None:
    """A bare % in a help text breaks argparse for the whole script."""
    text = TrlParser(SelfSpecGRPOConfig).format_help()
    assert "--selfspec_num_speculative_tokens" in text
    assert "Tokens drafted per round." in " ".join(text.split())


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0", 0), ("5", 5)])
def test_draft_length_is_an_int_or_auto_on_the_command_line(tmp_path: Path, text: str, value: object) -> None:
    """transformers' parser allows one type per argument: as `int` it refuses "auto", as `str` it passes "5" on."""
    config = parse(tmp_path, "--selfspec_num_speculative_tokens", text)
    assert config.options().num_speculative_tokens == value
    assert type(config.options().num_speculative_tokens) is type(value)


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("5", 5)])
def test_draft_length_is_an_int_or_auto_in_yaml(tmp_path: Path, text: str, value: object) -> None:
    """YAML hands over typed values, past argparse's conversion."""
    path = tmp_path / "run.yaml"
    path.write_text(f"selfspec_num_speculative_tokens: {text}\nselfspec_cuda_graphs: false\nuse_selfspec: false\n")
    config = parse(tmp_path, "--config", str(path))
    assert config.options() == SelfSpecOptions(num_speculative_tokens=value, cuda_graphs=False)  # type: ignore[arg-type]
    assert config.use_selfspec is False


def test_other_options_parse_from_the_command_line(tmp_path: Path) -> None:
    """A field whose annotation the parser can't read is only noticed by the user who needs it."""
    config = parse(
        tmp_path,
        *("--no_use_selfspec", "--selfspec_cuda_graphs", "false", "--selfspec_max_active_sequences", "16"),
        *("--selfspec_max_batch_size", "32", "--selfspec_verification", "coupled", "--selfspec_draft_qtype", "qint8"),
        *("--selfspec_refresh_interval", "2", "--selfspec_kv_memory_fraction", "0.25"),
        *("--selfspec_drafter", "suffix", "--selfspec_history", "false"),
    )
    assert not config.use_selfspec
    assert config.options() == SelfSpecOptions(
        draft_qtype="qint8",
        drafter="suffix",
        history=False,
        max_active_sequences=16,
        verification="coupled",
        refresh_interval=2,
        max_batch_size=32,
        cuda_graphs=False,
        kv_memory_fraction=0.25,
    )


@pytest.mark.parametrize(("name", "value"), BAD_VALUES)
def test_a_bad_value_is_refused_at_construction_by_the_name_of_its_field(
    tmp_path: Path, name: str, value: object
) -> None:
    """An error an hour later, or one that names a field the user never wrote, costs them the run or a search."""
    with pytest.raises(ValueError, match=rf"`{name}="):
        make_config(tmp_path, **{name: value})


def test_a_good_value_is_not_refused(tmp_path: Path) -> None:
    """Negative control of the test above: it must not pass because construction always fails."""
    assert make_config(tmp_path, selfspec_num_speculative_tokens=16).options().longest_draft == 16


def test_trls_own_fields_keep_their_defaults(tmp_path: Path) -> None:
    """Drop-in means that swapping the config class changes nothing but where tokens come from."""
    ours, theirs = make_config(tmp_path), GRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    # The logging directory, where TRL still has it, holds a time stamp.
    names = {field.name for field in dataclasses.fields(GRPOConfig)} - {"logging_dir"}
    assert {name: getattr(ours, name) for name in names if name not in ("accelerator_config",)} == {
        name: getattr(theirs, name) for name in names if name not in ("accelerator_config",)
    }
