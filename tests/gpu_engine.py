"""Small engines on a CUDA device, and counts of what they compile and launch."""

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from dispec import LLM, SamplingParams
from dispec.engine.api.outputs import RequestOutput
from dispec.engine.engine import Engine
from dispec.engine.execution.sampler import Sampler
from dispec.engine.scheduling.sequence import Sequence
from dispec.layers.config import ModelConfig
from dispec.layers.steps import decode_step
from tests.small_engine import sampled_logprobs

NEEDS_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL: dict[str, Any] = {
    "device": "cuda",
    "kv_cache_memory": "256MiB",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
}
# Head dims that the kernels are tuned for: the tiny checkpoints' are smaller than any real model's.
CONFIG = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    qkv_bias=True,
)


@pytest.fixture(autouse=True, scope="module")
def unchecked() -> None:
    """Refuse to run with shape checks: to the compiler everything that they wrap is one function."""
    if hasattr(decode_step, "__wrapped__"):
        pytest.fail("shape checks wrap what is to be compiled: run pytest -m gpu -o addopts=-ra")


def make(model: Any = CONFIG, **options: Any) -> LLM:
    """An engine of dummy weights, or of a checkpoint, in a process that has compiled nothing yet.

    Raises the compiler's error, where the engine would warn and run eagerly.
    """
    torch._dynamo.reset()
    counters.clear()
    load_format = "dummy" if isinstance(model, ModelConfig) else "auto"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "compilation failed", RuntimeWarning)
        return LLM(model, load_format=load_format, **SMALL | options)


def prompts(count: int, longest: int = 90, vocab_size: int = CONFIG.vocab_size) -> list[list[int]]:
    rng = random.Random(count)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def greedy(max_tokens: int = 16) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def token_ids(completions: list[RequestOutput]) -> list[list[int]]:
    return [choice.token_ids for completion in completions for choice in completion.outputs]


def finish(engine: Engine) -> None:
    """Run the engine until it has nothing to do."""
    while engine.has_work:
        engine.step()


@contextmanager
def decoding(engine: Engine, count: int, params: SamplingParams | None = None) -> Iterator[list[Sequence]]:
    """So many sequences that are past their prompts, for 60 steps and more; finishes them afterwards."""
    sequences = [engine.add(prompt, params or greedy(80)) for prompt in prompts(count, longest=40)]
    while any(sequence.num_output_tokens < 2 for sequence in sequences):
        assert engine.has_work, [sequence.error for sequence in sequences]
        engine.step()
    try:
        yield sequences
    finally:
        finish(engine)


def count_launches(engine: Engine, num_steps: int) -> int:
    """CUDA graphs launched in the next steps."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(num_steps):
            engine.step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if event.key == "cudaGraphLaunch")


def num_sampler_graphs(engine: Engine) -> int:
    """Functions of the sampler that are compiled, each for any number of rows."""
    sampler = engine.runner.sampler
    eager = Sampler(engine.device, engine.config.vocab_size, sampler._compute_logits).functions
    return sum(one is not other for one, other in zip(sampler.functions, eager, strict=True))


def num_graphs() -> int:
    """Graphs compiled since `make`, by any function."""
    return counters["stats"]["unique_graphs"]


def expect_replayed() -> None:
    """No compiled function ran without its CUDA graph, and none was broken into several graphs."""
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert not counters["graph_break"]


def expect_close_logprobs(found: list[RequestOutput], expected: list[RequestOutput], tolerance: float = 0.06) -> None:
    """Compare the logprobs of chosen tokens, of each completion up to the first token that differs."""
    for ours, theirs in zip(found, expected, strict=True):
        output, wanted = ours.outputs[0], theirs.outputs[0]
        both = zip(sampled_logprobs(output), sampled_logprobs(wanted), strict=True)
        for index, (one, other) in enumerate(both):
            if output.token_ids[:index] != wanted.token_ids[:index]:
                break  # a tie was decided otherwise, and the texts differ from here on
            assert one.logprob == pytest.approx(other.logprob, abs=tolerance)
