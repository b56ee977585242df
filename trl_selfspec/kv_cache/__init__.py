"""Keys and values: the paged cache, prefixes kept for later turns, and attention over pages."""
