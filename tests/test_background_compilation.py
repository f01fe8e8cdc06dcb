"""When an engine compiles, where it does not, and compiled steps that take over in the middle of an answer."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import jaxtyping
import pytest
import torch
from engine.background_compilation import BackgroundCompilation
from engine.compile_pieces import Compiled
from engine.compiled_model import eager_functions

from engine import LLM, SamplingParams, token_chooser
from engine.compile_cache import CompileKey, stamp, write_stamp
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


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A compile cache of the test's own, empty at first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    return tmp_path


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
from engine import SamplingParams
from tests.test_background_compilation import make
for options in ({{}}, {{"max_num_seqs": 1, "speculative_model": "ngram"}}):
    llm = make({dtype!r}, **options)
    llm.generate([[1, 2, 3] * 5] * 3, SamplingParams(temperature=0.8, top_k=50, logprobs=2, max_tokens=20))
names = ("torch._dynamo", "torch._inductor", "sympy", "transformers")
children = len(psutil.Process().children(recursive=True))
print(json.dumps([[name for name in names if name in sys.modules], children]))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[], 0]


def test_compiled_steps_take_over_in_the_middle_of_an_answer_without_changing_it():
    """As on CUDA, one graph between two steps."""
    expected = [found.token_ids for found in make().generate(PROMPTS, PARAMS)]
    engine = make().engine
    jaxtyping.config.update("jaxtyping_disable", True)  # the compiler cannot trace through the checks
    try:
        engine._compiling = BackgroundCompilation(engine._compile_key(), engine.runner.compile_pieces())
        sequences = [engine.add(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
        steps = {True: 0, False: 0}
        while engine.has_work:
            engine.step()
            steps[engine.runner.is_compiled] += 1
            if engine.has_idle_work and steps[False] > 3:
                for _ in range(2):
                    engine.work_while_idle()
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert steps[False] > 3
    assert steps[True] > 3
    assert [sequence.output_token_ids for sequence in sequences] == expected
    assert stamp(engine._compile_key()).exists()


@functools.cache
def compiled() -> Compiled:
    return Compiled(eager_functions(CONFIG), token_chooser.compiled_functions(torch.device("cpu")))


def key() -> CompileKey:
    return CompileKey(CONFIG, "float32", 16, 4, 0, overlaps=False, threads=1)


def pieces(calls: list[int], fails: bool = False) -> Generator[None, None, Compiled]:
    for index in range(3):
        calls.append(index)
        if fails:
            raise RuntimeError("no compiler today\nand more")
        yield
    return compiled()


def test_nothing_is_compiled_while_a_token_is_awaited():
    calls: list[int] = []
    compilation = BackgroundCompilation(key(), pieces(calls))
    compilation._due = 0.0
    assert compilation.advance(is_idle=False) is None
    assert compilation.advance(is_idle=False, may_pause=True) is None  # it is not in the cache: that takes too long
    assert calls == []
    found = [compilation.advance(is_idle=True) for _ in range(4)]
    assert found == [None, None, None, compiled()]
    assert compilation.has_ended
    again = BackgroundCompilation(key(), pieces(calls))
    again._due = 0.0
    assert again.advance(is_idle=False) is None
    assert calls == [0, 1, 2]
    again.advance(is_idle=False, may_pause=True)
    assert calls == [0, 1, 2, 0]


def test_what_failed_is_not_tried_again_for_a_day():
    calls: list[int] = []
    compilation = BackgroundCompilation(key(), pieces(calls, fails=True))
    with pytest.warns(RuntimeWarning, match=r"running eagerly and slower: RuntimeError: no compiler today \(is"):
        compilation.advance(is_idle=True)
    assert compilation.has_ended
    with pytest.warns(RuntimeWarning, match="no compiler today, found at an earlier start"):
        assert BackgroundCompilation(key(), pieces(calls)).has_ended
    assert calls == [0]
    failure = stamp(key()).with_name(f"{stamp(key()).name}.failed")
    yesterday = failure.stat().st_mtime - 90_000
    os.utime(failure, (yesterday, yesterday))
    assert not BackgroundCompilation(key(), pieces(calls)).has_ended
    failure.touch()
    write_stamp(key())  # as `--compile startup` does where it succeeds
    assert not BackgroundCompilation(key(), pieces(calls)).has_ended


@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_an_engine_that_verifies_drafts_has_compiled_all_that_it_runs(max_num_seqs):
    """An engine of one sequence too: its steps have several rows where they verify."""
    from torch._dynamo.utils import counters

    prompt = [7, 8, 9, 10] * 6
    params = [
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.7, top_k=50, seed=3, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.7, repetition_penalty=1.1, allowed_token_ids=(7, 8, 9, 10), seed=1, max_tokens=24),
        SamplingParams(temperature=0, logprobs=2, prompt_logprobs=1, max_tokens=8, ignore_eos=True),
    ]
    options = {"max_num_seqs": max_num_seqs, "speculative_model": "ngram"}
    expected = [make(**options).generate([prompt], one)[0] for one in params]
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        torch._dynamo.reset()
        llm = make(compile="startup", **options)
        graphs = counters["stats"]["unique_graphs"]
        found = [llm.generate([prompt], one)[0] for one in params]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
    assert llm.engine.runner.is_compiled
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]
    assert sum(record.num_drafts for record in llm.engine.records) > 10
    assert counters["stats"]["unique_graphs"] == graphs
