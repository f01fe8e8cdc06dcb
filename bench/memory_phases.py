"""Resident memory of an engine process after each phase of its start, and by mapping.

python -m dispec.bench.memory_phases --context 2048
"""

import ctypes
import re
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+\s*(.*)\n")


def status() -> dict[str, float]:
    """Return megabytes of this process: resident, of that anonymous and of files, and the peak."""
    found = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    return {name: int(found[name]) / 1e3 for name in ("VmRSS", "RssAnon", "RssFile", "VmHWM")}


def by_mapping() -> Counter[str]:
    """Return resident kilobytes of this process by mapped file; its own memory is [heap] or [anon]."""
    resident: Counter[str] = Counter()
    name = ""
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if mapping := _MAPPING.fullmatch(line):
                name = Path(mapping[1]).name or "[anon]"
            elif line.startswith("Rss:"):
                resident[name] += int(line.split()[1])
    return resident


def report_phase(phase: str) -> None:
    print(f"{phase:<30}" + "  ".join(f"{name} {size:6.0f}" for name, size in status().items()), flush=True)


def main(
    model: str = "smollm2",
    context: Annotated[int, typer.Option(min=32)] = 2048,
    enforce_eager: bool = False,
    top: Annotated[int, typer.Option(help="Mappings to show.")] = 10,
) -> None:
    """Print megabytes after each phase, with one sequence of a long context."""
    report_phase("python")
    import torch

    report_phase("import torch")
    from dispec.engine.api.llm import LLM
    from dispec.engine.sampling_params import SamplingParams

    report_phase("import dispec")
    llm = LLM(model, max_model_len=context + 16, max_num_seqs=1, enforce_eager=enforce_eager)
    report_phase("start")
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    llm.generate([[1 + index % 1000 for index in range(context - 16)]], params, use_tqdm=False)
    report_phase(f"a request of {context} tokens")
    ctypes.CDLL(None).malloc_trim(0)
    report_phase("after malloc_trim")
    weights, kv = torch.utils._pytree.tree_leaves(llm.engine.runner.weights), llm.engine.kv_plan
    held = sum(tensor.nbytes for tensor in weights if isinstance(tensor, torch.Tensor))
    print(f"weights {held / 1e6:.0f} MB, cache {kv.num_blocks * kv.block_bytes / 1e6:.0f} MB")
    for name, size in by_mapping().most_common(top):
        print(f"{size / 1e3:8.1f} MB  {name}")


if __name__ == "__main__":
    typer.run(main)
