"""Which GPU a worker of a pool runs on, and its share of that GPU's memory."""

from collections.abc import Mapping
from typing import Any

from dispec.engine.process.messages import WorkerPlace


def place_worker(options: Mapping[str, Any], place: WorkerPlace) -> dict[str, Any]:
    """Return a worker's options with its GPU and `gpu_memory_utilization`; unchanged without CUDA.

    Where `device` names no GPU, workers take those that torch sees in turns. Workers that share a GPU get equal parts
    of `gpu_memory_utilization`, beside what is in use when they start.
    """
    import torch

    from dispec.engine.options import EngineOptions

    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return dict(options)
    num_gpus = torch.cuda.device_count()
    sharing = place.num_workers
    if device == "cuda":
        index = place.number % num_gpus
        device, sharing = f"cuda:{index}", len(range(index, place.num_workers, num_gpus))
    placed = {**options, "device": device}
    if sharing > 1:
        free, total = torch.cuda.mem_get_info(device)
        utilization = options.get("gpu_memory_utilization", EngineOptions.gpu_memory_utilization)
        placed["gpu_memory_utilization"] = min(utilization, (total - free) / total + utilization / sharing)
    return placed
