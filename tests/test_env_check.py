"""`dispec env-check`: its probes run, and its conclusions follow from them."""

import itertools
import json
import subprocess
import sys

import pytest
import torch

from dispec.engine import environment
from dispec.engine.environment import plans, try_cpu_kernels, try_cuda_kernels, try_replay
from dispec.engine.execution.execution_plan import plan_for
from dispec.engine.options import EngineOptions
from dispec.ops.cpu.instruction_sets import INSTRUCTION_SETS
from dispec.ops.cpu.library import built_instruction_set
from dispec.ops.cuda import library as cuda_library
from dispec.serving.cli import env_check
from dispec.serving.cli.env_check import Finding
from tests.commands import running


def test_env_check_for_machines() -> None:
    with running(["env-check", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        out, err = process.communicate()
    assert process.returncode == 0, err.decode()
    report = json.loads(out)
    assert report["findings"]["python"]["executable"] == sys.executable
    assert report["findings"]["memory"]["free_bytes"] > 0
    assert report["findings"]["cpu engine"]["works"]
    assert report["features"]["eager CPU"] == {"works": True, "reason": ""}
    assert report["features"]["compiled CPU"]["works"] == report["findings"]["cpu compiler"]["works"]
    plans = [name for name in report["findings"] if name.startswith("plan ")]
    assert plans[:2] == ["plan cpu bfloat16", "plan cpu float32"]  # no float16: a CPU does not run it
    assert report["findings"]["plan cpu bfloat16"]["compile"] == "off"
    assert report["findings"]["cpu kernels"]["instruction_set"] == built_instruction_set()
    assert not report["findings"]["cpu kernels"]["is_forced"]


def test_env_check_names_a_forced_instruction_set(monkeypatch) -> None:
    monkeypatch.setenv("DISPEC_CPU_ISA", INSTRUCTION_SETS[-1].name)
    monkeypatch.setattr(environment, "instruction_set", lambda: INSTRUCTION_SETS[-1])
    monkeypatch.setattr(environment, "build", lambda: None)
    found = {finding.name: finding for finding in itertools.takewhile(is_before_probes, env_check.findings())}
    assert found["cpu kernels"].text == "works (0.0 s), avx2 by DISPEC_CPU_ISA"
    assert found["cpu kernels"].data["is_forced"]


def test_env_check_with_the_kernels_off(monkeypatch) -> None:
    monkeypatch.setenv("DISPEC_CPU_KERNELS", "off")
    found = {finding.name: finding for finding in itertools.takewhile(is_before_probes, env_check.findings())}
    assert found["cpu kernels"].text == "does not work: DISPEC_CPU_KERNELS is off"


def test_env_check_of_a_hopper_gpu_without_nvrtc(monkeypatch) -> None:
    monkeypatch.setattr(cuda_library, "has_nvrtc", lambda: False)
    assert try_cuda_kernels().reason == "cuda.bindings, or its NVRTC, is not found"
    monkeypatch.setenv("DISPEC_CUDA_KERNELS", "off")
    assert try_cuda_kernels().reason == "DISPEC_CUDA_KERNELS is off"


def is_before_probes(finding: Finding) -> bool:
    return finding.name != "cpu bf16"


@pytest.mark.parametrize(
    ("command", "name", "limit"),
    [
        (["env-check"], "DISPEC_CPU_ISA", "one of amx, avx512, avx2"),
        (["env-check"], "DISPEC_CPU_KERNELS", "on or off"),
        (["env-check"], "DISPEC_CUDA_KERNELS", "on or off"),
        (["generate", "Hi"], "DISPEC_CPU_ISA", "one of amx, avx512, avx2"),
        (["serve", "--port", "0"], "DISPEC_CUDA_KERNELS", "on or off"),
    ],
)
def test_commands_refuse_a_wrong_variable_in_one_sentence(command, name, limit, monkeypatch) -> None:
    monkeypatch.setenv(name, "maybe")
    with running(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        _, err = process.communicate()
    assert process.returncode == 2
    assert err.decode().splitlines()[-1] == f"error: {name} is 'maybe', must be {limit}"
    assert "Traceback" not in err.decode()
    assert "could not be built" not in err.decode()


def test_env_check_without_a_compiler() -> None:
    environment = {"CXX": "/bin/false", "DISPEC_CACHE_DIR": "/dev/null/nowhere"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        with running(["env-check"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            out, err = (stream.decode() for stream in process.communicate())
    assert process.returncode == 0, err
    assert err == ""
    rows = {line[:20].strip(): line[21:] for line in out.splitlines()}
    assert rows["cpu engine"].startswith("works")
    assert rows["cpu compiler"].startswith("does not work: ")
    assert rows["cpu kernels"].startswith("does not work: ")
    assert rows["cache"].startswith("not writable: ")
    assert rows["plan cpu float32"] == "eager; prompts and decodes in separate batches; one step at a time"
    assert "compiled CPU              no: cpu compiler: " in out


def test_env_check_where_torch_is_broken() -> None:
    found = [Finding("torch", "cannot be imported: x", {"works": False, "reason": "x"})]
    features = env_check.features(found)
    assert not env_check.can_run(features)
    assert all(not feature.works for feature in features)


def test_env_check_tells_which_device_fails() -> None:
    works, broken = {"works": True, "reason": ""}, {"works": False, "reason": "too old"}
    names = ["cpu kernels", "cpu engine", "cpu compiler", "cpu bf16", "cpu packed bf16"]
    parts = ("bf16", "engine", "compiler", "graphs")
    found = dict.fromkeys(names, works) | {"torch": {"works": True, "cuda": "13.0"}}
    for device in ("cuda:0", "cuda:1"):
        found |= {device: {}} | {f"{device} {part}": works for part in parts}
    found["cuda:1 engine"] = broken
    features = {
        feature.name: feature for feature in env_check.features(Finding(*item, item[1]) for item in found.items())
    }
    assert features["eager CPU"].works
    assert features["CUDA graphs"] == ("CUDA graphs", False, "cuda:1 engine: too old")


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        ({}, "cuda", "compiled at startup, replayed as CUDA graphs; {} in one batch; one step queued ahead"),
        (
            {"compile": "background"},
            "cuda",
            "compiled in the background, replayed as CUDA graphs; {} in one batch; one step queued ahead",
        ),
        ({"enforce_eager": True}, "cuda", "eager; {} in one batch; one step queued ahead"),
        (
            {"compile": "startup", "block_size": 16},
            "cpu",
            "compiled at startup; {} in separate batches; one step at a time",
        ),
    ],
)
def test_plans_in_words(options, device, expected, monkeypatch) -> None:
    monkeypatch.setattr(
        "dispec.engine.execution.execution_plan.has_cpu_kernel", lambda dtype, head_dim, block_size: block_size > 16
    )
    plan = plan_for(EngineOptions(**options), torch.device(device), head_dim=64)
    assert plan.describe() == expected.format("prompts and decodes")


def test_a_plan_compiles_nothing_without_a_compiler(monkeypatch) -> None:
    """An engine with a compiler that fails runs eagerly, and its plan says so beforehand."""
    monkeypatch.setattr(EngineOptions, "torch_device", lambda options: torch.device("cuda", 0))
    assert {plan.compile for plan in plans("cuda:0", compiles=False).values()} == {"off"}
    assert {plan.compile for plan in plans("cuda:0", compiles=True).values()} == {"startup"}


def test_replaying_is_refused_where_nothing_is_recorded() -> None:
    """A CPU compiles the function and gets the right numbers, without a CUDA graph."""
    outcome = try_replay("cpu")
    assert not outcome.works
    assert "records no CUDA graph" in outcome.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replaying_works_on_a_gpu() -> None:
    outcome = try_replay("cuda:0")
    assert outcome.works, outcome.reason


def test_kernels_work_without_a_cache(tmp_path, monkeypatch) -> None:
    """An engine builds them in a temporary directory, and so does the probe."""
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
    compiler.chmod(0o755)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert try_cpu_kernels().works
