"""Kernels in C++ for the CPU: `library` builds them on the machine they run on, the others call them on tensors."""
