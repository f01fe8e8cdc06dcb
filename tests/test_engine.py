"""The engine on small checkpoints: each prompt of a batch gets the tokens that it gets alone."""

import random
import time

import jaxtyping
import pytest
import torch

from dispec import LLM, EngineOptions, SamplingParams
from dispec.engine.api.llm import as_prompts
from dispec.engine.execution.kv_cache_memory import plan_kv_cache
from dispec.engine.options import parse_bytes
from tests.checkpoints import EOS_TOKEN_ID, FAMILIES, VOCAB_SIZE, save_tiny

OPTIONS = {"dtype": "float32", "device": "cpu", "enforce_eager": True, "kv_cache_memory": "16MiB"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    save_tiny(directory, "llama")
    return directory


@pytest.fixture(scope="module")
def llm(directory) -> LLM:
    return LLM(directory, **OPTIONS)


def random_prompts(count: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(max_tokens: int = 12) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def alone(llm: LLM, prompts: list[list[int]], params) -> list[list[int]]:
    each = params if isinstance(params, list) else [params] * len(prompts)
    return [llm.generate([prompt], param)[0].outputs[0].token_ids for prompt, param in zip(prompts, each, strict=True)]


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family, tmp_path):
    reference = save_tiny(tmp_path, family).eval()
    prompts = random_prompts(6)
    completions = LLM(tmp_path, **OPTIONS).generate(prompts, greedy())
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            expected = reference.generate(
                torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
            )[0, len(prompt) :]
        assert completion.outputs[0].token_ids == expected.tolist()
        assert completion.prompt_token_ids == prompt


@pytest.mark.smoke
def test_a_mixed_batch_equals_each_prompt_alone(llm):
    prompts = random_prompts(12)
    params = [
        SamplingParams(temperature=0.9 * (index % 2), max_tokens=4 + index, ignore_eos=True, seed=index)
        for index in range(12)
    ]
    together = [completion.outputs[0].token_ids for completion in llm.generate(prompts, params)]
    assert together == alone(llm, prompts, params)
    assert [len(tokens) for tokens in together] == [4 + index for index in range(12)]


@pytest.mark.smoke
def test_chunked_prefill_equals_whole(directory, llm):
    prompts = random_prompts(5, longest=200)
    chunked = LLM(directory, max_num_batched_tokens=8, max_num_seqs=4, **OPTIONS)
    assert [c.outputs[0].token_ids for c in chunked.generate(prompts, greedy())] == alone(llm, prompts, greedy())


@pytest.mark.smoke
def test_preemption_changes_no_output_and_loses_no_request(directory, llm):
    """A pool of nine blocks for eight sequences of up to seven: they take turns."""
    block_bytes = 2 * 3 * 3 * 16 * 16 * 4
    options = OPTIONS | {"kv_cache_memory": 10 * block_bytes, "block_size": 16}
    small = LLM(directory, max_num_seqs=8, max_model_len=112, **options)
    assert small.engine.kv_plan.num_blocks == 10
    prompts = random_prompts(8, longest=40)
    params = [SamplingParams(temperature=index % 2, max_tokens=60, ignore_eos=True, seed=index) for index in range(8)]
    expected = alone(llm, prompts, params)
    sequences = [small.engine.add(prompt, param) for prompt, param in zip(prompts, params, strict=True)]
    preempted = 0
    while small.engine.has_work:
        step = small.engine.scheduler.schedule()
        small.engine.scheduler.check()
        assert step.scheduled_sequences
        preempted += step.num_preempted
        small.engine.scheduler.commit(step, small.engine.runner.run(step))
        small.engine.scheduler.check()
    assert preempted > 3
    assert [s.token_ids[s.num_prompt_tokens :] for s in sequences] == expected
    assert small.engine.scheduler.pool.num_free == 9


def test_step_budget_and_decodes_before_prompts(directory):
    engine = LLM(directory, max_num_batched_tokens=16, max_num_seqs=4, **OPTIONS).engine
    first = engine.add([1, 2, 3], greedy(40))
    engine.step()
    engine.add(list(range(100)), greedy(4))
    for _ in range(7):
        before = first.num_output_tokens
        step = engine.scheduler.schedule()
        assert step.num_tokens <= 16
        assert step.scheduled_sequences[0].sequence is first
        engine.scheduler.commit(step, engine.runner.run(step))
        assert first.num_output_tokens == before + 1


def test_end_of_sequence_and_stop_tokens(llm):
    prompt = random_prompts(1)[0]
    tokens = llm.generate([prompt], greedy(30))[0].outputs[0].token_ids
    stop = tokens[10]
    first = tokens.index(stop)
    stopped = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=30, stop_token_ids=(stop,)))[0]
    assert stopped.outputs[0].token_ids == tokens[: first + 1]
    assert stopped.outputs[0].finish_reason == "stop"
    assert llm.generate([prompt], greedy(7))[0].outputs[0].finish_reason == "length"
    assert llm.engine.eos_token_ids == (EOS_TOKEN_ID,)
    scheduler = llm.engine.scheduler
    for ignore_eos, expected in ((False, {EOS_TOKEN_ID, 9}), (True, {9})):
        sequence = llm.engine.add(prompt, SamplingParams(ignore_eos=ignore_eos, stop_token_ids=(9,)))
        assert sequence.stop_token_ids == expected
        llm.engine.abort(sequence)
    assert not scheduler.has_work


def test_a_sequence_ends_at_the_context(directory):
    llm = LLM(directory, max_model_len=32, **OPTIONS)
    completion = llm.generate([list(range(20))], greedy(100))[0]
    assert len(completion.outputs[0].token_ids) == 12
    assert completion.outputs[0].finish_reason == "length"


def test_seeds(llm):
    prompt = [1, 2, 3]
    hot = [
        llm.generate([prompt], SamplingParams(temperature=5, max_tokens=20, seed=s))[0].outputs[0].token_ids
        for s in (1, 1, 2)
    ]
    assert hot[0] == hot[1]
    assert hot[0] != hot[2]
    unseeded = llm.generate([prompt] * 2, SamplingParams(temperature=5, max_tokens=20))
    assert unseeded[0].outputs[0].token_ids != unseeded[1].outputs[0].token_ids


def test_stream_is_generate_in_pieces_and_closing_it_aborts(llm):
    whole = llm.generate(["Es war einmal 😀"], greedy(25))[0]
    pieces = list(llm.stream("Es war einmal 😀", greedy(25)))
    assert [token for piece in pieces for token in piece.outputs[0].token_ids] == whole.outputs[0].token_ids
    assert "".join(piece.outputs[0].text for piece in pieces) == whole.outputs[0].text
    assert whole.outputs[0].text == llm.tokenizer.decode(whole.outputs[0].token_ids)
    assert [piece.finished for piece in pieces] == [False] * 24 + [True]
    stream = llm.stream("Es war", greedy(25))
    next(stream)
    stream.close()
    assert not llm.engine.has_work
    llm.engine.scheduler.check()


def test_abort_while_waiting_prefilling_and_running(directory):
    engine = LLM(directory, max_num_batched_tokens=16, max_num_seqs=2, **OPTIONS).engine
    running, prefilling, waiting = (engine.add(list(range(length)), greedy(50)) for length in (4, 60, 5))
    engine.step()
    engine.step()
    assert (running.num_output_tokens, prefilling.num_computed_tokens > 0, list(waiting.block_table)) == (2, True, [])
    for sequence in (waiting, prefilling, running, running):
        engine.abort(sequence)
        engine.scheduler.check()
        assert sequence.finish_reason == "abort"
    assert not engine.has_work
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    expected = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert llm.chat(messages, greedy(3))[0].prompt_token_ids == llm.tokenizer.encode(expected, False)


def test_metrics(llm):
    before = time.time()
    for request in llm.generate(random_prompts(3), SamplingParams(n=2, max_tokens=5, ignore_eos=True)):
        metrics = request.metrics
        assert before <= metrics.arrival_time <= time.time()
        assert metrics.first_token_latency == pytest.approx(metrics.queued_time + metrics.prefill_time)
        assert min(metrics.queued_time, metrics.prefill_time, metrics.decode_time) > 0
        assert metrics.e2e_latency == pytest.approx(metrics.first_token_latency + metrics.decode_time)
        assert metrics.num_generation_tokens == 10
        assert metrics.tokens_per_second == pytest.approx(8 / metrics.decode_time)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ("", greedy(), "prompt is empty"),
        ([], greedy(), "prompts is empty"),
        ([[]], greedy(), "prompt is empty"),
        ([[1], list(range(512))], greedy(), r"prompts\[1\].*512 tokens.*max_model_len \(512\)"),
        ([[VOCAB_SIZE]], greedy(), "token id 512, must be between 0 and 511"),
        ([[-1]], greedy(), "token id -1"),
        ([[1], [2]], [greedy()], "1 SamplingParams for 2 prompts"),
        ([[1]], SamplingParams(stop_token_ids=(600,)), "stop_token_ids holds token id 600"),
    ],
)
def test_bad_prompts_are_refused_and_cost_nothing(llm, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        llm.generate(prompts, params)
    assert not llm.engine.has_work


def test_a_prompt_of_the_wrong_type_is_named():
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"prompts\[1\] is float"):
            as_prompts([[1], 3.5])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", 1e9),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("seed", 2**63),
        ("stop_token_ids", (-1,)),
    ],
)
def test_bad_sampling_parameters(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("dtype", "int3"),
        ("device", "tpu"),
        ("device", "cuda:99"),
        ("kv_cache_memory", "lots"),
        ("kv_cache_memory", 0),
        ("kv_cache_memory", "1KiB"),
        ("kv_cache_memory", "900TiB"),
        ("max_model_len", 1),
        ("max_model_len", 4096),
        ("max_num_seqs", 0),
        ("max_num_batched_tokens", -3),
        ("max_num_batched_tokens", 63),
        ("block_size", 17),
        ("gpu_memory_utilization", 1.5),
        ("load_format", "pickle"),
    ],
)
def test_bad_options(directory, option, value):
    with pytest.raises(ValueError, match=option):
        LLM(directory, **OPTIONS | {option: value})


def test_float16_is_refused_on_cpu(directory):
    with pytest.raises(ValueError, match="float16"):
        LLM(directory, **OPTIONS | {"dtype": "float16"})


def test_the_cache_is_no_larger_than_it_can_be_of_use(llm):
    options = EngineOptions(dtype="bfloat16", max_num_seqs=2, block_size=16)
    plan = plan_kv_cache(llm.engine.config, options, torch.device("cpu"), free_bytes=2**40)
    assert plan.num_tokens == 2 * 512
    assert plan.max_model_len == 512
    scarce = plan_kv_cache(llm.engine.config, options, torch.device("cpu"), free_bytes=40 * plan.block_bytes)
    assert scarce.num_blocks == 10
    assert scarce.max_model_len == 9 * 16


@pytest.mark.parametrize(
    ("text", "size"), [("512MiB", 2**29), ("2 GiB", 2**31), ("1.5GB", 1_500_000_000), ("4096", 4096), (7, 7)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
