"""A follower rank: `python -m dispec.engine.distributed.rank_worker`, a child process of the engine.

It loads its part of the weights and executes the messages on its standard input until that is closed.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable

import msgspec
import torch

from dispec.engine.distributed.process_group import connect_store, join_group
from dispec.engine.distributed.process_watch import ProcessWatch
from dispec.engine.distributed.rank_messages import JoinGroup, read_message
from dispec.engine.dtypes import DTYPES
from dispec.engine.execution.execution_plan import plan_for
from dispec.engine.execution.kv_cache_memory import allocate_kv_cache, kv_dtype
from dispec.engine.execution.model_runner import ModelRunner
from dispec.engine.execution.ranks import AllocateCache, ComputeLogits, CopyBlocks, RunStep
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.loading.quantization import packing_for, with_kernels
from dispec.engine.machine.cache_directory import remove_substitutes
from dispec.engine.options import EngineOptions
from dispec.layers.sharding import Sharding
from dispec.layers.weights import dummy_weights, load_weights


def _join(request: JoinGroup) -> Callable[[AllocateCache], ModelRunner]:
    """Join the group and load the weights. Return a function that makes a runner with a KV cache of the given size."""
    options = EngineOptions(**{**request.options, "model": request.config or request.options["model"]})
    assert options.device is not None
    device, size = torch.device(options.device), options.tensor_parallel_size
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shard = join_group(request.rank, size, device, connect_store(size, request.port))
    dtype = DTYPES[options.dtype]
    is_dummy = options.load_format == "dummy"
    checkpoint = None
    if request.config is None:
        checkpoint = find_checkpoint(request.options["model"], without_weights=is_dummy)
    config = checkpoint.config if checkpoint is not None else request.config
    assert config is not None
    packing = packing_for(options, device)
    if checkpoint is None or is_dummy:
        weights = dummy_weights(config, dtype, device, options.seed or 0, shard, packing)
    else:
        tensors = with_kernels(checkpoint.tensors(dtype, options.quantization), dtype, device)
        weights = load_weights(config, tensors, dtype, device, shard=shard, packing=packing)
    local = Sharding(config, shard).local_config()

    def make_runner(message: AllocateCache) -> ModelRunner:
        kv_cache = allocate_kv_cache(local, message.plan, kv_dtype(options), device)
        return ModelRunner(
            plan_for(options, device, local.head_dim),
            local,
            weights,
            kv_cache,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=message.max_num_batched_tokens,
            max_model_len=message.plan.max_model_len,
            max_num_draft_tokens=options.max_num_draft_tokens,
            vocab_size=config.vocab_size,
        )

    return make_runner


def main() -> None:
    # Terminals send these to the whole process group. The engine alone ends a follower, by closing its input.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    # The main thread may wait for a kernel that waits for the engine's message.
    ProcessWatch([os.getppid()], lambda: os._exit(1))
    pipe = sys.stdin.buffer
    request = msgspec.json.decode(pipe.readline(), type=JoinGroup)
    torch.set_num_threads(request.num_threads)
    make_runner = _join(request)
    runner: ModelRunner | None = None
    while (message := read_message(pipe)) is not None:
        if isinstance(message, AllocateCache):
            runner = None  # frees its KV cache before the new one is allocated
            runner = make_runner(message)
            continue
        assert runner is not None
        match message:
            case CopyBlocks(blocks):
                runner.copy_blocks(blocks)
            case RunStep(shape, inputs, is_compiled):
                runner.run_inputs(shape, inputs, is_compiled=is_compiled)
            case ComputeLogits(hidden):
                runner.compute_logits(hidden)
    remove_substitutes()
    os._exit(0)  # destroying the process group would wait for the engine, which may have been killed


if __name__ == "__main__":
    main()
