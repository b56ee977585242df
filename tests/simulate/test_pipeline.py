"""Steps around rollouts: what must hold of any pipeline, and one that was measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_selfspec.simulate.pipeline import async_step_s, pipeline_s, step_gain


positive = st.floats(0.1, 100)


@given(generate_s=st.lists(positive, min_size=1, max_size=12), train_s=positive, lag=st.integers(0, 4))
def test_a_longer_lag_never_takes_longer(generate_s: list[float], train_s: float, lag: int) -> None:
    """And a lag of 0 is one after the other."""
    assert pipeline_s(generate_s, train_s, lag + 1) <= pipeline_s(generate_s, train_s, lag) + 1e-9
    assert pipeline_s(generate_s, train_s, 0) == pytest.approx(sum(generate_s) + len(generate_s) * train_s)


@given(generate_s=positive, train_s=positive)
def test_with_a_lag_the_longer_of_both_decides(generate_s: float, train_s: float) -> None:
    """So faster rollouts shorten no step whose training takes longer: what `advise` has to say."""
    assert async_step_s(generate_s, train_s, 1) == pytest.approx(max(generate_s, train_s), rel=1e-6)
    assert async_step_s(generate_s, train_s, 0) == pytest.approx(generate_s + train_s, rel=1e-6)


def test_the_measured_pipeline_of_an_8b_model() -> None:
    """Qwen3-8B at lag 1 (arXiv 2604.26779): from 75.0 to 60.5 s with rollouts 1.53 times as fast."""
    assert async_step_s(75.0, 59.9, 1) == pytest.approx(75.0)
    assert async_step_s(75.0 / 1.53, 59.9, 1) + 0.6 == pytest.approx(60.5)


@given(share=st.floats(0.05, 0.95), gain=st.floats(1.0, 10.0))
def test_a_step_gains_less_than_its_rollout(share: float, gain: float) -> None:
    """Amdahl's law, and its bound."""
    assert 1.0 <= step_gain(share, gain) <= min(gain, 1 / (1 - share)) + 1e-9
