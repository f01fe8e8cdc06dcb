"""Several processes that run one model, each a part of every layer: the first rank's side of it.

The first rank is the engine: it alone schedules, samples and answers requests. The others (`rank_worker`) receive on
standard input what the first rank's model computes, and compute the same. Sums over the ranks go through a process
group, NCCL on CUDA and Gloo on CPU, on this machine alone.
"""

import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from datetime import timedelta
from typing import Any, NoReturn

import msgspec
import torch
import torch.distributed as dist

from dispec.engine.distributed.rank_messages import Join, Message, framed
from dispec.engine.machine.torch_threads import set_threads
from dispec.engine.options import EngineOptions
from dispec.layers.config import ModelConfig, Shard

_WORKER = "dispec.engine.distributed.rank_worker"
_HOST = "127.0.0.1"
_GLANCE_SECONDS = 0.05  # between two looks at whether a rank that is awaited has come
_PATIENCE = timedelta(seconds=300)  # with a rank that does not come to a sum; one that died is noticed at once


class TensorParallelError(RuntimeError):
    """A rank is gone, so there is no whole model any more; the message says which and why."""


def join(rank: int, size: int, device: torch.device, store: dist.TCPStore) -> Shard:
    """Become a rank of the group that meets at the store."""
    store.set(_here(rank), "")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it looks up a host name that need not resolve
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    group = dist.group.WORLD
    assert group is not None
    return Shard(rank, size, group.group_name)


def meeting_point(size: int, port: int = 0) -> dist.TCPStore:
    """The store at which ranks meet: a new one at port 0, else the one that listens at `port`."""
    return dist.TCPStore(_HOST, port, size, is_master=port == 0, wait_for_workers=False, timeout=_PATIENCE)


def _here(rank: int) -> str:
    """The store's key that says that a rank has come so far that it can meet the others."""
    return f"rank {rank} is here"


class TensorParallel:
    """The followers of this process, the first of `options.tensor_parallel_size` ranks.

    Raises TensorParallelError if they do not start, ValueError if this process has ranks already.
    """

    def __init__(self, options: EngineOptions, device: torch.device) -> None:
        size = options.tensor_parallel_size
        if dist.is_initialized():
            raise ValueError(
                f"tensor_parallel_size is {size}, but this process has an engine with ranks already: close that first"
            )
        self._is_broken = False
        self._is_cuda = device.type == "cuda"
        self._all_threads = torch.get_num_threads()
        threads = max(1, self._all_threads // size)
        if device.type == "cpu":
            set_threads(threads)
        store = meeting_point(size)
        self._followers = [_start(options, device, rank, store.port, threads) for rank in range(1, size)]
        # Python keeps the pipes of a process that is not waited for: followers would never learn that we are gone.
        self._end = weakref.finalize(self, _end, self._followers, self._is_cuda, self._all_threads)
        self._end.atexit = False  # then the system closes the pipes
        # Readable once a follower has ended. Elsewhere than on Linux that is noticed at the next sum.
        self._watches = [os.pidfd_open(one.pid) for one in self._followers] if hasattr(os, "pidfd_open") else []
        try:
            self._wait_for_followers(store)
            self.shard = join(0, size, device, store)
        except Exception as error:
            try:
                self._fail(error)
            finally:
                self.close()

    def send(self, message: Message, payload: bytes = b"") -> None:
        """Have every follower do something; those after this come in the same order."""
        if self._is_broken:
            self._fail(None)
        frame = framed(message, payload)
        try:
            for follower in self._followers:
                assert follower.stdin is not None
                follower.stdin.write(frame)
                follower.stdin.flush()
        except OSError as error:
            self._fail(error)

    @contextmanager
    def together(self, message: Message, payload: bytes = b"") -> Iterator[None]:
        """Have the followers do something, and do it with them. If that fails in one rank there is no telling where the
        others are: nothing more is computed then."""
        self.send(message, payload)
        try:
            yield
        except Exception as error:
            self._fail(error)

    @property
    def is_broken(self) -> bool:
        """Whether a rank has failed, so that nothing can be computed any more."""
        return self._is_broken

    @property
    def wake_ups(self) -> list[int]:
        """File descriptors that become readable when `check` has something to say; none after it has."""
        return [] if self._is_broken else self._watches

    def check(self) -> None:
        """Raises TensorParallelError if a follower has ended."""
        if any(follower.poll() is not None for follower in self._followers):
            self._fail(None)

    def close(self) -> None:
        """End the followers, and leave the group."""
        self._is_broken = True
        watches, self._watches = self._watches, []
        for watch in watches:
            os.close(watch)
        self._end()

    def _wait_for_followers(self, store: dist.TCPStore) -> None:
        """Until all have come. A group waits for its ranks without a look at whether they live."""
        for rank, follower in enumerate(self._followers, start=1):
            while not store.check([_here(rank)]):
                with suppress(subprocess.TimeoutExpired):
                    follower.wait(_GLANCE_SECONDS)
                self.check()

    def _fail(self, error: Exception | None) -> NoReturn:
        self._is_broken = True
        gone = []
        for rank, follower in enumerate(self._followers, start=1):
            with suppress(subprocess.TimeoutExpired):  # its connections are closed a moment before it can be told
                gone.append(f"rank {rank} ended with status {follower.wait(timeout=1)}")
        reason = ", ".join(gone) or f"rank 0 failed: {error}"
        raise TensorParallelError(f"the tensor-parallel model is no longer whole: {reason}") from error


def _end(followers: "list[subprocess.Popen[bytes]]", is_cuda: bool, all_threads: int) -> None:
    """Close what the followers listen to, wait until they have ended, and leave the group."""
    for follower in followers:
        assert follower.stdin is not None
        with suppress(OSError):
            follower.stdin.close()
    for follower in followers:
        try:
            follower.wait(timeout=10)
        except subprocess.TimeoutExpired:  # in a sum to which not all ranks come
            follower.kill()
            follower.wait()
    if dist.is_initialized():
        if is_cuda:  # NCCL waits until no graph is left that has sums in it
            from torch._inductor.cudagraph_trees import reset_cudagraph_trees

            reset_cudagraph_trees()
        dist.destroy_process_group()
    set_threads(all_threads)


def _start(
    options: EngineOptions, device: torch.device, rank: int, port: int, threads: int
) -> "subprocess.Popen[bytes]":
    given: Mapping[str, Any] = {field.name: getattr(options, field.name) for field in fields(options)}
    config = options.model if isinstance(options.model, ModelConfig) else None
    name = f"cuda:{(device.index or 0) + rank}" if device.type == "cuda" else "cpu"
    order = Join(
        {**given, "model": "" if config else str(options.model), "device": name},
        config,
        rank,
        port,
        threads,
    )
    follower = subprocess.Popen(
        [sys.executable, "-m", _WORKER],
        stdin=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    assert follower.stdin is not None
    follower.stdin.write(msgspec.json.encode(order) + b"\n")
    follower.stdin.flush()
    return follower
