"""What a rollout will cost, from a model's shape and a device's numbers. No torch."""
