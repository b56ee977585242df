"""Which drafters another one makes needless, so that their memory can be freed."""

from collections.abc import Callable, Iterable, Iterator

from trl_selfspec.control.constants import GIVE_UP_DRAFTS, GIVE_UP_MARGIN, GIVE_UP_ROLLOUTS
from trl_selfspec.control.drafters import DrafterEstimates


Gain = Callable[[DrafterEstimates, int], float | None]  # over plain rounds at so many rows


def needless(drafters: Iterable[DrafterEstimates], gain: Gain) -> Iterator[tuple[str, str]]:
    """At a rollout's end, the names of drafters that have lost to another for long enough, and why.

    Matchers are left: they hold no weights, and what there is to copy changes. Of the others, those are compared that
    drafted in the same rollout, so that what training does to acceptance is in the figures of both.
    """
    rivals = [drafter for drafter in drafters if drafter.has_drafted and not drafter.traits.per_round]
    for worse in rivals if len(rivals) > 1 else ():
        lost = [(b, why) for b in rivals if b is not worse and (why := _why_worse(worse, b, gain))]
        worse.losses = worse.losses + 1 if lost else 0
        if worse.losses >= GIVE_UP_ROLLOUTS:
            yield from ((worse.traits.name, why) for b, why in lost[:1] if _enough(worse) and _enough(b))


def _enough(drafter: DrafterEstimates) -> bool:
    return drafter.num_examined >= GIVE_UP_DRAFTS


def _why_worse(worse: DrafterEstimates, better: DrafterEstimates, gain: Gain) -> str | None:
    """The figures at the size at which the two are closest, if the one loses clearly at every size."""
    pairs = []
    for rows in worse.cost.sizes:
        mine, theirs = gain(worse, rows), gain(better, rows)
        if not mine or not theirs or theirs <= GIVE_UP_MARGIN * mine:
            return None
        pairs.append((theirs / mine, rows, mine, theirs))
    if not pairs:
        return None
    _, rows, mine, theirs = min(pairs)
    return (
        f"at {rows} row{'s' if rows != 1 else ''} it gives {mine:.2f}x the tokens per second of plain rounds and "
        f"{better.traits.name} {theirs:.2f}x, and it comes no closer at any other batch size measured"
    )
