"""Answering while another process compiles: when compiled steps take over, and what becomes of that process."""

import json
import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from engine import LLM, SamplingParams, compile_behind
from engine.options import EngineOptions
from layers.config import ModelConfig

ROOT = Path(__file__).parent.parent
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=200,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 20]
PARAMS = [SamplingParams(temperature=0.9 * (i % 2), max_tokens=40, ignore_eos=True, seed=i) for i in range(3)]
PATIENCE = 240  # seconds that a test waits for another process before it fails


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory) -> Iterator[Path]:
    """A compile cache of this module's own, empty at first."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("compiled")
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(path))
        yield path


def make(compile: str, dtype: str = "float32", **options) -> LLM:
    return LLM(
        CONFIG,
        load_format="dummy",
        device="cpu",
        dtype=dtype,
        kv_cache_memory="1MiB",
        block_size=16,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        compile=compile,
        **options,
    )


def wait_for_child(llm: LLM) -> None:
    readable, _, _ = select.select(llm.engine.wake_ups, [], [], PATIENCE)
    assert readable


def finish_compiling(llm: LLM) -> None:
    while llm.engine.has_idle_work or llm.engine.wake_ups:
        llm.engine.work_while_idle()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "soon"}, "compile is 'soon', must be one of background, startup, off"),
        ({"compile": "startup", "enforce_eager": True}, "enforce_eager compiles nothing, and compile is 'startup'"),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options)


@pytest.mark.parametrize(
    ("options", "device", "when"),
    [
        ({}, "cpu", "background"),
        ({}, "cuda", "background"),
        ({"dtype": "float32"}, "cuda", "startup"),
        ({"speculative_model": "ngram"}, "cuda", "background"),
        ({"speculative_model": "smollm2-draft"}, "cuda", "startup"),
        ({"tensor_parallel_size": 2}, "cuda", "startup"),
        ({"compile": "startup"}, "cuda", "startup"),
        ({"compile": "startup"}, "cpu", "startup"),
        ({"enforce_eager": True}, "cpu", "off"),
    ],
)
def test_when_an_engine_compiles(options, device, when):
    assert EngineOptions(**options).when_to_compile(torch.device(device)) == when


def run_apart(call: str, cache: Path) -> str:
    """Call a function of this module in a process of its own, unchecked: checks have names that get into the cache's.

    Returns what it printed last.
    """
    program = f"from tests import test_compile_behind; test_compile_behind.{call}"
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def test_compiled_steps_take_over_in_the_middle_of_an_answer_without_changing_it(tmp_path):
    """They need only what the other process compiled, of dummies of a single layer; a later start needs no process."""
    found = json.loads(run_apart("take_over()", tmp_path))
    assert found["was_waiting"]
    assert found["eager_steps"] >= 10
    assert found["compiled_steps"] >= 5
    assert found["answers"] == [found["expected"]] * 3
    assert found["misses"] == 0
    assert found["hits"] == found["graphs"] == found["graphs_later"]
    again = json.loads(run_apart("keep_busy()", tmp_path))
    assert again["was_waiting"] is False
    assert again["is_compiled"]
    assert again["misses"] == 0


def take_over() -> None:
    from torch._dynamo.utils import counters

    expected = [found.token_ids for found in make("off").generate(PROMPTS, PARAMS)]
    llm = make("background")
    engine = llm.engine
    was_waiting = bool(engine.wake_ups)
    answers = [[found.token_ids for found in llm.generate(PROMPTS, PARAMS)]]  # while the other one works
    wait_for_child(llm)
    sequences = [engine.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    steps = {True: 0, False: 0}
    while engine.has_work:
        engine.step()
        steps[engine.runner.is_compiled] += 1
        if engine._compiling is not None:
            engine.work_while_idle()
    answers.append([sequence.output_token_ids for sequence in sequences])
    graphs = counters["stats"]["unique_graphs"]
    answers.append([found.token_ids for found in llm.generate(PROMPTS, PARAMS)])
    result = {
        "was_waiting": was_waiting,
        "expected": expected,
        "answers": answers,
        "eager_steps": steps[False],
        "compiled_steps": steps[True],
        "hits": counters["inductor"]["fxgraph_cache_hit"],
        "misses": counters["inductor"]["fxgraph_cache_miss"],
        "graphs": graphs,
        "graphs_later": counters["stats"]["unique_graphs"],
    }
    print(json.dumps(result))


def keep_busy() -> None:
    """An engine that always has work takes the pieces between its steps, in the share of its time that it may."""
    from torch._dynamo.utils import counters

    compile_behind._BUSY_SHARE = 1e9
    engine = make("background").engine
    was_waiting = bool(engine.wake_ups)
    for _ in range(1000):
        if not engine.has_work:
            engine.add([1, 2, 3], PARAMS[0])
        engine.step()
    misses = counters["inductor"]["fxgraph_cache_miss"]
    print(json.dumps({"was_waiting": was_waiting, "is_compiled": engine.runner.is_compiled, "misses": misses}))


@pytest.mark.parametrize("fate", ["killed", "failed", "absent"])
def test_what_befalls_the_other_process_costs_one_warning_and_no_answer(fate, monkeypatch):
    expected = make("off", dtype="bfloat16").generate(PROMPTS, PARAMS)
    if fate == "failed":
        monkeypatch.setenv("CXX", "/no/such/compiler")
    elif fate == "absent":
        monkeypatch.setattr(compile_behind, "_COMMAND", ("/no/such/python",))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        llm = make("background", dtype="bfloat16")
        if fate == "killed":
            os.kill(llm.engine._compiling._child.pid, signal.SIGKILL)
        finish_when_told = llm.engine.wake_ups
        if finish_when_told:
            wait_for_child(llm)
            finish_compiling(llm)
        found = llm.generate(PROMPTS, PARAMS)
    told = [str(warning.message) for warning in said if issubclass(warning.category, RuntimeWarning)]
    assert len(told) == 1
    assert "running eagerly" in told[0]
    assert not llm.engine.runner.is_compiled
    assert not llm.engine.wake_ups
    assert [c.token_ids for c in found] == [c.token_ids for c in expected]


def test_the_other_process_ends_with_the_engine_however_that_ends(tmp_path):
    """It holds a pipe of ours open as long as it lives."""
    read, write = os.pipe()
    program = f"""
import os
from engine import compile_behind
popen = compile_behind.subprocess.Popen
compile_behind.subprocess.Popen = lambda *args, **options: popen(*args, **options, pass_fds=({write},))
from tests.test_compile_behind import make
llm = make("background")
os.close({write})
print(llm.engine._compiling._child.pid, flush=True)
os.read(0, 1)
"""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(write,),
    ) as engine:
        os.close(write)
        assert engine.stdout is not None
        child = int(engine.stdout.readline())
        os.kill(child, 0)
        assert not select.select([read], [], [], 0)[0]
        engine.kill()
        assert select.select([read], [], [], PATIENCE)[0]
        assert os.read(read, 1) == b""
    os.close(read)


def test_an_eager_answer_does_not_import_the_compiler():
    """That would be a second or two of every start."""
    program = """
import json, sys
from tests.test_compile_behind import make
assert "torch._dynamo" not in sys.modules
llm = make("background")
llm.generate([[1, 2, 3]])
names = ("torch._dynamo", "torch._inductor", "sympy", "transformers")
print(json.dumps([name for name in names if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
