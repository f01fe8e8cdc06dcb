"""Start an engine in this process and print what its compiler did as one line of JSON. Run by `bench.compile`."""

import json
import sys
import time

began = time.perf_counter()

import torch  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402
from torch._inductor import metrics  # noqa: E402

from dispec.bench.loading import load  # noqa: E402
from dispec.bench.workload import Workload  # noqa: E402
from dispec.engine.api.llm import LLM  # noqa: E402
from dispec.engine.sampling_params import SamplingParams  # noqa: E402


def graphs() -> int:
    """Return the number of graphs that Dynamo has traced."""
    return int(counters["stats"]["unique_graphs"])


def use(llm: LLM, sequences: int, tokens: int) -> None:
    """Answer requests of many kinds: several prompt lengths and batch sizes, greedy and sampled."""
    kinds = (
        SamplingParams(temperature=0, max_tokens=5),
        SamplingParams(temperature=0.8, top_k=20, max_tokens=5, seed=1),
    )
    for size in sorted({1, 2, min(3, sequences), sequences}):
        for prompt_tokens in (1, 7, min(200, tokens - 8)):
            prompts = Workload(size, prompt_tokens, 5).prompts(llm.engine.config.vocab_size)
            for params in kinds:
                llm.generate(prompts, params, use_tqdm=False)


def main() -> None:
    imported = time.perf_counter() - began
    options = json.loads(sys.argv[1])
    llm = load(options.pop("model"), **options)
    at_start = graphs()
    use(llm, options["max_num_seqs"], options["max_model_len"])
    inductor = counters["inductor"]
    found = {
        "phase_seconds": {"import": imported} | llm.engine.phase_seconds,
        "graphs": at_start,
        "kernels": metrics.generated_kernel_count,
        "cached": inductor["fxgraph_cache_hit"],
        "later": graphs() - at_start,
        "skipped": inductor["cudagraph_skips"],
        "moving": inductor["cudagraph_recorded_non_static_inputs"],
        "is_compiled": llm.engine.runner.is_compiled,
        "torch": torch.__version__,
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
