"""The seconds of rounds that an engine measured, and a cost model moved to agree with them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import log
from typing import Any

from trl_selfspec.simulate.costs import Costs, Network
from trl_selfspec.simulate.fitting import fit


NOTHING: dict[str, Any] = {"draft": [], "accepted": {}, "examined": {}}


@dataclass(frozen=True)
class Measurements:
    """Seconds by size: rows, or rows and tokens per row."""

    plain: dict[int, float]
    draft: dict[int, float]
    verify: dict[tuple[int, int], float]
    alpha: float | None = None  # of real drafts

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "Measurements":
        """Reads a result of `bench_rollout.py`, or the state of a controller.

        Raises:
            ValueError: there are no measured drafts in it.
        """
        engine = saved.get("engines", {}).get("selfspec", saved)
        state = engine.get("controller", engine)
        if "plain_ms_by_rows" in engine:
            found = cls._from_bench(engine, saved)
        elif "verify_by_rows" in state:
            found = cls._from_state(state)
        else:
            raise ValueError("There are no measured rounds: give a result of scripts/bench_rollout.py with selfspec.")
        if not found.plain or not found.draft or not found.verify:
            raise ValueError(
                "No draft was measured in it, so it can't say what drafting costs: measure again with more "
                "--warmup-tokens, or with --num-speculative-tokens 4 --max-active-sequences ROWS."
            )
        return found

    @classmethod
    def _from_bench(cls, engine: Mapping[str, Any], saved: Mapping[str, Any]) -> "Measurements":
        def curve(points: Mapping[str, float]) -> dict[int, float]:
            return {round(float(n)): ms / 1e3 for n, ms in points.items()}

        drafts = [points for name, points in engine["draft_step_ms_by_rows"].items() if name != "suffix"]
        verify = curve(engine["verify_ms_by_tokens"])
        synthetic = saved.get("provenance", {}).get("synthetic_acceptance") is not None
        alpha = None if synthetic else engine.get("acceptance", {}).get("alpha")
        draft = curve(max(drafts, key=len, default={}))
        return cls(curve(engine["plain_ms_by_rows"]), draft, {(1, n): s for n, s in verify.items()}, alpha)

    @classmethod
    def _from_state(cls, state: Mapping[str, Any]) -> "Measurements":
        def curve(points: Iterable[tuple[float, float, float]]) -> dict[int, float]:
            return {int(n): seconds for _, n, seconds in points}

        drafters = [drafter for name, drafter in state["drafters"].items() if name != "suffix"]
        own = max(drafters, key=lambda drafter: len(drafter["draft"]), default=NOTHING)
        verify = {
            (int(rows), round(n / rows)): seconds
            for rows, points in state["verify_by_rows"]
            for n, seconds in curve(points).items()
        }
        accepted, examined = (sum(map(sum, own[name].values())) for name in ("accepted", "examined"))
        return cls(curve(state["plain"]), curve(own["draft"]), verify, accepted / examined if examined else None)


def moved(network: Network, speed: float, overhead: float) -> Network:
    """A network whose products and overheads take other times."""
    products, over = network.products, network.overheads
    products = replace(
        products,
        product_us=products.product_us * overhead,
        bytes_per_s=products.bytes_per_s * speed,
        flop_per_s=products.flop_per_s * speed,
    )
    names = ("layer_us", "step_us", "row_us", "token_us")
    over = replace(over, **{name: getattr(over, name) * overhead for name in names})
    return replace(network, products=products, overheads=over)


def calibrated(costs: Costs, measured: Measurements, context: float = 0.0) -> Costs:
    """The model with the factors of speed and overhead, of target and drafter, that explain the measurements best."""
    draft = costs.drafts[0]
    assert draft.network is not None
    drafting = draft.network

    def of(v: Mapping[str, float]) -> Costs:
        own = moved(drafting, v["speed"] * v["draft_speed"], v["draft_overhead"])
        return replace(
            costs, target=moved(costs.target, v["speed"], v["overhead"]), drafts=(replace(draft, network=own),)
        )

    def loss(v: Mapping[str, float]) -> float:
        now = of(v)
        network = now.drafts[0].network
        assert network is not None
        pairs = [(now.target.forward_s(n, 1, context), s) for n, s in measured.plain.items()]
        pairs += [(network.forward_s(n, 1, context), s) for n, s in measured.draft.items()]
        pairs += [(now.target.forward_s(n, t, context), s) for (n, t), s in measured.verify.items()]
        return sum(log(a / b) ** 2 for a, b in pairs)

    return of(fit(loss, dict.fromkeys(("speed", "overhead", "draft_speed", "draft_overhead"), 1.0), reach=30.0))
