"""What is compiled: whole graphs, no more of them than counted here, and no copies of weights or cache."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from dispec import LLM, SamplingParams
from dispec.engine.machine.compile_cache import choose_compile_cache
from dispec.layers.config import ModelConfig
from dispec.ops import has_sample_kernel
from tests.allocations import largest_allocation, smallest_matrix_or_cache

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=500,
    hidden_size=96,
    intermediate_size=160,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=640,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
SAMPLER_GRAPHS = 2 + (0 if has_sample_kernel(torch.device("cpu")) else 1)  # restrict, logprobs, maybe draw
GRAPHS = 2 + SAMPLER_GRAPHS  # decode and prefill
DRAFT_GRAPHS = 3  # decode and prefill of the draft model, and its draft step


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> Iterator[None]:
    """A function whose shapes are checked does not trace; every other test module runs with the checks on."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def make(dtype: str, enforce_eager: bool = False, config: ModelConfig = CONFIG, **options) -> LLM:
    fixed = {"load_format": "dummy", "device": "cpu", "kv_cache_memory": "16MiB"}
    fixed |= {"max_num_seqs": 16, "max_num_batched_tokens": 64, "compile": "off" if enforce_eager else "startup"}
    return LLM(config, dtype=dtype, **fixed | options)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def compiled(request) -> LLM:
    torch._dynamo.reset()
    counters.clear()
    return make(request.param)


def prompts(count: int) -> list[list[int]]:
    return [[(7 * index + 3 * token) % 500 for token in range(5 + 11 * index)] for index in range(count)]


def test_warm_up_compiles_every_graph_without_a_break(compiled):
    assert compiled.engine.runner.is_compiled
    assert counters["stats"]["unique_graphs"] == GRAPHS
    assert not counters["graph_break"]


def test_no_recompile_over_many_batch_sizes_lengths_and_settings(compiled):
    graphs = counters["stats"]["unique_graphs"]
    for count in (1, 2, 3, 5, 8, 13, 16, 20):
        compiled.generate(prompts(count), [param for param in every_feature() for _ in range(20)][:count])
        for param in every_feature():
            compiled.generate(prompts(count), param)
    compiled.generate([list(range(500))], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
    compiled.generate([[5]], SamplingParams(temperature=1.0, max_tokens=2))
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


def test_another_thread_runs_the_same_graphs(compiled):
    """Guards look at what torch keeps for each thread, such as how many threads it uses."""
    graphs = counters["stats"]["unique_graphs"]
    params = (every_feature() * 2)[:9]

    def answers() -> list[list[int]]:
        return [
            one.outputs[0].token_ids
            for one in compiled.generate(prompts(9), params) + compiled.generate([[5]], params[1])
        ]

    with ThreadPoolExecutor(1) as another:
        found = another.submit(answers).result()
    assert found == answers()
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_compiled_step_allocates_nothing_as_large_as_a_weight_matrix_or_the_cache(compiled):
    """Decoding and prefill: neither copies what it writes keys and values to."""
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    largest = largest_allocation(lambda: compiled.generate([[1, 2], [3, 4, 5]], params))
    runner = compiled.engine.runner
    assert largest < smallest_matrix_or_cache(runner.weights, runner.kv_cache)


def every_feature() -> list[SamplingParams]:
    short = {"max_tokens": 3, "ignore_eos": True, "seed": 1}
    return [
        SamplingParams(temperature=0, **short),
        SamplingParams(temperature=0.7, **short),
        SamplingParams(temperature=0.7, top_k=3, top_p=0.9, min_p=0.01, **short),
        SamplingParams(temperature=0, repetition_penalty=1.2, logit_bias={3: 1.0}, **short),
        SamplingParams(temperature=1.0, allowed_token_ids=(1, 2, 3), logprobs=5, **short),
        SamplingParams(temperature=0, bad_words_token_ids=((1,), (2, 3)), prompt_logprobs=2, **short),
        SamplingParams(temperature=1.0, n=3, presence_penalty=0.5, **short),
    ]


def test_a_draft_model_adds_its_steps_and_one_graph_of_its_loop():
    """Draft tokens of one sequence or of several, however they are sampled."""
    torch._dynamo.reset()
    counters.clear()
    options = {"speculative_model": replace(CONFIG, num_layers=1), "num_speculative_tokens": 3, "max_num_seqs": 4}
    features = [replace(param, max_tokens=12, n=1, prompt_logprobs=None) for param in every_feature()]
    given = [prompt[:7] for prompt in prompts(4)]
    found = []
    for enforce_eager in (False, True):
        llm = make("float32", enforce_eager, **options)
        llm.engine.speculator.is_adaptive = False
        if not enforce_eager:
            assert counters["stats"]["unique_graphs"] == GRAPHS + DRAFT_GRAPHS
        found.append([llm.generate(given[:1], param)[0].outputs[0].token_ids for param in features])
        found[-1] += [one.outputs[0].token_ids for one in llm.generate(given, features[:4])]
        assert any(record.num_drafts > 1 for record in llm.engine.records)
    assert found[0] == found[1]
    assert counters["stats"]["unique_graphs"] == GRAPHS + DRAFT_GRAPHS
    assert not counters["graph_break"]


def test_a_second_start_finds_its_graphs_in_the_cache_with_other_free_memory():
    make("bfloat16")
    torch._dynamo.reset()
    counters.clear()
    again = make("bfloat16", kv_cache_memory="11MiB")
    assert again.engine.runner.is_compiled
    assert counters["inductor"]["fxgraph_cache_miss"] == 0
    assert counters["inductor"]["fxgraph_cache_hit"] == GRAPHS


@pytest.mark.parametrize("asked", [True, False])
def test_compiled_code_is_kept_where_the_user_keeps_caches(asked, monkeypatch, tmp_path):
    monkeypatch.setenv("DISPEC_CACHE_DIR", str(tmp_path))
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if asked:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())  # as Inductor itself does when asked
    choose_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"].startswith(str(tmp_path))
    assert os.environ["TRITON_CACHE_DIR"].startswith(str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/chosen")
    choose_compile_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/chosen"


def test_compiled_tokens_equal_eager_ones_in_float32():
    torch._dynamo.reset()
    features = [replace(param, max_tokens=20, n=1, prompt_logprobs=None) for param in every_feature()]
    params = [replace(features[i % len(features)], seed=i) for i in range(9)]
    results = [
        [c.outputs[0].token_ids for c in make("float32", eager).generate(prompts(9), params)] for eager in (False, True)
    ]
    assert results[0] == results[1]


def test_two_compiled_engines_do_not_take_each_other_for_themselves():
    """Both call functions of the same code, whose constants differ."""
    torch._dynamo.reset()
    params = [SamplingParams(temperature=0.8 * (i % 2), max_tokens=12, ignore_eos=True, seed=i) for i in range(5)]
    other = replace(CONFIG, rms_norm_eps=0.3, rope_theta=500.0)
    engines = [make("float32"), make("bfloat16"), make("float32", config=other)]
    expected = [
        make("float32", True).generate(prompts(5), params),
        None,  # bf16 rounds differently when compiled: it is only here to disturb
        make("float32", True, config=other).generate(prompts(5), params),
    ]
    assert [c.outputs[0].token_ids for c in expected[0]] != [c.outputs[0].token_ids for c in expected[2]]
    for _ in range(2):
        for llm, known in zip(engines, expected, strict=True):
            found = llm.generate(prompts(5), params)
            if known is not None:
                assert [c.outputs[0].token_ids for c in found] == [c.outputs[0].token_ids for c in known]


def test_a_budget_smaller_than_the_warm_up():
    llm = LLM(
        CONFIG,
        load_format="dummy",
        dtype="float32",
        device="cpu",
        kv_cache_memory="1MiB",
        max_num_seqs=1,
        max_num_batched_tokens=4,
        compile="startup",
    )
    assert llm.engine.runner.is_compiled
    assert len(llm.generate(prompts(2), SamplingParams(max_tokens=3, ignore_eos=True))[1].outputs[0].token_ids) == 3


def test_a_failed_compilation_falls_back_with_one_warning(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no C++ compiler today")

    monkeypatch.setattr(torch, "compile", lambda function, **_: fail)
    with pytest.warns(RuntimeWarning, match="running eagerly.*no C\\+\\+ compiler today") as warnings:
        llm = make("float32")
    assert len([warning for warning in warnings if warning.category is RuntimeWarning]) == 1
    assert not llm.engine.runner.is_compiled
    expected = make("float32", enforce_eager=True).generate(prompts(2), SamplingParams(temperature=0, max_tokens=5))
    found = llm.generate(prompts(2), SamplingParams(temperature=0, max_tokens=5))
    assert [c.outputs[0].token_ids for c in found] == [c.outputs[0].token_ids for c in expected]
