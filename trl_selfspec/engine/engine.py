"""Batched self-speculative generation for transformers causal LMs: token ids in, token ids and log-probabilities out.

The engine decodes with a replica of the model, and drafts with the same weights, quantized, or with text that was
generated before. It runs the model itself only to check the replica against it, never changes or hooks it, and takes
token ids, never a tokenizer or a trainer.
"""

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, PreTrainedModel

from trl_selfspec.control.controller import Controller
from trl_selfspec.control.stats import RolloutStats
from trl_selfspec.drafter.history import CompletionHistory
from trl_selfspec.drafter.linear_backends import fast_qtypes, resolve_qtype
from trl_selfspec.drafter.protocol import Drafter
from trl_selfspec.drafter.quantized_drafter import QuantizedDrafter
from trl_selfspec.drafter.suffix_drafter import SuffixDrafter
from trl_selfspec.drafter.two_level_drafter import FEWEST_PARAMETERS, TwoLevelDrafter
from trl_selfspec.engine.batch_state import BatchState
from trl_selfspec.engine.cuda_graphs import Capture, CudaCapture, GraphPool
from trl_selfspec.engine.kv_budget import KVMemory, kv_bytes_per_token, state_bytes_per_row, warn_if_scarce
from trl_selfspec.engine.model_runner import ModelRunner
from trl_selfspec.engine.request import Request, make_requests
from trl_selfspec.engine.rollout import Progress, Rollout
from trl_selfspec.engine.scheduler import Scheduler
from trl_selfspec.kv_cache.attention import bind_cache
from trl_selfspec.kv_cache.prefix_cache import PrefixCache
from trl_selfspec.options import SelfSpecOptions
from trl_selfspec.policy.refusals import UnsupportedModelError
from trl_selfspec.policy.replica import LayoutChangedError, PolicyReplica
from trl_selfspec.policy.self_check import self_check
from trl_selfspec.sampling.logits_processing import BatchedLogitsProcessor, effective_generation_config
from trl_selfspec.sampling.samplers import CoupledSampler, GreedySampler, RejectionSampler, Sampler


logger = logging.getLogger(__name__)

__all__ = ["Progress", "RolloutOutput", "SelfSpecEngine", "UnsupportedModelError"]

ROUNDS_AHEAD = {"cuda": 1}  # the GPU goes on while Python reads and schedules
VERIFICATIONS: dict[str, Callable[[torch.Tensor, int], Sampler]] = {
    "rejection": RejectionSampler,
    "coupled": CoupledSampler,
}


@dataclass(frozen=True)
class RolloutOutput:
    """Completions in prompt order.

    Attributes:
        completion_ids: new tokens of each prompt; the last one is an EOS token if one was produced.
        logprobs: of each token under the distribution it was drawn from, all processors applied (as in vLLM).
        policy_logprobs: of each token under `log_softmax(logits / temperature)`, what TRL's trainers compute. The same
            list where temperature is the only processor.
        stats: raw counters and seconds of this call.
    """

    completion_ids: list[list[int]]
    logprobs: list[list[float]]
    policy_logprobs: list[list[float]]
    stats: RolloutStats


class SelfSpecEngine:
    """Generates with a model, and drafts with its own quantized weights or with what was generated before.

    Args:
        model: a transformers causal LM, or a PEFT model around one, on the device to generate on.
        options: see [`SelfSpecOptions`].
        autocast_dtype: dtype of the autocast under which the model is trained; `None` for none.
        param_dtype: dtype to which FSDP's mixed precision casts the model's parameters; `None` for none.
        controller: decides on the drafter and the draft length of each round; `None` builds one from `options`.
        capture: turns a function into one that replays it; `None` captures CUDA graphs as `options` ask for.

    Raises:
        UnsupportedModelError: the architecture or an adapter can't be run faithfully; the message names the reason.

    Example:
        >>> engine = SelfSpecEngine(model, SelfSpecOptions(draft_qtype="qint4"))
        >>> engine.generate([[1, 2, 3]], GenerationConfig(max_new_tokens=8, do_sample=True), seed=0).completion_ids
        >>> engine.refresh()  # whenever the model's weights have changed
    """

    @torch.inference_mode(False)  # in a caller's, what is made could not be written to later
    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        options: SelfSpecOptions | None = None,
        autocast_dtype: torch.dtype | None = None,
        param_dtype: torch.dtype | None = None,
        controller: Controller | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.options = options or SelfSpecOptions()
        self.autocast_dtype, self.param_dtype = autocast_dtype, param_dtype
        self._policy, self._capture = model, capture
        self._history = CompletionHistory() if self.options.keeps_history else None
        self._refresh_s = 0.0
        self._build()
        self.controller = controller or Controller(
            [drafter.traits for drafter in self.drafters.values()],
            self.options.num_speculative_tokens,
            self.options.max_speculative_tokens,
            self.options.max_active_sequences,
        )
        if self.controller.measures:  # before the first rollout: it imports quanto, which takes seconds
            for name, drafter in self.drafters.items():
                self.controller.expect_preparing(name, drafter.estimate_seconds())

    def _build(self) -> None:
        """Everything that depends on the policy's architecture and on the layout of its tensors."""
        self._replica = PolicyReplica(self._policy, self.autocast_dtype, self.param_dtype)
        self.device, self._vocab_size = self._replica.embeddings.device, len(self._replica.embeddings)
        self._dtype = self._replica.dtype
        self._context_length = getattr(self._text_config, "max_position_embeddings", None)
        if self._context_length is not None and self._context_length < 1:  # XLNet's -1: no limit
            self._context_length = None
        self.calibration = self_check(self._replica, self._policy, self._forward_context())
        self._replica.mark_current()
        self.draft_qtype = resolve_qtype(self.options.draft_qtype, self.device, self._dtype)
        self.drafters = {drafter.traits.name: drafter for drafter in self._make_drafters()}
        kv_dtype = self.autocast_dtype  # None: the dtype of the keys themselves
        num_layers = self._replica.num_layers
        with self._forward_context():
            probe = self._replica.model, num_layers, kv_dtype, self.device
            token_bytes = kv_bytes_per_token(*probe)
            row_bytes = state_bytes_per_row(*probe) if self._replica.is_recurrent else 0
        self._memory = KVMemory(num_layers, token_bytes, kv_dtype, self.options, row_bytes)
        self._prefix_cache: PrefixCache | None = None  # None: no cache is allocated
        self._state: BatchState | None = None  # as long as the cache
        self._seed = torch.zeros((), dtype=torch.int64, device=self.device)
        self._sampler = VERIFICATIONS[self.options.verification](self._seed, self.options.longest_draft)
        self._graphs = self._graph_pool()

    def _make_drafters(self) -> list[Drafter]:
        """Those that the options ask for. Where counts alone decide, the first one drafts."""
        options, dtype = self.options, self._dtype
        quantized = [self.draft_qtype]
        if options.drafter == "auto" and options.draft_qtype == "auto":
            quantized += (qtype for qtype in fast_qtypes(self.device, dtype) if qtype != self.draft_qtype)
        drafters: list[Drafter] = []
        if self._replica.is_recurrent and options.drafter != "suffix" and options.longest_draft:
            logger.warning(
                "trl_selfspec: %s keeps a recurrent state, of which a quantized drafter would need its own: %s.",
                type(self._replica.base).__name__,
                "rounds are plain" if options.drafter == "quantized" else "only suffix drafts are made",
            )
        elif options.drafter != "suffix":
            drafters += (QuantizedDrafter(self._replica, qtype) for qtype in quantized)
        if options.drafter != "quantized":
            drafters.append(suffix := SuffixDrafter(self._history, self.device))
            if drafters and isinstance(drafters[0], QuantizedDrafter) and self._is_large:
                drafters.append(TwoLevelDrafter(drafters[0], suffix))
        return drafters if options.longest_draft else []

    @property
    def _is_large(self) -> bool:
        """Whether drafts of two levels may beat those of one."""
        num_parameters = sum(parameter.numel() for parameter in self._replica.model.parameters())
        return self.device.type == "cuda" and num_parameters >= FEWEST_PARAMETERS

    @property
    def history(self) -> CompletionHistory | None:
        """Completions kept for later drafts; `None` where none are."""
        return self._history

    def remember(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> None:
        """Keeps completions for later drafts. `generate` does so by itself with what it generates.

        For completions of other processes, and for whole conversations: the prompt of the first turn, and all that
        came after it. They never change a sample.

        Args:
            prompt_ids: token ids, ragged, one prompt per completion.
            completion_ids: token ids, ragged. Of each prompt, as many are kept as it has here.
        """
        if (history := self.history) is not None:
            history.add(prompt_ids, completion_ids)

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model whose distribution samples follow, PEFT's wrapper removed."""
        return self._replica.base

    @property
    def prefix_cache(self) -> PrefixCache | None:
        """The keys and values, and which of their rows later calls can reuse; `None`: not allocated."""
        return self._prefix_cache

    @property
    def graphs(self) -> GraphPool:
        """The rounds captured so far."""
        return self._graphs

    @property
    def stale(self) -> bool:
        """Whether the model's weights changed since the last `refresh`: by version, address or a sample of values."""
        return self._replica.stale

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self, draft: bool = True) -> None:
        """Follows the model's weights, in place. Collective where the weights are sharded.

        Copies of weights are renewed at every call, whatever `stale` says. A model whose tensors have other shapes or
        dtypes than before (`resize_token_embeddings`, `to(dtype)`) is built anew.

        Args:
            draft: also requantize drafters. `False` keeps them as they are for this change of weights: samples still
                follow the new weights exactly, only fewer drafts are accepted. Quantizing itself waits for the first
                draft, so that a rollout that never speculates never pays for it.

        Raises:
            UnsupportedModelError: what the model has become can't be run faithfully.
        """
        start = self._seconds()
        with torch.cuda.device_of(self._seed):
            try:
                moved = self._replica.refresh()
            except LayoutChangedError:
                self.release()
                self._build()
                moved = True
            if moved:
                self._graphs.clear()
        if self._prefix_cache is not None:
            self._prefix_cache.clear()
        if draft:
            for drafter in self.drafters.values():
                drafter.request_update()
        self._refresh_s += self._seconds() - start

    @torch.inference_mode(False)
    @torch.no_grad()
    def check(self) -> None:
        """Compares the engine with the model's own forward once more, with the weights of the last `refresh`.

        Collective where the weights are sharded.

        Raises:
            UnsupportedModelError: they give other next-token distributions; the message names the likely cause.
        """
        with torch.cuda.device_of(self._seed):
            self.calibration = self_check(self._replica, self._policy, self._forward_context())

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        generation_config: GenerationConfig | None = None,
        seed: int | None = None,
        max_new_tokens: Sequence[int] | None = None,
        on_round: Callable[[Progress], None] | None = None,
        keep: bool = False,
    ) -> RolloutOutput:
        """Generates one completion per prompt.

        Args:
            prompt_ids: token ids, ragged. Equal prompts (a GRPO group) are prefilled once.
            generation_config: as in `model.generate`: unset fields come from the model's own config.
            seed: of all randomness; `None` draws one from torch's global CPU generator. A row's sample depends on the
                seed, its index and its own prompt alone.
            max_new_tokens: a budget per row in place of the config's.
            on_round: called after every round.
            keep: leave finished rows in the cache, as far as it has room, until the next `refresh` or `release`. A
                later call with `keep` computes prompts that begin like them (the next turn of a conversation) from
                where they differ. The tokens are the same but for rounding; a call without `keep` starts from nothing.

        Raises:
            ValueError: bad prompts, a generation parameter that can't be honoured, or a policy whose logits are not
                finite.
            RuntimeError: the model's weights changed since the last `refresh()`.
        """
        if self._replica.stale:
            raise RuntimeError("The model's weights changed since the last refresh; call `engine.refresh()` first.")
        config = effective_generation_config(self._replica.base, generation_config)
        logits_processor = BatchedLogitsProcessor.from_generation_config(self._replica.base, config, self.device)
        requests = make_requests(prompt_ids, config, max_new_tokens, self._vocab_size, self._context_length)
        if not requests:
            return RolloutOutput([], [], [], RolloutStats())
        if seed is None:
            seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        elif type(seed) is not int or not -(2**63) <= seed < 2**63:
            raise ValueError(f"`seed={seed!r}` is not supported: use an integer of 64 bits, or None.")
        if self._prefix_cache is not None and not keep:
            self._prefix_cache.clear()
        with torch.cuda.device_of(self._seed), self._forward_context(), contextlib.ExitStack() as on_error:
            on_error.callback(self.release)  # a failed rollout may leave NaN, which spreads through masked keys too
            rollout = self._rollout(requests, logits_processor, seed, on_round, keep)
            rollout.run()
            on_error.pop_all()
        for drafter in self.drafters.values():
            drafter.end_rollout(rollout.completions, rollout.stats)
        self._drop_given_up()
        warn_if_scarce(rollout.stats)
        rollout.stats.refresh_s, self._refresh_s = self._refresh_s + rollout.stats.requantize_s, 0.0
        rollout.stats.drafter_bytes, rollout.stats.kv_bytes = self.drafter_bytes, rollout.prefix_cache.cache.nbytes
        rollout.stats.graph_pool_bytes = self._graphs.nbytes
        if self.device.type == "cuda" and not keep:
            self.release()
        policy_logprobs = rollout.logprobs if logits_processor.is_full_softmax else rollout.policy_logprobs
        return RolloutOutput(rollout.completions, rollout.logprobs, policy_logprobs, rollout.stats)

    def release(self) -> None:
        """Frees the keys and values, those kept for later turns included; the next rollout allocates anew."""
        if self._prefix_cache is not None:
            self._prefix_cache = self._memory.release(self._prefix_cache)
        bind_cache(self._replica.model, None)
        for drafter in self.drafters.values():
            drafter.bind(None)

    def _drop_given_up(self) -> None:
        """Frees drafters that the controller will not choose again, and says why."""
        for name in self.drafters.keys() & self.controller.given_up.keys():
            logger.warning("trl_selfspec: no %s drafts from here on: %s", name, self.controller.given_up[name])
            self.drafters.pop(name).release()
            self._graphs.clear()

    @property
    def drafter_bytes(self) -> int:
        """Bytes that drafters hold beyond what they share with the target; 0 until one first drafts."""
        return sum(drafter.nbytes for drafter in self.drafters.values())

    def state_dict(self) -> dict:
        """What the controller learned, as JSON-able values."""
        return self.controller.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.controller.load_state_dict(state)

    @property
    def _text_config(self):
        return self._replica.base.config.get_text_config(decoder=True)

    def _rollout(
        self,
        requests: list[Request],
        logits_processor: BatchedLogitsProcessor,
        seed: int,
        on_round: Callable[[Progress], None] | None,
        keep: bool,
    ) -> Rollout:
        before, prefix_cache = self._prefix_cache, self._memory.allocate(requests, self._prefix_cache, self.device)
        self._prefix_cache, cache = prefix_cache, prefix_cache.cache
        new = self._state is None or before is None or before.cache is not cache
        if new:
            self._state = BatchState(cache.max_rows, cache.row_capacity, self.device)
        if cache.rounds_outdated() or new:
            self._graphs.clear()
        bind_cache(self._replica.model, cache)
        # Rows may be fewer than requests: those with a history go first, before the others need its place.
        requests.sort(key=lambda request: -prefix_cache.longest_prefix(request.prompt)[1])
        assert self._state is not None
        prompts = [request.prompt for request in sorted(requests, key=lambda request: request.row_id)]
        moved = [drafter.begin_rollout(prompts, self._state.capacity, keep) for drafter in self.drafters.values()]
        if any(moved):
            self._graphs.clear()
        self._seed.fill_(seed)
        logits_processor = self._graphs.begin_rollout(logits_processor, self._state.max_rows, cache.row_capacity)
        sampler, token_sampler = self._samplers(logits_processor.greedy)
        runner = ModelRunner(
            target=self._replica.model,
            cache=cache,
            state=self._state,
            logits_processor=logits_processor,
            sampler=sampler,
            token_sampler=token_sampler,
            observers=list(self.drafters.values()),
            max_position=None if self._context_length is None else self._context_length - 1,
            graphs=self._graphs,
            prefill_kwargs=self._prefill_kwargs(),
        )

        ahead = ROUNDS_AHEAD.get(self.device.type, 0)
        scheduler = Scheduler(requests, min(cache.max_rows, len(requests)))
        recurrent = self._replica.is_recurrent
        keep = keep and not recurrent  # only the end of a prompt can be reused, not the middle of a conversation
        return Rollout(
            runner, scheduler, prefix_cache, self.controller, self.drafters, keep, recurrent, on_round, ahead
        )

    def _seconds(self) -> float:
        """The host's clock, once the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _samplers(self, greedy: bool) -> tuple[Sampler, Sampler]:
        """What draws tokens and verifies drafts, and what verifies drafts without a distribution."""
        return (GreedySampler(), GreedySampler()) if greedy else (self._sampler, CoupledSampler(self._seed))

    def _graph_pool(self) -> GraphPool:
        choice = self.options.cuda_graphs
        if self._capture is not None:
            return GraphPool(self._capture, required=choice is True)
        if self.device.type != "cuda":
            if choice is True:
                raise ValueError(
                    f'`cuda_graphs=True` needs a model on a CUDA device, and this one is on {self.device}; use "auto".'
                )
            return GraphPool()
        return GraphPool(CudaCapture(self.device), required=choice is True) if choice else GraphPool()

    def _prefill_kwargs(self) -> dict[str, int]:
        accepted = inspect.signature(self._replica.model.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def _forward_context(self) -> contextlib.AbstractContextManager:
        if self.autocast_dtype is None:
            # An outer autocast (a user's `with accelerator.autocast()`) would change the logits_processor.
            return torch.autocast(self.device.type, enabled=False)
        return torch.autocast(self.device.type, dtype=self.autocast_dtype, cache_enabled=False)
