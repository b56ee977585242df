"""FSDP2 without a GPU: accelerate offers FSDP to GPUs alone, though torch shards on CPUs too.

torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py recipes/grpo_math.py --max_steps 20
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


# What `accelerate launch` makes of recipes/accelerate_configs/fsdp2.yaml.
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def allow_fsdp_on_cpu() -> None:
    os.environ.update(ENVIRONMENT)
    original = AcceleratorState.__init__

    def initialise(state: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        if not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(state, *args, **kwargs)

    AcceleratorState.__init__ = initialise  # type: ignore[method-assign]


if __name__ == "__main__":
    PartialState(cpu=True)
    allow_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
    # All is done and saved. gloo's threads sometimes outlive the interpreter, which then aborts ("terminate called
    # without an active exception"); leave without the interpreter's teardown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
