"""The drafter: a quantized copy of the policy, and the ways to multiply by its weights."""
