"""GRPO and RLOO in TRL with the engine's rollouts; the only folder that imports trl."""
