"""GPU kernels looked into without a GPU: compiled by nvcc (nvcc.py), by Triton (aot.py) or for the host (cuda_host)."""
