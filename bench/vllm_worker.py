"""vLLM as a contestant. It runs in vLLM's own environment and imports only vLLM and the standard library.

The protocol is that of bench/worker.py. Without the setting skip_tokenizer_init=false there are no texts.
"""

import json
import os
import sys
import time


def main() -> None:
    settings = json.loads(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep libraries' output apart from answers

    import vllm

    settings = {"skip_tokenizer_init": True} | settings
    llm = vllm.LLM(**settings)
    channel.write(json.dumps({"ready": {"vllm": vllm.__version__}}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]

        fields = request.get("params")

        def generate(tokens, prompts=prompts, fields=fields):  # type: ignore[no-untyped-def]
            given = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": fields is not None}
            given |= fields or {}
            if structure := given.pop("structured_outputs", None):
                given["structured_outputs"] = vllm.sampling_params.StructuredOutputsParams(**structure)
            params = vllm.SamplingParams(**given)
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return time.perf_counter() - start, outputs

        if request["decode_only"]:
            generate(1)  # fills the cache with the prompts' keys and values
        seconds, outputs = generate(request["output_tokens"])
        answer = {
            "seconds": seconds,
            "output_tokens": [len(output.outputs[0].token_ids) for output in outputs],
            "cached_tokens": sum(output.num_cached_tokens or 0 for output in outputs),
        }
        if fields is not None:
            answer["texts"] = [output.outputs[0].text for output in outputs]
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":  # vLLM's own processes import this file again
    main()
