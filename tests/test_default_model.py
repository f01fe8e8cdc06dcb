"""The built-in model in fp32 against transformers: greedy answers to varied prompts are the same tokens."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig

from dispec import LLM, SamplingParams

OUTPUT_TOKENS = 16

QUESTIONS = (
    "What is the capital of France? Answer briefly.",
    "Write a haiku about the sea.",
    "List three prime numbers.",
    "Translate 'good morning' to Spanish.",
    "What is 12 times 12?",
)
TEXTS = (
    "Once upon a time",
    "The quick brown fox",
    "def fibonacci(n):\n",
    "In 1969, the first humans",
    "Q: Why is the sky blue?\nA:",
    "Es war einmal ein",
    "import numpy as np\n\n",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,",
    "1, 1, 2, 3, 5, 8,",
    "😀 means",
    "To make pancakes you need",
    "SELECT name FROM users WHERE",
    "She opened the door and",
    "Photosynthesis is the process by which plants convert sunlight, water and carbon dioxide into"
    " oxygen and sugar. The light reactions take place in the thylakoid membranes, where",
)


@pytest.mark.slow
def test_twenty_greedy_answers_equal_transformers_in_float32():
    llm = LLM("smollm2", dtype="float32", device="cpu", enforce_eager=True, kv_cache_memory="256MiB")
    file = llm.engine.checkpoint.files[0]
    reference = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    prompts = [llm.chat_prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    prompts += [llm.tokenizer.encode(text) for text in TEXTS]
    assert len(prompts) == 20
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    # All twenty in one batch of ours, each alone in theirs.
    for prompt, completion in zip(prompts, llm.generate(prompts, params), strict=True):
        with torch.inference_mode():
            expected = reference.generate(
                torch.tensor([prompt]),
                max_new_tokens=OUTPUT_TOKENS,
                min_new_tokens=OUTPUT_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(prompt) :]
        assert completion.outputs[0].token_ids == expected.tolist()


def test_it_knows_the_capital_of_france():
    llm = LLM("smollm2", device="cpu", enforce_eager=True, kv_cache_memory="64MiB", max_model_len=512)
    (answer,) = llm.chat([{"role": "user", "content": QUESTIONS[0]}], SamplingParams(temperature=0, max_tokens=20))
    assert "Paris" in answer.outputs[0].text
    assert answer.outputs[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.outputs[0].text
