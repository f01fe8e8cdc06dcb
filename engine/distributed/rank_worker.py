"""A follower rank: `python -m dispec.engine.distributed.rank_worker`, a child process of the engine.

It loads its part of the weights, and then does what its standard input says until that ends.
"""

import faulthandler
import os
import signal
import sys
from collections.abc import Callable

import msgspec
import torch

from dispec.engine.distributed.rank_messages import Compute, Copy, Head, Join, Prepare, receive
from dispec.engine.distributed.tensor_parallel import join, meeting_point
from dispec.engine.dtypes import DTYPES
from dispec.engine.execution.execution_plan import plan_for
from dispec.engine.execution.kv_cache_memory import allocate_kv_cache
from dispec.engine.execution.model_runner import Runner
from dispec.engine.loading.checkpoint import find_checkpoint
from dispec.engine.machine.cache_directory import remove_substitutes
from dispec.engine.options import EngineOptions
from dispec.layers.sharding import Sharding
from dispec.layers.weights import dummy_weights, load_weights


def _runner_maker(order: Join) -> Callable[[Prepare], Runner]:
    """Joins the group and loads the weights; what comes of it makes a runner with a KV cache as large as it is told."""
    options = EngineOptions(**{**order.options, "model": order.config or order.options["model"]})
    assert options.device is not None
    device, size = torch.device(options.device), options.tensor_parallel_size
    if device.type == "cuda":
        torch.cuda.set_device(device)
    shard = join(order.rank, size, device, meeting_point(size, order.port))
    dtype = DTYPES[options.dtype]
    is_dummy = options.load_format == "dummy"
    checkpoint = None
    if order.config is None:
        checkpoint = find_checkpoint(order.options["model"], without_weights=is_dummy)
    config = checkpoint.config if checkpoint is not None else order.config
    assert config is not None
    if checkpoint is None or is_dummy:
        weights = dummy_weights(config, dtype, device, options.seed, shard)
    else:
        weights = load_weights(config, checkpoint.tensors(dtype), dtype, device, shard=shard)
    local = Sharding(config, shard).local_config()

    def make(message: Prepare) -> Runner:
        kv_cache = allocate_kv_cache(local, message.plan, dtype, device)
        return Runner(
            plan_for(options, device, local.head_dim),
            local,
            weights,
            kv_cache,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=message.max_num_batched_tokens,
            max_model_len=message.plan.max_model_len,
            max_num_drafts=options.max_num_drafts,
            vocab_size=config.vocab_size,
        )

    return make


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group: the engine decides what becomes of us
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    pipe = sys.stdin.buffer
    order = msgspec.json.decode(pipe.readline(), type=Join)
    torch.set_num_threads(order.num_threads)
    make = _runner_maker(order)
    runner: Runner | None = None
    while (received := receive(pipe)) is not None:
        message, payload = received
        if isinstance(message, Prepare):
            runner = None  # whose cache goes before there is another
            runner = make(message)
            continue
        assert runner is not None
        match message:
            case Copy(blocks):
                runner.copy(blocks)
            case Compute(shape, is_compiled):
                runner.follow(shape, payload, is_compiled)
            case Head():
                runner.follow_head(payload)
    remove_substitutes()
    os._exit(0)  # leaving the group in order would wait for the engine, which may be gone


if __name__ == "__main__":
    main()
