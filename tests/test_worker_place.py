"""Workers of a pool spread over the GPUs of a machine, and share one where there are fewer GPUs than workers."""

from typing import Any

import pytest
import torch

from dispec.engine.process.messages import WorkerPlace
from dispec.engine.process.worker_place import place_worker
from dispec.serving.cluster.worker_pool import WorkerPool


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The used share of each GPU's 100 GB."""
    used = [0.0, 0.0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(used))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(used))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda name: (1e11 * (1 - used[torch.device(name).index or 0]), 1e11)
    )
    return used


def test_each_worker_gets_a_gpu_and_its_memory(gpus: list[float]) -> None:
    placed = [place_worker({"dtype": "bfloat16"}, WorkerPlace(number, 2)) for number in range(2)]
    assert placed == [{"dtype": "bfloat16", "device": f"cuda:{number}"} for number in range(2)]
    given: dict[str, Any] = {"device": "cuda", "gpu_memory_utilization": 0.5}
    assert place_worker(given, WorkerPlace(1, 2)) == given | {"device": "cuda:1"}


def test_workers_that_share_a_gpu_get_equal_parts_of_it(gpus: list[float]) -> None:
    placed = place_worker({}, WorkerPlace(0, 3))
    assert (placed["device"], placed["gpu_memory_utilization"]) == ("cuda:0", pytest.approx(0.45))
    assert place_worker({}, WorkerPlace(1, 3)) == {"device": "cuda:1"}
    gpus[0] = 0.45
    placed = place_worker({}, WorkerPlace(2, 3))
    assert (placed["device"], placed["gpu_memory_utilization"]) == ("cuda:0", pytest.approx(0.9))
    gpus[0] = 0.5  # a worker that starts again, beside another one and another program: never above the whole
    assert place_worker({}, WorkerPlace(0, 3))["gpu_memory_utilization"] == pytest.approx(0.9)
    gpus[1] = 0.1
    placed = place_worker({"device": "cuda:1", "gpu_memory_utilization": 0.8}, WorkerPlace(0, 4))
    assert (placed["device"], placed["gpu_memory_utilization"]) == ("cuda:1", pytest.approx(0.3))


def test_workers_on_a_cpu_stay_as_they_are(gpus: list[float]) -> None:
    assert place_worker({"device": "cpu"}, WorkerPlace(1, 2)) == {"device": "cpu"}
    gpus.clear()
    assert place_worker({}, WorkerPlace(1, 2)) == {}


def test_a_worker_takes_the_place_of_the_one_that_it_replaces() -> None:
    limits = {"max_queued_requests": 1, "max_queued_tokens": 1, "stall_seconds": 60.0}
    pool = WorkerPool({"model": "any"}, num_prefill=1, num_decode=2, **limits)
    assert [(worker.role, worker.place) for worker in pool.workers] == [("prefill", 0), ("decode", 1), ("decode", 2)]
    del pool.workers[1]
    assert (pool.add_worker("decode").place, pool.add_worker("decode").place) == (1, 3)
