"""Triton kernels for NVIDIA GPUs. These modules import triton: import them only inside functions."""
