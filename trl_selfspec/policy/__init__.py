"""The policy as the engine sees it: a weight-sharing inference copy, under PEFT and sharding, checked against it."""
