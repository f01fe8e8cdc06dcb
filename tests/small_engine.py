"""Small engines in fp32 for the tests of scheduling: what they generate must not depend on how they got there."""

import random
from collections.abc import Iterable
from pathlib import Path

from dispec import LLM, CompletionOutput, Logprob, RequestOutput, SamplingParams
from tests.checkpoints import VOCAB_SIZE

BLOCK_SIZE = 16
OPTIONS = {
    "dtype": "float32",
    "device": "cpu",
    "enforce_eager": True,
    "kv_cache_memory": "16MiB",
    "block_size": BLOCK_SIZE,
}


def random_tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(f"{seed} {count}")
    return [rng.randrange(VOCAB_SIZE) for _ in range(count)]


def random_prompts(count: int, longest: int = 90) -> list[list[int]]:
    rng = random.Random(count)
    return [random_tokens(rng.randint(1, longest), index) for index in range(count)]


def greedy(max_tokens: int | None = 12, **others) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **others)


def mixed_params(count: int, max_tokens: int = 20) -> list[SamplingParams]:
    """Every feature that changes a choice, in rotation, each sequence with its own."""
    kinds = [
        {"temperature": 0.0},
        {"temperature": 1.3},
        {"temperature": 1.0, "top_k": 7, "top_p": 0.8},
        {"temperature": 0.0, "repetition_penalty": 1.4, "frequency_penalty": 0.3},
        {"temperature": 0.9, "min_p": 0.05, "presence_penalty": 0.7, "logit_bias": {5: 3.0, 9: -100.0}},
        {"temperature": 2.0, "allowed_token_ids": tuple(range(30, 60))},
        {"temperature": 1.5, "bad_words_token_ids": ((7,), (11, 12)), "logit_bias": {11: 4.0, 12: 4.0}},
        {"temperature": 0.0, "logprobs": 3},
    ]
    return [
        SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=index, **kinds[index % len(kinds)])
        for index in range(count)
    ]


def make(directory: Path, **options) -> LLM:
    return LLM(directory, **OPTIONS | options)


def speculating(directory: Path, speculative_model, *, is_adaptive=False, **options) -> LLM:
    llm = make(directory, speculative_model=speculative_model, **options)
    llm.engine.speculator.is_adaptive = is_adaptive
    return llm


def alone(llm: LLM, prompts: list[list[int]], params) -> list[list[int]]:
    """What each prompt gets when nothing else is in the engine."""
    each = params if isinstance(params, list) else [params] * len(prompts)
    return [llm.generate([prompt], param)[0].outputs[0].token_ids for prompt, param in zip(prompts, each, strict=True)]


def tokens_of(stream: Iterable[RequestOutput]) -> list[int]:
    """The tokens of a stream's first outputs."""
    return [token for piece in stream for token in piece.outputs[0].token_ids]


def sampled_logprobs(output: CompletionOutput) -> list[Logprob]:
    """Those of the output's own tokens."""
    assert output.logprobs is not None
    return [entry[token] for token, entry in zip(output.token_ids, output.logprobs, strict=True)]


def prompt_logprobs(request: RequestOutput) -> list[Logprob]:
    """Those of the prompt's own tokens, from the second one on."""
    assert request.prompt_logprobs is not None
    entries = zip(request.prompt_token_ids, request.prompt_logprobs, strict=True)
    return [entry[token] for token, entry in entries if entry is not None]
