"""Which plan follows from device, dtype, kernels and options."""

import pytest
import torch

from dispec.engine.execution import execution_plan
from dispec.engine.execution.execution_plan import ExecutionPlan, plan_for
from dispec.engine.options import EngineOptions

CUDA = ExecutionPlan(
    device="cuda",
    compile="startup",
    replays=True,
    fuses_layers=False,
    mixes=True,
    max_query_len=1,
    overlaps=True,
    reads_device_tokens=True,
)
CPU = ExecutionPlan(
    device="cpu",
    compile="off",
    replays=False,
    fuses_layers=True,
    mixes=True,
    max_query_len=16,
    overlaps=False,
    reads_device_tokens=False,
)
DRAFT = {"speculative_model": "smollm2-draft"}
RANKS = {"tensor_parallel_size": 2}


def plan(device: str, **options) -> ExecutionPlan:
    return plan_for(EngineOptions(**options), torch.device(device), head_dim=64)


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that has all kernels."""
    monkeypatch.setattr(execution_plan, "has_packed_linear", lambda: True)
    monkeypatch.setattr(execution_plan, "has_cpu_kernel", lambda *_: True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        (RANKS, {}),
        (DRAFT, {"max_query_len": 6}),
        ({"speculative_model": "ngram", "num_speculative_tokens": 3}, {"max_query_len": 4}),
        ({"compile": "background"}, {"compile": "background"}),
        ({"enforce_eager": True}, {"compile": "off", "replays": False}),
        ({"async_scheduling": False}, {"overlaps": False, "reads_device_tokens": False}),
        ({"async_scheduling": False, **DRAFT}, {"overlaps": False, "max_query_len": 6}),
    ],
)
def test_plans_on_cuda(dtype: str, options: dict, changes: dict) -> None:
    assert plan("cuda", dtype=dtype, **options) == ExecutionPlan(**vars(CUDA) | changes)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({}, {}),
        (DRAFT, {}),
        ({"dtype": "float32"}, {"fuses_layers": False}),
        (RANKS, {"fuses_layers": False}),
        ({"compile": "startup"}, {"compile": "startup", "fuses_layers": False}),
        ({"async_scheduling": True}, {"overlaps": True, "reads_device_tokens": True}),
        ({"async_scheduling": True, **DRAFT}, {"overlaps": True, "reads_device_tokens": True}),
        ({"async_scheduling": True, **RANKS}, {"overlaps": True, "reads_device_tokens": True, "fuses_layers": False}),
    ],
)
def test_plans_on_a_cpu(options: dict, changes: dict) -> None:
    assert plan("cpu", **options) == ExecutionPlan(**vars(CPU) | changes)


def test_a_cpu_without_a_kernel_for_matrices_fuses_no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_plan, "has_packed_linear", lambda: False)
    assert plan("cpu") == ExecutionPlan(**vars(CPU) | {"fuses_layers": False})


def test_a_cpu_without_a_kernel_for_attention_runs_decodes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution_plan, "has_cpu_kernel", lambda *_: False)
    changes = {"fuses_layers": False, "mixes": False, "max_query_len": 1}
    assert plan("cpu") == ExecutionPlan(**vars(CPU) | changes)
