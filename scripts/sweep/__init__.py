"""What `sweep_families.py` is made of."""
