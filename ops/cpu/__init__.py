"""C++ kernels for the CPU: `library` builds them on the machine they run on, the other modules call them on tensors."""
