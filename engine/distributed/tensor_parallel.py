"""The first rank's side of tensor parallelism: several processes that run one model, each a part of every layer.

The first rank is the engine, which alone schedules, samples and answers requests. The others (`rank_worker`) receive
the first rank's step inputs on standard input, and compute the same. Sums over the ranks go through a process
group of this machine: NCCL on CUDA, Gloo on CPU.
"""

import os
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from typing import NoReturn

import msgspec
import torch
import torch.distributed as dist

from dispec.engine.distributed.process_group import connect_store, join_group, ready_key
from dispec.engine.distributed.process_watch import ProcessWatch
from dispec.engine.distributed.rank_messages import JoinGroup, encode_frame
from dispec.engine.execution.ranks import Message
from dispec.engine.machine.torch_threads import set_threads
from dispec.engine.options import EngineOptions
from dispec.layers.config import ModelConfig

_WORKER = "dispec.engine.distributed.rank_worker"
_POLL_SECONDS = 0.05  # between two looks at a rank that is awaited
# The connections of a process that dies close shortly before its status can be read.
_STATUS_SECONDS = 1.0
_EXIT_SECONDS = 10.0  # for a follower to end after its input was closed


class TensorParallelError(RuntimeError):
    """A rank failed, so that the model is incomplete; the message names the rank and the reason."""


class TensorParallel:
    """The follower processes of this one, the first of `options.tensor_parallel_size` ranks.

    Implements `engine.execution.ranks.Ranks`. Raises TensorParallelError if a follower does not start, ValueError if
    this process already has a process group.
    """

    def __init__(self, options: EngineOptions, device: torch.device) -> None:
        size = options.tensor_parallel_size
        if dist.is_initialized():
            raise ValueError(
                f"tensor_parallel_size is {size}, but this process has an engine with ranks already: close that first"
            )
        self._is_broken = False
        self._failure: str | None = None
        self._watch: ProcessWatch | None = None
        all_threads = torch.get_num_threads()
        threads = max(1, all_threads // size)
        if device.type == "cpu":
            set_threads(threads)
        store = connect_store(size)
        self._followers = [_start(options, device, rank, store.port, threads) for rank in range(1, size)]
        # Python holds the pipes of a process that was not waited for, so that followers would not see them closed.
        self._end = weakref.finalize(self, _end, self._followers, device.type == "cuda", all_threads)
        self._end.atexit = False  # at exit the system closes the pipes
        # Each becomes readable when its follower ends. Systems without pidfds notice that at the next sum.
        self._pidfds = [os.pidfd_open(one.pid) for one in self._followers] if hasattr(os, "pidfd_open") else []
        try:
            self._wait_for_followers(store)
            self.shard = join_group(0, size, device, store)
            if device.type == "cuda":
                # Gloo notices by itself that a rank has ended. A kernel would wait for its message for ever.
                stop_waiting = weakref.WeakMethod(self._stop_waiting)
                self._watch = ProcessWatch(
                    [follower.pid for follower in self._followers],
                    lambda: method() if (method := stop_waiting()) is not None else None,
                )
        except Exception as error:
            try:
                self._fail(error)
            finally:
                self.close()

    @property
    def is_broken(self) -> bool:
        """Whether a rank has failed, so that nothing can be computed any more."""
        return self._is_broken

    @property
    def wake_ups(self) -> list[int]:
        """File descriptors that become readable when `check` would raise; none once a failure is known."""
        return [] if self._is_broken else self._pidfds

    def check(self) -> None:
        """Raise TensorParallelError if a follower has ended."""
        if any(follower.poll() is not None for follower in self._followers):
            self._fail(None)

    def send(self, message: Message) -> None:
        """Send a message to every follower."""
        if self._is_broken:
            self._fail(None)
        frame = encode_frame(message)
        try:
            for follower in self._followers:
                assert follower.stdin is not None
                follower.stdin.write(frame)
                follower.stdin.flush()
        except OSError as error:
            self._fail(error)

    @contextmanager
    def together(self, message: Message) -> Iterator[None]:
        """Send a message for the time of a computation of this rank that takes part in the same sums."""
        self.send(message)
        try:
            yield
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        """End the followers and leave the group."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._is_broken:
            for follower in self._followers:  # they may wait for a message of one that has ended
                follower.kill()
        self._is_broken = True
        pidfds, self._pidfds = self._pidfds, []
        for pidfd in pidfds:
            os.close(pidfd)
        self._end()

    def _stop_waiting(self) -> None:
        """End the kernels that wait for a follower that has ended: the thread that waits for them can `check` then."""
        group = dist.group.WORLD
        assert group is not None
        group._get_backend(torch.device("cuda")).abort()

    def _wait_for_followers(self, store: dist.TCPStore) -> None:
        """Wait until all followers are ready. Joining a group does not notice that another rank has died."""
        for rank, follower in enumerate(self._followers, start=1):
            while not store.check([ready_key(rank)]):
                with suppress(subprocess.TimeoutExpired):
                    follower.wait(_POLL_SECONDS)
                self.check()

    def _fail(self, error: Exception | None) -> NoReturn:
        self._is_broken = True
        if self._failure is None:
            self._failure = f"the tensor-parallel model is no longer whole: {self._reason(error)}"
        raise TensorParallelError(self._failure) from error

    def _reason(self, error: Exception | None) -> str:
        ended = []
        deadline = time.monotonic() + _STATUS_SECONDS
        for rank, follower in enumerate(self._followers, start=1):
            with suppress(subprocess.TimeoutExpired):
                status = follower.wait(timeout=max(0.0, deadline - time.monotonic()))
                ended.append(f"rank {rank} ended with status {status}")
        return ", ".join(ended) or f"rank 0 failed: {error}"


def _end(followers: "list[subprocess.Popen[bytes]]", is_cuda: bool, all_threads: int) -> None:
    """Close the followers' inputs, wait until they have ended, and leave the group."""
    for follower in followers:
        assert follower.stdin is not None
        with suppress(OSError):
            follower.stdin.close()
    for follower in followers:
        try:
            follower.wait(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired:  # it waits in a sum that another rank never joined
            follower.kill()
            follower.wait()
    if dist.is_initialized():
        if is_cuda:
            # NCCL waits until no CUDA graph with its sums exists.
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
        dist.destroy_process_group()
    set_threads(all_threads)


def _start(
    options: EngineOptions, device: torch.device, rank: int, port: int, threads: int
) -> "subprocess.Popen[bytes]":
    config = options.model if isinstance(options.model, ModelConfig) else None
    own = {
        "model": "" if config else str(options.model),
        # Followers do not run a draft model, but their plan depends on whether there is one.
        "speculative_model": None if options.speculative_model is None else str(options.speculative_model),
        "device": f"cuda:{(device.index or 0) + rank}" if device.type == "cuda" else "cpu",
    }
    values = {field.name: getattr(options, field.name) for field in fields(options)} | own
    follower = subprocess.Popen(
        [sys.executable, "-m", _WORKER],
        stdin=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    assert follower.stdin is not None
    follower.stdin.write(msgspec.json.encode(JoinGroup(values, config, rank, port, threads)) + b"\n")
    follower.stdin.flush()
    return follower
