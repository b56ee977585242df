"""What every test gets: one thread, a fixed global seed, no network; GPU tests only where there is a GPU."""

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the Hub is a mistake
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a fork after tokenizing warns, and warnings are errors

import pytest
import torch


torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels then run in numpy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage: looking for it took half of each training run, which ends in doing so."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_global_seed() -> None:
    """Prevents a test whose outcome depends on which tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(params=["avx2", "avx512_bf16"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels and limits of that CPU, whatever this one is: AVX-512 is computed by AVX2 where it is missing."""
    from trl_selfspec.kernels.cpu import machine

    monkeypatch.setattr(machine, "instruction_set", lambda: machine.InstructionSet(request.param))
    return request.param
