"""The share of next tokens on which the engine and transformers agree, in the dtype that is served.

    dispec bench agreement --dtype bfloat16

Both read the engine's own greedy output token by token (teacher forcing), so that a near-tie that falls the other way
counts once. For comparison it prints how often transformers in that dtype agrees with transformers in fp32.
"""

from typing import Annotated, Any

import torch
import typer

from dispec.bench.loading import Device, Dtype
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Report
from dispec.bench.transformers_peer import transformers_model
from dispec.engine.api.llm import LLM
from dispec.engine.dtypes import DTYPES
from dispec.engine.sampling_params import SamplingParams

_STARTS = (
    "The history of", "In a distant galaxy", "def main():", "The recipe calls for", "Scientists have found that",
    "My favourite book", "The stock market", "Once upon a time", "A triangle has", "The president said",
    "How to learn", "Water boils at", "The cat sat on", "import os\n", "Dear diary,", "The best way to",
)  # fmt: skip


def main(
    model: Annotated[str, typer.Option(help="Directory, hub id, .gguf file or built-in name.")] = "smollm2",
    dtype: Dtype = "bfloat16",
    device: Device = None,
    output_tokens: Annotated[int, typer.Option(min=1)] = 64,
    output: Output = None,
) -> None:
    """Measure how often the engine's next token is transformers' next token."""
    settings = dict(locals())
    columns = {"": "", " ": "", "agree on": ".2%", "of tokens": "d"}
    report = Report("agreement", settings, describe_machine(choose_device(device)), columns, output)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "enforce_eager": True}
    llm = LLM(model, **options)
    checkpoint = llm.engine.checkpoint
    assert checkpoint is not None
    params = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    outputs = llm.generate(list(_STARTS), params)
    choices: dict[str, list[int]] = {"dispec": [token for one in outputs for token in one.outputs[0].token_ids]}
    for name, kind in ((f"transformers {dtype}", DTYPES[dtype]), ("transformers float32", torch.float32)):
        reference = transformers_model(model, checkpoint, kind, llm.engine.device)
        choices[name] = []
        for one in outputs:
            ids = torch.tensor([one.prompt_token_ids + one.outputs[0].token_ids], device=llm.engine.device)
            with torch.inference_mode():
                logits = reference(ids).logits[0]
            choices[name] += logits[len(one.prompt_token_ids) - 1 : -1].argmax(-1).tolist()
        del reference
    names = list(choices)
    for left, right in ((0, 1), (0, 2), (1, 2)):
        pairs = list(zip(choices[names[left]], choices[names[right]], strict=True))
        share = sum(a == b for a, b in pairs) / len(pairs)
        label = f"{names[left]} {dtype}" if left == 0 else names[left]
        report.add({"left": label, "right": names[right]}, {"agree": share}, [label, names[right], share, len(pairs)])
    report.finish()


if __name__ == "__main__":
    typer.run(main)
