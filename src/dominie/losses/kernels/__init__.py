"""Kernels for GPUs, each with a twin in plain torch that it is tested against."""
