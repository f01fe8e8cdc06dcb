"""The process group that the ranks of a tensor-parallel model join: on one machine, NCCL on CUDA and Gloo on CPU."""

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from dispec.layers.config import Shard

_HOST = "127.0.0.1"
_COLLECTIVE_TIMEOUT = timedelta(seconds=300)  # of a rank that hangs; one that died is noticed at once


def join_group(rank: int, size: int, device: torch.device, store: dist.TCPStore) -> Shard:
    """Become a rank of the process group that meets at the store."""
    store.set(ready_key(rank), "")
    if sys.platform == "linux":
        # Without it Gloo looks the host's name up, which need not resolve.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_COLLECTIVE_TIMEOUT)
    group = dist.group.WORLD
    assert group is not None
    return Shard(rank, size, group.group_name)


def connect_store(size: int, port: int = 0) -> dist.TCPStore:
    """Return the store at which `size` ranks meet: a new one for port 0, else the one that listens at `port`."""
    return dist.TCPStore(_HOST, port, size, is_master=port == 0, wait_for_workers=False, timeout=_COLLECTIVE_TIMEOUT)


def ready_key(rank: int) -> str:
    """Return the store's key that a rank sets before it joins the group."""
    return f"rank {rank} is ready"
