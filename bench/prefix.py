"""Time to first token of requests with a common prefix, with prefix sharing and without.

    dispec bench prefix --requests 32 --prefix-tokens 1024

Two cases: all requests arrive at once and none has computed the prefix, and an earlier request left the prefix in the
cache. Both engines alternate.
"""

import statistics
from typing import Annotated

import typer

from dispec.bench.loading import Device, Dtype, EnforceEager, Model, load
from dispec.bench.machine import choose_device, describe_machine
from dispec.bench.report import Output, Plot, Report
from dispec.bench.workload import Workload
from dispec.engine.api.llm import LLM
from dispec.engine.sampling_params import SamplingParams
from dispec.engine.scheduling.step_record import StepRecord

CASES = ("all at once", "prefix in the cache")


def first_token_seconds(llm: LLM, prompts: list[list[int]]) -> tuple[float, int]:
    """Return the mean time to first token of simultaneous prompts, and the number of prompt tokens computed."""
    llm.engine.records.clear()
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    computed = sum(record.num_prompt_tokens for record in llm.engine.records if isinstance(record, StepRecord))
    return statistics.mean(output.metrics.first_token_latency for output in outputs), computed


def main(
    model: Model = "smollm2",
    requests: Annotated[int, typer.Option(min=1)] = 32,
    prefix_tokens: Annotated[int, typer.Option(min=1)] = 1024,
    own_tokens: Annotated[int, typer.Option(min=1, help="Tokens after the prefix.")] = 32,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    dtype: Dtype = "bfloat16",
    device: Device = None,
    enforce_eager: EnforceEager = False,
    output: Output = None,
    plot: Plot = None,
) -> None:
    """Measure time to first token with and without prefix sharing."""
    settings = dict(locals())
    columns = {"": "", "sharing s": ".3f", "computed": "d", "without s": ".3f", "computed ": "d", "ratio": ".1fx"}
    report = Report("prefix", settings, describe_machine(choose_device(device)), columns, output, plot)
    engines = {
        name: load(
            model,
            dtype=dtype,
            device=device,
            max_num_seqs=requests,
            max_model_len=prefix_tokens + own_tokens + 16,
            kv_cache_memory="2GiB",
            enable_prefix_caching=name == "sharing",
            enforce_eager=enforce_eager,
        )
        for name in ("sharing", "without")
    }
    vocab_size = engines["sharing"].engine.config.vocab_size
    workload = Workload(requests, prefix_tokens + own_tokens, 2, shared_tokens=prefix_tokens)
    seconds: dict[tuple[str, str], list[float]] = {}
    tokens: dict[tuple[str, str], int] = {}
    for llm in engines.values():  # warm allocators
        first_token_seconds(llm, workload.prompts(vocab_size, -1)[:2])
    for round_ in range(rounds):
        prompts = workload.prompts(vocab_size, round_)
        others = workload.prompts(vocab_size, round_ + 1000)
        after = [prompts[0][:prefix_tokens] + other[prefix_tokens:] for other in others]  # others after the same prefix
        for name, llm in engines.items():
            for case, given in zip(CASES, (prompts, after), strict=True):
                taken, tokens[case, name] = first_token_seconds(llm, given)
                seconds.setdefault((case, name), []).append(taken)
    for case in CASES:
        median = {name: statistics.median(seconds[case, name]) for name in engines}
        computed = {name: tokens[case, name] for name in engines}
        ratio = median["without"] / median["sharing"]
        report.add(
            {"case": case},
            {
                "first_token_seconds": median,
                "seconds": {name: seconds[case, name] for name in engines},
                "computed_prompt_tokens": computed,
                "ratio": ratio,
            },
            [case, median["sharing"], computed["sharing"], median["without"], computed["without"], ratio],
        )
        for name in engines:
            report.point("", f"{case}, {name}", median[name])
    print(f"{requests} requests of {prefix_tokens} shared and {own_tokens} own tokens: mean time to first token")
    report.finish(y="mean seconds to first token", kind="bars")


if __name__ == "__main__":
    typer.run(main)
