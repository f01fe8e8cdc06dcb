"""How a scheduled step runs on the device.

Reading order: `execution_plan`, `launches`, `input_buffers`, `model_runner`, `compiled_steps`, `sampler`.
"""
