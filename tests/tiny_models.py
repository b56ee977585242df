"""Tiny models whose mistakes show, and drafters that are wrong on purpose.

Default initialisation is so flat that a greedy row repeats one token and hides what is broken; these weights are large
enough that rows wander through the vocabulary.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trl_selfspec.control.controller import PLAIN, Choice, Controller
from trl_selfspec.drafter.quantized_drafter import QuantizedDrafter, make_drafter, quantized_layers
from trl_selfspec.engine import kv_budget
from trl_selfspec.engine.engine import SelfSpecEngine
from trl_selfspec.options import SelfSpecOptions


VOCAB_SIZE = 96
CONTEXT_LENGTH = 128
WEIGHT_STD = 0.12  # six times the usual
# Sliding windows shorter than the prompts, so that rows run out of them.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "num_hidden_layers": 2},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "smollm3": {"no_rope_layers": [1, 0]},
    "gpt_neox": {"num_key_value_heads": None, "head_dim": None},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.8, "logits_scaling": 2.0},
    "qwen3_moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "head_dim": None,
        "q_lora_rank": 24,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "first_k_dense_replace": 2,
    },
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "attention_chunk_size": 6,
        "no_rope_layers": [1, 0],
        "moe_layers": [],
        "floor_scale": 4,
        "attn_scale": 0.3,
    },
}


def tiny_model(
    family: str = "llama", seed: int = 0, std: float = WEIGHT_STD, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A model of two layers that ends rows at no token; a value of `None` leaves the family's own default."""
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT_LENGTH,
        "tie_word_embeddings": False,  # a tied head mostly repeats the last token
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    values |= FAMILIES.get(family, {}) | overrides
    config = AutoConfig.for_model(family, **{name: value for name, value in values.items() if value is not None})
    attention = "eager" if family == "gemma2" else None  # before 5.21, transformers' default leaves its soft-cap out
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.generation_config.eos_token_id = None
    scale_weights(model, seed, std)
    return model.to(dtype)


@torch.no_grad()
def scale_weights(model: torch.nn.Module, seed: int, std: float = WEIGHT_STD) -> None:
    """Draws every matrix anew and moves every vector (a bias, a norm's weight) off its neutral value, in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=std, generator=generator)
        else:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=std)


def ragged_prompts(lengths: list[int], seed: int = 0, vocab_size: int = VOCAB_SIZE) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def always_speculating(model: PreTrainedModel, gamma: int = 3, **values: Any) -> SelfSpecEngine:
    """Speculates in every round, with the drafter that is the most often wrong."""
    options: dict[str, Any] = {"max_active_sequences": 10_000, "draft_qtype": "qint4"} | values
    return SelfSpecEngine(model, SelfSpecOptions(num_speculative_tokens=gamma, **options))


def built_once(build: Callable[..., SelfSpecEngine]) -> Callable[..., SelfSpecEngine]:
    """Lets calls with equal arguments share an engine, which takes longer to build than most rollouts of tests.

    Nothing of earlier rollouts is in it, provided that no test refreshes it or changes its model's weights: keys and
    values are freed, and a controller that learns would have to be new.
    """
    engines: dict[Any, SelfSpecEngine] = {}

    @functools.wraps(build)
    def shared(model: PreTrainedModel, *args: Any, **values: Any) -> SelfSpecEngine:
        page_size = kv_budget.page_size(torch.device("cpu"))
        key = id(model), page_size, args, tuple(sorted(values.items()))  # the engine keeps the model alive
        if key not in engines:
            engines[key] = build(model, *args, **values)
        engines[key].release()
        return engines[key]

    return shared


def left_padded(prompts: list[list[int]], pad: int = 0) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def spoil(engine: SelfSpecEngine, noise: float, seed: int = 0) -> None:
    """Gives the engine a drafter of perturbed weights, `noise` times their own size, until its next `refresh`."""
    if not engine.drafters:  # nothing will be drafted
        return
    replica = engine._replica
    drafter = make_drafter(replica, engine.draft_qtype)
    generator = torch.Generator().manual_seed(seed)
    for name, module in quantized_layers(drafter):
        weight = replica.model.get_submodule(name).weight
        error = torch.randn(weight.shape, generator=generator).to(weight)
        module.requantize_(weight + noise * weight.std() * error)
    quantized = quantized_drafter(engine)
    quantized.module, quantized.version = drafter, quantized.wanted_version


def quantized_drafter(engine: SelfSpecEngine) -> QuantizedDrafter:
    """The drafter of the engine's own choice of a type."""
    drafter = engine.drafters[engine.draft_qtype]
    assert isinstance(drafter, QuantizedDrafter)
    return drafter


def force_page_size(monkeypatch: pytest.MonkeyPatch, page_size: int | None) -> None:
    """Engines allocate pages of this size from here on; `None`: dense rows."""
    monkeypatch.setattr("trl_selfspec.engine.kv_budget.page_size", lambda device: page_size)


class Schedule(Controller):
    """A controller that plays a fixed list of draft lengths over and over.

    Args:
        drafters: names, by draft; played over and over too. None: the first one of the engine.
    """

    def __init__(self, *draft_lengths: int, drafters: Sequence[str] = ()) -> None:
        self.draft_lengths, self.drafters, self.rounds, self.drafts = draft_lengths, drafters, 0, 0
        super().__init__([], num_speculative_tokens=0)  # measures nothing

    def begin_rollout(self, ready: Collection[str] = (), contexts: Mapping[str, str] | None = None) -> None:
        self.rounds = self.drafts = 0
        self.names = list(self.drafters or list(contexts or ())[:1])
        self.given_up: dict[str, str] = {}

    def choose(self, rows: int) -> Choice:
        self.rounds += 1
        gamma = self.draft_lengths[(self.rounds - 1) % len(self.draft_lengths)]
        if not (gamma and self.names):
            return PLAIN
        self.drafts += 1
        return Choice(gamma, self.names[(self.drafts - 1) % len(self.names)])

    def disable(self, drafter: str, reason: str) -> None:
        self.names = [name for name in self.names if name != drafter]

    def give_up(self, drafter: str, reason: str) -> None:
        self.disable(drafter, reason)

    def usual_plain_seconds(self, rows: int) -> None:
        return None

    def pass_over(self, rows: int = 0, choice: Choice = PLAIN, seconds: float = 0.0) -> None: ...

    def observe_plain(self, rows: int, seconds: float) -> None: ...

    def observe_speculative(
        self, rows: int, choice: Choice, draft_s: float, verify_s: float, accepted: Any, examined: Any
    ) -> None: ...

    def observe_preparing(self, drafter: str, seconds: float, typical: bool = True) -> None: ...
