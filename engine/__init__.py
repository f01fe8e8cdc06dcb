"""The engine: scheduling, execution, speculation, KV transfer, and the Python API."""

import os

# Torch's OpenMP runtime reads it when it is loaded. By default a thread spins for 300,000 turns after each parallel
# operation, some 5 ms, on a core that another process or our kernels' threads (ops/cpu/thread_pool.cpp) could use. The
# count would overrule a user's OMP_WAIT_POLICY.
SPIN_COUNT = "20000"
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
