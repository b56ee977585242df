"""C kernels for CPUs, compiled on first use, with the Python that packs their arguments."""
