"""The small policy that demo and recipes train: its sizes."""

import make_tiny_policy
import pytest
import torch


def test_the_sizes_are_what_they_say() -> None:
    """On a GPU the policy must have at least 100 million parameters to say anything about larger ones."""
    for name, size in make_tiny_policy.SIZES.items():
        with torch.device("meta"):
            parameters = make_tiny_policy.make_model(size).num_parameters()
        said = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
        assert parameters == pytest.approx(said, rel=0.12), (name, parameters)
