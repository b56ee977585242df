"""What rounds cost and how fast bytes went by, from the `RolloutStats` of the timed rollouts."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from bench.workload import Workload
from trl_selfspec.control.stats import RolloutStats


OPTIONAL_BYTES = ("kv_bytes", "graph_pool_bytes", "drafter_bytes")  # fields of the stats, where the engine counts them


@dataclass(frozen=True)
class Traffic:
    """Bytes that decoding has to read."""

    weight_bytes: int  # all parameters
    weights_read_bytes: int  # per forward: without an input embedding of its own, of which B rows are read
    kv_token_bytes: int  # keys and values of one token over all layers
    kv_read_bytes: int  # over all plain rounds of a rollout, by all rows

    @classmethod
    def of(cls, model: PreTrainedModel, workload: Workload) -> "Traffic":
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert embedding is not None and head is not None
        weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        table = embedding.weight
        assert isinstance(table, Tensor)
        own_bytes = 0 if head.weight is table else table.nbytes
        config = model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        token_bytes = 2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize
        return cls(weight_bytes, weight_bytes - own_bytes, token_bytes, token_bytes * workload.keys_read)


def own_figures(stats: RolloutStats, rollouts: int, traffic: Traffic) -> dict[str, Any]:
    """Acceptance, component seconds (per rollout) and bandwidth from the summed stats of the timed rollouts."""
    components = {name: getattr(stats, f"{name}_s") / rollouts for name in ("prefill", "plain", "draft", "verify")}
    figures: dict[str, Any] = {"component_s": components, "rounds": {}}
    for name, rounds in (("plain", stats.plain_rounds), ("speculative", stats.num_rounds_speculative)):
        figures["rounds"][name] = rounds / rollouts
    # The components are the device's seconds; what the host adds between rounds shows in the wall clock alone.
    num_rounds = stats.plain_rounds + stats.num_rounds_speculative
    figures["wall_ms_per_round"] = 1e3 * (stats.rollout_s - stats.prefill_s) / num_rounds
    if stats.plain_rounds:
        figures["plain_round_ms"] = 1e3 * stats.plain_s / stats.plain_rounds
        num_bytes = stats.plain_rounds * traffic.weights_read_bytes
        if not stats.num_rounds_speculative:  # else which plain rounds read how many keys is not known
            num_bytes += rollouts * traffic.kv_read_bytes
        figures["plain_bytes_per_s"] = num_bytes / stats.plain_s
    if stats.num_rounds_speculative:
        figures["draft_step_ms"] = 1e3 * stats.draft_s / stats.draft_steps
        figures["verify_ms"] = 1e3 * stats.verify_s / stats.num_rounds_speculative
        figures["drafters"] = {
            name: {
                "rounds": own.rounds / rollouts,
                "draft_ms": 1e3 * own.draft_s / own.rounds,
                "mean_acceptance_length": own.mean_acceptance_length,
            }
            for name, own in stats.by_drafter.items()
        }
        if len(stats.by_drafter) == 1 and "suffix" not in stats.by_drafter:  # else it reads no weights, or of several
            figures["draft_weight_bytes_per_s"] = stats.draft_steps * stats.drafter_bytes / stats.draft_s
        figures["verify_weight_bytes_per_s"] = (
            stats.num_rounds_speculative * traffic.weights_read_bytes / stats.verify_s
        )
        figures["acceptance"] = {
            "alpha": stats.alpha,
            "acceptance_rate": stats.acceptance_rate,
            "mean_acceptance_length": stats.mean_acceptance_length,
            "num_speculative_tokens": stats.mean_num_speculative_tokens,
            "speculative_round_fraction": stats.speculative_round_fraction,
            "toggle_active_sequences": stats.toggle_active_sequences,
        }
    return figures | {name: value for name in OPTIONAL_BYTES if (value := getattr(stats, name, 0))}


def step_costs(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Milliseconds by size as a controller learned them: plain rounds and draft steps by rows, verifying by tokens.

    A step of suffix drafts is a whole draft.

    Args:
        state: `SelfSpecEngine.state_dict()`.
    """

    def ms(curve: list[list[float]]) -> dict[str, float]:
        return {f"{n:g}": 1e3 * seconds for _, n, seconds in curve}

    drafters = {name: costs for name, drafter in state["drafters"].items() if (costs := ms(drafter["draft"]))}
    return {
        "plain_ms_by_rows": ms(state["plain"]),
        "verify_ms_by_tokens": ms(state["verify"]),
        "draft_step_ms_by_rows": drafters,
    }
