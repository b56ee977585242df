"""The engine: prompts in, completions out. The loop is in rollout.py, what runs on the device in model_runner.py."""
