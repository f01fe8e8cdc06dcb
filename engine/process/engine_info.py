"""The description of an engine that its process sends when it is ready."""

import os

from dispec.engine.engine import Engine
from dispec.engine.execution.kv_cache_memory import weight_bytes
from dispec.engine.process.messages import EngineInfo


def engine_info(engine: Engine) -> EngineInfo:
    """Return the description of an engine in this process."""
    checkpoint, plan, options = engine.checkpoint, engine.kv_plan, engine.options
    return EngineInfo(
        model=str(options.model),
        architecture=engine.config.architecture,
        directory=str(checkpoint.directory) if checkpoint is not None else None,
        dtype=options.dtype,
        weights_format=engine.weights_format,
        device=str(engine.device),
        vocab_size=engine.config.vocab_size,
        eos_token_ids=list(engine.eos_token_ids),
        max_model_len=engine.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=engine.scheduler.max_num_batched_tokens,
        num_blocks=engine.scheduler.pool.num_usable,
        block_size=plan.block_size,
        weight_bytes=weight_bytes(engine.runner.weights),
        kv_cache_bytes=plan.num_blocks * plan.block_bytes,
        compile=engine.plan.compile,
        is_compiled=engine.runner.is_compiled,
        phase_seconds=engine.phase_seconds,
        pid=os.getpid(),
        **engine.transfer_address(),
    )
