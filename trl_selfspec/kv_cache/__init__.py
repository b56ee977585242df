"""Keys and values: the paged cache, the prefix cache over its idle rows, and attention over pages."""
