"""Real TRL trainers on a tiny random model, a tokenizer built here and generated data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from trl_selfspec import SelfSpecGRPOConfig, SelfSpecGRPOTrainer


SPECIAL_TOKENS = ["<pad>", "<bos>", "<eos>", "<unk>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] + ':' + message['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
PROMPTS = ["1+2=", "13+29=", "7*8=", "what is 100-1?"]
FP32_LOGP_TOLERANCE = 1e-4  # two orders of summation of the same fp32 forward
# Draft lengths by counts alone, so that a run speculates in every round and repeats.
ALWAYS_SPECULATE = {
    "selfspec_draft_qtype": "qint8",
    "selfspec_num_speculative_tokens": 3,
    "selfspec_max_active_sequences": 64,
}
GREEDY = {"generation_kwargs": {"do_sample": False}}


def make_tokenizer() -> PreTrainedTokenizerFast:
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def make_config(**overrides: Any) -> Qwen3Config:
    values = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Qwen3Config(**values | overrides)


def make_model(**overrides: Any) -> Qwen3ForCausalLM:
    """Weights three times their usual size: default initialisation is so flat that mistakes do not show."""
    config = make_config(**overrides)
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    torch.set_rng_state(generator_state)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def make_dataset(conversational: bool = False) -> Dataset:
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS] if conversational else PROMPTS
    return Dataset.from_list([{"prompt": prompt} for prompt in prompts * 4])


class Recorder:
    """A reward that differs within every group, so that weights move, and that keeps what it was shown."""

    __name__ = "recorder"

    def __init__(self, on_call: Callable[[int], None] | None = None) -> None:
        self.completion_ids: list[list[list[int]]] = []
        self.on_call = on_call

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        self.completion_ids.append(completion_ids)
        if self.on_call is not None:
            self.on_call(len(self.completion_ids))
        return [float(index % 3) for index in range(len(completion_ids))]


def config_values(output_dir: Path, **overrides: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 6,
        "num_generations": 3,
        "max_completion_length": 12,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | overrides


def make_trainer(
    output_dir: Path,
    trainer_class: type[Any] = SelfSpecGRPOTrainer,
    config_class: type = SelfSpecGRPOConfig,
    model: Any = None,
    reward: Recorder | None = None,
    trainer_kwargs: dict[str, Any] | None = None,
    conversational: bool = False,
    train_dataset: Any = None,
    **overrides: Any,
) -> Any:
    return trainer_class(
        model=make_model() if model is None else model,
        reward_funcs=reward or Recorder(),
        args=config_class(**config_values(output_dir, **overrides)),
        train_dataset=train_dataset or make_dataset(conversational),
        **{"processing_class": make_tokenizer()} | (trainer_kwargs or {}),
    )


def train(trainer: Any, **kwargs: Any) -> list[dict[str, float]]:
    """Trains and returns the log of each step."""
    trainer.train(**kwargs)
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class MoveWeights(TrainerCallback):
    """Moves the weights after each step: a greedy group has equal completions, and so no gradient that would."""

    @torch.no_grad()
    def on_step_end(self, *_: Any, model: torch.nn.Module, **__: Any) -> None:
        for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
            parameter += 0.1 * torch.arange(parameter.numel()).sin().view_as(parameter)


def greedy_run(tmp_path: Path, lora: bool = False, **overrides: Any) -> list[list[list[int]]]:
    reward = Recorder()
    peft_config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    kwargs = {"callbacks": [MoveWeights()], "peft_config": peft_config if lora else None}
    options = {"max_steps": 3, "learning_rate": 0.0, "shuffle_dataset": False}
    train(make_trainer(tmp_path, reward=reward, trainer_kwargs=kwargs, **options, **GREEDY, **overrides))
    assert len(reward.completion_ids) == 3
    return reward.completion_ids


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def module_state(model: torch.nn.Module) -> dict[str, Any]:
    """All of a policy that a rollout must leave as it was, apart from its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {
        name: (
            module.training,
            getattr(module, "gradient_checkpointing", None),
            "forward" in vars(module),
            tuple(len(getattr(module, kind)) for kind in hooks),
            {
                key: (parameter.requires_grad, parameter.data_ptr())
                for key, parameter in module._parameters.items()
                if parameter is not None
            },
        )
        for name, module in model.named_modules()
    } | {"use_cache": model.config.use_cache, "attention": model.config._attn_implementation}  # type: ignore[union-attr]


def assert_same_weights(ours: Any, theirs: Any) -> None:
    expected = weights(theirs)
    for name, tensor in weights(ours).items():
        assert torch.equal(tensor, expected[name]), name
