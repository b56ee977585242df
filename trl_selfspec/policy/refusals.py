"""Which models the engine refuses before it builds anything: by what their config and their placement say.

Faults that no config shows are the self-check's to find.
"""

from transformers import DynamicCache, PreTrainedModel

from trl_selfspec.policy.recurrent_layers import is_recurrent, unsupported_layers


# transformers recomputes the frequencies of these for the longest row of the batch: a row would see its neighbours.
BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Layers of transformers' cache that hold keys and values alone, or nothing.
KEYS_AND_VALUES = {"DynamicLayer", "DynamicSlidingWindowLayer", "DummyLayer"}
WITH_STATE = {
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
}
USE_TRL = "use TRL's own generation (`use_selfspec=False`)."


class UnsupportedModelError(ValueError):
    """The engine can't run this model faithfully; the message names the reason."""


def refuse_unsupported(base: PreTrainedModel) -> None:
    """Lets models pass that the engine may run.

    Raises:
        UnsupportedModelError: the engine can't run the model faithfully; the message names the reason.
    """
    _refuse_device(base)
    _refuse_other_state(base)
    _refuse_batch_dependent_rope(base)
    _refuse_uncapped_attention(base)


def _refuse_device(base: PreTrainedModel) -> None:
    devices = {parameter.device.type for parameter in base.parameters() if not hasattr(parameter, "ds_id")}
    if "meta" in devices and any(hasattr(module, "_hf_hook") for module in base.modules()):
        raise UnsupportedModelError(
            "accelerate keeps weights of the policy off its device (`cpu_offload`, `device_map`); load the whole "
            "model on one device."
        )
    if others := devices - {"cpu", "cuda", "meta"}:
        raise UnsupportedModelError(
            f"the policy is on {', '.join(sorted(others))}, and the engine runs on CPU and CUDA."
        )


def _refuse_other_state(base: PreTrainedModel) -> None:
    """Refuses layers that keep more than keys and values, by the class of their entry in transformers' own cache."""
    config = base.config.get_text_config(decoder=True)
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, AttributeError, ValueError):  # unknown to transformers' cache: the self-check decides
        layers = []
    names = [type(layer).__name__ for layer in layers]
    types = getattr(config, "layer_types", None) or [f"number {index}" for index in range(len(names))]
    unsupported = unsupported_layers(base)
    runs_states = is_recurrent(base) and not unsupported and set(names) != {"LinearAttentionLayer"}
    known = KEYS_AND_VALUES | WITH_STATE if runs_states else KEYS_AND_VALUES
    other = dict.fromkeys(
        f"`{kind}` (`{name}`)" for kind, name in zip(types, names, strict=False) if name not in known
    )
    if other or (getattr(base, "_is_stateful", False) and not runs_states):
        where = f"in layers of type {', '.join(other)}, " if other else ""
        where += f"computed by {', '.join(unsupported)}, " if unsupported else ""
        raise UnsupportedModelError(
            f"{type(base).__name__} keeps more than keys and values, such as a recurrent state, {where}"
            f"which the engine does not run yet; {USE_TRL}"
        )


def _refuse_batch_dependent_rope(base: PreTrainedModel) -> None:
    rope = getattr(base.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for parameters in (rope, *(nested for nested in rope.values() if isinstance(nested, dict))):  # by layer type
        if parameters.get("rope_type") in BATCH_DEPENDENT_ROPE:
            raise UnsupportedModelError(
                f"rotary scaling `{parameters['rope_type']}` depends on the longest row of the batch, so samples "
                f"would too; {USE_TRL}"
            )


def _refuse_uncapped_attention(base: PreTrainedModel) -> None:
    """transformers before 5.21 gives models with a soft-cap torch's SDPA by default, which leaves the cap out."""
    config = base.config.get_text_config(decoder=True)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        raise UnsupportedModelError(
            "with `attn_implementation='sdpa'` training leaves out the soft-cap of this model's attention, so samples "
            "would follow another distribution; load it with `attn_implementation='eager'`."
        )
