"""Seconds of plain rounds, drafts and verifications of a model on a device in an engine.

A matrix product takes `product_us` and the p-norm of the time for its bytes and the time for its FLOPs: where the
two limits meet it is slower than either. A hard maximum doubles the error on the sweep of an A100
(tests/simulate/test_accuracy.py). An engine adds a time per layer, per row and per forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from trl_selfspec.control.drafters import DrafterTraits
from trl_selfspec.control.rates import PLAIN, Choice
from trl_selfspec.simulate.shapes import Shape


def norm(a: float, b: float, p: float) -> float:
    """Between a + b (p = 1) and the larger of both (p = inf)."""
    high = max(a, b)
    return high if p == inf else high * (1.0 + (min(a, b) / high) ** p) ** (1 / p)


@dataclass(frozen=True)
class Products:
    """What products by weights of one dtype take on a device."""

    bits: float  # per weight, scales included
    product_us: float
    bytes_per_s: float
    flop_per_s: float
    p: float

    def seconds(self, count: float, weights: float, flop: float) -> float:
        return 1e-6 * count * self.product_us + norm(
            weights * self.bits / 8 / self.bytes_per_s, flop / self.flop_per_s, self.p
        )


@dataclass(frozen=True)
class Overheads:
    """What an engine adds to products, in microseconds unless said otherwise."""

    layer_us: float = 0.0  # per layer and forward: norms, rotary embedding, activation, a call of attention
    step_us: float = 0.0  # per forward: sampling, and the host where it is not hidden
    row_us: float = 0.0  # per row and forward
    verify_row_us: float = 0.0  # per row and verification
    token_us: float = 0.0  # per token of a forward: sampling
    context_us: float = 0.0  # per thousand tokens of context, layer and verification: attention of several queries
    products: int = 4  # launches per layer
    kv_share: float = 0.8  # of the bandwidth, for keys and values


@dataclass(frozen=True)
class Link:
    """All-reduce between the ranks of a tensor-parallel group."""

    latency_us: float
    bytes_per_s: float


@dataclass(frozen=True)
class Network:
    """A model on a device in an engine."""

    shape: Shape
    products: Products
    kv_bytes_per_s: float
    overheads: Overheads
    head: bool = True  # whether a forward ends with the output head
    head_products: Products | None = None  # None: those of the layers
    kv_bits: float = 16.0
    tp: int = 1
    link: Link | None = None

    @property
    def num_bytes(self) -> float:
        """Of all weights, on each rank."""
        return self.shape.parameters * self.products.bits / 8 / self.tp

    @property
    def draft_bytes(self) -> float:
        """The same for a drafter, which shares the input embedding."""
        shape = self.shape
        weights = shape.layers * (shape.layer_dense + shape.experts * shape.expert) + shape.head
        return weights * self.products.bits / 8 / self.tp

    @property
    def kv_token_bytes(self) -> float:
        return self.shape.kv_per_token * self.kv_bits / 8 / self.tp

    def forward_s(self, rows: float, tokens: int = 1, context: float = 0.0) -> float:
        """Seconds of a forward of some tokens of each row, over a mean context."""
        shape, over, tp, m = self.shape, self.overheads, self.tp, rows * tokens
        seconds = self.products.seconds(
            shape.layers * over.products,
            shape.layers * shape.layer_dense / tp,
            2 * m * shape.layers * shape.layer_dense / tp,
        )
        if shape.experts:
            touched = shape.experts * (1 - (1 - shape.experts_used / shape.experts) ** m)
            weights, flop = touched * shape.expert, 2 * m * shape.experts_used * shape.expert
            seconds += self.products.seconds(0, shape.layers * weights / tp, shape.layers * flop / tp)
        if self.head:
            seconds += (self.head_products or self.products).seconds(1, shape.head / tp, 2 * m * shape.head / tp)
        flop = 4 * m * context * shape.layers * shape.heads * shape.head_dim / tp
        seconds += rows * context * self.kv_token_bytes / (self.kv_bytes_per_s * over.kv_share)
        seconds += flop / self.products.flop_per_s
        micros = shape.layers * over.layer_us + over.step_us + rows * over.row_us + m * over.token_us
        if tokens > 1:
            micros += rows * over.verify_row_us + shape.layers * over.context_us * context / 1000
        if self.link is not None and tp > 1:
            sent = 2 * m * shape.hidden * (tp - 1) / tp * 2
            seconds += 2 * shape.layers * (1e-6 * self.link.latency_us + sent / self.link.bytes_per_s)
        return seconds + 1e-6 * micros

    def prefill_s(self, tokens: float) -> float:
        """Seconds of reading prompts, by their products alone."""
        bare = replace(self, head=False, overheads=Overheads())
        return bare.forward_s(1, round(tokens)) if tokens else 0.0


@dataclass(frozen=True)
class Draft:
    """What drafts: another network, or something that costs the same per round whatever the length."""

    name: str
    alpha: float  # chance that a draft is accepted whose predecessors were
    network: Network | None = None
    round_s: float = 0.0
    prepare_s: float = 0.0  # before the first draft of a rollout

    def seconds(self, rows: float, gamma: int, context: float) -> float:
        return self.round_s if self.network is None else gamma * self.network.forward_s(rows, 1, context)

    def tokens(self, gamma: int) -> float:
        """Expected of a round and row."""
        return sum(self.alpha**k for k in range(gamma + 1))

    @property
    def traits(self) -> DrafterTraits:
        return DrafterTraits(self.name, per_round=self.network is None)


@dataclass(frozen=True)
class Costs:
    """Seconds of rounds, and the tokens they bring."""

    target: Network
    drafts: Sequence[Draft] = field(default_factory=tuple)
    longest: int = 8

    @property
    def by_name(self) -> Mapping[str, Draft]:
        return {draft.name: draft for draft in self.drafts}

    def draft_s(self, rows: float, choice: Choice, context: float) -> float:
        return self.by_name[choice.drafter].seconds(rows, choice.gamma, context) if choice.gamma else 0.0

    def target_s(self, rows: float, choice: Choice, context: float) -> float:
        return self.target.forward_s(rows, choice.gamma + 1, context)

    def round_s(self, rows: float, choice: Choice, context: float) -> float:
        return self.draft_s(rows, choice, context) + self.target_s(rows, choice, context)

    def alpha(self, choice: Choice) -> float:
        return self.by_name[choice.drafter].alpha if choice.gamma else 0.0

    def tokens(self, choice: Choice) -> float:
        return self.by_name[choice.drafter].tokens(choice.gamma) if choice.gamma else 1.0

    def gain(self, rows: float, choice: Choice, context: float) -> float:
        """Tokens per second over those of plain rounds."""
        plain_s, seconds = self.round_s(rows, PLAIN, context), self.round_s(rows, choice, context)
        return self.tokens(choice) * plain_s / seconds

    def gated(self, rows: float, context: float, margin: float) -> Choice:
        """The best choice where it gains more than a margin."""
        choice = self.best(rows, context)
        return choice if self.gain(rows, choice, context) > margin else PLAIN

    def best(self, rows: float, context: float) -> Choice:
        """The choice of the highest rate."""
        choices = [Choice(gamma, draft.name) for draft in self.drafts for gamma in range(1, self.longest + 1)]
        return max([PLAIN, *choices], key=lambda choice: self.gain(rows, choice, context))
