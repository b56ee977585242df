"""The numbers of a `config.json` that decide what a forward reads and computes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# Families of plain multi-head or grouped-query attention whose config fields mean the same.
# fmt: off
DENSE = [
    "arcee", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "granite",
    "helium", "llama", "mistral", "nanochat", "olmo", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "seed_oss",
    "smollm3", "stablelm", "starcoder2",
]
# fmt: on
EXPERTS = ["gpt_oss", "granitemoe", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe"]
UNGATED = ("arcee", "nanochat", "starcoder2")  # two matrices in an MLP, others have three
TIED = ("cohere", "gemma", "smollm3", "starcoder2")  # unless their config says otherwise


@dataclass(frozen=True)
class Shape:
    """A decoder of equal layers. Counts are of numbers, not bytes."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # of the MLP that every token goes through; 0 where all of it is experts
    vocab: int
    tied: bool = False
    experts: int = 0
    experts_used: int = 0  # per token
    expert_inner: int = 0
    mlp_matrices: int = 3

    @property
    def layer_dense(self) -> int:
        """Weights of a layer that every token needs."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.mlp_matrices * self.hidden * self.inner + self.hidden * self.experts

    @property
    def expert(self) -> int:
        return self.mlp_matrices * self.hidden * self.expert_inner

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        return self.layers * (self.layer_dense + self.experts * self.expert) + self.head * (1 if self.tied else 2)

    @property
    def kv_per_token(self) -> int:
        """Keys and values of a token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Shape":
        """Reads a `config.json`.

        Raises:
            ValueError: the architecture is not one whose fields are known, or a field is missing.
        """
        config = config.get("text_config", config)
        kind = config.get("model_type")
        if kind not in DENSE + EXPERTS:
            raise ValueError(
                f"The architecture {kind!r} is not known to the cost model: {', '.join(sorted(DENSE + EXPERTS))}. "
                "Measure instead, with `scripts/bench_rollout.py` or a short training run."
            )
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            inner = config["intermediate_size"]
            shape = {
                "layers": config["num_hidden_layers"],
                "hidden": hidden,
                "heads": heads,
                "kv_heads": config.get("num_key_value_heads") or heads,
                "head_dim": config.get("head_dim") or hidden // heads,
                "vocab": config["vocab_size"],
                "tied": config.get("tie_word_embeddings", kind.startswith(TIED)),
                "mlp_matrices": 2 if kind in UNGATED else 3,
            }
            if kind in EXPERTS:
                shape["experts"] = config["num_experts" if "num_experts" in config else "num_local_experts"]
                shape["experts_used"] = config["num_experts_per_tok"]
                shape["expert_inner"] = config.get("moe_intermediate_size") or inner
                inner = config.get("shared_expert_intermediate_size", 0)
        except KeyError as error:
            raise ValueError(f"This {kind} config lacks {error}: give the model's own config.json.") from error
        return cls(inner=inner, **shape)

    @classmethod
    def load(cls, path: Path) -> "Shape":
        """From a `config.json`, or the folder that holds it."""
        return cls.from_config(json.loads((path / "config.json" if path.is_dir() else path).read_text()))
