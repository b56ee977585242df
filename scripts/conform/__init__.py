"""Parts of `scripts/conformance.py`: stand-ins for what TRL's tests load, and the pytest plugin that runs them."""
