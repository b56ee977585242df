"""How many tokens to draft, from measured prices and live acceptance. Needs no torch."""
