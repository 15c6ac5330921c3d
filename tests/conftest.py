"""What has to be set before anything is imported."""

import os

# Two workers with two threads each run many times slower on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton decides at its import whether its kernels are interpreted, and any test may import it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
