"""CUDA C++ kernels for Hopper: `library` builds them on the machine they run on, the others call them on tensors."""
