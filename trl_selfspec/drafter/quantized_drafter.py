"""The drafter: the target replica's module tree with quantized Linear layers, and what keeps it current.

Everything but the Linear weights is shared with the replica. The weights are quantized from the replica's effective
ones, adapters merged, after every change.

On GPUs, the projections of one input are output rows of one quantized layer. Each row has scales of its own, so this
changes no code; under their own names they are still there, to be quantized one by one.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trl_selfspec.control.drafters import DrafterTraits
from trl_selfspec.drafter.protocol import Batch, Drafter, DraftError, DraftRunner
from trl_selfspec.drafter.quantized_linear import QuantizedLinear
from trl_selfspec.drafter.quantized_weight import make_quantized_weight
from trl_selfspec.kernels import triton_support as gpu
from trl_selfspec.kv_cache.attention import bind_cache
from trl_selfspec.kv_cache.paged_cache import PagedCache
from trl_selfspec.policy.fused_layers import joinable_projections
from trl_selfspec.policy.peft_weights import find_module, frozen_state
from trl_selfspec.policy.replica import PolicyReplica, ReplicaLinear
from trl_selfspec.utils import Clock, failures_raised_as


TIMED_CALLS = 3  # the first one imports quanto


class QuantizedDrafter(Drafter):
    """The target's replica with quantized weights: built when it is first needed, requantized when weights changed.

    A rollout that never uses it never pays for it.

    Args:
        replica: the target replica.
        qtype: quanto's name of the weights' type.

    Attributes:
        module: the quantized replica; `None` until it was first needed.
        version: the replica's, of the weights that `module` has; `None` where it has none yet.
        wanted_version: the replica's, of the weights that the next draft should have.
    """

    has_distribution = True

    def __init__(self, replica: PolicyReplica, qtype: str) -> None:
        self.traits = DrafterTraits(qtype)
        self.replica, self.qtype = replica, qtype
        self.module: PreTrainedModel | None = None
        self.version: int | None = None
        self.wanted_version = replica.version

    def request_update(self) -> None:
        """Has the replica's present weights quantized before the next draft; until then older ones may draft."""
        self.wanted_version = self.replica.version

    @property
    def is_ready(self) -> bool:
        """Whether it has the weights that were last asked for."""
        return self.version == self.wanted_version

    def prepare(self) -> tuple[float, bool]:
        """Builds and requantizes what is due; the first time takes longer than later ones."""
        was_there = self.module is not None
        clock = Clock(self.replica.embeddings.device)
        clock.mark()
        try:
            with failures_raised_as(DraftError):
                self._update()
        except DraftError:
            self.module = self.version = None
            raise
        clock.mark()
        return clock.laps()[0], was_there

    def _update(self) -> None:
        if self.module is None:
            self.module = make_drafter(self.replica, self.qtype)
        if not self.is_ready:
            requantize(self.module, self.replica)
            self.version = self.wanted_version

    @torch.no_grad()
    def estimate_seconds(self) -> float:
        """What quantizing all weights should take, from one of middle size."""
        sizes = [module.weight for module in self.replica.model.modules() if isinstance(module, ReplicaLinear)]
        if not sizes:
            return 0.0
        like = sorted(sizes, key=torch.numel)[len(sizes) // 2]
        out_features, in_features = like.shape
        sample = make_quantized_weight(self.qtype, out_features, in_features, like.dtype, like.device)
        zeros, clock = torch.zeros_like(like), Clock(like.device)
        clock.mark()
        for _ in range(TIMED_CALLS):
            sample.quantize_(zeros)
            clock.mark()
        return min(clock.laps()) * sum(map(torch.numel, sizes)) / like.numel()

    @property
    def nbytes(self) -> int:
        """Bytes it holds beyond what it shares with the target; 0 until it first drafts."""
        return 0 if self.module is None else drafter_bytes(self.module)

    def bind(self, cache: PagedCache | None) -> None:
        if self.module is not None:
            bind_cache(self.module, cache)

    def num_steps(self, gamma: int) -> int:
        return gamma

    @property
    def program(self) -> str:
        return f"draft {self.qtype}"

    def step(self, runner: DraftRunner, batch: Batch, num_slots: int, gamma: int) -> Tensor:
        """One forward of T = 1 behind the tokens drafted so far. Its keys go to the target's cache."""
        assert self.module is not None, "prepare comes first"
        at = batch.lengths + batch.num_drafted
        scores = runner.process(runner.forward(self.module, at[:, None] - 1, num_slots), at)[:, 0]
        draft, logprobs = runner.sampler.propose(scores, batch.row_ids, at, batch.num_drafted[0])
        batch.tokens.scatter_(1, at[:, None], draft[:, None])
        batch.draft_nan.logical_or_(logprobs.isnan())
        batch.num_drafted.add_(1)
        return draft

    def release(self) -> None:
        self.module = self.version = None


class QuantizedRows(nn.Module):
    """A Linear layer whose weight is a part of a larger quantized one: its output rows from `first_row` on."""

    def __init__(self, whole: QuantizedLinear, first_row: int, out_features: int) -> None:
        super().__init__()
        self.whole, self.first_row = whole, first_row
        self.in_features, self.out_features, self.dtype = whole.in_features, out_features, whole.dtype

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.out_features)

    @property
    def weight(self) -> Tensor:
        return self.whole.dequantize(self.rows)

    @property
    def bias(self) -> Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(x)[..., self.rows]

    def requantize_(self, weight: Tensor, repack: bool = True) -> None:
        """`QuantizedLinear.requantize_` of its own rows; `weight` is `(out_features, in_features)`."""
        self.whole.requantize_(weight, self.first_row, repack)

    @torch.no_grad()
    def copy_bias_(self, bias: Tensor | None) -> None:
        """Takes over what the layer would have shared alone."""
        if bias is not None:
            assert self.whole.bias is not None
            self.whole.bias[self.rows].copy_(bias)


def make_drafter(replica: PolicyReplica, qtype: str) -> PreTrainedModel:
    """The target replica's tree and tensors with a `QuantizedLinear` for every Linear layer; fill it by `requantize`.

    The output head is quantized too. Kept in bf16, it would add 21 % (7B) to 58 % (135M) to the bytes that a draft
    step reads, for 0.002 to 0.016 of acceptance (docs/LOG.md 2026-11-30).
    """
    joined = _joined(replica, qtype)

    def quantized(name: str, layer: ReplicaLinear) -> nn.Module:
        if name in joined:
            return joined[name]
        sizes = layer.in_features, layer.out_features
        return QuantizedLinear(*sizes, layer.bias, qtype, layer.weight.dtype, layer.weight.device)

    return replica.tree(linear=quantized)


def _joined(replica: PolicyReplica, qtype: str) -> dict[str, QuantizedRows]:
    """The parts of the joined layers by name, where kernels run them at once."""
    joined: dict[str, QuantizedRows] = {}
    if not gpu.runs_triton(replica.embeddings.device):
        return joined
    for layer in replica.fast_layers:
        for group in joinable_projections(replica.model.get_submodule(layer)):
            names = [f"{layer}.{name}" for name in group]
            linears = [replica.model.get_submodule(name) for name in names]
            biases = [linear.bias for linear in linears if linear.bias is not None]
            if len(biases) not in (0, len(names)):
                continue
            weight: Tensor = linears[0].weight  # type: ignore[assignment]
            sizes: list[int] = [linear.out_features for linear in linears]  # type: ignore[misc]
            bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None  # type: ignore[arg-type]
            whole = QuantizedLinear(weight.shape[1], sum(sizes), bias, qtype, weight.dtype, weight.device)
            for index, name in enumerate(names):
                joined[name] = QuantizedRows(whole, sum(sizes[:index]), sizes[index])
    return joined


def quantized_layers(drafter: nn.Module) -> Iterator[tuple[str, QuantizedLinear | QuantizedRows]]:
    """The drafter's quantized layers, with the names of the target's that they stand for."""
    wholes: set[nn.Module] = {module.whole for module in drafter.modules() if isinstance(module, QuantizedRows)}
    for name, module in drafter.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedRows) and module not in wholes:
            yield name, module


@torch.no_grad()
def requantize(drafter: nn.Module, replica: PolicyReplica) -> None:
    """Quantizes the current weights into the drafter, in place, layer by layer; skips frozen ones that stayed."""
    changed: dict[QuantizedLinear, None] = {}
    for name, module in quantized_layers(drafter):
        state = frozen_state(find_module(replica.base, name))
        if state is not None and state == getattr(module, "quantized_state", None):
            continue
        layer = replica.model.get_submodule(name)
        module.requantize_(layer.weight, repack=False)  # type: ignore[arg-type]
        if isinstance(module, QuantizedRows):
            module.copy_bias_(layer.bias)  # type: ignore[arg-type]
        module.quantized_state = state  # type: ignore[assignment]
        changed[module.whole if isinstance(module, QuantizedRows) else module] = None
    for whole in changed:
        whole.repack_()


def drafter_bytes(drafter: nn.Module) -> int:
    """Bytes the drafter holds beyond what it shares with the target replica."""
    wholes = {module.whole for module in drafter.modules() if isinstance(module, QuantizedRows)}
    biases = sum(whole.bias.nbytes for whole in wholes if whole.bias is not None)
    return biases + sum(module.nbytes for module in drafter.modules() if isinstance(module, QuantizedLinear))
