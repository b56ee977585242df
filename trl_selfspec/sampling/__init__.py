"""From logits to tokens: logits processors, keyed random numbers, the rules of acceptance, and the samplers."""
