"""GRPO and RLOO with lossless speculative rollouts.

Names are loaded on first use, so the import costs neither trl nor CUDA.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .control.stats import RolloutStats
    from .engine.custom_generate import SelfSpecGenerate
    from .engine.engine import SelfSpecEngine
    from .options import SelfSpecOptions
    from .trainer.config import SelfSpecConfigMixin, SelfSpecGRPOConfig, SelfSpecRLOOConfig
    from .trainer.mixin import SelfSpecMixin
    from .trainer.trainers import SelfSpecGRPOTrainer, SelfSpecRLOOTrainer

__version__ = "0.1.0"
__all__ = [
    "RolloutStats",
    "SelfSpecConfigMixin",
    "SelfSpecEngine",
    "SelfSpecGRPOConfig",
    "SelfSpecGRPOTrainer",
    "SelfSpecGenerate",
    "SelfSpecMixin",
    "SelfSpecOptions",
    "SelfSpecRLOOConfig",
    "SelfSpecRLOOTrainer",
]

_MODULES = {
    "RolloutStats": ".control.stats",
    "SelfSpecConfigMixin": ".trainer.config",
    "SelfSpecEngine": ".engine.engine",
    "SelfSpecGRPOConfig": ".trainer.config",
    "SelfSpecGRPOTrainer": ".trainer.trainers",
    "SelfSpecGenerate": ".engine.custom_generate",
    "SelfSpecMixin": ".trainer.mixin",
    "SelfSpecOptions": ".options",
    "SelfSpecRLOOConfig": ".trainer.config",
    "SelfSpecRLOOTrainer": ".trainer.trainers",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
