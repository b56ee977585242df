"""vLLM as an engine of the benchmark: the real worker process and its protocol, with a stand-in for the library."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from bench.figures import Traffic
from bench.vllm_engine import RESERVE_BYTES, VllmEngine, check_vllm, kv_bytes, memory_share
from bench.workload import Workload, completion_lengths, load_model, random_prompts


# What the worker uses of vLLM's offline API, strict about names and as noisy on stdout as the real one.
STAND_IN = """
import json, os, pathlib
print("INFO: imported")
__version__ = "0.0.0+standin"

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, detokenize):
        assert (temperature, ignore_eos, detokenize) == (1.0, True, False)
        self.max_tokens = max_tokens

class Completion:
    def __init__(self, token_ids):
        self.token_ids = tuple(token_ids)

class RequestOutput:
    def __init__(self, token_ids):
        self.outputs = [Completion(token_ids)]

class LLM:
    def __init__(self, *, model, load_format, skip_tokenizer_init, dtype, max_model_len, max_num_seqs,
                 kv_cache_memory_bytes, enforce_eager, enable_prefix_caching):
        assert skip_tokenizer_init and not enable_prefix_caching and enforce_eager
        assert (load_format == "auto") == (pathlib.Path(model) / "model.safetensors").exists()
        assert os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind" and int(os.environ["OMP_NUM_THREADS"]) > 0
        assert kv_cache_memory_bytes >= max_num_seqs * max_model_len
        self.vocab_size = json.loads((pathlib.Path(model) / "config.json").read_text())["vocab_size"]
        self.max_model_len = max_model_len
        print("INFO: loaded", dtype, max_num_seqs)

    def generate(self, prompts, sampling_params, use_tqdm):
        print("INFO: generating")
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids = prompt["prompt_token_ids"]
            if max(ids) >= self.vocab_size:
                raise ValueError(f"Token id {max(ids)} is out of vocabulary")
            assert len(ids) + params.max_tokens <= self.max_model_len
            outputs.append(RequestOutput([sum(ids) % self.vocab_size] * params.max_tokens))
        return outputs
"""
INPUTS = "class TokensPrompt(dict):\n    pass\n"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "inputs.py").write_text(INPUTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(random_prompts(3, 6, vocab_size=256, seed=0), completion_lengths("longtail", 3, 12, seed=0))


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", None, torch.float32, torch.device("cpu"), seed=0)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("saved", [False, True], ids=["random weights", "saved weights"])
def test_the_worker_does_the_forced_work(model, work: Workload, saved: bool, tmp_path: Path) -> None:
    """Each request its own prompt and length, in order, past all that the library prints; the end frees the memory."""
    check_vllm(sys.executable)
    path = None
    if saved:
        path = tmp_path / "saved"
        copy.deepcopy(model).save_pretrained(path)  # which changes the configuration of what it saves
    engine = VllmEngine(model, work, path=path)
    try:
        assert engine.version == "0.0.0+standin"
        for part in (work.shortened(0.5), work):
            completions = engine.rollout(part, seed=1)
            part.check(completions, "vllm")
            expected = [[sum(p) % 256] * n for p, n in zip(part.prompt_ids, part.lengths, strict=True)]
            assert completions == expected
    finally:
        engine.close()
    assert engine._process.returncode == 0


@pytest.mark.usefixtures("stand_in")
def test_an_exception_in_the_worker_reaches_the_parent(model, work: Workload) -> None:
    """Without it the parent would wait for ever for an answer, or time an empty rollout."""
    engine = VllmEngine(model, work)
    with pytest.raises(RuntimeError, match="Token id 256 is out of vocabulary"):
        engine.rollout(Workload([[256]], [2]), seed=0)
    assert engine._process.returncode == 1


def test_a_worker_that_dies_is_an_error(model, work: Workload, tmp_path: Path) -> None:
    """A GPU that runs out of memory can take the whole process with it."""
    worker = tmp_path / "worker.py"
    worker.write_text("import json, sys\nsys.stdin.readline()\nprint(json.dumps({'ready': True, 'version': '1'}))\n")
    engine = VllmEngine(model, work, worker=worker)
    with pytest.raises(RuntimeError, match="ended without a word"):
        engine.rollout(work, seed=0)


def test_a_python_without_vllm_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="can't be started"):
        check_vllm(str(tmp_path / "python"))
    bare = tmp_path / "bare"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    with pytest.raises(ValueError, match=r"has no vLLM; install it.*--vllm-python"):
        check_vllm(str(bare))


def test_the_memory_share_holds_weights_and_every_token(model) -> None:
    """Too little, and vLLM would swap rows out; too much, and the other engines would have no room beside it."""
    work = Workload([[1] * 100] * 128, [512] * 128)
    traffic = Traffic.of(model, work)
    keys = 128 * 612 * traffic.kv_token_bytes
    assert keys < kv_bytes(traffic, work, "cuda") < kv_bytes(traffic, work, "cpu") < 1.5 * keys
    total = 4 * (traffic.weight_bytes + keys + RESERVE_BYTES)
    assert 0.25 < memory_share(traffic, work, total) < 0.26
    with pytest.raises(ValueError, match="engine vllm needs"):
        memory_share(traffic, work, total // 4)


def test_the_shape_reaches_vllm(model, work: Workload, tmp_path: Path) -> None:
    """vLLM picks its own model class by `architectures`."""
    seen = tmp_path / "config.json"
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, pathlib, sys\n"
        "arguments = json.loads(sys.stdin.readline())\n"
        f"pathlib.Path({str(seen)!r}).write_text((pathlib.Path(arguments['model']) / 'config.json').read_text())\n"
        "print(json.dumps({'ready': True, 'version': '1'}))\n"
    )
    VllmEngine(model, work, worker=worker).close()
    config = json.loads(seen.read_text())
    assert config["architectures"] == ["Qwen2ForCausalLM"] and config["model_type"] == "qwen2"
    assert (config["hidden_size"], config["num_key_value_heads"], config["vocab_size"]) == (64, 2, 256)
    assert model.config.architectures is None
