"""DiSpec or transformers as a contestant in a process of its own, started by `bench.contestants`.

After a first line that it is ready, it answers each line of standard input by one line of standard output, all JSON:

    → {"prompts": [[…], …], "output_tokens": 128, "decode_only": false}
    ← {"seconds": 1.5, "output_tokens": [128, …], "cached_tokens": 0}

`decode_only` leaves the prompts' time out of the seconds. With "params", more fields of `SamplingParams` (DiSpec and
vLLM), the answer has the "texts" of the outputs as well.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

Answer = dict[str, Any]
Run = Callable[[list[list[int]], int, bool, Mapping[str, Any] | None], Answer]


def dispec(settings: dict[str, Any]) -> Run:
    """Run DiSpec's `LLM.generate`. settings: model, options."""
    from dispec.bench.loading import load
    from dispec.engine.sampling_params import SamplingParams

    llm = load(settings["model"], **settings["options"])

    def run(
        prompts: list[list[int]], output_tokens: int, decode_only: bool, fields: Mapping[str, Any] | None
    ) -> Answer:
        def generate(tokens: int) -> Answer:
            given: dict[str, Any] = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True} | dict(fields or {})
            params = SamplingParams(**given)
            start = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            answer: Answer = {
                "seconds": time.perf_counter() - start,
                "output_tokens": [len(output.outputs[0].token_ids) for output in outputs],
                "cached_tokens": sum(output.num_cached_tokens for output in outputs),
            }
            if fields is not None:
                answer["texts"] = [output.outputs[0].text for output in outputs]
            return answer

        if decode_only:
            generate(1)  # fills the cache with the prompts' keys and values
        return generate(output_tokens)

    return run


def transformers(settings: dict[str, Any]) -> Run:
    """Run transformers' `generate` on one static batch, or on one prompt after another with `one_at_a_time`."""
    import torch

    from dispec.bench.machine import choose_device
    from dispec.bench.transformers_peer import transformers_model
    from dispec.engine.dtypes import DTYPES
    from dispec.engine.loading.checkpoint import find_checkpoint

    device = choose_device(settings["device"])
    checkpoint = None if settings["is_geometry"] else find_checkpoint(settings["model"])
    model: Any = transformers_model(settings["model"], checkpoint, DTYPES[settings["dtype"]], device)

    def generate(prompts: list[list[int]], tokens: int) -> list[int]:
        inputs = torch.tensor(prompts, device=device)
        with torch.inference_mode():
            result = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [len(row) - inputs.shape[1] for row in result.cpu()]

    def timed(prompts: list[list[int]], tokens: int) -> Answer:
        batches = [[prompt] for prompt in prompts] if settings.get("one_at_a_time") else [prompts]
        start = time.perf_counter()
        counts = [count for batch in batches for count in generate(batch, tokens)]
        return {"seconds": time.perf_counter() - start, "output_tokens": counts, "cached_tokens": None}

    def run(
        prompts: list[list[int]], output_tokens: int, decode_only: bool, fields: Mapping[str, Any] | None
    ) -> Answer:
        assert fields is None
        # transformers keeps no cache between calls: time the prompts alone and subtract.
        prompts_alone = timed(prompts, 1)["seconds"] if decode_only else 0.0
        answer = timed(prompts, output_tokens + decode_only)
        answer["seconds"] -= prompts_alone
        answer["output_tokens"] = [count - decode_only for count in answer["output_tokens"]]
        return answer

    return run


def main() -> None:
    settings = json.loads(sys.argv[1])
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # keep libraries' output apart from answers
    run = {"dispec": dispec, "transformers": transformers}[settings["engine"]](settings)
    channel.write(json.dumps({"ready": {}}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        answer = run(request["prompts"], request["output_tokens"], request["decode_only"], request.get("params"))
        channel.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
