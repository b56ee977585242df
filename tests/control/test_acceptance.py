"""Expected tokens per round from the counts of accepted drafts."""

from trl_selfspec.control.acceptance import Acceptance


def test_expected_tokens_follow_alpha_per_position() -> None:
    """1 + a + ab for γ = 2; positions never examined take the pooled alpha."""
    acceptance = Acceptance(decay=1.0, prior=0.8)
    acceptance.add([8e6, 2e6], [10e6, 4e6])
    a, b, pooled = 0.8, 0.5, 10 / 14
    one, two, three = acceptance.tokens_per_round(3)[1:]
    assert abs(one - (1 + a)) < 1e-4
    assert abs(two - (1 + a + a * b)) < 1e-4
    assert abs(three - (1 + a + a * b + a * b * pooled)) < 1e-4


def test_recent_acceptance_follows_the_rows_that_are_left() -> None:
    """Evidence of 64 rows would outweigh the last row's for hundreds of rounds."""
    lasting = Acceptance(0.998, prior=0.8)
    recent = Acceptance(0.98, prior=lasting)
    for acceptance in (lasting, recent):
        for rows, accepted, rounds in ((64, 64, 100), (1, 0, 100)):
            for _ in range(rounds):
                acceptance.add([accepted], [rows])
    assert recent.alpha < 0.25
    assert lasting.alpha > 0.9  # negative control: counts without the cut
