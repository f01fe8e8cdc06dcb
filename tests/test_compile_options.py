"""When an engine compiles, where it does not, and compiled steps that take over in the middle of an answer."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch

from dispec import LLM, SamplingParams
from dispec.engine.engine import Engine
from dispec.engine.execution import compiled_steps
from dispec.engine.options import EngineOptions
from dispec.layers.config import ModelConfig

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
DRAFT = replace(CONFIG, num_layers=1)
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9] * 20]
PARAMS = [SamplingParams(temperature=0.9 * (i % 2), max_tokens=40, ignore_eos=True, seed=i) for i in range(3)]


def unchecked() -> Iterator[None]:
    """A function whose shapes are checked does not trace."""
    torch._dynamo.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def make(dtype: str = "float32", **options) -> LLM:
    return LLM(
        CONFIG,
        load_format="dummy",
        device="cpu",
        dtype=dtype,
        kv_cache_memory="1MiB",
        block_size=16,
        max_num_batched_tokens=32,
        **({"max_num_seqs": 4} | options),
    )


@pytest.mark.parametrize(
    ("options", "device", "when"),
    [
        ({}, "cpu", "off"),
        ({"dtype": "float32"}, "cpu", "off"),
        ({}, "cuda", "startup"),
        ({"dtype": "float32"}, "cuda", "startup"),
        ({"speculative_model": "ngram"}, "cuda", "startup"),
        ({"speculative_model": "smollm2-draft"}, "cuda", "startup"),
        ({"tensor_parallel_size": 2}, "cuda", "startup"),
        ({"compile": "background"}, "cuda", "background"),
        ({"compile": "off"}, "cuda", "off"),
        ({"compile": "startup"}, "cpu", "startup"),
        ({"enforce_eager": True}, "cpu", "off"),
    ],
)
def test_when_an_engine_compiles(options, device, when):
    assert EngineOptions(**options).when_to_compile(torch.device(device)) == when


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "soon"}, "compile is 'soon', must be one of background, startup, off"),
        ({"compile": "startup", "enforce_eager": True}, "enforce_eager compiles nothing, and compile is 'startup'"),
        ({"compile": "background", "device": "cpu"}, "compile is 'background', which is for CUDA"),
        (
            {"compile": "startup", "device": "cpu", "tensor_parallel_size": 2},
            "compile is 'startup' and tensor_parallel_size is 2: several ranks on CPU compile nothing",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        EngineOptions(**options).torch_device()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_on_a_cpu_no_compiler_is_imported_and_no_process_started(dtype):
    program = f"""
import json, sys
import psutil
from dispec import SamplingParams
from tests.test_compile_options import DRAFT, make
for options in ({{}}, {{"max_num_seqs": 1, "speculative_model": "ngram"}}, {{"speculative_model": DRAFT}}):
    llm = make({dtype!r}, **options)
    llm.generate([[1, 2, 3] * 5] * 3, SamplingParams(temperature=0.8, top_k=50, logprobs=2, max_tokens=20))
names = ("torch._dynamo", "torch._inductor", "sympy", "transformers")
children = len(psutil.Process().children(recursive=True))
print(json.dumps([[name for name in names if name in sys.modules], children]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], 0]


@pytest.fixture
def compiles() -> Iterator[None]:
    yield from unchecked()


@pytest.fixture
def background(monkeypatch) -> Iterator[None]:
    """Engines of the test compile in the background, as they can on CUDA."""
    monkeypatch.setattr(EngineOptions, "when_to_compile", lambda own, _: own.compile or "background")
    yield from unchecked()


@pytest.mark.parametrize(
    "options",
    [{}, {"async_scheduling": True}, {"speculative_model": DRAFT}],
    ids=["plain", "overlapping", "draft model"],
)
def test_compiled_steps_take_over_in_the_middle_of_an_answer_without_changing_it(background, options):
    """One piece between two steps."""
    expected = [found.outputs[0].token_ids for found in make(compile="off").generate(PROMPTS, PARAMS)]
    engine = make(**options).engine
    if engine.speculator is not None:
        engine.speculator.is_adaptive = False
    sequences = [engine.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
    steps = {True: 0, False: 0}
    while engine.has_work:
        engine.step()
        steps[engine.runner.is_compiled] += 1
        if engine.has_idle_work and steps[False] > 3:
            engine.work_while_idle()
    assert steps[False] > 3
    assert steps[True] > 3
    assert engine.compiled_seconds is not None
    assert [sequence.output_token_ids for sequence in sequences] == expected


def work_through(engine: Engine) -> None:
    assert engine.has_idle_work
    while engine.has_idle_work:
        engine.work_while_idle()


def test_a_compiler_that_fails_in_the_background_is_told_of_once(background, monkeypatch):
    expected = [found.outputs[0].token_ids for found in make(compile="off").generate(PROMPTS, PARAMS)]

    def fail(*_, **__):
        raise RuntimeError("no compiler today\nand more")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    llm = make()
    with pytest.warns(RuntimeWarning, match="running eagerly and slower: RuntimeError: no compiler today") as said:
        work_through(llm.engine)
    assert [str(warning.message).count("\n") for warning in said if warning.category is RuntimeWarning] == [0]
    assert not llm.engine.runner.is_compiled
    assert llm.engine.compiled_seconds is None
    assert [found.outputs[0].token_ids for found in llm.generate(PROMPTS, PARAMS)] == expected


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_an_engine_that_verifies_drafts_has_compiled_all_that_it_runs(max_num_seqs, compiles):
    """An engine of one sequence too: its steps have several rows where they verify."""
    from torch._dynamo.utils import counters  # not above: a process that imports this module compiles nothing

    prompt = [7, 8, 9, 10] * 6
    params = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.7, top_k=50, seed=3, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.7, repetition_penalty=1.1, allowed_token_ids=(7, 8, 9, 10), seed=1, max_tokens=24),
        SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, max_tokens=8, ignore_eos=True),
    ]
    options = {"max_num_seqs": max_num_seqs, "speculative_model": "ngram"}
    expected = [make(**options).generate([prompt], one)[0] for one in params]
    llm = make(compile="startup", **options)
    assert llm.engine.runner.is_compiled
    graphs = counters["stats"]["unique_graphs"]
    found = [llm.generate([prompt], one)[0] for one in params]
    assert [one.outputs[0].token_ids for one in found] == [one.outputs[0].token_ids for one in expected]
    assert sum(record.num_drafts for record in llm.engine.records) > 10
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(("cores", "given", "expected"), [(1, None, 1), (3, None, 3), (3, "5", 5)])
def test_the_compiler_uses_as_many_processes_as_there_are_usable_cores(cores, given, expected, monkeypatch):
    from torch._inductor import config as inductor  # not imported by the program above

    monkeypatch.setattr(compiled_steps, "usable_cores", lambda: cores)
    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    if given:
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", given)
    with inductor.patch(compile_threads=5):
        compiled_steps._configure()
        assert inductor.compile_threads == expected
