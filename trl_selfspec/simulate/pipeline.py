"""Training steps around rollouts: one after the other, or generation that runs ahead by a bounded number of steps."""

from collections.abc import Sequence


def step_gain(share: float, gain: float) -> float:
    """How much faster a step gets if this share of it is a rollout, which gets faster by `gain` (Amdahl's law)."""
    return 1 / (1 - share + share / gain)


def pipeline_s(generate_s: Sequence[float], train_s: float, lag: int, sync_s: float = 0.0) -> float:
    """Seconds from the first step to the end of the last, with rollouts that may be `lag` weights old.

    The rollout of step s starts when the one before has ended and the weights of step s - 1 - lag are there. A step
    trains when its rollout and the step before have ended. A lag of 0 is synchronous training.
    """
    generated, trained = 0.0, []
    for step, seconds in enumerate(generate_s):
        weights = trained[step - 1 - lag] if step > lag else 0.0
        generated = max(generated, weights) + sync_s + seconds
        trained.append(max(generated, trained[-1] if trained else 0.0) + train_s)
    return trained[-1] if trained else 0.0


def async_step_s(generate_s: float, train_s: float, lag: int, sync_s: float = 0.0, steps: int = 64) -> float:
    """Seconds of a step once the pipeline is full."""
    half = steps // 2
    whole = pipeline_s([generate_s] * steps, train_s, lag, sync_s)
    return (whole - pipeline_s([generate_s] * half, train_s, lag, sync_s)) / (steps - half)
