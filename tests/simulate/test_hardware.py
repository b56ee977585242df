"""The table of devices, and shapes from configs."""

import json
from pathlib import Path

import pytest
from accuracy import SHAPES

from trl_selfspec.simulate.hardware import devices, find_device
from trl_selfspec.simulate.shapes import Shape


QWEN = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 94,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}


def test_every_number_has_a_source() -> None:
    """A number from nowhere can't be corrected."""
    for name, device in devices().items():
        assert set(device.sources) == {"memory", "products", "allreduce"} and all(device.sources.values()), name
        for products in device.products.values():
            assert products.bytes_per_s < 1.2 * device.bytes_per_s and products.p > 1, name


def test_a_device_is_found_by_its_full_name() -> None:
    """What torch.cuda calls it."""
    assert find_device("NVIDIA A100-SXM4-40GB").name == "a100-40gb"
    assert find_device("NVIDIA A100-SXM4-80GB").name == "a100-80gb"
    assert find_device("NVIDIA GB200").name == "gb200"
    assert find_device("NVIDIA GeForce RTX 4090").name == "rtx-4090"


def test_an_unknown_device_lists_those_there_are() -> None:
    """Prevents advice for a device that was guessed from its name."""
    with pytest.raises(ValueError, match=r"'mi300x' is not in the table: use one of .*h200.*--here"):
        find_device("mi300x")


def test_shapes_are_those_of_the_models(tmp_path: Path) -> None:
    """Parameters as published: 7.62, 235.1 and 1.54 billion."""
    assert Shape.from_config(QWEN) == SHAPES["Qwen2.5-7B"]
    assert Shape.from_config({"model_type": "a_wrapper", "text_config": MOE}) == SHAPES["Qwen3-235B-A22B"]
    published = {"Qwen2.5-7B": 7.62e9, "Qwen3-235B-A22B": 235.1e9, "Qwen2.5-1.5B": 1.54e9}
    for name, parameters in published.items():
        assert SHAPES[name].parameters == pytest.approx(parameters, rel=0.005)
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    assert Shape.load(tmp_path) == Shape.load(tmp_path / "config.json") == SHAPES["Qwen2.5-7B"]


def test_an_unknown_architecture_is_refused() -> None:
    """Prevents a guess about layers that are not attention and an MLP."""
    with pytest.raises(ValueError, match=r"'mamba2' is not known to the cost model: .*qwen3.* Measure instead"):
        Shape.from_config(QWEN | {"model_type": "mamba2"})
    with pytest.raises(ValueError, match=r"qwen2 config lacks 'hidden_size'"):
        Shape.from_config({"model_type": "qwen2", "num_attention_heads": 4})
